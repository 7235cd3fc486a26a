"""Aligned tables, paragraphs and amounts for a terminal of 100 columns."""

import shlex
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

WIDTH = 100
GAP = "  "
LONGEST_NAME = 32
"""Characters of a name in a table; what is longer is shortened in the middle."""


@dataclass(frozen=True)
class Units:
    """Names and sizes of the units of memory and of stored bytes."""

    memory_name: str
    memory_bytes: float
    stored_name: str
    stored_bytes: float

    def memory(self, value: float) -> str:
        amount = value / self.memory_bytes
        return f"{amount:,.1f}" if amount >= 0.05 or not value else f"{amount:.1g}"

    def stored(self, value: float) -> str:
        return f"{value / self.stored_bytes:,.4g}"


LARGE = Units("GiB", 2**30, "GB", 1e9)
SMALL = Units("MiB", 2**20, "MB", 1e6)


def amount(value: float) -> str:
    """Bytes of memory with their unit."""
    units = LARGE if value >= LARGE.memory_bytes else SMALL
    return f"{units.memory(value)} {units.memory_name}"


def count(value: float) -> str:
    """A number of tokens."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if value >= unit:
            return f"{value / unit:.4g}{name}"
    return f"{value:,.0f}"


def lines(*sentences: str) -> str:
    """Paragraphs, each on lines of its own."""
    return "\n".join(
        textwrap.fill(sentence, WIDTH, break_on_hyphens=False) for sentence in sentences
    )


def labelled(label: str, text: str) -> str:
    """A paragraph behind its label, indented."""
    first, rest = f"  {label:<8}", " " * 10
    return textwrap.fill(
        text, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns: the first to the left, the others to the right. Those that do not fit beside each
    other go below, behind the first one again."""
    cells = [list(header), *([_short(row[0]), *row[1:]] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
    return "\n\n".join(
        "\n".join(
            GAP.join(
                line[column].rjust(widths[column]) if column else line[column].ljust(widths[column])
                for column in (0, *columns)
            ).rstrip()
            for line in cells
        )
        for columns in _side_by_side(widths)
    )


def _side_by_side(widths: Sequence[int]) -> Iterator[list[int]]:
    """Columns after the first, as many at a time as fit."""
    taken: list[int] = []
    used = widths[0]
    for column, width in enumerate(widths[1:], start=1):
        if taken and used + len(GAP) + width > WIDTH:
            yield taken
            taken, used = [], widths[0]
        taken.append(column)
        used += len(GAP) + width
    yield taken


def _short(name: str) -> str:
    if len(name) <= LONGEST_NAME:
        return name
    half = (LONGEST_NAME - 3) // 2
    return f"{name[:half]}...{name[-half:]}"


def shell(command: str, indent: str) -> str:
    """A line for a shell on several that it reads as one; nothing to mend after copying."""
    room = WIDTH - len(indent) - len(" \\")
    done: list[str] = []
    for word in (shlex.quote(word) for word in shlex.split(command)):
        if len(word) > room:  # a word may go on at the start of the next line
            parts = textwrap.wrap(
                shlex.split(word)[0], room // 2, drop_whitespace=False, break_on_hyphens=False
            )
            word = "\\\n".join(shlex.quote(part) for part in parts)
        fits = done and "\n" not in word and "\n" not in done[-1]
        if fits and len(done[-1]) + 1 + len(word) <= room:
            done[-1] += f" {word}"
        else:
            done.append(word)
    return indent + f" \\\n{indent}".join(done)
