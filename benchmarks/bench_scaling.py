"""Time and memory over the number of classes C, of features M and of samples B: how the cost of each loss grows.

    python benchmarks/bench_scaling.py [--csv FILE] [--png FILE] [--device cuda] [--budget 300]

From one base shape each size is varied on its own (cases.SCALING_BASE, SCALING_AXES). Measured, in float32, are
- "ncmi batch, learnt": the kernels with fixed centroids (dense ones, as learning leaves them, at every shape);
- "ncmi batch + centroids": the same with the gradient of the centroids in every step;
- "ncmi statistics": what the first of them needs of the centroids, once for each change of them;
- "literal": the loss as the paper writes it, with fixed centroids and a [B, C, M] tensor;
- "cross_entropy with head": a linear layer from M features to C logits and cross_entropy, with the gradient of the
  layer's weight: what a classifier has where NCMI has its centroids.
But for the statistics it is forward and backward, down to the features.

Time: the implementations run interleaved as in bench_gpu.py (wall time on a CPU; on a GPU cold, by events), until their
part of --budget is over and for 20 rounds at least; from the sixth on one that has used more than a third of the time
sits out rounds. What the literal form uses is put on top of the part, so that the others do not go short.
Memory, `peak_extra_bytes`: what a step allocates at once, at most, on top of what was there (devices.py). It is a
later step, not the first: parameters and the statistics of fixed centroids are there before it.

An implementation goes along an axis until a step would take more than --step-seconds, or more than half of the memory
that is free, growing from the shape before it in proportion to what is varied: that is the most that any of them grows
by. A row with a `note` instead of numbers says where and why it stopped; the figure has an open end there.
"""

import argparse
import gc
import importlib.util
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from arguments import at_least, output, positive, seconds
from bench_gpu import MAX_LEAD_US, Step, Timed, time_steps
from cases import (
    CROSS_ENTROPY_WITH_HEAD,
    DTYPE,
    LITERAL,
    NCMI_CENTROIDS,
    NCMI_LEARNT,
    NCMI_STATISTICS,
    SCALING_AXES,
    SCALING_BASE,
    TINY,
    Implementation,
    Shape,
    batch,
)
from devices import CPU, Cpu, Cuda, Device, describe_machine, free_bytes, memory_worker, peak_of
from gpu_results import FULL, NO_GRAD
from records import Measured, markdown, spread, write_rows

from ncmi_kernels import _backends, available_backends

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

IMPLEMENTATIONS = (NCMI_LEARNT, NCMI_CENTROIDS, NCMI_STATISTICS, LITERAL, CROSS_ENTROPY_WITH_HEAD)
STATISTICS = "statistics"
CAPS = ("time: ", "memory: ")
LEAST_ROUNDS = 20
MAX_SHARE = 1 / 3


@dataclass
class Row(Measured):
    """A row of the CSV file: one implementation at one shape of one axis."""

    threads: int
    backend: str
    axis: str
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
    peak_extra_bytes: int | None = None
    note: str = ""


class Point(NamedTuple):
    """A shape, and which of its sizes is varied."""

    axis: str
    shape: Shape

    @property
    def size(self) -> int:
        """What is varied."""
        return int(getattr(self.shape, self.axis))


def points_of(base: Shape, axes: dict[str, Sequence[int]]) -> list[Point]:
    """All of them, each axis upwards."""
    return [Point(axis, base._replace(**{axis: size})) for axis, sizes in axes.items() for size in sorted(sizes)]


# ------------------------------------------------------------------------------------------------------------
# One implementation at one shape
# ------------------------------------------------------------------------------------------------------------


def make_step(implementation: Implementation, shape: Shape, device: torch.device) -> Step:
    """A step of a fresh criterion."""
    mode = NO_GRAD if implementation is NCMI_STATISTICS else FULL
    return Step(implementation.build(shape).to(device), *batch(shape, device=device), mode)


def step_peak(name: str, shape: Shape, threads: int) -> int | None:
    """What a step takes at most, after a first one. To be run by `memory_worker`."""
    torch.set_num_threads(threads)
    implementation = next(each for each in IMPLEMENTATIONS if each.name == name)
    make_step(implementation, TINY, CPU).run()  # loads code and starts threads
    step = make_step(implementation, shape, CPU)
    if not implementation.heavy:  # which keeps nothing for a later step
        step.run()
        step.release()
    return peak_of(step.run)


def obstacle(implementation: Implementation, point: Point, before: Row | None, step_seconds: float, free: int) -> str:
    """Why it goes no further than the row before, or ""."""
    if before is None or before.median_us is None:
        return ""
    growth = point.size / getattr(before, point.axis)
    seconds, taken = growth * before.median_us / 1e6, growth * (before.peak_extra_bytes or 0)
    if seconds > step_seconds:
        return f"time: a step would take up to {seconds:.1f} s, more than {step_seconds:g} s"
    if taken > free / 2:
        return f"memory: up to {taken / 2**30:.1f} GiB, more than half of the {free / 2**30:.1f} GiB that are free"
    return ""


def prepare(implementation: Implementation, shape: Shape, device: Device, worker: Executor | None) -> Timed:
    """Measure the memory of a step and warm it up; a note where that fails."""
    timed = Timed(implementation, FULL, note=implementation.obstacle(shape, device.torch_device) or "")
    if timed.note:
        return timed
    try:
        if worker is not None:
            threads = torch.get_num_threads()
            timed.peak = worker.submit(step_peak, implementation.name, shape, threads).result()
        step = make_step(implementation, shape, device.torch_device)
        step.run()
        device.synchronize()
        start = time.perf_counter()
        if worker is None:
            timed.peak = device.peak(step.run)
        elif not implementation.heavy:
            step.run()
        timed.lead_us = min(1.5e6 * (time.perf_counter() - start) + 20, MAX_LEAD_US)
        step.release()
        timed.step = step
    except Exception as error:
        timed.fail(error)
    return timed


