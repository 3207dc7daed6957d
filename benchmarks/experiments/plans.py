"""The experiments: which networks are trained, on what and how."""

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from images import VALIDATION
from training import Run, Setting

PAIRS, FASHION, DIGITS, CIFAR = "fashion-pairs", "fashion-mnist", "digits", "cifar-100"
FOCUS = {"separation_focus": 10.0}


class Task(NamedTuple):
    """How long a data set is trained by which network, and by which settings of each loss."""

    network: str
    epochs: int
    settings: dict[str, Setting]

    @property
    def features(self) -> int | None:
        """M of the losses that take any."""
        return self.settings["NCMI, focus"].features


def _settings(
    cross_entropy_lr: float, ncmi_lr: float, centroid_lr: float, features: int | None = None, **common: Any
) -> dict[str, Setting]:
    """Cross-entropy, the defaults of NCMILoss with fixed centroids, and near classes first with learnt ones."""
    return {
        "cross-entropy": Setting("ce", cross_entropy_lr, **common),
        "NCMI": Setting("ncmi", ncmi_lr, features=features, **common),
        "NCMI, focus": Setting("ncmi", ncmi_lr, features=features, options=FOCUS, centroid_lr=centroid_lr, **common),
    }


# The recipe of the paper for CIFAR-100 (arXiv 2601.02543), whose authors log 76.99% at best.
MILESTONES = (60, 120, 160)
PAPER = Setting(
    "ncmi",
    0.1,
    options={"temperature": 0.2, "separation": "centroid_to_sample", "ratio": "sample", "center_momentum": 0.999999},
    features=512,
    milestones=MILESTONES,
    centroid_sgd={"lr": 1.0, "momentum": 0.999999, "start_epoch": 30},
)

TASKS = {
    # The gradient of a centroid grows with the share of its class in a batch, so its rate is C / 100. With as few
    # features as 10 classes, focus would want a fifth of the network's rate.
    # Rates are those at a batch of 128. For digits and Fashion-MNIST the demo says how they were found: neither
    # cross-entropy nor NCMI with equal weights gains from another one.
    DIGITS: Task("cnn", 6, _settings(0.1, 2.0, 0.1, 32, batch_size=64)),
    FASHION: Task("cnn", 8, _settings(0.2, 1.0, 0.1, 32)),
    PAIRS: Task("cnn", 8, _settings(0.2, 1.0, 1.0)),
    CIFAR: Task(
        "resnet18",
        200,
        {
            "cross-entropy": Setting("ce", 0.1, milestones=MILESTONES),
            "NCMI, paper": PAPER,
            "NCMI, focus": Setting("ncmi", 1.0, options=FOCUS, centroid_lr=1.0),
        },
    ),
}


def _runs(
    experiment: str,
    datasets: Iterable[str],
    seeds: int,
    epochs: int | None,
    settings_of: Callable[[Task], dict[str, Setting]],
    **changed: Any,
) -> list[Run]:
    """By data set, seed and setting; `changed` are fields of a run that are not its task's."""
    runs = [
        Run(experiment, dataset, task.network, name, setting, seed, epochs or task.epochs)
        for dataset in datasets
        for task in (TASKS[dataset],)
        for seed in range(seeds)
        for name, setting in settings_of(task).items()
    ]
    return [dataclasses.replace(run, **changed) for run in runs]


def _validated(runs: Iterable[Run]) -> list[Run]:
    """The same, measured on a part of the training images."""
    return [dataclasses.replace(run, dataset=run.dataset + VALIDATION) for run in runs]


def compare(datasets: Iterable[str], seeds: int, epochs: int | None) -> list[Run]:
    """The losses on the same network with the same budget; focus with fixed centroids too."""

    def settings(task: Task) -> dict[str, Setting]:
        fixed = dataclasses.replace(task.settings["NCMI, focus"], centroid_lr=0.0)
        return {**task.settings, "NCMI, focus, fixed": fixed}

    return _runs("compare", datasets, seeds, epochs, settings)


