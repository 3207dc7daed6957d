"""Where the time of a training step goes on the CPU, with NCMI and with cross-entropy, and what a centroid step costs.

    python benchmarks/bench_step.py [--csv FILE] [--threads 1 2] [--seconds 60]

Two tables, float32, medians, everything that a table compares interleaved in random order in one process.

Steps. The demo's convolutional network on images of noise. A step is cut where the features leave the network: the
network's forward pass; the loss and its gradient by the features (and, "jointly", by the centroids); the network's
backward pass; the step of torch.optim.SGD; and where the centroids alternate with the network, the step of CentroidSGD.
`share` is that of the loss and the centroid step in the whole step: the median of the quotients of each step.

Centroid steps. From features without a graph, by CentroidSGD, with and without a forward pass of the same features
before it (not timed: it belongs to the network's step); and by what it replaces, the criterion, backward and
torch.optim.SGD with momentum, with the kernels and in plain PyTorch. Before each one another part of the memory is
written, as a network's step does, so that none finds its tensors in cache. `ratio` is the median over the rounds of the
quotient with CentroidSGD's step without a forward pass before it.
"""

import argparse
import csv
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_loss import describe_machine
from cases import Shape, batch
from demo import CENTROID_LR, convolutional
from rich.console import Console
from rich.table import Table
from torch import nn

from ncmi_kernels import CentroidSGD, NCMILoss

WARM_UP_ROUNDS, MIN_ROUNDS = 3, 15
PHASES = ("forward", "loss", "backward", "optimizer", "centroids")
SHAPES = (Shape(128, 100, 512), Shape(128, 1000, 2048), Shape(256, 1000, 2048), Shape(1024, 1000, 2048))


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
)


@dataclass
class Row:
    """A row of the CSV file: one way to take a step, or one phase of it ("step": all of them)."""

    device: str
    torch: str
    ncmi_kernels: str
    cpu_capability: str
    date: str
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

    def __init__(self, task: Task, method: str) -> None:
        outputs = task.C if method == "cross-entropy" else task.M
        torch.manual_seed(0)
        self.network = convolutional(outputs)
        self.criterion: nn.Module = nn.CrossEntropyLoss()
        self.centroid_optimizer = None
        groups: list[dict[str, Any]] = [{"params": list(self.network.parameters())}]
        if method != "cross-entropy":
            self.criterion = NCMILoss(task.C, task.M, learn_centroids=method == "NCMI, jointly")
            if method == "NCMI, jointly":
                groups.append({"params": list(self.criterion.parameters()), "lr": CENTROID_LR})
            elif method == "NCMI, alternating":
                self.centroid_optimizer = CentroidSGD(self.criterion, CENTROID_LR, 0.9)
        self.optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9, weight_decay=5e-4)
        self.images = torch.randn(task.B, *task.image)
        self.target = torch.randint(task.C, (task.B,))

    def step(self) -> dict[str, float]:
        """Microseconds of each phase."""
        clock = Clock()
        self.optimizer.zero_grad()
        outputs = self.network(self.images)
        clock.lap("forward")
        leaf = outputs.detach().requires_grad_()
        loss = self.criterion(leaf, self.target)
        loss.backward()
        clock.lap("loss")
        outputs.backward(leaf.grad)
        clock.lap("backward")
        self.optimizer.step()
        clock.lap("optimizer")
        if self.centroid_optimizer is not None:
            self.centroid_optimizer.step(leaf, self.target)
            clock.lap("centroids")
        return clock.laps


METHODS = ("cross-entropy", "NCMI", "NCMI, alternating", "NCMI, jointly")


