"""NCMI against accuracy over the checkpoints of training runs, on the test set.

    python benchmarks/ncmi_accuracy.py
    python benchmarks/ncmi_accuracy.py --data fashion-mnist --epochs 2

Trains the demo's network with cross-entropy and with NCMI, keeps it after several steps of each run, and measures these
checkpoints. Writes a row for each to a CSV, draws them, and prints the rank correlation within each run: a ranking of
checkpoints by falling NCMI that is the ranking by accuracy gives -1.
"""

import copy
import math
import statistics
from collections.abc import Callable, Iterable
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import demo
import torch
from arguments import output, positive
from data import CLASSES, Dataset
from devices import describe_machine
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from records import write_lines
from scipy.stats import spearmanr
from torch import nn
from tqdm import tqdm

from ncmi_kernels import NCMILoss
from ncmi_kernels._tables import show
from ncmi_kernels.metrics import NCMIMetric

RESULTS = Path(__file__).parent / "results" / "cpu"
LOSSES = ("cross-entropy", "NCMI")


class Row(NamedTuple):
    """One checkpoint, measured in one way."""

    loss: str
    distribution: str
    seed: int
    step: int
    accuracy: float
    cmi: float
    gamma: float
    ncmi: float


def read(lines: Iterable[dict[str, str]]) -> list[Row]:
    """The rows of lines of the CSV file."""
    kinds = Row.__annotations__
    return [Row(**{name: kind(line[name]) for name, kind in kinds.items()}) for line in lines]


def checkpoint_steps(steps: int, count: int) -> list[int]:
    """At most so many steps to keep, in geometric progression up to the last one: most happens early."""
    return sorted({round(steps ** (i / count)) for i in range(1, count + 1)})


def checkpoints(
    recipe: demo.Recipe,
    dataset: Dataset,
    seed: int,
    epochs: int,
    batch_size: int,
    keep: list[int],
    on_step: Callable[[], object] = lambda: None,
) -> dict[int, tuple[nn.Module, nn.Module]]:
    """Train as the demo does; the network, ready to be evaluated, and its criterion after each of the steps `keep`."""
    kept: dict[int, tuple[nn.Module, nn.Module]] = {}
    step = 0

    def after_step(network: nn.Module, criterion: nn.Module) -> None:
        nonlocal step
        step += 1
        on_step()
        if step in keep:
            kept[step] = copy.deepcopy(network).eval(), copy.deepcopy(criterion)

    demo.train(recipe, dataset, seed=seed, epochs=epochs, batch_size=batch_size, on_step=after_step)
    return kept


def measure(network: nn.Module, criterion: nn.Module, dataset: Dataset) -> tuple[float, dict[str, list[float]]]:
    """Test accuracy in percent, and by distribution [CMI, Gamma, NCMI] of the test set.

    Both losses are measured by the distribution that the demo takes, NSF of the centred outputs at length one;
    cross-entropy's network also by the softmax that it was trained for. Accuracy as in the demo.
    """
    batches = list(demo.in_batches(network, dataset.test_x, dataset.test_y))
    outputs = torch.cat([output for output, _ in batches])
    metrics = {"NSF": NCMIMetric(CLASSES, outputs.shape[1], l2_normalize=True, center=outputs.double().mean(dim=0))}
    if isinstance(criterion, NCMILoss):
        some = slice(demo.CLASS_MEAN_IMAGES)
        criterion.fit_class_means(demo.in_batches(network, dataset.train_x[some], dataset.train_y[some]))
        predicted = criterion.predict(outputs, class_means=True)
    else:
        metrics["softmax"] = NCMIMetric(CLASSES, activation="softmax")
        predicted = outputs.argmax(dim=1)
    for metric in metrics.values():
        for batch in batches:
            metric.update(*batch)
    accuracy = 100 * (predicted == dataset.test_y).double().mean().item()
    return accuracy, {name: [value.item() for value in metric.compute().values()] for name, metric in metrics.items()}


def series(rows: list[Row]) -> dict[tuple[str, str], list[list[Row]]]:
    """The rows by loss and distribution, and there by seed, which is one training run."""
    grouped: dict[tuple[str, str], dict[int, list[Row]]] = {}
    for row in rows:
        grouped.setdefault((row.loss, row.distribution), {}).setdefault(row.seed, []).append(row)
    return {key: list(runs.values()) for key, runs in grouped.items()}


