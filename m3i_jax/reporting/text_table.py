"""Plain-text tables and sizes."""

from collections.abc import Iterable, Sequence


def text_table(rows: Iterable[Sequence[object]], headers: Sequence[str]) -> str:
    """Returns a table with aligned columns; columns of numbers and empty cells are aligned right.

    >>> print(text_table([("encoder", "1,024"), ("text", "7")], ("part", "parameters")))
    part     parameters
    -------  ----------
    encoder       1,024
    text              7
    """
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(headers), *cells]) for i in range(len(headers))]
    numeric = [
        all(
            not row[i] or row[i].replace(",", "").replace(".", "").lstrip("-").isdigit()
            for row in cells
        )
        for i in range(len(headers))
    ]

    def line(row: Sequence[str]) -> str:
        return "  ".join(
            c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric, strict=True)
        ).rstrip()

    return "\n".join([line(headers), "  ".join("-" * w for w in widths), *map(line, cells)])


def format_figures(value: float) -> str:
    """Returns a number with four figures, or with all of a larger whole part: never as 1.2e+05.

    >>> format_figures(1.23456), format_figures(107_361_792.3)
    ('1.235', '107,361,792')
    """
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:,.4g}"


def format_bytes(count: float) -> str:
    """Returns bytes in binary units.

    >>> format_bytes(3 * 2**30), format_bytes(1000)
    ('3.00 GiB', '1000 B')
    """
    units = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
    power = 0
    while count >= 1024 and power < len(units) - 1:
        count, power = count / 1024, power + 1
    return f"{count:.2f} {units[power]}" if power else f"{count:.0f} B"
