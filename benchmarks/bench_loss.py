"""Time and memory of the NCMI loss on the CPU, beside cross-entropy and the same loss in plain PyTorch.

    python benchmarks/bench_loss.py [--csv FILE] [--threads 1 2] [--shapes 256x1000x1000 ...] [--quick]

What is measured is in cases.py. All numbers are float32.

Time. The implementations run interleaved in one process: a round is one step of each in random order, so that
none always inherits the caches and the heap of the same neighbour. Slow ones sit out rounds while they have
used more than their share of the time. A step starts with no gradients allocated, and is one of
- forward: the training forward, the graph kept;
- forward+backward: the same step to the end, the graph freed;
- no-grad forward: the same criterion, still in training mode, under torch.no_grad().
Steps that compile or load code, and a few rounds more, are thrown away. Reported are the median and the 20th
and 80th percentile. `ratio_to_cross_entropy` is the median over the rounds of the quotient with the median
cross_entropy step of the three rounds before. The quotient of the two medians would compare steps from
different moments; on a machine whose speed drifts (neighbours, clock frequency) the halves of a pair drift
together. In its own round a slow step would lower its own ratio: it empties the caches, and half of the time
cross_entropy comes after it. And what has one step alone would have the noise of one cross_entropy.
`ratio_to_head`, of "ncmi focus" alone, is the same with the "cross_entropy with head" step of its own round.

The allocator keeps its defaults, as it does for users. glibc hands large freed blocks back to the system, and
touching new pages may then cost more than the arithmetic; so the minor page faults of a step are reported
(their mean). glibc raises its threshold for that to the largest block freed so far, up to 32 MiB. The
implementations share one such state, as the parts of a training program do; alone in a process, one may fault
more.

Memory. `peak_extra_bytes` is what the first forward+backward step of a fresh criterion has allocated at once,
at most, on top of what was there before it: gradients, what the graph keeps, temporaries, and what NCMILoss
caches of fixed centroids. `later_peak_extra_bytes` is the same for its second step. devices.py says how it is
found. Code was loaded and compiled, and threads were started, by a step of another criterion.
"""

import argparse
import random
import resource
import sys
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

import torch
from arguments import output, positive, seconds
from cases import CROSS_ENTROPY, DTYPE, IMPLEMENTATIONS, SHAPES, Implementation, Shape, batch, run_rounds
from devices import CPU, describe_machine, memory_worker, peak_of
from gpu_results import FORWARD, FULL, NO_GRAD
from records import Measured, spread, write_rows
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import ncmi_kernels

MODES = (FORWARD, FULL, NO_GRAD)

WARM_UP_ROUNDS = 3
PRICE_ROUNDS = 3
MIN_ROUNDS = 20
MAX_ROUNDS = 2000
QUICK_LITERAL_BYTES = 2**28


class Sample(NamedTuple):
    """One step in one mode."""

    microseconds: float
    faults: int


@dataclass
class Row(Measured):
    """A row of the CSV file: one implementation in one mode at one shape."""

    B: int
    C: int
    M: int
    dtype: str
    threads: int
    implementation: str
    mode: str
    repetitions: int = 0
    median_us: float | None = None
    p20_us: float | None = None
    p80_us: float | None = None
    ratio_to_cross_entropy: float | None = None
    ratio_to_head: float | None = None
    peak_extra_bytes: int | None = None
    later_peak_extra_bytes: int | None = None
    minor_faults_per_step: float | None = None
    note: str = ""


# ------------------------------------------------------------------------------------------------------------
# Steps
# ------------------------------------------------------------------------------------------------------------


def forget_gradients(criterion: nn.Module, z: Tensor) -> None:
    """Free every gradient of an earlier step."""
    z.grad = None
    criterion.zero_grad(set_to_none=True)


def train_step(criterion: nn.Module, z: Tensor, y: Tensor) -> dict[str, Sample]:
    """A forward and backward step; gives both training modes."""
    forget_gradients(criterion, z)
    before, start = _faults(), time.perf_counter_ns()
    loss = criterion(z, y)
    forward = time.perf_counter_ns() - start
    middle, start = _faults(), time.perf_counter_ns()
    loss.backward()
    del loss
    backward = time.perf_counter_ns() - start
    after = _faults()
    return {
        FORWARD: Sample(forward / 1e3, middle - before),
        FULL: Sample((forward + backward) / 1e3, after - before),
    }


def no_grad_step(criterion: nn.Module, z: Tensor, y: Tensor) -> dict[str, Sample]:
    """A forward step without a graph."""
    forget_gradients(criterion, z)
    with torch.no_grad():
        before, start = _faults(), time.perf_counter_ns()
        loss = criterion(z, y)
        del loss
        forward = time.perf_counter_ns() - start
        after = _faults()
    return {NO_GRAD: Sample(forward / 1e3, after - before)}


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


# ------------------------------------------------------------------------------------------------------------
# Memory
# ------------------------------------------------------------------------------------------------------------


