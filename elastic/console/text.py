"""Numbers and tables as text."""

from collections.abc import Sequence


def short(value: float) -> str:
    """A count in about four digits: 12.31B, 819.2k, 1,024."""
    if value < 10_000:
        return f"{value:,.4g}"
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * unit:  # 999,950 is 1M, not 1000k
            return f"{value / unit:.4g}{letter}"
    return f"{value:.4g}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], indent: int = 0) -> list[str]:
    """Lines of aligned columns: the first to the left, the others to the right."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return [
        " " * indent
        + "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
