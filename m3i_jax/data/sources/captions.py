"""The captions of a record. Training reads the first; retrieval is evaluated with all of them, such
as the five of an image of COCO or Flickr30k."""

from typing import Any

from m3i_jax.data.sources.interface import inner_sources


def caption_texts(value: Any) -> tuple[str | bytes, ...]:
    """Returns the texts of a field of a file: a text, or a list of texts; () for anything else.

    >>> caption_texts("a cat"), caption_texts(["a cat", 3, b"one cat"]), caption_texts(None)
    (('a cat',), ('a cat', b'one cat'), ())
    """
    if isinstance(value, str | bytes):
        return (value,)
    if isinstance(value, dict) or not hasattr(value, "__iter__"):
        return ()
    return tuple(text for text in value if isinstance(text, str | bytes))


def first_and_others(texts: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """Returns the fields `caption` and `other_captions` of a record with some texts.

    >>> first_and_others(("a", "b")), first_and_others(())
    (('a', ('b',)), (None, ()))
    """
    return (texts[0], tuple(texts[1:])) if texts else (None, ())


def source_caption(source: Any, index: int) -> str | bytes | None:
    """Returns the caption of a record, without reading its image if the source has `caption`.

    >>> from m3i_jax.data.sources.base import Record
    >>> source_caption([Record("a", b"", caption="a cat")], 0)
    'a cat'
    """
    caption = getattr(source, "caption", None)
    return caption(index) if caption else source[index].caption


def source_captions(source: Any, index: int) -> tuple[str | bytes, ...]:
    """Returns all captions of a record, without reading its image if the source has `caption_list`,
    or `caption` and so no more than one.

    >>> from m3i_jax.data.sources.base import Record
    >>> record = Record("a", b"", caption="a cat", other_captions=("one cat", "a pet"))
    >>> source_captions([record, Record("b", b"")], 0), source_captions([Record("b", b"")], 0)
    (('a cat', 'one cat', 'a pet'), ())
    """
    if caption_list := getattr(source, "caption_list", None):
        return tuple(caption_list(index))
    if hasattr(source, "caption"):
        caption, others = source.caption(index), ()
    else:
        record = source[index]
        caption, others = record.caption, record.other_captions
    return () if caption is None else (caption, *others)


def caption_digests(source: Any) -> list[str]:
    """Returns the digests of captions whose changes no fingerprint shows, of a source and of those
    that it is made of.

    >>> import types
    >>> folder = types.SimpleNamespace(caption_digest=lambda: "0123456789abcdef")
    >>> caption_digests(types.SimpleNamespace(source=folder)), caption_digests([])
    (['0123456789abcdef'], [])
    """
    if digest := getattr(source, "caption_digest", None):
        return [digest()]
    return [digest for inner in inner_sources(source) for digest in caption_digests(inner)]


def encoded_captions(record: Any) -> tuple[bytes, ...]:
    """Returns all captions of a record as bytes.

    >>> from m3i_jax.data.sources.base import Record
    >>> encoded_captions(Record("a", b"", caption="a cat", other_captions=(b"one cat",)))
    (b'a cat', b'one cat')
    """
    if record.caption is None:
        return ()
    return tuple(
        text if isinstance(text, bytes) else text.encode("utf-8", "replace")
        for text in (record.caption, *record.other_captions)
    )
