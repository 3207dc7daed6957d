"""Where the time of a training step goes, with NCMI and with cross-entropy, and what a centroid step costs.

    python benchmarks/bench_step.py [--csv FILE] [--png FILE] [--threads 1 2] [--seconds 90]

Float32; what a table compares takes turns (ncmi_kernels/_timing.py).

Steps. The demo's convolutional network, on noise of the size of its images: what they show changes no time. Its last
layer is the linear head, to C logits for cross-entropy and to M features for NCMI, and counts as the network's. A step
is cut where the features leave the network; its phases are the network's forward pass, the loss, its gradient by the
features (and, "jointly", by the centroids), the network's backward pass, the network's step of torch.optim.SGD, and
the centroids' step: of CentroidSGD where they alternate with the network, of torch.optim.SGD where they train jointly.
There it is a call of its own, to be timed, and does what a group of the network's optimiser would do.
`share` is that of the loss, forward and backward, and the centroid step in the whole step: the median of the quotients
of each step.

Centroid steps. From features without a graph, by CentroidSGD, with and without a
forward pass of the same features before it (not timed: it belongs to the network's step); and by what it replaces, the
criterion, backward and torch.optim.SGD with momentum, with the kernels and in plain PyTorch. Before each one another
part of the memory is written, as a network's step does, so that none finds its tensors in cache. `ratio` is the median
over the rounds of the quotient with CentroidSGD's step without a forward pass before it.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from arguments import output, positive
from cases import (
    CENTROID_SHAPES,
    CENTROID_STEPS,
    PLAIN_CENTROID_STEP,
    CentroidStep,
    Shape,
    batch,
    kernels,
)
from demo import CENTROID_LR, convolutional
from devices import describe_machine
from matplotlib.figure import Figure
from records import MACHINE, TIMES, pivot
from records import Row as Row
from runner import arguments_of, failures, measure_all, row_of
from torch import nn

from ncmi_kernels import CentroidSGD, NCMILoss
from ncmi_kernels._tables import show
from ncmi_kernels._timing import Entry, run_rounds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = (*MACHINE, "threads", "task", "B", "C", "M", "method", "phase", *TIMES, "share", "ratio", "note")
LEAST_ROUNDS, WARM_UP_ROUNDS = 15, 3
LOSS_FORWARD, LOSS_BACKWARD, CENTROIDS = "loss forward", "loss backward", "centroid step"
PHASES = ("network forward", LOSS_FORWARD, LOSS_BACKWARD, "network backward", "network optimizer", CENTROIDS)
METHODS = ("cross-entropy", "NCMI", "NCMI, alternating", "NCMI, jointly")
WAYS = {**{name: kernels()[name] for name in CENTROID_STEPS}, PLAIN_CENTROID_STEP.name: PLAIN_CENTROID_STEP}
OTHER_MEMORY = 2**28  # bytes


@dataclass(frozen=True)
class Task:
    """What the network of a step sees and gives."""

    name: str
    B: int
    image: tuple[int, int, int]
    C: int
    M: int


TASKS = (
    Task("digits", 64, (1, 8, 8), 10, 32),
    Task("fashion-mnist", 128, (1, 14, 14), 10, 32),
    Task("100 classes", 128, (1, 14, 14), 100, 128),
    Task("10000 classes", 128, (1, 14, 14), 10_000, 128),
)


def with_share(laps: dict[str, float]) -> dict[str, float]:
    """The phases of a step with the whole and the loss's share of it."""
    whole = sum(laps.values())
    share = (laps[LOSS_FORWARD] + laps[LOSS_BACKWARD] + laps.get(CENTROIDS, 0.0)) / whole
    return {**laps, "step": whole, "share": share}


