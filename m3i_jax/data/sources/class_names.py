"""Readable names for categories: WordNet ids, as folders of ImageNet are called, or plain numbers,
looked up in a file that lies at hand.

ImageNet's own distributions ship such a file: `LOC_synset_mapping.txt`, `synset_words.txt` or
`words.txt`, a line of which is an id, then a space or tab, then the names. A plain list, one name a
line, or a JSON list or object names numbered categories. Without a file the ids stay."""

import collections
import json
import os
import re
from collections.abc import Mapping, Sequence

from m3i_jax.data.sources import base
from m3i_jax.errors import UserError

FILES = ("LOC_synset_mapping.txt", "synset_words.txt", "synsets.txt", "words.txt")
# folders above the images that are searched: ILSVRC/Data/CLS-LOC/train has its file beside ILSVRC
ABOVE = 4
LIMIT = 1 << 22  # bytes of a file that are read; WordNet's own words.txt has 2.6 MB
_ID = re.compile(r"n\d{8}")


def are_wordnet_ids(classes: Sequence[str]) -> bool:
    """Whether all classes are WordNet ids.

    >>> are_wordnet_ids(("n01440764", "n01443537")), are_wordnet_ids(("n01440764", "tench"))
    (True, False)
    """
    return bool(classes) and all(_ID.fullmatch(name) for name in classes)


def names_near_folder(folder: str, classes: Sequence[str]) -> tuple[str, ...]:
    """The names of WordNet ids, from a file of ImageNet's in the folder or above it; the classes as
    they are, if there is none.

    >>> names_near_folder("/", ("n01440764", "n01443537"))
    ('n01440764', 'n01443537')
    """
    place = os.path.abspath(folder)
    for _ in range(ABOVE + 1):
        for name in FILES:
            if os.path.isfile(path := os.path.join(place, name)):
                known = {key: text for key, text in _lines(_text(path)) if _ID.fullmatch(key)}
                if known.keys() & set(classes):
                    return readable_class_names(classes, known)
        place = os.path.dirname(place)
    return tuple(classes)


def class_names_from_file(path: str, classes: Sequence[str]) -> tuple[str, ...]:
    """The names that a file gives to classes which are WordNet ids or numbers.

    Raises:
        UserError: the file cannot be read, or names none of them.
    """
    text = _text(os.path.expanduser(path))
    try:
        known = _json(text) if path.endswith(".json") else {}
    except (ValueError, RecursionError, TypeError) as error:
        raise UserError(
            f"data.class_names={path!r} is no JSON list or object of names: {error}"
        ) from None
    if not known and are_wordnet_ids(classes):
        known = dict(_lines(text))
    if not known:
        known = {str(i): line.strip() for i, line in enumerate(text.splitlines()) if line.strip()}
    if not known.keys() & set(classes):
        some = ", ".join(map(repr, classes[:3])) or "none"
        raise UserError(
            f"data.class_names={path!r} names {len(known):,} classes, but none of the source's"
            f" ({some}): give another file"
        )
    return readable_class_names(classes, known)


def readable_class_names(classes: Sequence[str], known: Mapping[str, str]) -> tuple[str, ...]:
    """Names of classes, all different: the first of several synonyms; all of them, or with the id
    behind it, where two would be the same.

    >>> readable_class_names(("n1", "n2", "n3"), {"n1": "crane, bird", "n2": "crane", "n3": "tench, Tinca tinca"})
    ('crane, bird', 'crane', 'tench')
    """
    full = [known.get(name, name).strip() or name for name in classes]
    names = [name.split(",")[0].strip() or name for name in full]
    for better in (
        full,
        [f"{name} ({identity})" for name, identity in zip(full, classes, strict=True)],
    ):
        count = collections.Counter(names)
        names = [b if count[n] > 1 else n for n, b in zip(names, better, strict=True)]
    return tuple(names)


def _text(path: str) -> str:
    if not os.path.isfile(path):
        raise UserError(
            f"data.class_names={path!r} does not exist: {base.missing_path_error(path)}"
        )
    return base.read_byte_range(path, 0, min(os.path.getsize(path), LIMIT)).decode(
        "utf-8", "replace"
    )


def _lines(text: str) -> list[tuple[str, str]]:
    pairs = (line.strip().split(None, 1) for line in text.splitlines())
    return [(pair[0], pair[1]) for pair in pairs if len(pair) == 2]


def _json(text: str) -> dict[str, str]:
    """A list of names, an object of them, or keras' {"0": ["n01440764", "tench"]}."""
    value = json.loads(text)
    if isinstance(value, list):
        return {str(i): str(name) for i, name in enumerate(value)}
    out: dict[str, str] = {}
    for key, name in value.items():
        if isinstance(name, list) and len(name) == 2:
            out[str(name[0])] = out[str(key)] = str(name[1])
        else:
            out[str(key)] = str(name)
    return out
