"""Tables and figures of the experiments, from the rows of their CSV file.

`TABLES` and `FIGURES` have one function for each; rows are dicts of text, as csv.DictReader gives them.
"""

import itertools
import statistics
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import demo
from images import VALIDATION
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from plans import BATCH_SIZES, FINAL_EPOCHS, PAIRS, arms_of, trials
from records import markdown
from scipy.stats import spearmanr
from training import STEP

Row = dict[str, str]
Found = TypeVar("Found")
# Of Okabe and Ito, which the colour-blind can tell apart; the markers do it in grey too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "os^Dv*"


def of(rows: Iterable[Row], experiment: str) -> list[Row]:
    """The rows of an experiment."""
    return [row for row in rows if row["experiment"] == experiment]


def grouped(rows: Iterable[Row], *columns: str) -> dict[tuple[str, ...], list[Row]]:
    """The rows by the values of these columns, in the order in which these first come."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[column] for column in columns), []).append(row)
    return groups


def of_seeds(rows: Iterable[Row], column: str) -> list[float]:
    """The values of a column, one for each seed.

    Raises:
        ValueError: a seed has more than one: the same run twice, or runs of different length.
    """
    rows = list(rows)
    seeds = [row["seed"] for row in rows]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seed: got {seeds}, expected each once, in rows such as {rows[0]}")
    return [float(row[column]) for row in rows]


def spread(rows: Iterable[Row], column: str, digits: int = 1, factor: float = 1.0) -> str:
    """Mean and standard deviation over the seeds."""
    return demo.spread([factor * value for value in of_seeds(rows, column)], digits)


def mean(rows: Iterable[Row], column: str) -> float:
    """Mean over the seeds."""
    return statistics.mean(of_seeds(rows, column))


def _seeds(group: list[Row]) -> str:
    return str(len(group))


# ------------------------------------------------------------------------------------------------------------
# Tables
# ------------------------------------------------------------------------------------------------------------

MEASURES = ("train acc. %", "test acc. %", "ECE %", "CMI, 1e-3 nats", "Gamma, 1e-3 nats", "NCMI %", "seconds")


def _measures(group: list[Row]) -> list[str]:
    return [
        spread(group, "train_accuracy"),
        spread(group, "accuracy", 2),
        spread(group, "ece"),
        spread(group, "cmi", 2, 1e3),
        spread(group, "gamma", 2, 1e3),
        spread(group, "ncmi", 1, 100),
        spread(group, "seconds", 1),
    ]


def compare(rows: list[Row]) -> str:
    """Experiment 1."""
    groups = grouped(_in_order(of(rows, "compare")), "dataset", "epochs", "setting")
    lines = [
        [f"{dataset}, {setting}", epochs, _seeds(group), *_measures(group)]
        for (dataset, epochs, setting), group in groups.items()
    ]
    return markdown(("data, loss", "epochs", "seeds", *MEASURES), lines)


def ablation(rows: list[Row]) -> str:
    """Experiment 2: a line for each change, a column for each setting that was changed, of each data set."""
    groups = grouped(of(rows, "ablation"), "dataset", "setting")
    columns = sorted({(dataset, setting.partition(": ")[0]) for dataset, setting in groups})
    changes = list(dict.fromkeys(sorted((s.partition(": ")[2] for _, s in groups), key=lambda s: (s != "as it is", s))))
    lines = []
    for change in changes:
        cells = [groups.get((dataset, f"{base}: {change}")) for dataset, base in columns]
        lines.append([change, *(spread(cell, "accuracy") if cell else "" for cell in cells)])
    return markdown(("test accuracy, %", *(f"{dataset}<br>{base}" for dataset, base in columns)), lines)


def batch_size(rows: list[Row]) -> str:
    """Experiment 3."""
    lines = []
    for (dataset, name), sizes in _by_batch(rows).items():
        lines.append([f"{dataset}, {name}", *(spread(sizes[s], "accuracy") if s in sizes else "" for s in BATCH_SIZES)])
    return markdown(("test accuracy, %", *map(str, BATCH_SIZES)), lines)


def _by_batch(rows: list[Row]) -> dict[tuple[str, ...], dict[int, list[Row]]]:
    found: dict[tuple[str, ...], dict[int, list[Row]]] = {}
    for row in _in_order(of(rows, "batch-size")):
        name, _, size = row["setting"].partition(", batch ")
        found.setdefault((row["dataset"], name), {}).setdefault(int(size), []).append(row)
    return found


def networks(rows: list[Row]) -> str:
    """Experiment 4, over networks: rank correlation of NCMI and accuracy."""
    lines = []
    for (dataset, loss), group in grouped(_in_order(of(rows, "networks")), "dataset", "setting").items():
        means = [(mean(g, "ncmi"), mean(g, "accuracy")) for g in grouped(group, "network").values()]
        low, high = min(a for _, a in means), max(a for _, a in means)
        lines.append([f"{dataset}, {loss}", str(len(means)), f"{low:.1f} to {high:.1f}", f"{_rank(means):.2f}"])
    return markdown(("data, loss", "networks", "test accuracy, %", "rank correlation with NCMI"), lines)


def checkpoints(rows: list[Row]) -> str:
    """Experiment 4, over checkpoints: rank correlation within each run, mean over the runs."""
    lines = []
    for (dataset, loss), runs in _runs_of_checkpoints(rows).items():
        whole = [_rank([(float(r["ncmi"]), float(r["accuracy"])) for r in run]) for run in runs]
        late = [_rank([(float(r["ncmi"]), float(r["accuracy"])) for r in run[len(run) // 2 :]]) for run in runs]
        cells = [f"{statistics.mean(values):.2f}" for values in (whole, late)]
        last = [run[-1] for run in runs]
        lines.append([f"{dataset}, {loss}", str(len(runs[0])), spread(last, "accuracy"), *cells])
    return markdown(
        ("data, loss", "checkpoints a run", "last accuracy, %", "rank correlation", "of the later half"), lines
    )


def _runs_of_checkpoints(rows: list[Row]) -> dict[tuple[str, ...], list[list[Row]]]:
    found: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in of(rows, "checkpoints"):
        name = row["setting"].partition(STEP)[0]
        found.setdefault((row["dataset"], name), {}).setdefault(row["seed"], []).append(row)
    for run in (run for runs in found.values() for run in runs.values()):
        if len({row["setting"] for row in run}) < len(run) or len({row["epochs"] for row in run}) > 1:
            raise ValueError(f"setting: got rows of more than one run, such as {run[0]}")
    order = sorted(found, key=lambda key: (key[0], _loss_order(key[1])))
    return {key: list(found[key].values()) for key in order}


def _rank(pairs: list[tuple[float, float]]) -> float:
    return float(spearmanr([a for a, _ in pairs], [b for _, b in pairs]).statistic)


def search(rows: list[Row]) -> str:
    """Experiment 5: the best trial of each arm and the median of all, on the validation part."""
    lines = []
    for (dataset, epochs), searched in grouped(_in_order(of(rows, "search")), "dataset", "epochs").items():
        name = dataset.removesuffix(VALIDATION)
        base = name.partition(":")[0]
        for arm, group in _by_arm(searched, base).items():
            every = trials(base, 1 + max(int(row["setting"].rpartition(" ")[2]) for row in group))
            ranked = sorted(group, key=lambda row: -float(row["accuracy"]))
            best = every[ranked[0]["setting"]]
            options = {**best.options, "centroid_lr": best.centroid_lr, "scale": best.centroid_scale}
            shown = [f"lr {best.lr:g}", f"weight decay {best.weight_decay:g}"]
            options["M"] = best.features
            shown += [f"{key} {value}" for key, value in options.items() if value not in (None, 0.0)]
            middle = statistics.median(float(row["accuracy"]) for row in group)
            cells = [f"{name}, {epochs} epochs, {arm}", str(len(group)), f"{float(ranked[0]['accuracy']):.2f}"]
            lines.append([*cells, f"{middle:.2f}", ", ".join(shown)])
    return markdown(("data, arm", "trials", "best, %", "median, %", "the best one"), lines)


def _by_arm(rows: list[Row], dataset: str) -> dict[str, list[Row]]:
    found = {arm: [row for row in rows if row["setting"].startswith(f"{arm}: ")] for arm in arms_of(dataset)}
    return {arm: group for arm, group in found.items() if group}


def final(rows: list[Row]) -> str:
    """Experiment 5: the choice of each arm on the test set."""
    groups = grouped(_in_order(of(rows, "final")), "dataset", "setting", "epochs")
    lines = [
        [f"{dataset}, {setting}, {epochs} epochs", _seeds(group), *_measures(group)]
        for (dataset, setting, epochs), group in groups.items()
    ]
    return markdown(("data, arm, epochs", "seeds", *MEASURES), lines)


def _loss_order(name: str) -> tuple[int, str]:
    order = ("cross-entropy", "SupCon", "NCMI")
    return next((i for i, start in enumerate(order) if name.startswith(start)), len(order)), name


def _in_order(rows: list[Row]) -> list[Row]:
    """By data set, length, loss and seed: the runs of several jobs are written in the order in which they end."""
    return sorted(rows, key=lambda r: (r["dataset"], int(r["epochs"]), _loss_order(r["setting"]), int(r["seed"])))


# ------------------------------------------------------------------------------------------------------------
# Figures
# ------------------------------------------------------------------------------------------------------------


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(4.2 * count, 3.8), layout="constrained")
    panels = list(figure.subplots(1, count, squeeze=False)[0])
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _by_dataset(
    found: dict[tuple[str, ...], Found], draw: Callable[[Axes, str, Found, dict[str, Any]], object]
) -> Figure:
    """A panel for each data set, in which `draw` draws what was found of each loss, in a style of its own."""
    datasets = list(dict.fromkeys(dataset for dataset, _ in found))
    figure, panels = _panels(len(datasets))
    for axes, dataset in zip(panels, datasets, strict=True):
        axes.set(title=dataset)
        curves = [(name, measured) for (of_dataset, name), measured in found.items() if of_dataset == dataset]
        for (name, measured), color, marker in zip(curves, COLORS, MARKERS, strict=False):
            draw(axes, name, measured, {"color": color, "marker": marker})
    panels[0].legend(frameon=False)
    return figure


def draw_batch_size(rows: list[Row]) -> Figure:
    """Accuracy over the batch size, a panel for each data set: mean and range of the seeds."""

    def draw(axes: Axes, name: str, sizes: dict[int, list[Row]], style: dict[str, Any]) -> None:
        x = sorted(sizes)
        values = [of_seeds(sizes[size], "accuracy") for size in x]
        axes.plot(x, [statistics.mean(v) for v in values], markersize=5, label=name, **style)
        low, high = [min(v) for v in values], [max(v) for v in values]
        axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)

    figure = _by_dataset(_by_batch(rows), draw)
    for axes in figure.axes:
        axes.set(xlabel="batch size", ylabel="test accuracy (%)")
        axes.set_xscale("log", base=2)
        axes.set_xticks(BATCH_SIZES, labels=list(map(str, BATCH_SIZES)))
    return figure


def _error_over_ncmi(figure: Figure) -> Figure:
    for axes in figure.axes:
        axes.set(xlabel="NCMI", ylabel="test error (%)", xscale="log", yscale="log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter("{x:g}")
    return figure


def draw_networks(rows: list[Row]) -> Figure:
    """Error over NCMI, a point for each network: the mean of the seeds."""

    def draw(axes: Axes, name: str, group: list[Row], style: dict[str, Any]) -> None:
        points = sorted((mean(g, "ncmi"), 100 - mean(g, "accuracy")) for g in grouped(group, "network").values())
        axes.plot(*zip(*points, strict=True), markersize=5, linewidth=0.8, label=name, **style)

    return _error_over_ncmi(_by_dataset(grouped(_in_order(of(rows, "networks")), "dataset", "setting"), draw))


def draw_checkpoints(rows: list[Row]) -> Figure:
    """Error over NCMI on the way through training, a line for each run."""

    def draw(axes: Axes, name: str, runs: list[list[Row]], style: dict[str, Any]) -> None:
        for run, label in zip(runs, itertools.chain([name], itertools.repeat(None)), strict=False):
            ncmi = [float(row["ncmi"]) for row in run]
            error = [max(100 - float(row["accuracy"]), 0.05) for row in run]  # a logarithm has no place for none
            axes.plot(ncmi, error, markersize=3, linewidth=0.6, label=label, **style)

    return _error_over_ncmi(_by_dataset(_runs_of_checkpoints(rows), draw))


def draw_search(rows: list[Row]) -> Figure:
    """On fashion-pairs: validation accuracy of each arm's trials, test accuracy of the choice over the epochs."""
    rows = [row for row in rows if row["dataset"] in (PAIRS, PAIRS + VALIDATION)]
    figure, (left, right) = _panels(2)
    for (arm, group), color, marker in zip(_by_arm(of(rows, "search"), PAIRS).items(), COLORS, MARKERS, strict=False):
        accuracies = sorted((float(row["accuracy"]) for row in group), reverse=True)
        left.plot(range(1, len(group) + 1), accuracies, color=color, marker=marker, markersize=4, label=arm)
        chosen = grouped(of(rows, "final"), "setting", "epochs")
        values = [[float(r["accuracy"]) for r in chosen.get((f"{arm}: chosen", str(e)), [])] for e in FINAL_EPOCHS]
        if all(values):
            right.plot(FINAL_EPOCHS, [statistics.mean(v) for v in values], color=color, marker=marker, label=arm)
            for epochs, points in zip(FINAL_EPOCHS, values, strict=True):
                right.scatter([epochs] * len(points), points, color=color, s=8, alpha=0.6)
    left.set(title="search", xlabel="trial, best first", ylabel="validation accuracy (%)")
    right.set(title="the best trial of each", xlabel="epochs", ylabel="test accuracy (%)", xticks=FINAL_EPOCHS)
    left.legend(frameon=False, loc="lower left")
    return figure


# By the names that the pages have for them.
TABLES: dict[str, Callable[[list[Row]], str]] = {
    table.__name__.replace("_", "-"): table
    for table in (compare, ablation, batch_size, networks, checkpoints, search, final)
}
FIGURES: dict[str, Callable[[list[Row]], Figure]] = {
    draw.__name__.removeprefix("draw_").replace("_", "-"): draw
    for draw in (draw_batch_size, draw_networks, draw_checkpoints, draw_search)
}
