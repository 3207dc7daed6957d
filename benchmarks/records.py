"""What every benchmark writes: rows of a CSV file, the columns that summarise repetitions, tables in Markdown.

Nothing but the standard library, so that results can be read and reported where nothing is installed.
"""

import csv
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

Record = TypeVar("Record")  # a dataclass; its fields are the columns
_PARSERS = {"int": int, "float": float, "str": str}


@dataclass
class Measured:
    """The first columns of the CPU benchmarks: where, when and of what versions (`devices.describe_machine`)."""

    device: str
    torch: str
    ncmi_kernels: str
    cpu_capability: str
    date: str


def columns(kind: Any) -> list[str]:
    """The names of a row's columns."""
    return [column.name for column in fields(kind)]


def write_rows(path: Path, rows: Sequence[Any], *, append: bool = False) -> None:
    """Write rows of one kind under a header, replacing the file; or add them to it, under a header where it is new."""
    new = not append or not path.exists() or path.stat().st_size == 0
    if not rows:
        return
    with path.open("w" if new else "a", newline="") as file:
        writer = csv.DictWriter(file, columns(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def read_rows(path: Path, kind: type[Record]) -> list[Record]:
    """The rows of a CSV file; none where it does not exist."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [
            kind(**{column.name: _parse(column.type, line[column.name]) for column in fields(kind)})  # type: ignore[arg-type]
            for line in csv.DictReader(file)
        ]


def _parse(kind: Any, text: str) -> Any:
    name = str(getattr(kind, "__name__", kind)).removesuffix(" | None")
    return None if text == "" and name != "str" else _PARSERS[name](text)


def quantile(values: Sequence[float], level: float) -> float:
    """Of at least one value, interpolated linearly."""
    ordered = sorted(values)
    position = level * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def spread(microseconds: Sequence[float]) -> dict[str, Any]:
    """The columns that summarise the repetitions: their number, the median, the 20th and 80th percentile."""
    p20, median, p80 = (round(quantile(microseconds, level), 2) for level in (0.2, 0.5, 0.8))
    return {"repetitions": len(microseconds), "median_us": median, "p20_us": p20, "p80_us": p80}


def markdown(header: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A table in Markdown; columns of numbers to the right, but for the first one."""
    cells = [[str(cell).replace("|", "/") for cell in line] for line in lines]
    numbers = [any(re.match(r"[-+]?\d", line[column]) for line in cells) for column in range(len(header))]
    marks = ["---:" if column and right else "---" for column, right in enumerate(numbers)]
    return "".join("| " + " | ".join(row) + " |\n" for row in (header, marks, *cells))
