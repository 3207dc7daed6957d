"""Where the time of a training step goes, with NCMI and with cross-entropy, and what a centroid step costs.

    python benchmarks/bench_step.py [--csv FILE] [--png FILE] [--threads 1 2] [--seconds 90] [--device cuda]

Float32, medians, everything that a table compares interleaved in random order in one process.

Steps. The demo's convolutional network, on noise of the size of its images: what they show changes no time. Its last
layer is the linear head, to C logits for cross-entropy and to M features for NCMI, and counts as the network's. A step
is cut where the features leave the network; its phases are the network's forward pass, the loss, its gradient by the
features (and, "jointly", by the centroids), the network's backward pass, the network's step of torch.optim.SGD, and
the centroids' step: of CentroidSGD where they alternate with the network, of torch.optim.SGD where they train jointly.
There it is a call of its own, to be timed, and does what the README's group in the network's optimiser would do.
`share` is that of the loss, forward and backward, and the centroid step in the whole step: the median of the quotients
of each step. On a GPU the phases lie between CUDA events in the stream, so a phase that the device waits in for the
host has that time too.

Centroid steps (CPU; bench_gpu.py has those of a GPU). From features without a graph, by CentroidSGD, with and without a
forward pass of the same features before it (not timed: it belongs to the network's step); and by what it replaces, the
criterion, backward and torch.optim.SGD with momentum, with the kernels and in plain PyTorch. Before each one another
part of the memory is written, as a network's step does, so that none finds its tensors in cache. `ratio` is the median
over the rounds of the quotient with CentroidSGD's step without a forward pass before it.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from arguments import output, positive, seconds
from cases import CENTROID_SHAPES, CENTROID_STEPS, PLAIN_CENTROID_STEP, CentroidStep, Shape, batch, kernels
from demo import CENTROID_LR, convolutional
from devices import CPU, describe_machine
from matplotlib.figure import Figure
from records import Measured, spread, write_rows
from rich.console import Console
from rich.table import Table
from torch import nn

from ncmi_kernels import CentroidSGD, NCMILoss

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WARM_UP_ROUNDS, MIN_ROUNDS = 3, 15
LOSS_FORWARD, LOSS_BACKWARD, CENTROIDS = "loss forward", "loss backward", "centroid step"
PHASES = ("network forward", LOSS_FORWARD, LOSS_BACKWARD, "network backward", "network optimizer", CENTROIDS)
OTHER_MEMORY = 2**28  # bytes
OURS, *_ = CENTROID_STEPS


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


@dataclass
class Row(Measured):
    """A row of the CSV file: one way to take a step, or one phase of it ("step": all of them)."""

    threads: int
    task: str
    B: int
    C: int
    M: int
    method: str
    phase: str
    repetitions: int
    median_us: float
    p20_us: float
    p80_us: float
    share: float | None = None
    ratio: float | None = None


# ------------------------------------------------------------------------------------------------------------
# Training steps
# ------------------------------------------------------------------------------------------------------------


class Training:
    """A network in training, with the loss on its own in the middle of a step."""

    def __init__(self, task: Task, method: str, device: torch.device = CPU) -> None:
        outputs = task.C if method == "cross-entropy" else task.M
        torch.manual_seed(0)
        self.device = device
        self.network = convolutional(outputs).to(device)
        self.criterion: nn.Module = nn.CrossEntropyLoss()
        self.centroid_optimizer: Any = None
        if method != "cross-entropy":
            self.criterion = NCMILoss(task.C, task.M, learn_centroids=method == "NCMI, jointly", device=device)
            if method == "NCMI, jointly":
                self.centroid_optimizer = torch.optim.SGD(self.criterion.parameters(), CENTROID_LR, momentum=0.9)
            elif method == "NCMI, alternating":
                self.centroid_optimizer = CentroidSGD(self.criterion, CENTROID_LR, 0.9)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        self.images = torch.randn(task.B, *task.image, device=device)
        self.target = torch.randint(task.C, (task.B,), device=device)

    def step(self) -> dict[str, float]:
        """Microseconds of each phase."""
        clock = Clock(self.device)
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
        return clock.laps()


METHODS = ("cross-entropy", "NCMI", "NCMI, alternating", "NCMI, jointly")


class Clock:
    """Time from one lap to the next, on the device."""

    def __init__(self, device: torch.device = CPU) -> None:
        self._on_gpu = device.type == "cuda"
        self._names: list[str] = []
        self._marks = [self._now()]

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter_ns()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def lap(self, name: str) -> None:
        """Note what has passed since the last lap."""
        self._marks.append(self._now())
        self._names.append(name)

    def laps(self) -> dict[str, float]:
        """Microseconds by lap."""
        if self._on_gpu:
            torch.cuda.synchronize()
        pairs = zip(self._marks, self._marks[1:], strict=False)
        passed = [1e3 * start.elapsed_time(end) if self._on_gpu else (end - start) / 1e3 for start, end in pairs]
        return dict(zip(self._names, passed, strict=True))


# ------------------------------------------------------------------------------------------------------------
# Centroid steps
# ------------------------------------------------------------------------------------------------------------


def centroid_steps(shape: Shape) -> dict[str, Callable[[], dict[str, float]]]:
    """Ways to take one step of the centroids, each of centroids of its own."""
    z, y = batch(shape)
    other = torch.zeros(OTHER_MEMORY // 4)

    def timed(stepper: nn.Module) -> Callable[[], dict[str, float]]:
        assert isinstance(stepper, CentroidStep)

        def step() -> dict[str, float]:
            stepper.prepare(z, y)
            other.add_(1)
            clock = Clock()
            stepper(z, y)
            clock.lap("step")
            return clock.laps()

        return step

    ours = kernels()
    ways = {name: ours[name] for name in CENTROID_STEPS} | {PLAIN_CENTROID_STEP.name: PLAIN_CENTROID_STEP}
    return {name: timed(way.build(shape)) for name, way in ways.items()}


# ------------------------------------------------------------------------------------------------------------


def run(steps: dict[str, Callable[[], dict[str, float]]], seconds: float) -> list[dict[str, dict[str, float]]]:
    """Rounds of one step of each in random order, for `seconds` or MIN_ROUNDS."""
    order = random.Random(0)
    rounds: list[dict[str, dict[str, float]]] = []
    for _ in range(WARM_UP_ROUNDS):
        for step in steps.values():
            step()
    end = time.perf_counter() + seconds
    while len(rounds) < MIN_ROUNDS or time.perf_counter() < end:
        names = list(steps)
        order.shuffle(names)
        rounds.append({name: steps[name]() for name in names})
    return rounds


def measure_training(task: Task, seconds: float, device: torch.device = CPU) -> list[dict[str, Any]]:
    """The rows of a task, but for what they share with all others."""
    rounds = run({method: Training(task, method, device).step for method in METHODS}, seconds)
    common = {"task": task.name, "B": task.B, "C": task.C, "M": task.M}
    rows = []
    for method in METHODS:
        laps = [each[method] for each in rounds]
        rows += [
            {**common, "method": method, "phase": phase, **spread([lap[phase] for lap in laps])}
            for phase in PHASES
            if phase in laps[0]
        ]
        shares = [(lap[LOSS_FORWARD] + lap[LOSS_BACKWARD] + lap.get(CENTROIDS, 0)) / sum(lap.values()) for lap in laps]
        whole = spread([sum(lap.values()) for lap in laps])
        rows.append({**common, "method": method, "phase": "step", **whole, "share": round(median(shares), 4)})
    return rows


def measure_centroid_steps(shape: Shape, seconds: float) -> list[dict[str, Any]]:
    """The rows of a shape, but for what they share with all others."""
    steps = centroid_steps(shape)
    rounds = run(steps, seconds)
    return [
        {
            "task": "centroid step",
            **shape._asdict(),
            "method": method,
            "phase": "step",
            **spread([each[method]["step"] for each in rounds]),
            "ratio": round(median(each[method]["step"] / each[OURS]["step"] for each in rounds), 3),
        }
        for method in steps
    ]


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
        widths = [found[each, phase].median_us / 1e3 if (each, phase) in found else 0.0 for each in methods]
        axes.barh(methods, widths, left=list(left.values()), color=COLORS[phase], label=phase)
        left = {each: left[each] + width for each, width in zip(methods, widths, strict=True)}
    for index, method in enumerate(methods):
        step = found[method, "step"]
        text = f" {step.median_us / 1e3:.1f} ({100 * (step.share or 0):.1f}%)"
        axes.text(left[method], index, text, va="center", fontsize="small")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.2 * max(left.values()))
    row = rows[0]
    axes.set_title(f"{row.task}: B = {row.B}, C = {row.C}, M = {row.M}", fontsize="medium")
    axes.set_xlabel("ms")
    axes.spines[["top", "right"]].set_visible(False)


def show(rows: Sequence[Row]) -> None:
    """Print both tables."""
    console = Console()
    console = Console(width=max(console.width, 150))
    first = rows[0]
    machine = f"{first.device}, {first.cpu_capability}, torch {first.torch}; medians, microseconds"
    steps = Table(title=f"Training steps. {machine}")
    for column in ("task", "threads", "loss"):
        steps.add_column(column)
    for column in (*PHASES, "step", "share"):
        steps.add_column(column, justify="right")
    found = {(row.task, row.threads, row.method, row.phase): row for row in rows}
    for task, threads, method in dict.fromkeys(key[:3] for key in found if key[0] != "centroid step"):
        cells = [found.get((task, threads, method, phase)) for phase in (*PHASES, "step")]
        whole = found[task, threads, method, "step"]
        steps.add_row(
            task, str(threads), method, *(f"{cell.median_us:.0f}" if cell else "" for cell in cells),
            f"{100 * (whole.share or 0):.1f}%",
        )  # fmt: skip
    console.print(steps)
    centroids = Table(title=f"Centroid steps. {machine}")
    for column in ("B x C x M", "threads", "method"):
        centroids.add_column(column)
    for column in ("time", "ratio"):
        centroids.add_column(column, justify="right")
    for row in rows:
        if row.task == "centroid step":
            shape = f"{row.B} x {row.C} x {row.M}"
            centroids.add_row(shape, str(row.threads), row.method, f"{row.median_us:.0f}", f"{row.ratio:.2f}")
    console.print(centroids)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Benchmark training steps with the NCMI loss.")
    parser.add_argument("--csv", type=output, metavar="FILE", help="also write the results here")
    parser.add_argument("--png", type=output, metavar="FILE", help="also draw the phases of the training steps here")
    parser.add_argument("--threads", type=positive, nargs="+", default=[1, 2], help="thread counts (default: 1 2)")
    parser.add_argument(
        "--shapes", type=Shape.parse, nargs="*", metavar="BxCxM", help="of centroid steps (default: on a CPU, four)"
    )
    parser.add_argument("--tasks", nargs="*", default=[task.name for task in TASKS], help="(default: all)")
    parser.add_argument("--seconds", type=seconds, default=90, help="in all (default: %(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    tasks = [task for task in TASKS if task.name in options.tasks]
    if len(tasks) < len(options.tasks):
        parser.error(f"--tasks: got {options.tasks}, expected some of {[task.name for task in TASKS]}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device: got cuda, and torch {torch.__version__} finds no CUDA device")
    if options.device == "cuda" and options.shapes:
        parser.error("--shapes: got shapes with --device cuda, expected none (bench_gpu.py centroids measures them)")
    device = torch.device(options.device)
    shapes = () if options.device == "cuda" else CENTROID_SHAPES if options.shapes is None else options.shapes
    if not tasks and not shapes:
        parser.error("--tasks, --shapes: got none of either, expected at least one")
    share = options.seconds / max(1, len(options.threads) * (len(tasks) + len(shapes)))
    machine = describe_machine(device)
    rows: list[Row] = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for case in (*tasks, *shapes):
            name = case.name if isinstance(case, Task) else f"centroid step at {case}"
            print(f"{name}, {threads} thread(s)", file=sys.stderr, flush=True)
            found = (
                measure_training(case, share, device) if isinstance(case, Task) else measure_centroid_steps(case, share)
            )
            rows += [Row(**machine, threads=threads, **row) for row in found]
    if options.csv:
        write_rows(options.csv, rows)
    if options.png and tasks:
        draw(rows).savefig(options.png, dpi=120)
    show(rows)


if __name__ == "__main__":
    main()