def step_peaks(name: str, shape: Shape, threads: int) -> tuple[int | None, int | None]:
    """What a fresh criterion's first and second step take at most; of a heavy one, only the first.

    To be run by `memory_worker`.
    """
    torch.set_num_threads(threads)
    torch.compiler.reset()
    implementation = next(each for each in IMPLEMENTATIONS if each.name == name)
    warm_shape = shape._replace(B=min(2, shape.B)) if implementation.heavy else shape
    train_step(implementation.build(warm_shape), *batch(warm_shape))
    criterion, (z, y) = implementation.build(shape), batch(shape)

    def peak() -> int | None:
        forget_gradients(criterion, z)
        return peak_of(lambda: criterion(z, y).backward())

    return peak(), None if implementation.heavy else peak()


# ------------------------------------------------------------------------------------------------------------
# One shape
# ------------------------------------------------------------------------------------------------------------


@dataclass
class Measurement:
    """What is known of one implementation at one shape."""

    candidate: Implementation
    criterion: nn.Module | None = None
    note: str = ""
    peaks: tuple[int | None, int | None] = (None, None)
    spent: float = 0.0
    samples: dict[str, list[Sample]] = field(default_factory=lambda: {mode: [] for mode in MODES})
    ratios: dict[str, list[float]] = field(default_factory=lambda: {mode: [] for mode in MODES})
    ratios_beside: dict[str, list[float]] = field(default_factory=lambda: {mode: [] for mode in MODES})


def prepare(implementation: Implementation, shape: Shape, threads: int, worker: Executor) -> Measurement:
    """Measure the memory of an implementation, then make and warm up a criterion to be timed."""
    peaks = worker.submit(step_peaks, implementation.name, shape, threads).result()
    criterion = implementation.build(shape)
    if not implementation.heavy:
        for step in (train_step, no_grad_step):
            step(criterion, *batch(shape))
    return Measurement(implementation, criterion, peaks=peaks)


def take_round(due: Sequence[Measurement], z: Tensor, y: Tensor, order: random.Random) -> list[dict[str, Sample]]:
    """One step of each, trained and without gradients, in random order; one dict by mode for each."""
    results: list[dict[str, Sample]] = [{} for _ in due]
    steps = [(index, step) for index in range(len(due)) for step in (train_step, no_grad_step)]
    order.shuffle(steps)
    for index, step in steps:
        measurement = due[index]
        assert measurement.criterion is not None
        start = time.perf_counter()
        results[index].update(step(measurement.criterion, z, y))
        measurement.spent += time.perf_counter() - start
    return results


class Keeper:
    """Puts the results of rounds where they belong, with the quotients of steps."""

    def __init__(self) -> None:
        self._before: deque[dict[str, Sample]] = deque(maxlen=PRICE_ROUNDS)  # of cross_entropy

    def keep(self, due: Sequence[Measurement], results: Sequence[dict[str, Sample]], number: int) -> None:
        """Of a round; one of a negative number is for warming up."""
        found = {each.candidate.name: result for each, result in zip(due, results, strict=True)}
        for measurement, result in zip(due, results, strict=True) if number >= 0 else ():
            candidate = measurement.candidate
            prices = [result] if candidate is CROSS_ENTROPY else self._before
            beside = found.get(candidate.beside)
            for mode, sample in result.items():
                measurement.samples[mode].append(sample)
                price = median(each[mode].microseconds for each in prices)
                measurement.ratios[mode].append(sample.microseconds / price)
                if beside is not None:
                    measurement.ratios_beside[mode].append(sample.microseconds / beside[mode].microseconds)
        self._before.append(found[CROSS_ENTROPY.name])


def fill(measurements: Sequence[Measurement], z: Tensor, y: Tensor, deadline: float) -> None:
    """Fill in the samples and ratios until the deadline, a reading of time.perf_counter."""
    keeper = Keeper()
    run_rounds(
        [measurement for measurement in measurements if measurement.criterion is not None],
        lambda due, number, order: keeper.keep(due, take_round(due, z, y, order), number),
        deadline,
        least=MIN_ROUNDS,
        most=MAX_ROUNDS,
        warm_up=WARM_UP_ROUNDS,
    )


