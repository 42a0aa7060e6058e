"""Encodes and decodes tf.train.Example messages, the records of ArrayRecord and TFRecord files,
without TensorFlow.

The wire format is that of protocol buffers: Example {1: Features}, Features {1: map of string to
Feature}, Feature {1: bytes list, 2: float list, 3: int64 list}. Float lists are skipped, since no
image, label or caption is one."""

from collections.abc import Iterator, Mapping

_VARINT, _DOUBLE, _BYTES, _FLOAT = 0, 1, 2, 5  # wire types
_BYTES_LIST, _INT64_LIST = 1, 3  # fields of a Feature


def encode_example(features: Mapping[str, bytes | int | tuple[bytes, ...]]) -> bytes:
    """Encodes one message; the same features always give the same bytes.

    Args:
        features: name -> bytes, several bytes, or an integer of 64 bits.

    >>> encode_example({"label": 3}).hex()
    '0a100a0e0a056c6162656c12051a030a0103'
    """
    entries = b""
    for name, value in sorted(features.items()):
        if not isinstance(value, int):
            values = (value,) if isinstance(value, bytes) else value
            feature = _field(_BYTES_LIST, b"".join(_field(1, each) for each in values))
        else:
            feature = _field(_INT64_LIST, _field(1, _varint(value & 0xFFFFFFFFFFFFFFFF)))
        entries += _field(1, _field(1, name.encode()) + _field(2, feature))
    return _field(1, entries)


def decode_example(raw: bytes) -> dict[str, list[bytes] | list[int]]:
    """Decodes the features of a message by name, except floats.

    Raises:
        ValueError: the bytes are not such a message.

    >>> decode_example(encode_example({"image": b"...", "label": -1}))
    {'image': [b'...'], 'label': [-1]}
    """
    features: dict[str, list[bytes] | list[int]] = {}
    for field, start, end in _fields(raw, 0, len(raw)):
        for entry_field, entry, entry_end in _fields(raw, start, end) if field == 1 else ():
            if entry_field != 1:
                continue
            name, feature, feature_end = "", entry_end, entry_end
            for part, part_start, part_end in _fields(raw, entry, entry_end):
                if part == 1:
                    name = raw[part_start:part_end].decode()
                elif part == 2:
                    feature, feature_end = part_start, part_end
            for kind, first, last in _fields(raw, feature, feature_end):
                if kind == _BYTES_LIST:
                    features[name] = [
                        raw[value:stop] for f, value, stop in _fields(raw, first, last) if f == 1
                    ]
                elif kind == _INT64_LIST:
                    features[name] = list(_integers(raw, first, last))
    return features


def _integers(raw: bytes, start: int, end: int) -> Iterator[int]:
    for field, first, last in _fields(raw, start, end, numbers=True):
        if last < 0 and field == 1:
            yield _signed(first)
        while field == 1 and first < last:
            number, first = _read_varint(raw, first)
            yield _signed(number)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | _BYTES]) + _varint(len(content)) + content


def _read_varint(raw: bytes, at: int) -> tuple[int, int]:
    value, shift = 0, 0
    while at < len(raw) and shift < 64:
        byte = raw[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value & 0xFFFFFFFFFFFFFFFF, at
    raise ValueError("not a tf.train.Example: a number has no end")


def _fields(raw: bytes, at: int, end: int, *, numbers: bool = False) -> list[tuple[int, int, int]]:
    """Returns (number, first byte, end) of the length-delimited fields of a message; with
    `numbers`, also (number, value, -1) of the integers.

    Positions instead of slices, so that an image is copied once.
    """
    fields = []
    while at < end:
        tag, at = (raw[at], at + 1) if raw[at] < 128 else _read_varint(raw, at)
        kind = tag & 7
        if kind == _BYTES:
            size, at = _read_varint(raw, at)
            fields.append((tag >> 3, at, at + size))
            at += size
        elif kind == _VARINT:
            value, at = _read_varint(raw, at)
            if numbers:
                fields.append((tag >> 3, value, -1))
        elif kind in (_DOUBLE, _FLOAT):
            at += 8 if kind == _DOUBLE else 4
        else:
            raise ValueError(f"not a tf.train.Example: wire type {kind}")
        if at > end:
            raise ValueError("not a tf.train.Example: a field exceeds the end")
    return fields
