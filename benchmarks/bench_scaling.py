"""How time and memory of the NCMI loss grow with the classes, the features and the samples.

    python benchmarks/bench_scaling.py [--csv FILE] [--png FILE] [--device cuda] [--seconds 300] [--C 10 100 1000 ...]

From one base shape, one size varied at a time. Beside NCMI with fixed centroids, with learnt ones, and what it computes
once for each change of fixed ones: the literal form, and cross-entropy with its linear head, which a classifier has
where NCMI has its centroids. But for the statistics it is forward and backward, down to the features.

From the sixth round on one that has used more than a third of the time sits out rounds; each has 20 at least.
`peak_extra_bytes` is of a later step, not the first: parameters and the statistics of fixed centroids are there before.

An implementation goes along an axis until a step would take more than --step-seconds, or more than half of the memory
that is free, growing from the shape before it in proportion to what is varied: that is the most that any of them grows
by. A row with a `note` instead of numbers says where and why it stopped; the figure has an open end there.
"""

import gc
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from contextlib import nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch
from arguments import at_least, output, positive, seconds
from cases import (
    CROSS_ENTROPY_WITH_HEAD,
    FULL,
    LITERAL,
    NCMI_CENTROIDS,
    NCMI_LEARNT,
    NCMI_STATISTICS,
    NO_GRAD,
    OUR_NAMES,
    Implementation,
    Shape,
    backend_of,
    batch,
)
from devices import describe_machine, free_bytes, memory_worker
from records import MACHINE, TIMES, pivot
from records import Row as Row
from runner import (
    Step,
    arguments_of,
    cpu_peaks,
    device_of,
    entry_of,
    failures,
    left,
    measure_all,
    row_of,
    timed,
)

from ncmi_kernels._tables import show
from ncmi_kernels._timing import Device, Entry, run_rounds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

IMPLEMENTATIONS = (NCMI_LEARNT, NCMI_CENTROIDS, NCMI_STATISTICS, LITERAL, CROSS_ENTROPY_WITH_HEAD)
SHAPE = ("axis", "B", "C", "M", "dtype", "implementation", "mode")
COLUMNS = (*MACHINE, "threads", "backend", *SHAPE, *TIMES, "peak_extra_bytes", "note")
LEAST_ROUNDS, MOST_ROUNDS, ROUNDS_OF_ALL, SHARE = 20, 100, 5, 1 / 3
BASE = Shape(128, 1000, 512)
AXES = {
    "C": (10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000),
    "M": (32, 128, 512, 2_048, 8_192, 32_768),
    "B": (8, 32, 128, 512, 2_048, 8_192, 32_768),
}


class Point(NamedTuple):
    """A shape, and which of its sizes is varied."""

    axis: str
    shape: Shape

    @property
    def size(self) -> int:
        """What is varied."""
        return int(getattr(self.shape, self.axis))


def mode_of(implementation: Implementation) -> str:
    """What is timed of it."""
    return NO_GRAD if implementation is NCMI_STATISTICS else FULL


def obstacle(point: Point, before: Row | None, step_seconds: float, free: int) -> str:
    """Why an implementation goes no further than the row before, or ""."""
    if before is None or before.median_us is None:
        return ""
    growth = point.size / getattr(before, point.axis)
    seconds, taken = growth * before.median_us / 1e6, growth * (before.peak_extra_bytes or 0)
    if seconds > step_seconds:
        return f"time: a step would take up to {seconds:.1f} s, more than {step_seconds:g} s"
    if taken > free / 2:
        return f"memory: up to {taken / 2**30:.1f} GiB, more than half of the {free / 2**30:.1f} GiB that are free"
    return ""


def prepare(implementation: Implementation, note: str, point: Point, device: Device, worker: Executor | None) -> Entry:
    """An entry with its memory, warmed up; or with a note."""
    on, shape, mode = device.torch_device, point.shape, mode_of(implementation)
    entry = entry_of(implementation, share=SHARE, group="", note=note or implementation.obstacle(shape, on) or "")
    if entry.note:
        return entry
    try:
        timed(entry, Step(implementation.build(shape).to(on), *batch(shape, device=on), mode), device)
        if worker is not None:
            entry.peaks = worker.submit(cpu_peaks, entry.name, mode, shape, torch.get_num_threads()).result()
    except Exception as error:
        entry.fail(error)
    return entry


class Scaling:
    """Measures points, each axis upwards; remembers where each implementation has stopped."""

    def __init__(self, device: Device, worker: Executor | None, step_seconds: float) -> None:
        self.device, self.worker, self.step_seconds = device, worker, step_seconds
        self.last: dict[tuple[str, str], Row] = {}  # by axis and implementation

    def measure(self, point: Point, seconds: float) -> list[Row]:
        """Those that have not stopped; a row with a note where one does."""
        start, free, entries = time.perf_counter(), free_bytes(self.device.torch_device), []
        for each in IMPLEMENTATIONS:
            before = self.last.get((point.axis, each.name))
            if before is None or not before.note:
                note = obstacle(point, before, self.step_seconds, free)
                entries.append((each, prepare(each, note, point, self.device, self.worker)))
        running = [entry for _, entry in entries]
        run_rounds(running, left(start, seconds), least=LEAST_ROUNDS, most=MOST_ROUNDS, each=ROUNDS_OF_ALL)
        rows = []
        for each, entry in entries:
            first, later = entry.peaks
            row = row_of(entry, mode_of(each), axis=point.axis, **point.shape._asdict())
            row.peak_extra_bytes = first if later is None else later  # a heavy one keeps nothing for a later step
            rows.append(row)
            self.last[point.axis, each.name] = row
            row.mode = "statistics" if each is NCMI_STATISTICS else FULL
            entry.take = None
        gc.collect()
        return rows