class Training:
    """A network in training, with the loss on its own in the middle of a step."""

    def __init__(self, task: Task, method: str) -> None:
        outputs = task.C if method == "cross-entropy" else task.M
        torch.manual_seed(0)
        self.network = convolutional(outputs)
        self.criterion: nn.Module = nn.CrossEntropyLoss()
        self.centroid_optimizer: Any = None
        if method != "cross-entropy":
            self.criterion = NCMILoss(task.C, task.M, learn_centroids=method == "NCMI, jointly")
            if method == "NCMI, jointly":
                self.centroid_optimizer = torch.optim.SGD(self.criterion.parameters(), CENTROID_LR, momentum=0.9)
            elif method == "NCMI, alternating":
                self.centroid_optimizer = CentroidSGD(self.criterion, CENTROID_LR, 0.9)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        self.images = torch.randn(task.B, *task.image)
        self.target = torch.randint(task.C, (task.B,))

    def step(self) -> dict[str, float]:
        """Microseconds of each phase."""
        clock = Clock()
        self.optimizer.zero_grad()
        self.criterion.zero_grad()
        outputs = self.network(self.images)
        clock.lap("network forward")
        leaf = outputs.detach().requires_grad_()
        loss = self.criterion(leaf, self.target)
        clock.lap(LOSS_FORWARD)
        loss.backward()
        clock.lap(LOSS_BACKWARD)
        outputs.backward(leaf.grad)
        clock.lap("network backward")
        self.optimizer.step()
        clock.lap("network optimizer")
        if self.centroid_optimizer is not None:
            if isinstance(self.centroid_optimizer, CentroidSGD):
                self.centroid_optimizer.step(leaf, self.target)
            else:
                self.centroid_optimizer.step()
            clock.lap(CENTROIDS)
        return with_share(clock.laps)


class Clock:
    """Wall time from one lap to the next."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}  # microseconds
        self._mark = time.perf_counter_ns()

    def lap(self, name: str) -> None:
        """Note what has passed since the last lap."""
        now = time.perf_counter_ns()
        self.laps[name], self._mark = (now - self._mark) / 1e3, now


# ------------------------------------------------------------------------------------------------------------
# Both
# ------------------------------------------------------------------------------------------------------------


def centroid_step(name: str, shape: Shape) -> Entry:
    """An entry of steps of the centroids, of centroids of its own."""
    stepper, (z, y), other = WAYS[name].build(shape), batch(shape), torch.zeros(OTHER_MEMORY // 4)
    assert isinstance(stepper, CentroidStep)

    def take() -> dict[str, float]:
        stepper.prepare(z, y)
        other.add_(1)
        clock = Clock()
        stepper(z, y)
        clock.lap("step")
        return clock.laps

    return Entry(name, take)


def entries_of(case: Task | Shape) -> list[Entry]:
    """What takes turns: the methods of a training step, or the ways to take a step of the centroids."""
    if isinstance(case, Task):
        return [Entry(method, Training(case, method).step) for method in METHODS]
    return [centroid_step(name, case) for name in WAYS]


def rows_of(entries: Sequence[Entry], case: Task | Shape) -> list[Row]:
    """A row for each phase of each entry, and one for the whole step."""
    task = {"task": case.name if isinstance(case, Task) else "centroid step", "B": case.B, "C": case.C, "M": case.M}
    rows = []
    for entry in entries:
        for phase in (*PHASES, "step"):
            if entry.samples(phase) or (phase == "step" and entry.note):
                rows.append(row_of(entry, phase, **task, method=entry.name, phase=phase))
        if shares := entry.samples("share"):
            rows[-1].share = median(shares)
        elif not isinstance(case, Task):
            rows[-1].ratio = entry.ratio(entries[0], "step")
    return rows


def measure(case: tuple[Task | Shape, int], seconds: float) -> list[Row]:
    """The rows of a task, or of the centroids' steps at a shape, with so many threads."""
    what, threads = case
    torch.set_num_threads(threads)
    entries = entries_of(what)
    run_rounds(entries, seconds, least=LEAST_ROUNDS, warm_up=WARM_UP_ROUNDS)
    rows = rows_of(entries, what)
    for row in rows:
        row.threads = threads
    return rows


# ------------------------------------------------------------------------------------------------------------
# Output
# ------------------------------------------------------------------------------------------------------------

