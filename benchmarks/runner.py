"""Steps of the implementations, for the rounds of ncmi_kernels/_timing.py; and the command line of a benchmark."""

import argparse
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

import cases
import torch
from arguments import output, seconds
from cases import BACKWARD, CENTROID_STEP, FORWARD, NO_GRAD, CentroidStep, Implementation, Shape, batch
from devices import peak_of
from records import Row, write_rows
from torch import Tensor, nn

from ncmi_kernels._timing import Cuda, Device, Entry, spread

MAX_LEAD_US = 5000.0
Case = TypeVar("Case")


# ------------------------------------------------------------------------------------------------------------
# Steps
# ------------------------------------------------------------------------------------------------------------


class Step:
    """One mode of a criterion: what comes before the timed part, the timed part, and what comes after."""

    def __init__(self, criterion: nn.Module, z: Tensor, y: Tensor, mode: str) -> None:
        self.criterion, self.z, self.y, self.mode = criterion, z, y, mode
        self.wanted = [z, *(each for each in criterion.parameters() if each.requires_grad)]
        self._loss: Tensor | None = None
        self._upstream: Tensor | None = None

    def prepare(self) -> None:
        """What a backward step needs, or one of the centroids."""
        if self.mode == BACKWARD:
            self._forward()
        elif isinstance(self.criterion, CentroidStep):
            self.criterion.prepare(self.z, self.y)

    def run(self) -> None:
        """What is timed."""
        if self.mode == CENTROID_STEP:
            self.criterion(self.z, self.y)
            return
        if self.mode != BACKWARD:
            self._forward()
        if self.mode not in (FORWARD, NO_GRAD):
            self._backward()

    def release(self) -> None:
        """Free the graph."""
        self._loss = None

    def _forward(self) -> None:
        self._loss = None
        with torch.set_grad_enabled(self.mode != NO_GRAD):
            self._loss = self.criterion(self.z, self.y)

    def _backward(self) -> None:
        assert self._loss is not None
        if self._upstream is None:  # at the first step, which is not timed
            self._upstream = torch.ones_like(self._loss.detach())
        torch.autograd.grad(self._loss, self.wanted, self._upstream)
        self._loss = None


def entry_of(implementation: Implementation, **more: Any) -> Entry:
    """An entry of an implementation that has no step yet."""
    own = {name: getattr(implementation, name) for name in ("name", "share", "group", "heavy")}
    return Entry(**{**own, **more})


def row_of(entry: Entry, mode: str, **columns: Any) -> Row:
    """A row of the CSV file."""
    columns = {"implementation": entry.name, "mode": mode, "note": entry.note, **columns}
    return Row(**columns, **spread(entry.samples(mode)))


def timed(entry: Entry, step: Step, device: Device) -> None:
    """Warm a step up, find its memory on a GPU, and make it the entry's; a note where that fails."""
    try:
        for _ in range(1 if entry.heavy and device.torch_device.type == "cpu" else 2):
            step.prepare()
            device.synchronize()
            start = time.perf_counter()
            step.run()
            lead_us = min(1.5e6 * (time.perf_counter() - start) + 20, MAX_LEAD_US)  # the host's part
            device.synchronize()
            step.release()
        if device.torch_device.type != "cpu":
            step.prepare()
            entry.peaks = (None, device.peak(step.run))
            step.release()
    except Exception as error:
        entry.fail(error)
        return

    def take() -> dict[str, float]:
        step.prepare()
        microseconds = device.time(step.run, lead_us)
        step.release()
        return {step.mode: microseconds}

    entry.take = take


def cpu_peaks(name: str, mode: str, shape: Shape, threads: int) -> tuple[int | None, int | None]:
    """What a fresh criterion's first and second step take at most; of a heavy one, only the first.

    To be run by `memory_worker`. A step of another criterion loads and compiles code, and starts threads.
    """
    torch.set_num_threads(threads)
    torch.compiler.reset()
    implementation = next(each for each in (*cases.IMPLEMENTATIONS, cases.NCMI_STATISTICS) if each.name == name)
    small = shape._replace(B=min(2, shape.B)) if implementation.heavy else shape
    Step(implementation.build(small), *batch(small), mode).run()
    step = Step(implementation.build(shape), *batch(shape), mode)
    first = peak_of(step.run)
    if implementation.heavy:
        return first, None
    step.release()
    return first, peak_of(step.run)


# ------------------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------------------


def arguments_of(doc: str | None) -> ArgumentParser:
    """What all benchmarks take, under the docstring of one."""
    parser = ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=output, metavar="FILE", help="write the results here")
    parser.add_argument("--seconds", type=seconds, default=300, help="in all (default: %(default)s)")
    return parser


def left(start: float, seconds: float) -> float:
    """Seconds for the rounds of a case that was begun at `start`: a third at least, however long preparing it took."""
    return max(start + seconds - time.perf_counter(), seconds / 3)


def device_of(parser: ArgumentParser, options: Namespace) -> Device:
    """What --device names; an error where it is not there."""
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device: got cuda, and torch {torch.__version__} finds no CUDA device")
    return Cuda() if options.device == "cuda" else Device()


def measure_all(
    every: Sequence[Case],
    measure: Callable[[Case, float], list[Row]],
    options: Namespace,
    columns: Sequence[str],
    common: dict[str, Any],
) -> list[Row]:
    """All cases one after the other, each with an equal part of the time that is left; rows are written as they come.

    Args:
        every: the cases.
        measure: measures a case in so many seconds; it gives rows, with a note for what could not be measured.
        options: with `seconds` and `csv`, to which lines are added if it has `append`.
        columns: of the CSV file.
        common: columns that all rows share.
    """
    end = time.perf_counter() + options.seconds
    rows: list[Row] = []
    for index, case in enumerate(every):
        print(f"{case} [{index + 1} of {len(every)}]", file=sys.stderr, flush=True)
        new = measure(case, max(0.0, end - time.perf_counter()) / (len(every) - index))
        for row in new:
            vars(row).update(common)
        if options.csv:
            write_rows(options.csv, new, columns, append=bool(rows) or getattr(options, "append", False))
        rows += new
    return rows


def failures(rows: Sequence[Row], ours: Collection[str], excused: tuple[str, ...] = ()) -> int:
    """Print which of these implementations could not be measured; the exit status of the benchmark."""
    failed = [row for row in rows if row.note and row.implementation in ours and not row.note.startswith(excused)]
    for row in failed:
        print(f"{row.implementation}, {row.mode} at {row.shape}: {row.note}")
    return 1 if failed else 0
