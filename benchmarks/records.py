"""What every benchmark writes: rows of a CSV file, the columns that summarise repetitions, tables.

Nothing but the standard library, so that results can be read and reported where nothing is installed.
"""

import csv
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

Record = TypeVar("Record")  # a dataclass; its fields are the columns
_PARSERS = {"int": int, "float": float, "str": str}


@dataclass
class Row:
    """What was measured of one thing at one shape; benchmarks/README.md says what the columns mean.

    A benchmark names the columns that its CSV file has; the others keep their defaults.
    """

    # Where, when and of what versions: devices.describe_machine.
    device: str = ""
    torch: str = ""
    ncmi_kernels: str = ""
    cpu_capability: str = ""
    date: str = ""
    driver: str = ""
    cuda: str = ""
    triton: str = ""
    # What.
    threads: int = 0
    backend: str = ""
    axis: str = ""
    task: str = ""
    processes: int = 0
    B: int = 0
    C: int = 0
    M: int = 0
    dtype: str = ""
    implementation: str = ""
    mode: str = ""
    method: str = ""
    phase: str = ""
    # What came of it.
    repetitions: int = 0
    median_us: float | None = None
    p20_us: float | None = None
    p80_us: float | None = None
    ratio_to_cross_entropy: float | None = None
    ratio_to_head: float | None = None
    ratio: float | None = None
    share: float | None = None
    peak_extra_bytes: int | None = None
    later_peak_extra_bytes: int | None = None
    minor_faults_per_step: float | None = None
    model_bytes: int | None = None
    gb_per_s: float | None = None
    share_of_copy: float | None = None
    launches: int | None = None
    payload_bytes: int | None = None
    loopback_bytes: int | None = None
    milliseconds: float | None = None
    note: str = ""

    @property
    def shape(self) -> str:
        """As the tables have it."""
        return f"{self.B}, {self.C}, {self.M}"


MACHINE = ("device", "torch", "ncmi_kernels", "cpu_capability", "date")
TIMES = ("repetitions", "median_us", "p20_us", "p80_us")


def write_lines(
    path: Path, lines: Iterable[Mapping[str, Any]], columns: Sequence[str], *, append: bool = False
) -> None:
    """Write lines under a header, replacing the file; or add them to it, under a header where it is new."""
    new = not append or not path.exists() or path.stat().st_size == 0
    with path.open("w" if new else "a", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        if new:
            writer.writeheader()
        for line in lines:
            writer.writerow({key: f"{cell:.6g}" if isinstance(cell, float) else cell for key, cell in line.items()})


def write_rows(path: Path, rows: Iterable[Row], columns: Sequence[str], *, append: bool = False) -> None:
    """`write_lines` of rows."""
    write_lines(path, map(asdict, rows), columns, append=append)


def read_rows(path: Path, kind: type[Record]) -> list[Record]:
    """The rows of a CSV file; none where it does not exist. A column that the file lacks has its default."""
    if not path.exists():
        return []
    kinds = {column.name: column.type for column in fields(kind)}  # type: ignore[arg-type]
    with path.open(newline="") as file:
        return [
            kind(**{name: _parse(kinds[name], cell) for name, cell in line.items()}) for line in csv.DictReader(file)
        ]


def _parse(kind: Any, text: str) -> Any:
    name = str(getattr(kind, "__name__", kind)).removesuffix(" | None")
    return None if text == "" and name != "str" else _PARSERS[name](text)


# ------------------------------------------------------------------------------------------------------------
# Tables
# ------------------------------------------------------------------------------------------------------------

Lines = list[list[str]]


def pivot(
    rows: Iterable[Row], key: Callable[[Row], tuple[object, ...]], across: str, cell: Callable[[Row], str]
) -> tuple[list[str], Lines]:
    """A line for each key, a column for each value of the column `across`: the names of these, and the lines."""
    found: dict[tuple[object, ...], dict[str, str]] = {}
    for row in rows:
        found.setdefault(key(row), {})[getattr(row, across)] = cell(row)
    names = list(dict.fromkeys(name for line in found.values() for name in line))
    return names, [[*map(str, key), *(line.get(name, "") for name in names)] for key, line in found.items()]


def markdown(header: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A table in Markdown; columns of numbers to the right, but for the first one."""
    cells = [[str(cell).replace("|", "/") for cell in line] for line in lines]
    numbers = [any(re.match(r"[-+]?\d", line[column]) for line in cells) for column in range(len(header))]
    marks = ["---:" if column and right else "---" for column, right in enumerate(numbers)]
    return "".join("| " + " | ".join(row) + " |\n" for row in (header, marks, *cells))
