"""Tables for a terminal."""

from collections.abc import Sequence


def show(header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Print a table, its columns to the right."""
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    for line in (header, *lines):
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
