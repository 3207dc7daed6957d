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


class Budget(NamedTuple):
    """What a trial of the search may cost, and how long its choice is trained."""

    epochs: int
    images: int | None = None  # to train on; None for all
    final: tuple[int, ...] = ()  # epochs; none for those of the trials

    def dataset(self, name: str) -> str:
        """The data set of that name, with so many images."""
        return name if self.images is None else f"{name}:{self.images}"


class Task(NamedTuple):
    """How long a data set is trained by which network, by which settings of each loss, and how these are searched."""

    network: str
    epochs: int
    settings: dict[str, Setting]
    budgets: dict[str, Budget] = {"short": Budget(8, final=(8, 20))}  # noqa: RUF012

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
    # Two CPU cores can afford it, and rates are from few runs by hand. ResNet-18 is in `paper`.
    CIFAR: Task(
        "resnet9",
        16,
        {
            "cross-entropy": Setting("ce", 0.2, options={"label_smoothing": 0.1}, precision="bfloat16"),
            "NCMI": Setting("ncmi", 0.3, precision="bfloat16"),
            "NCMI, focus": Setting("ncmi", 0.3, options=FOCUS, centroid_lr=0.3, precision="bfloat16"),
        },
        {"10000-images": Budget(30, 10_000), "short": Budget(8), "long": Budget(16)},
    ),
}
# For a GPU.
PAPER_TASK = Task(
    "resnet18",
    200,
    {
        "cross-entropy": Setting("ce", 0.1, milestones=MILESTONES),
        "NCMI, paper": PAPER,
        "NCMI, focus": Setting("ncmi", 1.0, options=FOCUS, centroid_lr=1.0),
    },
)


