"""One training run: what is trained and how, and what is measured of it."""

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from demo import concentration_and_separation
from images import Images
from ncmi_accuracy import checkpoint_steps
from networks import build
from pytorch_metric_learning.losses import SupConLoss
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_calibration_error

from ncmi_kernels import CentroidSGD, NCMILoss

PRECISIONS = ("float32", "bfloat16")
LOSSES = ("ce", "ncmi", "supcon")
SAMPLE = 10_000  # of the training images: for the class means and the training accuracy
EVALUATION_BATCH = 1000
SUPCON_TEMPERATURE = 0.1
BINS = 15  # of the calibration error
STEP = ", step "  # between the names of a setting and of its checkpoint


@dataclass(frozen=True)
class Setting:
    """How a network is trained; SGD with momentum, a warm-up of one epoch, a cosine down to zero.

    Attributes:
        loss: of `LOSSES`.
        lr: of the network, at a batch of 128; it goes with the batch size.
        weight_decay: of the network.
        batch_size: images a step.
        features: outputs of the network; None for as many as there are classes. Cross-entropy has no choice.
        options: of NCMILoss, or of nn.CrossEntropyLoss.
        centroid_lr: 0 for fixed centroids; it does not go with the batch size. Joint training with the network.
        centroid_scale: the length of the initial centroid logits, where it is not NCMILoss's own.
        milestones: divide the rate by 5 at these epochs, without warm-up, in the place of the cosine.
        precision: of `PRECISIONS`; bfloat16 is torch.autocast's, of the network alone.
        centroid_sgd: arguments of CentroidSGD for steps that alternate, in the place of `centroid_lr`; `start_epoch` in
            the place of `start_step`.
    """

    loss: str
    lr: float
    weight_decay: float = 5e-4
    batch_size: int = 128
    features: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    centroid_lr: float = 0.0
    centroid_scale: float | None = None
    milestones: tuple[int, ...] = ()
    centroid_sgd: dict[str, Any] | None = None
    precision: str = "float32"


@dataclass(frozen=True)
class Run:
    """One network to train: the first columns of a row."""

    experiment: str
    dataset: str
    network: str
    name: str  # of the setting
    setting: Setting
    seed: int
    epochs: int
    checkpoints: int = 0  # how many to measure on the way, each a row of its own

    @property
    def key(self) -> tuple[str, ...]:
        """What tells it from other runs in the CSV file."""
        return tuple(
            map(
                str, (self.experiment, self.dataset, self.network, self.setting.loss, self.name, self.seed, self.epochs)
            )
        )


class Row(NamedTuple):
    """What was measured of a network: a line of the CSV file. Accuracies and `ece` in percent, divergences in nats."""

    experiment: str
    dataset: str
    network: str
    loss: str
    setting: str
    seed: int
    epochs: int
    train_accuracy: float
    accuracy: float
    cmi: float
    gamma: float
    ncmi: float
    ece: float
    seconds: float