def measure(
    point: Point,
    implementations: Sequence[Implementation],
    notes: dict[str, str],
    device: Device,
    budget: float,
    worker: Executor | None,
) -> list[dict[str, Any]]:
    """The columns of a shape's rows that differ; `notes` are of those that are left out."""
    start = time.perf_counter()
    timed = [
        Timed(each, FULL, note=notes[each.name]) if notes[each.name] else prepare(each, point.shape, device, worker)
        for each in implementations
    ]
    running = [each for each in timed if each.step is not None]
    deadline = max(start + budget, time.perf_counter() + budget / 3)  # memory and warm-up take a part of it
    time_steps(running, device, deadline, least=LEAST_ROUNDS, max_share=MAX_SHARE)
    rows = [
        {
            "axis": point.axis,
            **point.shape._asdict(),
            "implementation": each.candidate.name,
            "mode": STATISTICS if each.candidate is NCMI_STATISTICS else FULL,
            "peak_extra_bytes": each.peak,
            "note": each.note,
            **(spread(each.samples) if each.samples else {}),
        }
        for each in timed
    ]
    del timed, running
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


def table(rows: Sequence[Row]) -> str:
    """Milliseconds, and in brackets MiB: a line for each shape, a column for each implementation."""
    names = list(dict.fromkeys(row.implementation for row in rows))
    found = {(row.axis, row.B, row.C, row.M, row.implementation): row for row in rows}
    shapes = dict.fromkeys(key[:4] for key in found)
    cells = [[_cell(found.get((*shape, name))) for name in names] for shape in shapes]
    lines = [[shape[0], ", ".join(map(str, shape[1:])), *line] for shape, line in zip(shapes, cells, strict=True)]
    return markdown(["over", "B, C, M", *names], lines)


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row.median_us is None:
        return row.note.split(":")[0]
    memory = "" if row.peak_extra_bytes is None else f" ({row.peak_extra_bytes / 2**20:.2f})"
    return f"{row.median_us / 1e3:.3f}{memory}"


def progress(points: Sequence[Point]) -> Iterable[Point]:
    """With a bar, where tqdm is installed."""
    if importlib.util.find_spec("tqdm") is None:
        return points
    from tqdm import tqdm

    bar: Iterable[Point] = tqdm(points, unit="shape")
    return bar


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 where one of this package's kernels could not be measured."""
    parser = argparse.ArgumentParser(description="Measure how the cost of the NCMI loss grows.")
    parser.add_argument("--csv", type=output, metavar="FILE", help="write the results here")
    parser.add_argument("--png", type=output, metavar="FILE", help="draw them here")
    parser.add_argument("--budget", type=seconds, default=300, metavar="SECONDS", help="in all (default: %(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(default: %(default)s)")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="(default: torch's)")
    parser.add_argument("--step-seconds", type=seconds, default=5, help="the longest step (default: %(default)s)")
    parser.add_argument(
        "--base", type=Shape.parse, default=SCALING_BASE, metavar="BxCxM", help="(default: %(default)s)"
    )
    for axis, sizes in SCALING_AXES.items():
        parser.add_argument(
            f"--{axis}",
            type=positive if axis == "B" else at_least(2),
            nargs="*",
            default=sizes,
            help=f"(default: {sizes[0]} to {sizes[-1]})",
        )
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device: got cuda, and torch {torch.__version__} finds no CUDA device")
    points = points_of(options.base, {axis: getattr(options, axis) for axis in SCALING_AXES})
    if not points:
        parser.error("--C, --M, --B: got no sizes, expected at least one")
    torch.set_num_threads(options.threads)
    device: Device = Cuda() if options.device == "cuda" else Cpu()
    backend = _backends.resolve(None, torch.empty(0, device=device.torch_device))
    if backend == "reference":
        parser.error(f"nothing to measure: {available_backends()}")
    common = {**describe_machine(device.torch_device), "threads": options.threads, "backend": backend}
    common["dtype"] = str(DTYPE).removeprefix("torch.")

    end = time.perf_counter() + options.budget
    rows: list[Row] = []
    with ExitStack() as stack:
        worker = stack.enter_context(memory_worker()) if device.torch_device.type == "cpu" else None
        for index, point in enumerate(progress(points)):
            before = {row.implementation: row for row in rows if row.axis == point.axis}
            running = [each for each in IMPLEMENTATIONS if each.name not in before or not before[each.name].note]
            free = free_bytes(device.torch_device)
            notes = {
                each.name: obstacle(each, point, before.get(each.name), options.step_seconds, free) for each in running
            }
            budget = max(0.0, end - time.perf_counter()) / (len(points) - index)
            new = [Row(**common, **row) for row in measure(point, running, notes, device, budget, worker)]
            rows += new
            if options.csv:
                write_rows(options.csv, rows)
    print(table(rows))
    if options.png:
        draw(rows).savefig(options.png, dpi=120)
    kernels = [each.name for each in IMPLEMENTATIONS if each.kernels]
    failures = [
        f"{row.implementation} at {Shape(row.B, row.C, row.M)}: {row.note}"
        for row in rows
        if row.note and row.implementation in kernels and not row.note.startswith(CAPS)
    ]
    print(*failures, sep="\n", end="\n" * bool(failures))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