class Clock:
    """Time from one lap to the next."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter_ns()

    def lap(self, name: str) -> None:
        """Note what has passed since the last lap."""
        now = time.perf_counter_ns()
        self.laps[name] = (now - self._last) / 1e3
        self._last = now


# ------------------------------------------------------------------------------------------------------------
# Centroid steps
# ------------------------------------------------------------------------------------------------------------

OURS = "CentroidSGD"
OTHER_MEMORY = 2**28  # bytes


def centroid_steps(shape: Shape) -> dict[str, Callable[[], dict[str, float]]]:
    """Ways to take one step of the centroids, each of centroids of its own."""
    z, y = batch(shape)
    z = z.detach()
    other = torch.zeros(OTHER_MEMORY // 4)

    def criterion(**options: Any) -> NCMILoss:
        made = NCMILoss(shape.C, shape.M, **options)
        generator = torch.Generator().manual_seed(1)
        made.centroid_logits.data.add_(torch.randn(shape.C, shape.M, generator=generator), alpha=0.05)
        made(z, y)  # sets the centre
        return made

    def ours(after_forward: bool) -> Callable[[], dict[str, float]]:
        made = criterion()
        optimizer = CentroidSGD(made, CENTROID_LR, 0.9)

        def step() -> dict[str, float]:
            if after_forward:
                made(z, y)
            other.add_(1)
            clock = Clock()
            optimizer.step(z, y)
            clock.lap("step")
            return clock.laps

        return step

    def by_autograd(backend: str | None) -> Callable[[], dict[str, float]]:
        made = criterion(backend=backend).eval()
        optimizer = torch.optim.SGD(made.parameters(), CENTROID_LR, momentum=0.9)

        def step() -> dict[str, float]:
            other.add_(1)
            clock = Clock()
            optimizer.zero_grad()
            made(z, y).backward()
            optimizer.step()
            clock.lap("step")
            return clock.laps

        return step

    return {
        OURS: ours(after_forward=False),
        "CentroidSGD after forward": ours(after_forward=True),
        "kernels, autograd, SGD": by_autograd(None),
        "PyTorch, autograd, SGD": by_autograd("reference"),
    }


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


def quantiles(values: Sequence[float]) -> dict[str, Any]:
    """The columns of a row that summarise the repetitions."""
    p20, middle, p80 = (
        torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()
    )
    return {
        "repetitions": len(values),
        "median_us": round(middle, 2),
        "p20_us": round(p20, 2),
        "p80_us": round(p80, 2),
    }


def measure_training(task: Task, seconds: float) -> list[dict[str, Any]]:
    """The rows of a task, but for what they share with all others."""
    rounds = run({method: Training(task, method).step for method in METHODS}, seconds)
    common = {"task": task.name, "B": task.B, "C": task.C, "M": task.M}
    rows = []
    for method in METHODS:
        laps = [each[method] for each in rounds]
        rows += [
            {**common, "method": method, "phase": phase, **quantiles([lap[phase] for lap in laps])}
            for phase in PHASES
            if phase in laps[0]
        ]
        shares = [(lap["loss"] + lap.get("centroids", 0)) / sum(lap.values()) for lap in laps]
        whole = quantiles([sum(lap.values()) for lap in laps])
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
            **quantiles([each[method]["step"] for each in rounds]),
            "ratio": round(median(each[method]["step"] / each[OURS]["step"] for each in rounds), 3),
        }
        for method in steps
    ]


def show(rows: Sequence[Row]) -> None:
    """Print both tables."""
    console = Console()
    console = Console(width=max(console.width, 130))
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
    parser = argparse.ArgumentParser(description="Benchmark training steps with the NCMI loss on the CPU.")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the results here")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="thread counts (default: 1 2)")
    parser.add_argument(
        "--shapes", type=Shape.parse, nargs="*", default=SHAPES, metavar="BxCxM", help="of centroid steps"
    )
    parser.add_argument("--tasks", nargs="*", default=[task.name for task in TASKS], help="(default: all)")
    parser.add_argument("--seconds", type=float, default=90, help="in all (default: %(default)s)")
    options = parser.parse_args(arguments)
    tasks = [task for task in TASKS if task.name in options.tasks]
    if len(tasks) < len(options.tasks):
        parser.error(f"--tasks: got {options.tasks}, expected some of {[task.name for task in TASKS]}")
    share = options.seconds / max(1, len(options.threads) * (len(tasks) + len(options.shapes)))
    machine = describe_machine()
    rows: list[Row] = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for case in (*tasks, *options.shapes):
            name = case.name if isinstance(case, Task) else f"centroid step at {case}"
            print(f"{name}, {threads} thread(s)", file=sys.stderr, flush=True)
            found = measure_training(case, share) if isinstance(case, Task) else measure_centroid_steps(case, share)
            rows += [Row(**machine, threads=threads, **row) for row in found]
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
    show(rows)


if __name__ == "__main__":
    main()
