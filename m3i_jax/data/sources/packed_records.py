"""Packs records as tf.train.Examples, which ArrayRecord files hold, and unpacks those of other
programs, too."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from m3i_jax.data.sources import base, tf_example
from m3i_jax.data.sources.base import Record
from m3i_jax.data.sources.captions import encoded_captions

# Names of features in files of other programs; the first that is present is used.
IMAGES = ("image", "image/encoded", "image_bytes", "jpg", "jpeg", "png", "webp")
LABELS = ("label", "image/class/label", "class", "cls")
CAPTIONS = ("caption", "text", "txt", "image/caption")
KEYS = ("key", "__key__", "id", "image/filename", "filename", "file_name")


def pack_record(record: Record) -> bytes:
    """Encodes a record as a tf.train.Example. Decoded pixels are stored as PNG, encoded images
    unchanged.

    >>> unpack_record(pack_record(Record("a", b"...", 3, "a cat")))
    Record(key='a', image=b'...', label=3, caption=b'a cat')
    """
    image = record.image if isinstance(record.image, bytes) else _png(record.image)
    features: dict[str, bytes | int | tuple[bytes, ...]] = {
        "image": image,
        "key": record.key.encode("utf-8", "surrogateescape"),
    }
    if record.label >= 0:
        features["label"] = int(record.label)
    if texts := encoded_captions(record):
        features["caption"] = texts
    return tf_example.encode_example(features)


def unpack_record(raw: bytes, key: str = "") -> Record:
    """Decodes the record of a tf.train.Example with features of the usual names (IMAGES, LABELS,
    CAPTIONS, KEYS). Without an image feature, the image is empty.

    Args:
        raw: the message.
        key: of the record, if the message holds none.

    Raises:
        ValueError: the bytes are not a tf.train.Example.

    >>> unpack_record(tf_example.encode_example({"image/encoded": b"...", "text": b"a dog"}), "7")
    Record(key='7', image=b'...', label=-1, caption=b'a dog')
    """
    features = tf_example.decode_example(raw)

    def found(names: Sequence[str], kind: type) -> Any:
        for name in names:
            if (values := features.get(name)) and isinstance(values[0], kind):
                return tuple(values)
        return (None,)

    label, name = base.parse_label(found(LABELS, int)[0]), found(KEYS, bytes)[0]
    caption, *others = found(CAPTIONS, bytes)
    return Record(
        name.decode("utf-8", "surrogateescape") if name else key,
        found(IMAGES, bytes)[0] or b"",
        -1 if label is None else label,
        caption,
        other_captions=tuple(others),
    )


def _png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