def _runs(
    experiment: str,
    datasets: Iterable[str],
    seeds: int,
    epochs: int | None,
    settings_of: Callable[[Task], dict[str, Setting]] = lambda task: task.settings,
    tasks: dict[str, Task] = TASKS,
    **changed: Any,
) -> list[Run]:
    """By data set, seed and setting; `changed` are fields of a run that are not its task's."""
    runs = [
        Run(experiment, dataset, task.network, name, setting, seed, epochs or task.epochs)
        for dataset in datasets
        for task in (tasks[dataset],)
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


def paper(datasets: Iterable[str], seeds: int, epochs: int | None) -> list[Run]:
    """The recipe of the paper, with ResNet-18 and 200 epochs, and the losses beside it."""
    return _runs("paper", datasets, seeds, epochs, tasks=dict.fromkeys(datasets, PAPER_TASK))


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
FINAL_EPOCHS = TASKS[PAIRS].budgets["short"].final


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


def _cifar_entropy(draw: random.Random, smoothing: tuple[float, ...]) -> Setting:
    setting = Setting("ce", _log_uniform(draw, 0.05, 1.0), draw.choice((2e-4, 5e-4, 1e-3)), precision="bfloat16")
    return dataclasses.replace(setting, options={"label_smoothing": draw.choice(smoothing)})


def _cifar_ncmi(draw: random.Random, centroid_lrs: tuple[float, ...], **choices: tuple[Any, ...]) -> Setting:
    return Setting(
        "ncmi",
        _log_uniform(draw, 0.05, 1.0),
        draw.choice((2e-4, 5e-4, 1e-3)),
        features=draw.choice((100, 192)),
        options={"temperature": draw.choice((0.3, 1.0))} | {name: draw.choice(of) for name, of in choices.items()},
        centroid_lr=draw.choice(centroid_lrs),
        centroid_scale=draw.choice((4.0, 10.0)),
        precision="bfloat16",
    )


Arms = dict[str, Callable[[random.Random], Setting]]
ARMS: Arms = {
    "cross-entropy": _cross_entropy_trial,
    "NCMI, equal weights": lambda draw: _ncmi_trial(draw, (0.0,)),
    "NCMI, focus": lambda draw: _ncmi_trial(draw, (3.0, 10.0, 30.0)),
}


_RATIOS, _LEARNT, _FOCI = ("batch", "sample"), (0.1, 0.3, 1.0), (3.0, 10.0, 30.0)
CIFAR_ARMS: Arms = {
    "cross-entropy": lambda draw: _cifar_entropy(draw, (0.0,)),
    "cross-entropy, smoothed": lambda draw: _cifar_entropy(draw, (0.05, 0.1, 0.2)),
    "NCMI, equal weights": lambda draw: _cifar_ncmi(draw, (0.0, *_LEARNT), ratio=_RATIOS),
    "NCMI, focus": lambda draw: _cifar_ncmi(draw, (0.0, *_LEARNT), ratio=_RATIOS, separation_focus=_FOCI),
    "NCMI, soft margin": lambda draw: _cifar_ncmi(
        draw,
        (0.0, *_LEARNT),
        ratio=("soft_margin",),
        sharpness=(2.0, 4.0, 8.0),
        separation_focus=(0.0, *_FOCI),
    ),
    "NCMI, several centroids": lambda draw: _cifar_ncmi(
        draw,
        _LEARNT,
        ratio=_RATIOS,
        centroids_per_class=(2, 4),
        centroid_focus=(2.0, 4.0, 8.0),
        separation_focus=(0.0, *_FOCI),
    ),
}


def arms_of(dataset: str) -> Arms:
    """What the search compares on a data set."""
    return CIFAR_ARMS if dataset == CIFAR else ARMS


def trials(dataset: str, count: int = TRIALS) -> dict[str, Setting]:
    """The settings of the search by name, always the same ones: the first `count` of each arm."""
    drawn = {arm: (random.Random(0), draw) for arm, draw in arms_of(dataset).items()}
    # One of each arm at a time, so that a search that is stopped has given all of them as many.
    return {
        f"{arm}: trial {trial}": draw_setting(draw)
        for trial in range(count)
        for arm, (draw, draw_setting) in drawn.items()
    }


def _budgets(dataset: str, names: Iterable[str] | None, epochs: int | None) -> list[Budget]:
    budgets = TASKS[dataset].budgets
    if unknown := [name for name in names or () if name not in budgets]:
        raise ValueError(f"--budget: got {unknown[0]!r}, expected of {', '.join(budgets)} for {dataset}")
    found = [budgets[name] for name in names or budgets]
    if epochs is not None and len(found) > 1:
        raise ValueError(f"--epochs: got {epochs} with {len(found)} budgets, which differ by it; expected one --budget")
    return found


def search(
    datasets: Iterable[str], seeds: int, epochs: int | None, budgets: Iterable[str] | None = None, count: int = TRIALS
) -> list[Run]:
    """The trials at each budget, by the validation part of the data set.

    Raises:
        ValueError: a data set has no budget of such a name, or `epochs` are for several.
    """
    runs: list[Run] = []
    for dataset in datasets:
        for budget in _budgets(dataset, budgets, epochs):
            settings, name = trials(dataset, count), budget.dataset(dataset)
            found = _runs("search", [dataset], seeds, epochs or budget.epochs, lambda _, found=settings: found)  # type: ignore[misc]
            runs += [dataclasses.replace(run, dataset=name) for run in found]
    return _validated(runs)


def chosen(
    rows: Iterable[dict[str, str]], dataset: str, budget: Budget, count: int = TRIALS
) -> dict[str, tuple[str, Setting]]:
    """By arm, the trial of the highest validation accuracy (mean over seeds), from the rows of the CSV file.

    Raises:
        ValueError: the search has not been run on this data set at this budget, or not to its end.
    """
    found: dict[str, list[float]] = {}
    where = ("search", budget.dataset(dataset) + VALIDATION, TASKS[dataset].network, str(budget.epochs))
    for row in rows:
        if tuple(row[name] for name in ("experiment", "dataset", "network", "epochs")) == where:
            found.setdefault(row["setting"], []).append(float(row["accuracy"]))
    every = trials(dataset, count)
    if missing := [name for name in every if name not in found]:
        raise ValueError(
            f"search: {len(missing)} of {len(every)} trials on {budget.dataset(dataset)}, {budget.epochs} epochs, are "
            "missing; run `search` first"
        )
    best = {}
    for arm in arms_of(dataset):
        names = [name for name in every if name.startswith(f"{arm}: ")]
        name = max(names, key=lambda name: sum(found[name]) / len(found[name]))
        best[arm] = name, every[name]
    return best


def final(
    datasets: Iterable[str],
    seeds: int,
    epochs: int | None,
    rows: Iterable[dict[str, str]],
    budgets: Iterable[str] | None = None,
    count: int = TRIALS,
) -> list[Run]:
    """The chosen trial of each arm, and the documented recipe, trained on all training images, for the test set.

    Of a budget of fewer images, on as many of all.
    """
    rows, runs = list(rows), []
    for dataset in datasets:
        for budget in _budgets(dataset, budgets, epochs):
            settings = {f"{arm}: chosen": s for arm, (_, s) in chosen(rows, dataset, budget, count).items()}
            settings["NCMI, focus: recipe"] = TASKS[dataset].settings["NCMI, focus"]
            for length in (epochs,) if epochs else budget.final or (budget.epochs,):
                found = _runs("final", [dataset], seeds, length, lambda _, found=settings: found)  # type: ignore[misc]
                runs += [dataclasses.replace(run, dataset=budget.dataset(dataset)) for run in found]
    return runs
