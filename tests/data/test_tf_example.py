"""tf.train.Example messages: compatible with other implementations in both directions; noise raises
ValueError."""

import numpy as np
import pytest

from m3i_jax.data.sources import tf_example


def test_golden_bytes():
    # golden: made by the protocol buffers library from the published definition of
    # tf.train.Example: label = 3, caption = b"hi"
    golden = (
        b"\n#\n\x11\n\x07caption\x12\x06\n\x04\n\x02hi"
        + b"\n\x0e\n\x05label\x12\x05\x1a\x03\n\x01\x03"
    )
    golden = b"\n" + bytes([len(golden) - 2]) + golden[2:]
    assert tf_example.encode_example({"label": 3, "caption": b"hi"}) == golden
    assert tf_example.decode_example(golden) == {"caption": [b"hi"], "label": [3]}


@pytest.mark.parametrize("size", [0, 1, 127, 128, 20_000, 3_000_000])
def test_round_trip(size):
    content = np.random.default_rng(size).bytes(size)
    features = {"image": content, "ümlaut": b"x", "one": 1, "big": 2**62, "negative": -5}
    assert tf_example.decode_example(tf_example.encode_example(features)) == {
        name: [value] for name, value in features.items()
    }


def test_messages_of_other_programs():
    # Several values, an int64 list that is not packed, a float list, an unknown field, a feature
    # without a kind.
    def field(number: int, content: bytes, wire: int = 2) -> bytes:
        return bytes([number << 3 | wire]) + (bytes([len(content)]) if wire == 2 else b"") + content

    def entry(name: bytes, feature: bytes) -> bytes:
        return field(1, field(1, name) + field(2, feature))

    features = (
        entry(b"texts", field(1, field(1, b"a") + field(1, b"bc")))
        + entry(b"plain", field(3, field(1, b"\x07", 0) + field(1, b"\x96\x01", 0)))
        + entry(b"packed", field(3, field(1, b"\x01\x96\x01")))
        + entry(b"float", field(2, field(1, b"\0\0\x80?")))
        + entry(b"nothing", b"")
        + field(9, b"unknown")
    )
    raw = (
        field(1, features) + field(7, b"\0" * 8, 1) + field(7, b"\0" * 4, 5) + field(6, b"\x01", 0)
    )
    assert tf_example.decode_example(raw) == {
        "texts": [b"a", b"bc"],
        "plain": [7, 150],
        "packed": [1, 150],
    }
    assert tf_example.decode_example(b"") == {}


def test_noise_is_a_value_error():
    rng, message, refused = (
        np.random.default_rng(0),
        tf_example.encode_example({"image": b"content", "label": 300}),
        0,
    )
    for _ in range(3000):
        raw = bytearray(message[: rng.integers(len(message) + 1)])
        for _ in range(rng.integers(3)):
            if raw:
                raw[rng.integers(len(raw))] = rng.integers(256)
        try:
            tf_example.decode_example(bytes(raw))
        except ValueError:
            refused += 1
    assert refused > 1000