def train(
    run: Run,
    images: Images,
    work: Path | None = None,
    on_epoch: Callable[[], object] = lambda: None,
    on_end: Callable[[nn.Module, nn.Module], object] = lambda network, criterion: None,
    device: str = "cpu",
) -> list[Row]:
    """Train a network and measure it.

    Args:
        run: what to train.
        images: the data.
        work: a file to keep the state in at the end of each epoch, so that a run that was killed goes on from there,
            if it had the same setting; removed at the end. None to keep nothing.
        on_epoch: called after each epoch.
        on_end: called with the trained network and the criterion, both in evaluation mode.
        device: that trains; what is measured of the outputs is measured on the CPU.

    Returns:
        One row; with checkpoints, one for each of them.

    Raises:
        RuntimeError: the setting is of bfloat16 and the device has none.
    """
    check_precision(run.setting.precision, device)
    torch.manual_seed(run.seed)
    images = images.to(device)
    parts = _build(run, images, device)
    network, criterion, optimizer = parts["network"], parts["criterion"], parts["optimizer"]
    centroid_optimizer = parts.get("centroids")
    steps = math.ceil(len(images.train_x) / run.setting.batch_size)
    parts["schedule"] = torch.optim.lr_scheduler.LambdaLR(optimizer, _schedule(run, steps))
    keep = checkpoint_steps(run.epochs * steps, run.checkpoints)
    state: dict[str, Any] = {"run": repr(run), "epoch": 0, "seconds": 0.0, "rows": []}
    if work is not None and work.exists():
        state = _restore(work, parts, state)
    rows = [Row(*row) for row in state["rows"]]
    seconds: float = state["seconds"]
    for epoch in range(state["epoch"], run.epochs):
        start = time.perf_counter()
        for step, batch in enumerate(torch.randperm(len(images.train_x)).split(run.setting.batch_size)):
            if len(batch) == 1:
                continue  # which batch normalisation cannot take
            batch = batch.to(device)
            target = images.train_y[batch]
            seen = _see(images, images.train_x[batch], augment=True)
            with _autocast(run.setting, device):
                outputs = network(seen)
            outputs = outputs.float()
            loss = criterion(outputs, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            parts["schedule"].step()
            if centroid_optimizer is not None:
                centroid_optimizer.step(outputs, target)
            if epoch * steps + step + 1 in keep:
                paused = time.perf_counter()
                name = f"{run.name}{STEP}{epoch * steps + step + 1}"
                rows.append(_row(run, name, network, criterion, images, seconds + paused - start))
                network.train(), criterion.train()
                start += time.perf_counter() - paused
        seconds += time.perf_counter() - start
        if work is not None and epoch + 1 < run.epochs:
            rows_so_far = [tuple(row) for row in rows]
            _save(work, parts, {"run": repr(run), "epoch": epoch + 1, "seconds": seconds, "rows": rows_so_far})
        on_epoch()
    if not run.checkpoints:
        rows = [_row(run, run.name, network, criterion, images, seconds)]
    if work is not None:
        work.unlink(missing_ok=True)
    on_end(network, criterion)
    return rows


def _build(run: Run, images: Images, device: str) -> dict[str, Any]:
    setting = run.setting
    features = setting.features or images.classes
    example = _see(images, images.train_x[:1], augment=False)
    network = build(run.network, example.cpu(), features).to(device).train()
    groups = [{"params": list(network.parameters()), "lr": setting.lr * setting.batch_size / 128}]
    groups[0]["weight_decay"] = setting.weight_decay
    parts: dict[str, Any] = {"network": network}
    if setting.loss == "ce":
        if features != images.classes:
            raise ValueError(f"features: got {features} for cross-entropy, expected {images.classes}, one a class")
        parts["criterion"] = nn.CrossEntropyLoss(**setting.options)
    elif setting.loss == "supcon":
        parts["criterion"] = SupConLoss(**{"temperature": SUPCON_TEMPERATURE, **setting.options})
    elif setting.loss == "ncmi":
        learn = bool(setting.centroid_lr)
        criterion = NCMILoss(images.classes, features, learn_centroids=learn, **setting.options)
        if setting.centroid_scale is not None:
            with torch.no_grad():
                criterion.centroid_logits.copy_(setting.centroid_scale * F.normalize(criterion.centroid_logits, dim=1))
        criterion.to(device)
        if learn:
            groups.append({"params": [criterion.centroid_logits], "lr": setting.centroid_lr, "weight_decay": 0.0})
        if setting.centroid_sgd is not None:
            arguments = dict(setting.centroid_sgd)
            steps = math.ceil(len(images.train_x) / setting.batch_size)
            arguments["start_step"] = arguments.pop("start_epoch", 0) * steps
            parts["centroids"] = CentroidSGD(criterion, **arguments)
        parts["criterion"] = criterion
    else:
        raise ValueError(f"loss: got {setting.loss!r}, expected one of {', '.join(LOSSES)}")
    parts["optimizer"] = torch.optim.SGD(groups, momentum=0.9)
    return parts


def _schedule(run: Run, steps: int) -> Callable[[int], float]:
    if run.setting.milestones:
        return lambda step: 0.2 ** sum(step >= steps * epoch for epoch in run.setting.milestones)
    decay = max(1, steps * (run.epochs - 1))
    return lambda step: min((step + 1) / steps, (1 + math.cos(math.pi * max(0, step - steps) / decay)) / 2)


def _save(path: Path, parts: dict[str, Any], state: dict[str, Any]) -> None:
    state["rng"] = torch.get_rng_state()
    state["cuda_rng"] = torch.cuda.get_rng_state_all()
    state["parts"] = {name: part.state_dict() for name, part in parts.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(".new")
    torch.save(state, whole)
    os.replace(whole, path)  # so that a kill in between leaves the last one


def _restore(path: Path, parts: dict[str, Any], start: dict[str, Any]) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, map_location="cpu")
    if state.get("run") != start["run"]:  # the plan has changed since; the names are the same
        return start
    for name, part in parts.items():
        part.load_state_dict(state["parts"][name])
    torch.set_rng_state(state["rng"])
    torch.cuda.set_rng_state_all(state["cuda_rng"])
    return state


def check_precision(precision: str, device: str) -> None:
    """Refuse bfloat16 where it would not run, or many times slower than float32.

    Raises:
        ValueError: another precision.
        RuntimeError: no bfloat16.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision: got {precision!r}, expected one of {', '.join(PRECISIONS)}")
    if precision == "bfloat16":
        cuda = torch.device(device).type == "cuda"
        if not (torch.cuda.is_bf16_supported() if cuda else torch.ops.mkldnn._is_mkldnn_bf16_supported()):
            raise RuntimeError(f"precision: got bfloat16, which {device} does not have, expected --precision float32")


def _autocast(setting: Setting, device: str) -> torch.autocast:
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=setting.precision == "bfloat16")


def _see(images: Images, x: Tensor, *, augment: bool) -> Tensor:
    return images.prepare(x, augment).contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------------------------
# What is measured
# ------------------------------------------------------------------------------------------------------------


def _row(run: Run, name: str, network: nn.Module, criterion: nn.Module, images: Images, seconds: float) -> Row:
    """Measure a network; leaves it in evaluation mode."""
    network.eval(), criterion.eval()
    with _autocast(run.setting, images.train_x.device.type):
        known, outputs = (outputs_of(network, images, x).cpu() for x in (images.train_x[:SAMPLE], images.test_x))
    known_y, test_y = images.train_y[:SAMPLE].cpu(), images.test_y.cpu()
    device = images.train_x.device
    score = _scorer(criterion.cpu(), known, known_y, images.classes)
    scores = score(outputs)
    cmi, gamma = concentration_and_separation(outputs, test_y, images.classes)
    row = Row(
        run.experiment,
        run.dataset,
        run.network,
        run.setting.loss,
        name,
        run.seed,
        run.epochs,
        _accuracy(score(known), known_y),
        _accuracy(scores, test_y),
        cmi,
        gamma,
        cmi / gamma,
        calibration_error(scores, test_y),
        seconds,
    )
    criterion.to(device)
    return row


@torch.no_grad()
def outputs_of(network: nn.Module, images: Images, x: Tensor) -> Tensor:
    """What an evaluated network makes of images [N, channels, H, W]: [N, M]."""
    return torch.cat([network(_see(images, part, augment=False)).float() for part in x.split(EVALUATION_BATCH)])


def _scorer(criterion: nn.Module, known: Tensor, known_y: Tensor, classes: int) -> Callable[[Tensor], Tensor]:
    """Scores [N, C] from outputs [N, M], the highest for the predicted class.

    Cross-entropy: the logits. NCMI: minus the divergence from the class means of `known`, the paper's evaluation.
    SupCon: the cosine with the mean direction of each class.
    """
    if isinstance(criterion, NCMILoss):
        criterion.fit_class_means(_batches(known, known_y))
        return lambda outputs: criterion.scores(outputs, class_means=True)
    if isinstance(criterion, SupConLoss):
        directions = F.normalize(known, dim=1)
        means = torch.zeros(classes, known.shape[1]).index_add_(0, known_y, directions)
        return lambda outputs: F.normalize(outputs, dim=1) @ F.normalize(means, dim=1).T
    return lambda outputs: outputs


def _batches(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(x.split(EVALUATION_BATCH), y.split(EVALUATION_BATCH), strict=True)


def _accuracy(scores: Tensor, target: Tensor) -> float:
    return 100 * (scores.argmax(dim=1) == target).double().mean().item()


def calibration_error(scores: Tensor, target: Tensor) -> float:
    """Expected calibration error in percent of the softmax of the scores [N, C] at their best temperature.

    The scores of the losses are of different scales, and only cross-entropy's are meant to be logits. So each gets the
    temperature that makes the targets of one half of the images likeliest, and the error (15 bins, by the largest
    probability) is that of the other half; the mean of both ways.
    """
    scores = scores.double()
    finite = scores.isfinite()
    if not finite.all():  # a class without a mean scores -inf
        scores = scores.masked_fill(~finite, scores[finite].min().item() if finite.any() else 0.0)
    halves = [(scores[part::2], target[part::2]) for part in (0, 1)]
    return sum(_error_at(_temperature(*a), *b) for a, b in (halves, halves[::-1])) / 2


def _temperature(scores: Tensor, target: Tensor) -> float:
    spread = scores.std(dim=1).mean().item() or 1.0

    def loss(log_factor: float) -> float:
        return F.cross_entropy(scores * (math.exp(log_factor) / spread), target).item()

    return spread / math.exp(minimize_scalar(loss, bounds=(-7, 7), method="bounded").x)


def _error_at(temperature: float, scores: Tensor, target: Tensor) -> float:
    probabilities = torch.softmax(scores / temperature, dim=1)
    return 100 * multiclass_calibration_error(probabilities, target, scores.shape[1], n_bins=BINS, norm="l1").item()
