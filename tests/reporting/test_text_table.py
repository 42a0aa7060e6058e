"""Text tables and sizes."""

import pytest

from m3i_jax.reporting import text_table


def test_numbers_are_flush_right_and_words_flush_left():
    text = text_table.text_table(
        [("encoder", "85,798,656", "12 blocks"), ("text", "-7.5", "")],
        ("part", "parameters", "what"),
    )
    assert text.splitlines() == [
        "part     parameters  what",
        "-------  ----------  ---------",
        "encoder  85,798,656  12 blocks",
        "text           -7.5",
    ]


def test_objects_and_no_rows():
    assert text_table.text_table([(1, None), (20, "x")], ("n", "y")).splitlines()[2:] == [
        " 1  None",
        "20  x",
    ]
    assert text_table.text_table([], ("a", "bc")).splitlines() == ["a  bc", "-  --"]
    with pytest.raises((ValueError, IndexError)):
        text_table.text_table([("one",)], ("a", "b"))


@pytest.mark.parametrize(
    "count, text",
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536 * 1024, "1.50 MiB"),
        (5 * 2**40, "5.00 TiB"),
        (2**70, "1048576.00 PiB"),
    ],
)
def test_size(count, text):
    assert text_table.format_bytes(count) == text