# Blues for the network, warm colours for the loss; the order of the phases tells them apart in grey too.
COLORS = dict(zip(PHASES, ("#9ecae1", "#fdae6b", "#d94801", "#4292c6", "#084594", "#67000d"), strict=True))


def draw(rows: Sequence[Row]) -> Figure:
    """The medians of the phases as stacked bars, with the median of the step: a panel by task, at the most threads."""
    steps = [row for row in rows if row.task != "centroid step"]
    threads = max(row.threads for row in steps)
    steps = [row for row in steps if row.threads == threads]
    tasks = list(dict.fromkeys(row.task for row in steps))
    figure = Figure(figsize=(9, 0.9 + 1.5 * len(tasks)), layout="constrained")
    first = steps[0]
    figure.suptitle(
        f"A training step, and the loss's share of it ({first.device}, {threads} thread(s), {first.date[:10]})"
    )
    for axes, task in zip(figure.subplots(len(tasks), 1, squeeze=False)[:, 0], tasks, strict=True):
        _panel(axes, [row for row in steps if row.task == task])
    handles, labels = figure.axes[0].get_legend_handles_labels()
    by_label = dict(zip(labels, handles, strict=True))
    figure.legend(by_label.values(), by_label.keys(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _panel(axes: "Axes", rows: Sequence[Row]) -> None:
    methods = list(dict.fromkeys(row.method for row in rows))
    found = {(row.method, row.phase): row for row in rows}
    left = dict.fromkeys(methods, 0.0)
    for phase in PHASES:
        widths = [(found[each, phase].median_us or 0) / 1e3 if (each, phase) in found else 0.0 for each in methods]
        axes.barh(methods, widths, left=list(left.values()), color=COLORS[phase], label=phase)
        left = {each: left[each] + width for each, width in zip(methods, widths, strict=True)}
    for index, method in enumerate(methods):
        step = found[method, "step"]
        text = f" {(step.median_us or 0) / 1e3:.1f} ({100 * (step.share or 0):.1f}%)"
        axes.text(left[method], index, text, va="center", fontsize="small")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.2 * max(left.values()))
    row = rows[0]
    axes.set_title(f"{row.task}: B = {row.B}, C = {row.C}, M = {row.M}", fontsize="medium")
    axes.set_xlabel("ms")
    axes.spines[["top", "right"]].set_visible(False)


def cell(row: Row) -> str:
    """Microseconds; the share of the loss, or the ratio to CentroidSGD."""
    if row.median_us is None:
        return row.note
    share = "" if row.share is None else f" ({100 * row.share:.1f}%)"
    return f"{row.median_us:.0f}{share}" + ("" if row.ratio is None else f" ({row.ratio:.2f})")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = arguments_of(__doc__)
    parser.set_defaults(seconds=90)
    parser.add_argument("--png", type=output, metavar="FILE", help="draw the phases of the training steps here")
    parser.add_argument("--threads", type=positive, nargs="+", default=[1, 2], help="(default: 1 2)")
    parser.add_argument("--shapes", type=Shape.parse, nargs="*", default=CENTROID_SHAPES, help="of centroid steps")
    by_name = {task.name: task for task in TASKS}
    parser.add_argument("--tasks", nargs="*", choices=by_name, default=list(by_name), help="(default: all)")
    options = parser.parse_args(arguments)
    cases = (*(by_name[name] for name in options.tasks), *options.shapes)
    if not cases:
        parser.error("--tasks, --shapes: got none of either, expected at least one")
    every = [(case, threads) for threads in options.threads for case in cases]
    rows = measure_all(every, measure, options, COLUMNS, describe_machine())
    if options.png and options.tasks:
        draw(rows).savefig(options.png, dpi=120)
    names, lines = pivot(rows, lambda row: (row.task, row.shape, row.threads, row.method), "phase", cell)
    show(["us", "B, C, M", "threads", "", *names], lines)
    return failures(rows, (*METHODS, *WAYS))


if __name__ == "__main__":
    sys.exit(main())