def variants(base: Setting, centroid_lr: float) -> dict[str, Setting]:
    """The setting, and it with one thing changed at a time."""

    def other(**options: Any) -> Setting:
        return dataclasses.replace(base, options={**base.options, **options})

    learnt = dataclasses.replace(base, centroid_lr=0.0 if base.centroid_lr else centroid_lr)
    return {
        "as it is": base,
        "softmax for NSF": other(activation="softmax"),
        "no centring": other(center_momentum=None),
        "centre momentum 0.99": other(center_momentum=0.99),
        "centre momentum 0.9999": other(center_momentum=0.9999),
        "no L2 normalisation": other(l2_normalize=False),
        "temperature 0.2": other(temperature=0.2),
        "fixed centroids" if base.centroid_lr else "learnt centroids": learnt,
        "centroid_to_sample": other(separation="centroid_to_sample"),
        "ratio by sample": other(ratio="sample"),
    }


def _ablated(task: Task) -> dict[str, Setting]:
    bases = {name: setting for name, setting in task.settings.items() if name in ("NCMI", "NCMI, focus")}
    centroid_lr = task.settings["NCMI, focus"].centroid_lr
    named = {f"{name}: {what}": s for name, base in bases.items() for what, s in variants(base, centroid_lr).items()}
    # The authors' loss and rate, less the schedule of 200 epochs; and at a rate that suits a short run.
    common = next(iter(bases.values()))
    for lr in (0.1, 1.0):
        short: dict[str, Any] = {
            "features": common.features,
            "batch_size": common.batch_size,
            "milestones": (),
            "centroid_sgd": None,
        }
        paper = dataclasses.replace(PAPER, lr=lr, **short)
        softmax = dataclasses.replace(paper, options={**paper.options, "activation": "softmax"})
        named |= {f"paper, lr {lr}: as it is": paper, f"paper, lr {lr}: softmax for NSF": softmax}
    return named


def ablation(datasets: Iterable[str], seeds: int, epochs: int | None) -> list[Run]:
    """What each part of the loss does: one changed at a time, from three settings."""
    return _runs("ablation", datasets, seeds, epochs, _ablated)


BATCH_SIZES = (16, 32, 64, 128, 256)
# On validation parts within 0.4 points of the best of SUPCON_RATES for Fashion-MNIST and fashion-pairs, 0.9 for digits.
SUPCON_LR = 0.2
SUPCON_RATES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def batch_size(datasets: Iterable[str], seeds: int, epochs: int | None) -> list[Run]:
    """Accuracy over the batch size, also of SupCon; the rate goes with it."""

    def settings(task: Task) -> dict[str, Setting]:
        every = {**task.settings, "SupCon": Setting("supcon", SUPCON_LR, features=task.features)}
        return {
            f"{name}, batch {size}": dataclasses.replace(setting, batch_size=size)
            for size in BATCH_SIZES
            for name, setting in every.items()
        }

    return _runs("batch-size", datasets, seeds, epochs, settings)


def supcon_rate(datasets: Iterable[str], seeds: int, epochs: int | None) -> list[Run]:
    """SupCon's learning rate, by the validation part."""

    def settings(task: Task) -> dict[str, Setting]:
        return {f"lr {lr}": Setting("supcon", lr, features=task.features) for lr in SUPCON_RATES}

    return _validated(_runs("supcon-rate", datasets, seeds, epochs, settings))


NETWORKS = ("perceptron", "cnn-4", "cnn-8", "cnn-16", "cnn")


def networks(datasets: Iterable[str], seeds: int, epochs: int | None) -> list[Run]:
    """NCMI and accuracy of networks of different size and kind."""
    each = [_runs("networks", datasets, seeds, epochs, lambda task: task.settings, network=name) for name in NETWORKS]
    return list(itertools.chain.from_iterable(each))


def checkpoints(datasets: Iterable[str], seeds: int, epochs: int | None) -> list[Run]:
    """NCMI and accuracy on the way through training."""
    return _runs("checkpoints", datasets, seeds, epochs, lambda task: task.settings, checkpoints=14)


