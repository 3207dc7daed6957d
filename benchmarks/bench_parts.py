"""Where the time of a step with separation_focus goes, beside that of a linear head with cross_entropy.

    python benchmarks/bench_parts.py [--csv FILE] [--threads 1 2]

A step is forward and backward, float32, on the CPU. All take turns in rounds; the whole is the median over the rounds.
torch.profiler then says how much of it the operators take: those of matrix products, those over the table of the
centroids, and those over the rows of the batch. The rest is the whole less these: Python, autograd, memory.
"""

import itertools
import statistics
from collections.abc import Sequence
from functools import partial

import torch
from arguments import positive
from cases import Shape
from devices import describe_machine
from records import MACHINE, Row, pivot
from runner import arguments_of, measure_all
from torch.profiler import ProfilerActivity, profile

from ncmi_kernels._bench import FULL, HEAD, LEAST_ROUNDS, WARM_UP_ROUNDS, Step, steps_of
from ncmi_kernels._tables import show
from ncmi_kernels._timing import Device, Entry, run_rounds

SHAPES = (Shape(128, 100, 512), Shape(256, 1000, 1000), Shape(1024, 1000, 2048))
METHODS = (HEAD, "ncmi focus", "ncmi focus + centroids")
PARTS = {
    "products": ("aten::mm", "aten::addmm", "aten::addmm_"),
    "centroids": tuple(f"ncmi_kernels::{name}" for name in ("centroid_stats", "focus_table", "centroid_grad")),
    "rows": (
        *(f"aten::{name}" for name in ("_log_softmax", "_log_softmax_backward_data")),
        *(f"aten::{name}" for name in ("nll_loss_forward", "nll_loss_backward")),
        *(f"ncmi_kernels::{name}" for name in ("terms", "focus_rows", "focus_weights_", "focus_sums_", "reduce")),
        *(f"ncmi_kernels::{name}" for name in ("input_grad", "update_center_")),
    ),
}
WHOLE, REST = "whole", "rest"
COLUMNS = (*MACHINE, "threads", "B", "C", "M", "implementation", "phase", "repetitions", "median_us", "share")
ROUNDS = 40


def full_of(step: Step) -> dict[str, float]:
    """Microseconds of a step."""
    return {FULL: Device().time(step.full, 0)}


def parts_of(step: Step, repetitions: int) -> dict[str, float]:
    """Microseconds of each part of a step, means."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(repetitions):
            step.full()
    found = dict.fromkeys(PARTS, 0.0)
    for event in profiler.key_averages():
        for part, operators in PARTS.items():
            if event.key in operators:
                found[part] += event.self_cpu_time_total / repetitions
    return found


def measure(case: tuple[int, Shape], seconds: float) -> list[Row]:
    """The rows of a number of threads and a shape."""
    threads, (B, C, M) = case
    torch.set_num_threads(threads)
    steps = {name: step for name, step in steps_of((B, C, M), torch.device("cpu"), None).items() if name in METHODS}
    entries = [Entry(name, partial(full_of, step)) for name, step in steps.items()]
    run_rounds(entries, seconds, least=LEAST_ROUNDS, most=ROUNDS, warm_up=WARM_UP_ROUNDS)
    rows = []
    for entry in entries:
        name, times = entry.name, entry.samples(FULL)
        whole = statistics.median(times)
        parts = parts_of(steps[name], len(times))
        for phase, value in {WHOLE: whole, **parts, REST: whole - sum(parts.values())}.items():
            row = Row(threads=threads, B=B, C=C, M=M, implementation=name, phase=phase, repetitions=len(times))
            row.median_us, row.share = value, value / whole
            rows.append(row)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = arguments_of(__doc__)
    parser.add_argument("--threads", type=positive, nargs="+", default=(1, 2), help="(default: 1 2)")
    parser.add_argument(
        "--shapes", type=Shape.parse, nargs="+", default=SHAPES, metavar="BxCxM", help="(default: three)"
    )
    options = parser.parse_args(arguments)
    cases = list(itertools.product(options.threads, options.shapes))
    names, lines = pivot(
        measure_all(cases, measure, options, COLUMNS, describe_machine()),
        lambda row: (row.threads, row.shape, row.implementation),
        "phase",
        lambda row: f"{row.median_us:.0f}",
    )
    show(["threads", "B, C, M", "microseconds", *names], lines)


if __name__ == "__main__":
    main()
