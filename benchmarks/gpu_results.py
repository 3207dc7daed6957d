"""What the GPU benchmark writes: rows of a CSV file, and tables and bytes derived from them.

Nothing but the standard library, so that results can be read and reported where nothing is installed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from records import markdown

FORWARD, NO_GRAD, BACKWARD, FULL = "forward", "no-grad forward", "backward", "forward+backward"
# An upstream gradient other than 1: what is made in the forward pass has to be scaled then.
FULL_SCALED = "forward+backward, upstream 0.5"
CENTROID_STEP = "centroid step"
MODES = (FORWARD, NO_GRAD, BACKWARD, FULL, FULL_SCALED)

# Of a full step too, but not the time on the device: of an eager call, and of a step replayed from a CUDA graph.
WALL, GRAPH = "wall time, forward+backward", "graph replay, forward+backward"
# What the profiler counted: kernels, copies and fills.
LAUNCHES_FORWARD, LAUNCHES_BACKWARD = "launches, forward", "launches, backward"


class Traffic(NamedTuple):
    """What an implementation has to read and write, besides one read of the features in each pass."""

    table: bool = False  # the rows of log q [C, M] of the batch's classes, float32, in each pass
    centre: bool = False  # the mean of the features, before the forward pass
    one_pass: bool = False  # the gradient is made in the forward pass, for float32
    centroids: bool = False  # gradient of the centroid logits [C, M], float32


def model_bytes(
    shape: tuple[int, int, int], itemsize: int, mode: str, traffic: Traffic, cache_bytes: int
) -> int | None:
    """The bytes that a step has to move through memory; None where that is nothing.

    A floor, not what an implementation does move. cross_entropy is counted as two passes, which it is in torch.
    Finding the mean of the features reads them once more, from the cache where they fit into it. A batch of B samples
    has at most B classes, whose rows of log q it reads. A step of the centroids reads the features, reads and writes
    the centroids and their momentum, and writes the next log q.
    """
    B, C, M = shape
    features, table, own_rows = B * M * itemsize, 4 * C * M, 4 * min(B, C) * M
    if mode == CENTROID_STEP:
        return features + 5 * table
    forward = features + own_rows * traffic.table + table * traffic.centroids
    if traffic.centre and features > cache_bytes:
        forward += features
    if mode == NO_GRAD:
        return forward
    one_pass = traffic.one_pass and itemsize == 4
    if one_pass:
        forward += features
        backward = 2 * features if mode == FULL_SCALED else 0
    else:
        backward = 2 * features + own_rows * traffic.table
    if traffic.centroids:
        backward += features + 2 * table
    return {FORWARD: forward, BACKWARD: backward}.get(mode, forward + backward) or None


@dataclass
class Row:
    """A row of the CSV file: one implementation in one mode at one shape."""

    device: str
    driver: str
    torch: str
    cuda: str
    triton: str
    ncmi_kernels: str
    cpu_capability: str
    date: str
    B: int
    C: int
    M: int
    dtype: str
    implementation: str
    mode: str
    repetitions: int = 0
    median_us: float | None = None
    p20_us: float | None = None
    p80_us: float | None = None
    model_bytes: int | None = None
    gb_per_s: float | None = None
    share_of_copy: float | None = None
    peak_extra_bytes: int | None = None
    launches: int | None = None
    note: str = ""

    @property
    def shape(self) -> tuple[int, int, int]:
        """B, C and M."""
        return self.B, self.C, self.M

    def shape_text(self) -> str:
        """As the tables have it."""
        return f"{self.B}, {self.C}, {self.M}"


# ------------------------------------------------------------------------------------------------------------
# Tables
# ------------------------------------------------------------------------------------------------------------


def times_table(rows: Sequence[Row], modes: Sequence[str] = MODES) -> str:
    """Time, and GB/s of model bytes in brackets: a line for each shape, dtype and mode, a column by implementation."""
    timed = [row for row in rows if row.mode in modes]
    names = list(dict.fromkeys(row.implementation for row in timed))
    lines: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in timed:
        lines.setdefault((row.shape_text(), row.dtype, row.mode), {}).setdefault(row.implementation, _time_cell(row))
    used = [name for name in names if any(line.get(name) for line in lines.values())]
    return markdown(
        ["B, C, M", "dtype", "mode", *used],
        [[*key, *(line.get(name, "") for name in used)] for key, line in lines.items() if any(line.values())],
    )


def _time_cell(row: Row) -> str:
    if row.median_us is None:
        return ""
    return f"{row.median_us:.1f}" + ("" if row.gb_per_s is None else f" ({row.gb_per_s:.0f})")


def small_table(rows: Sequence[Row]) -> str:
    """What a small step costs besides its bytes: wall time, replay from a graph, launches."""
    cells: dict[tuple[str, str, str], dict[str, object]] = {}
    for row in rows:
        line = cells.setdefault((row.shape_text(), row.dtype, row.implementation), {})
        if row.mode in (WALL, GRAPH) and row.median_us is not None:
            line[row.mode] = f"{row.median_us:.1f}"
        if row.launches is not None:
            line[row.mode] = row.launches
    columns = (WALL, GRAPH, LAUNCHES_FORWARD, LAUNCHES_BACKWARD)
    return markdown(
        ["B, C, M", "dtype", "implementation", "wall, us", "graph replay, us", "launches forward", "backward"],
        [[*key, *(line.get(column, "") for column in columns)] for key, line in cells.items() if line],
    )


def memory_table(rows: Sequence[Row]) -> str:
    """The most that a full step has allocated at once on top of what was there, in MiB."""
    return markdown(
        ["B, C, M", "dtype", "implementation", "peak extra, MiB"],
        [
            [row.shape_text(), row.dtype, row.implementation, f"{row.peak_extra_bytes / 2**20:.1f}"]
            for row in rows
            if row.peak_extra_bytes is not None
        ],
    )


def notes(rows: Sequence[Row]) -> list[str]:
    """What was not measured, and why: one line for each implementation, shape and reason."""
    lines = dict.fromkeys(
        f"{row.implementation} at ({row.shape_text()}) {row.dtype}: {row.note}" for row in rows if row.note
    )
    return list(lines)


# ------------------------------------------------------------------------------------------------------------
# Aims
# ------------------------------------------------------------------------------------------------------------

MAX_LAUNCHES = {LAUNCHES_FORWARD: 4, LAUNCHES_BACKWARD: 2}
MAX_REPLAY_US = 15.0
MAX_WALL_RATIO = 1.5
MAX_MEMORY_SHARE = 0.01
FIXED = ("batch", "sample")  # the implementations with fixed centroids and a moving centre, of each backend


def aims_table(rows: Sequence[Row], backends: Sequence[str] = ("cuda", "triton")) -> str:
    """Each aim for small batches and memory: the worst measured over shapes and dtypes; is it met?"""
    lines = []
    for backend in backends:
        ours = [f"{backend} {name}" for name in FIXED]
        for mode, limit in MAX_LAUNCHES.items():
            counts = [
                float(row.launches)
                for row in rows
                if row.implementation in ours and row.mode == mode and row.launches is not None
            ]
            lines.append([backend, mode, *_verdict(counts, limit, "")])
        replays = [
            row.median_us
            for row in rows
            if row.implementation in ours and row.mode == GRAPH and row.median_us is not None
        ]
        lines.append([backend, "graph replay of a full step", *_verdict(replays, MAX_REPLAY_US, " us")])
        lines.append([backend, "wall time / cross_entropy's", *_verdict(_ratios(rows, ours), MAX_WALL_RATIO, "")])
        lines.append(
            [backend, "peak memory / the literal form's", *_verdict(_memory_shares(rows, ours), MAX_MEMORY_SHARE, "")]
        )
    return markdown(["backend", "aim", "at most", "worst measured", "met"], lines)


def _verdict(values: Sequence[float], limit: float, unit: str) -> list[str]:
    if not values:
        return [f"{limit:g}{unit}", "unmeasured", ""]
    return [f"{limit:g}{unit}", f"{max(values):.3g}{unit}", "yes" if max(values) <= limit else "no"]


def _ratios(rows: Sequence[Row], ours: Sequence[str]) -> list[float]:
    wall = {(row.shape, row.dtype, row.implementation): row.median_us for row in rows if row.mode == WALL}
    return [
        time / price
        for (shape, dtype, name), time in wall.items()
        if name in ours and time is not None and (price := wall.get((shape, dtype, "cross_entropy")))
    ]


def _memory_shares(rows: Sequence[Row], ours: Sequence[str]) -> list[float]:
    # Only where nothing was timed: there the first step of a fresh criterion was measured.
    peaks = {
        (row.shape, row.dtype, row.implementation): row.peak_extra_bytes
        for row in rows
        if row.peak_extra_bytes is not None and row.median_us is None
    }
    return [
        peak / literal
        for (shape, dtype, name), peak in peaks.items()
        if name in ours and (literal := peaks.get((shape, dtype, "literal")))
    ]