def measure(shape: Shape, threads: int, budget: float, worker: Executor, *, quick: bool = False) -> list[Row]:
    """All implementations in all modes at one shape.

    Args:
        shape: B, C and M.
        threads: for torch.set_num_threads.
        budget: seconds, of which a third at least goes to the timed rounds.
        worker: from `memory_worker`.
        quick: leave the literal form out unless it is small.

    Returns:
        A row for each implementation and mode; one with a note and without numbers where it was left out.
    """
    start = time.perf_counter()
    torch.set_num_threads(threads)
    torch.compiler.reset()  # else earlier shapes count towards the limit on recompilations
    z, y = batch(shape)
    measurements = []
    for implementation in IMPLEMENTATIONS:
        note = implementation.obstacle(shape, CPU) or ""
        if quick and implementation.heavy and shape.literal_bytes() > QUICK_LITERAL_BYTES:
            note = "left out by --quick"
        if note:
            measurements.append(Measurement(implementation, note=note))
        else:
            measurements.append(prepare(implementation, shape, threads, worker))
    fill(measurements, z, y, max(start + budget, time.perf_counter() + budget / 3))
    common = {**describe_machine(), **shape._asdict(), "threads": threads}
    common["dtype"] = str(DTYPE).removeprefix("torch.")
    return [Row(**common, **_summary(measurement, mode)) for measurement in measurements for mode in MODES]


def _summary(measurement: Measurement, mode: str) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "implementation": measurement.candidate.name,
        "mode": mode,
        "note": measurement.note,
    }
    samples, beside = measurement.samples[mode], measurement.ratios_beside[mode]
    if not samples:
        return summary
    return summary | {
        **spread([sample.microseconds for sample in samples]),
        "ratio_to_cross_entropy": round(median(measurement.ratios[mode]), 4),
        "ratio_to_head": round(median(beside), 4) if beside else None,
        "peak_extra_bytes": measurement.peaks[0] if mode == FULL else None,
        "later_peak_extra_bytes": measurement.peaks[1] if mode == FULL else None,
        "minor_faults_per_step": round(sum(sample.faults for sample in samples) / len(samples), 1),
    }


# ------------------------------------------------------------------------------------------------------------
# Output
# ------------------------------------------------------------------------------------------------------------


TABLE_LINES = (
    "forward, us",
    "no-grad forward, us",
    "forward+backward, us",
    "  / cross_entropy",
    "  peak extra, MiB",
    "  page faults",
)


def make_table(rows: Sequence[Row]) -> Table:
    """A table row for each shape and thread count, a column for each implementation."""
    machine = rows[0]
    title = f"{machine.device}, {machine.cpu_capability}, torch {machine.torch}, {machine.dtype}; medians"
    table = Table(title=title, show_lines=True)
    for name in ("B x C x M", "threads", ""):
        table.add_column(name, no_wrap=True)
    names = list(dict.fromkeys(row.implementation for row in rows))
    for name in names:
        table.add_column(name, justify="right", max_width=24)
    found = {((row.B, row.C, row.M, row.threads), row.implementation, row.mode): row for row in rows}
    for case in dict.fromkeys(key[0] for key in found):
        cells = [_cell({mode: found[case, name, mode] for mode in MODES}) for name in names]
        table.add_row(" x ".join(map(str, case[:3])), str(case[3]), "\n".join(TABLE_LINES), *cells)
    return table


def _cell(rows: dict[str, Row]) -> str:
    full = rows[FULL]
    if full.note:
        return full.note
    peak = full.peak_extra_bytes
    return "\n".join(
        (
            f"{rows[FORWARD].median_us:.0f}",
            f"{rows[NO_GRAD].median_us:.0f}",
            f"{full.median_us:.0f}",
            f"{full.ratio_to_cross_entropy:.2f}",
            "unknown" if peak is None else f"{peak / 2**20:.1f}",
            f"{full.minor_faults_per_step:.0f}",
        )
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Benchmark the NCMI loss on the CPU.")
    parser.add_argument("--csv", type=output, metavar="FILE", help="also write the results here")
    parser.add_argument("--threads", type=positive, nargs="+", help="thread counts (default: 1 2; quick: 1)")
    parser.add_argument("--shapes", type=Shape.parse, nargs="+", metavar="BxCxM")
    parser.add_argument("--quick", action="store_true", help="two small shapes in about half a minute")
    parser.add_argument("--budget", type=seconds, metavar="SECONDS", help="in all (default: 300; quick: 30)")
    options = parser.parse_args(arguments)
    reason = ncmi_kernels.available_backends()["cpu"]
    if reason is not None:
        sys.exit(f"nothing to measure: {reason}")
    shapes = options.shapes or (SHAPES[:2] if options.quick else SHAPES)
    threads = options.threads or ([1] if options.quick else [1, 2])
    budget = options.budget if options.budget is not None else 30 if options.quick else 300
    end = time.perf_counter() + budget

    cases = [(shape, count) for shape in shapes for count in threads]
    rows: list[Row] = []
    with memory_worker() as worker:
        for index, (shape, count) in enumerate(cases):
            print(f"{shape}, {count} thread(s) [{index + 1} of {len(cases)}]", file=sys.stderr, flush=True)
            budget = max(0.0, end - time.perf_counter()) / (len(cases) - index)
            rows += measure(shape, count, budget, worker, quick=options.quick)
            if options.csv:
                write_rows(options.csv, rows)
    table = make_table(rows)
    Console(width=Console(width=1000).measure(table).maximum).print(table)


if __name__ == "__main__":
    main()