def correlations(run: list[Row]) -> tuple[float, float]:
    """Rank correlation of NCMI and accuracy over a run, and over the later half of its checkpoints."""
    ncmi, accuracy = torch.tensor([[row.ncmi, row.accuracy] for row in run], dtype=torch.float64).T
    half = len(run) // 2
    return spearmanr(ncmi, accuracy).statistic, spearmanr(ncmi[half:], accuracy[half:]).statistic


COLUMNS = ("accuracy first, %", "last, %", "NCMI first", "last", "rank corr. all", "2nd half")


def summary(runs: list[list[Row]]) -> list[str]:
    """The cells of COLUMNS: means over the runs, the rank correlation within each."""
    cells = [f"{statistics.mean(run[at].accuracy for run in runs):.1f}" for at in (0, -1)]
    cells += [f"{statistics.mean(run[at].ncmi for run in runs):.3g}" for at in (0, -1)]
    return cells + [f"{statistics.mean(values):.2f}" for values in zip(*map(correlations, runs), strict=True)]


def title(data: str) -> str:
    """That of the figure."""
    return f"{data}: the checkpoints of each training run in a colour of its own"


def draw(rows: list[Row], title: str) -> Figure:
    """The error over NCMI: a panel for each loss and distribution, a colour and marker for each run."""
    grouped = series(rows)
    figure = Figure(figsize=(3.6 * len(grouped), 3.8), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(1, len(grouped), sharex=True, sharey=True, squeeze=False)[0]
    for axes, ((loss, distribution), runs) in zip(panels, grouped.items(), strict=True):
        for run, color, marker in zip(runs, cycle(("#0072B2", "#D55E00", "#009E73")), cycle("os^"), strict=False):
            ncmi, error = [row.ncmi for row in run], [100 - row.accuracy for row in run]
            axes.plot(ncmi, error, color=color, marker=marker, markersize=4, linewidth=0.6)
        axes.set(title=f"{loss}, {distribution}", xlabel="NCMI", xscale="log")
        axes.set_yscale("symlog", linthresh=1)  # logarithmic, and yet no error at all has a place
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set(ylabel="test error (%)", ylim=(0, 100))
    return figure


def main() -> None:
    """The command line."""
    parser = demo.arguments_of("NCMI against accuracy over the checkpoints of training runs.")
    parser.set_defaults(seeds=3)
    parser.add_argument("--checkpoints", type=positive, default=14, help="at most, a run (default: %(default)s)")
    parser.add_argument(
        "--output", type=output, default=RESULTS / "ncmi_accuracy", help="less .csv and .png (default: %(default)s)"
    )
    arguments = parser.parse_args()
    path, task = arguments.output.absolute(), demo.TASKS[arguments.data]
    dataset = demo.images_of(parser, arguments)
    epochs = arguments.epochs or task.epochs
    steps = epochs * math.ceil(len(dataset.train_x) / task.batch_size)
    keep = checkpoint_steps(steps, arguments.checkpoints)
    rows = []
    with tqdm(total=len(LOSSES) * arguments.seeds * steps, unit="step", smoothing=0.02) as bar:
        for loss in LOSSES:
            for seed in range(arguments.seeds):
                bar.set_description(f"{loss}, seed {seed}")
                recipe = task.recipes[loss]
                kept = checkpoints(recipe, dataset, seed, epochs, task.batch_size, keep, bar.update)
                for step, (network, criterion) in kept.items():
                    accuracy, measured = measure(network, criterion, dataset)
                    rows += [Row(loss, name, seed, step, accuracy, *values) for name, values in measured.items()]
    machine = {**describe_machine(), "data": arguments.data}
    lines = [{**machine, **row._asdict()} for row in rows]
    write_lines(path.with_suffix(".csv"), lines, [*machine, *Row._fields])
    show(["loss, distribution", *COLUMNS], [[", ".join(key), *summary(runs)] for key, runs in series(rows).items()])
    draw(rows, title(arguments.data)).savefig(path.with_suffix(".png"), format="png", dpi=130)
    print(f"{path.with_suffix('.csv')} and .png are written")


if __name__ == "__main__":
    main()
