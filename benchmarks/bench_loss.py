"""Time and memory of the NCMI loss on the CPU, beside cross-entropy and the same loss in plain PyTorch.

    python benchmarks/bench_loss.py [--csv FILE] [--threads 1 2] [--shapes 256x1000x1000 ...] [--seconds 300]
        [--implementations "ncmi batch" ...]

What is measured is in cases.py, how in runner.py. All numbers are float32. A step starts with no gradients allocated:
- forward: the training forward, the graph kept;
- forward+backward: the same step to the end, the graph freed;
- no-grad forward: the same criterion, still in training mode, under torch.no_grad().

`ratio_to_cross_entropy` takes the median cross_entropy step of the three rounds before. In its own round a slow step
would lower its own ratio: it empties the caches, and half of the time cross_entropy comes after it. And what has one
step alone would have the noise of one cross_entropy. `ratio_to_head`, of what has products as large as those of the
head, is that with the "cross_entropy with head" step of its own round.

The allocator keeps its defaults, as it does for users. glibc hands large freed blocks back to the system, and touching
new pages may then cost more than the arithmetic; so the minor page faults of a step are reported (their mean). glibc
raises its threshold for that to the largest block freed so far, up to 32 MiB. The implementations share one such state,
as the parts of a training program do; alone in a process, one may fault more.

`peak_extra_bytes` is what the first forward+backward step of a fresh criterion has allocated at once, at most, on top
of what was there before it: gradients, what the graph keeps, temporaries, and what NCMILoss caches of fixed centroids.
`later_peak_extra_bytes` is the same for its second step.
"""

import sys
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from functools import partial

import torch
from arguments import positive
from cases import (
    CROSS_ENTROPY,
    CROSS_ENTROPY_WITH_HEAD,
    FORWARD,
    FULL,
    IMPLEMENTATIONS,
    NO_GRAD,
    OUR_NAMES,
    SHAPES,
    WITH_PRODUCTS,
    Implementation,
    Shape,
    batch,
)
from devices import CPU, describe_machine, memory_worker
from records import MACHINE, TIMES, Row, pivot
from runner import arguments_of, cpu_peaks, entry_of, failures, left, measure_all, row_of
from steps import FAULTS, no_grad_step, train_step

from ncmi_kernels._tables import show
from ncmi_kernels._timing import Entry, run_rounds

MODES = (FORWARD, FULL, NO_GRAD)
RATIOS = ("ratio_to_cross_entropy", "ratio_to_head")
MEMORY = ("peak_extra_bytes", "later_peak_extra_bytes", "minor_faults_per_step")
COLUMNS = (*MACHINE, "B", "C", "M", "dtype", "threads", "implementation", "mode", *TIMES, *RATIOS, *MEMORY, "note")
LEAST_ROUNDS, MOST_ROUNDS, WARM_UP_ROUNDS, PRICE_ROUNDS = 20, 2000, 3, 3


def measure(
    case: tuple[Shape, int], seconds: float, worker: Executor, implementations: Sequence[Implementation]
) -> list[Row]:
    """The implementations, cross_entropy among them, in all modes at one shape with so many threads."""
    start, (shape, threads) = time.perf_counter(), case
    torch.set_num_threads(threads)
    torch.compiler.reset()  # else earlier shapes count towards the limit on recompilations
    z, y = batch(shape)
    found: dict[str, dict[str, Entry]] = {}  # by implementation, and there by mode
    for each in implementations:
        # A step trained and one without gradients have a share of the time in common.
        training, without = (entry_of(each, group=each.group or each.name) for _ in range(2))
        found[each.name] = {FORWARD: training, FULL: training, NO_GRAD: without}
        training.note = without.note = each.obstacle(shape, CPU) or ""
        try:
            if not training.note:
                training.peaks = worker.submit(cpu_peaks, each.name, FULL, shape, threads).result()
                criterion = each.build(shape)
                for entry, step in ((training, train_step), (without, no_grad_step)):
                    if not each.heavy:
                        step(criterion, *batch(shape))
                    entry.take = partial(step, criterion, z, y)
        except Exception as error:
            training.fail(error)
            without.fail(error)
    entries = [found[each.name][mode] for each in implementations for mode in (FULL, NO_GRAD)]
    run_rounds(entries, left(start, seconds), least=LEAST_ROUNDS, most=MOST_ROUNDS, warm_up=WARM_UP_ROUNDS)
    rows = [
        row_of(entry, mode, **shape._asdict(), threads=threads)
        for by_mode in found.values()
        for mode, entry in by_mode.items()
    ]
    for row in rows:
        entry, mode = found[row.implementation][row.mode], row.mode
        row.ratio_to_cross_entropy = entry.ratio(found[CROSS_ENTROPY.name][mode], mode, before=PRICE_ROUNDS)
        if row.implementation in names_of(WITH_PRODUCTS) and CROSS_ENTROPY_WITH_HEAD.name in found:
            row.ratio_to_head = entry.ratio(found[CROSS_ENTROPY_WITH_HEAD.name][mode], mode)
        if row.mode == FULL:
            row.peak_extra_bytes, row.later_peak_extra_bytes = entry.peaks
        if faults := entry.samples(FAULTS + mode):
            row.minor_faults_per_step = sum(faults) / len(faults)
    return rows


def names_of(implementations: Sequence[Implementation]) -> list[str]:
    """As tables and CSV files have them."""
    return [each.name for each in implementations]


def cell(row: Row) -> str:
    """Microseconds, and the ratio to cross_entropy."""
    if row.median_us is None:
        return row.note.split(":")[0]
    return f"{row.median_us:.0f}" + (
        "" if row.ratio_to_cross_entropy is None else f" ({row.ratio_to_cross_entropy:.2f})"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = arguments_of(__doc__)
    parser.add_argument("--threads", type=positive, nargs="+", default=[1, 2], help="(default: 1 2)")
    parser.add_argument("--shapes", type=Shape.parse, nargs="+", default=SHAPES, metavar="BxCxM")
    parser.add_argument(
        "--implementations", nargs="+", choices=names_of(IMPLEMENTATIONS), metavar="NAME", help="beside cross_entropy"
    )
    options = parser.parse_args(arguments)
    asked = options.implementations or names_of(IMPLEMENTATIONS)
    implementations = [each for each in IMPLEMENTATIONS if each is CROSS_ENTROPY or each.name in asked]
    every = [(shape, threads) for shape in options.shapes for threads in options.threads]
    with memory_worker() as worker:
        common = {**describe_machine(), "dtype": "float32"}
        rows = measure_all(
            every, partial(measure, worker=worker, implementations=implementations), options, COLUMNS, common
        )
    names, lines = pivot(rows, lambda row: (row.shape, row.threads, row.mode), "implementation", cell)
    show(["B, C, M", "threads", "us (/ cross_entropy)", *names], lines)
    return failures(rows, OUR_NAMES)


if __name__ == "__main__":
    sys.exit(main())