# ------------------------------------------------------------------------------------------------------------
# Output
# ------------------------------------------------------------------------------------------------------------

LABELS = {
    NCMI_LEARNT.name: "NCMI, fixed centroids",
    NCMI_CENTROIDS.name: "NCMI, learnt centroids",
    NCMI_STATISTICS.name: "NCMI, once per change of fixed centroids",
    LITERAL.name: "NCMI, literal form",
    CROSS_ENTROPY_WITH_HEAD.name: "cross-entropy with linear head",
}
# Okabe and Ito's colours, which the colour-blind can tell apart; the markers do it in grey too.
STYLES = dict(
    zip(LABELS, (("#0072B2", "o"), ("#56B4E9", "s"), ("#009E73", "^"), ("#D55E00", "v"), ("#000000", "D")), strict=True)
)
AXIS_LABELS = {"C": "classes C", "M": "features M", "B": "samples B"}


def draw(rows: Sequence[Row]) -> "Figure":
    """Time above and memory below, a panel for each axis; an open mark ends what was stopped by a cap."""
    from matplotlib.figure import Figure

    axes_names = list(dict.fromkeys(row.axis for row in rows))
    figure = Figure(figsize=(4.6 * len(axes_names), 8.4), layout="constrained")
    panels = figure.subplots(2, len(axes_names), squeeze=False, sharex="col", sharey="row")
    for column, axis in enumerate(axes_names):
        mine = [row for row in rows if row.axis == axis]
        fixed = ", ".join(f"{name} = {getattr(mine[0], name)}" for name in Shape._fields if name != axis)
        for panel, name, unit in (
            (panels[0][column], "median_us", 1e3),
            (panels[1][column], "peak_extra_bytes", 2**20),
        ):
            _panel(panel, mine, axis, name, unit)
            panel.set(xscale="log", yscale="log")
            panel.grid(alpha=0.25)
            panel.spines[["top", "right"]].set_visible(False)
        panels[0][column].set_title(fixed)
        panels[1][column].set_xlabel(AXIS_LABELS[axis])
    panels[0][0].set_ylabel("time of a step, ms")
    panels[1][0].set_ylabel("peak extra memory of a step, MiB")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    first = rows[0]
    figure.suptitle(
        f"{first.device}, {first.threads} thread(s), {first.dtype}, {first.date[:10]}; open marks: stopped there"
    )
    return figure


def _panel(panel: "Axes", rows: Sequence[Row], axis: str, column: str, unit: float) -> None:
    for name, label in LABELS.items():
        mine = [row for row in rows if row.implementation == name]
        points = [(getattr(row, axis), getattr(row, column) / unit) for row in mine if getattr(row, column)]
        if not points:
            continue
        color, marker = STYLES[name]
        style = "--" if name == NCMI_STATISTICS.name else "-"
        panel.plot(*zip(*points, strict=True), style, color=color, marker=marker, markersize=5, label=label)
        if any(row.note for row in mine):
            panel.plot(*points[-1], marker, color=color, markersize=11, markerfacecolor="none", markeredgewidth=1.5)


def cell(row: Row) -> str:
    """Milliseconds, and in brackets MiB."""
    if row.median_us is None:
        return row.note.split(":")[0]
    memory = "" if row.peak_extra_bytes is None else f" ({row.peak_extra_bytes / 2**20:.2f})"
    return f"{row.median_us / 1e3:.3f}{memory}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 where one of this package's kernels could not be measured."""
    parser = arguments_of(__doc__)
    parser.add_argument("--png", type=output, metavar="FILE", help="draw the results here")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(default: %(default)s)")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="(default: torch's)")
    parser.add_argument("--step-seconds", type=seconds, default=5, help="the longest step (default: %(default)s)")
    parser.add_argument("--base", type=Shape.parse, default=BASE, metavar="BxCxM", help="(default: %(default)s)")
    for axis, sizes in AXES.items():
        least = at_least(1 if axis == "B" else 2)
        parser.add_argument(f"--{axis}", type=least, nargs="*", default=sizes, help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    device = device_of(parser, options)
    torch.set_num_threads(options.threads)
    points = [
        Point(axis, options.base._replace(**{axis: size})) for axis in AXES for size in sorted(getattr(options, axis))
    ]
    if not points:
        parser.error("--C, --M, --B: got no sizes, expected at least one")
    common = {
        **describe_machine(device.torch_device),
        "threads": options.threads,
        "backend": backend_of(device.torch_device),
    }
    with memory_worker() if options.device == "cpu" else nullcontext() as worker:
        scaling = Scaling(device, worker, options.step_seconds)
        rows = measure_all(points, scaling.measure, options, COLUMNS, {**common, "dtype": "float32"})
    names, lines = pivot(rows, lambda row: (row.axis, row.shape), "implementation", cell)
    show(["over", "B, C, M", *names], lines)
    if options.png:
        draw(rows).savefig(options.png, dpi=120)
    return failures(rows, OUR_NAMES, excused=("time: ", "memory: "))


if __name__ == "__main__":
    sys.exit(main())