# ------------------------------------------------------------------------------------------------------------
# The gap with 100 classes: a search that gives each arm as many trials, and its choice on the test set
# ------------------------------------------------------------------------------------------------------------

TRIALS = 20
SEARCH_EPOCHS = 8
FINAL_EPOCHS = (8, 20)


def _cross_entropy_trial(draw: random.Random) -> Setting:
    return Setting(
        "ce",
        _log_uniform(draw, 0.02, 1.0),
        draw.choice((1e-4, 5e-4, 2e-3)),
        options={"label_smoothing": draw.choice((0.0, 0.1))},
    )


def _ncmi_trial(draw: random.Random, focus: tuple[float, ...]) -> Setting:
    return Setting(
        "ncmi",
        _log_uniform(draw, 0.2, 4.0),
        draw.choice((1e-4, 5e-4, 2e-3)),
        features=draw.choice((100, 128, 256)),
        options={
            "temperature": draw.choice((0.3, 1.0)),
            "ratio": draw.choice(("batch", "sample")),
            "separation_focus": draw.choice(focus),
        },
        centroid_lr=draw.choice((0.0, 0.1, 1.0, 3.0)),
        centroid_scale=draw.choice((2.0, 4.0, 10.0)),
    )


def _log_uniform(draw: random.Random, low: float, high: float) -> float:
    return float(f"{low * (high / low) ** draw.random():.2g}")


ARMS: dict[str, Callable[[random.Random], Setting]] = {
    "cross-entropy": _cross_entropy_trial,
    "NCMI, equal weights": lambda draw: _ncmi_trial(draw, (0.0,)),
    "NCMI, focus": lambda draw: _ncmi_trial(draw, (3.0, 10.0, 30.0)),
}


def trials() -> dict[str, Setting]:
    """All settings of the search by name, always the same ones; as many for each arm."""
    found = {}
    for arm, draw_setting in ARMS.items():
        draw = random.Random(0)
        for trial in range(TRIALS):
            found[f"{arm}: trial {trial}"] = draw_setting(draw)
    return found


def search(datasets: Iterable[str], seeds: int, epochs: int | None) -> list[Run]:
    """The trials, by the validation part of the data set."""
    return _validated(_runs("search", datasets, seeds, epochs or SEARCH_EPOCHS, lambda task: trials()))


def chosen(rows: Iterable[dict[str, str]], dataset: str) -> dict[str, tuple[str, Setting]]:
    """By arm, the trial of the highest validation accuracy (mean over seeds), from the rows of the CSV file.

    Raises:
        ValueError: the search has not been run on this data set, or not to its end.
    """
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["experiment"] == "search" and row["dataset"] == dataset + VALIDATION:
            found.setdefault(row["setting"], []).append(float(row["accuracy"]))
    every = trials()
    if missing := [name for name in every if name not in found]:
        raise ValueError(f"search: {len(missing)} of {len(every)} trials on {dataset} are missing; run `search` first")
    best = {}
    for arm in ARMS:
        names = [name for name in every if name.startswith(f"{arm}: ")]
        name = max(names, key=lambda name: sum(found[name]) / len(found[name]))
        best[arm] = name, every[name]
    return best


def final(datasets: Iterable[str], seeds: int, epochs: int | None, rows: Iterable[dict[str, str]]) -> list[Run]:
    """The chosen trial of each arm, and the documented recipe, trained on all training images, for the test set."""
    rows, runs = list(rows), []
    for dataset in datasets:
        settings = {f"{arm}: chosen": setting for arm, (_, setting) in chosen(rows, dataset).items()}
        settings["NCMI, focus: recipe"] = TASKS[dataset].settings["NCMI, focus"]
        for length in (epochs,) if epochs else FINAL_EPOCHS:
            runs += _runs("final", [dataset], seeds, length, lambda task, settings=settings: settings)  # type: ignore[misc]
    return runs
