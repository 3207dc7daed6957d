"""The shapes and the implementations that all benchmarks and their tests share.

Every implementation is a criterion, `criterion(z, y) -> loss`, with z [B, M] and y [B]. The NCMI ones use the
defaults of :class:`NCMILoss` in training mode, so each of them also moves the running centre in every step.

compare.py runs this with older revisions of the package, too: what these may lack is looked up where it is used.
"""

import gc
import importlib.util
import os
import random
import shutil
import time
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import devices
import torch
import torch.nn.functional as F
from devices import CPU
from gpu_results import Traffic
from torch import Tensor, nn

import ncmi_kernels
from ncmi_kernels import NCMILoss, available_backends, reference

DTYPE = torch.float32

# Tensors of B C M elements that live at once in a step of the literal form: measured 4.0 to 4.2.
LITERAL_TENSORS = 4.5
CENTROID_LR, CENTROID_MOMENTUM = 0.1, 0.9


class Shape(NamedTuple):
    """Batch size, number of classes and feature dimension."""

    B: int
    C: int
    M: int

    def __str__(self) -> str:
        return f"{self.B}x{self.C}x{self.M}"

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """The inverse of str, for argparse: "256x1000x1000"."""
        sizes = [int(size) if size.isdecimal() else 0 for size in text.split("x")]
        if len(sizes) != 3 or min(sizes) < 1 or sizes[1] < 2 or sizes[2] < 2:
            raise ArgumentTypeError(f"got {text!r}, expected BxCxM with B >= 1, C >= 2 and M >= 2")
        return cls(*sizes)

    def literal_bytes(self) -> int:
        """About what a forward and backward step of the literal form allocates."""
        return int(LITERAL_TENSORS * self.B * self.C * self.M * DTYPE.itemsize)


TINY = Shape(6, 4, 10)  # all of its time is the cost of a call; and to try a program
SHAPES = (Shape(128, 100, 512), Shape(256, 1000, 1000), Shape(1024, 1000, 2048), Shape(4096, 1000, 1000))
CENTROID_SHAPES = (Shape(128, 100, 512), Shape(128, 1000, 2048), Shape(256, 1000, 2048), Shape(1024, 1000, 2048))
# A GPU is full from larger batches on only; the small ones are bound by the cost of a call.
SMALL_SHAPES = (*SHAPES[:2], Shape(4096, 100, 128))
GPU_SHAPES = (
    *SMALL_SHAPES,
    Shape(32768, 1000, 1024),
    Shape(32768, 1000, 4096),
    Shape(16384, 100, 16384),
    Shape(2048, 10, 131072),
)
MEMORY_SHAPE = Shape(256, 1000, 2048)
# Over one size each, the others as in the base.
SCALING_BASE = Shape(128, 1000, 512)
SCALING_AXES = {
    "C": (10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000),
    "M": (32, 128, 512, 2_048, 8_192, 32_768),
    "B": (8, 32, 128, 512, 2_048, 8_192, 32_768),
}


def batch(shape: Shape, seed: int = 0, dtype: torch.dtype = DTYPE, device: torch.device = CPU) -> tuple[Tensor, Tensor]:
    """Features z [B, M], a leaf that requires a gradient, and targets y [B] that suit cross-entropy too."""
    generator = torch.Generator(device).manual_seed(seed)
    z = torch.randn(shape.B, shape.M, dtype=dtype, device=device, generator=generator).requires_grad_()
    return z, torch.randint(min(shape.C, shape.M), (shape.B,), device=device, generator=generator)


def ncmi(shape: Shape, *, learn_centroids: bool = False, learnt: bool = False, **options: Any) -> NCMILoss:
    """`learnt`: centroids that learning has moved. Those of the start, one-hot, the CPU's kernels need not read."""
    criterion = NCMILoss(shape.C, shape.M, learn_centroids=learn_centroids, dtype=DTYPE, **options)
    if learnt:
        noise = torch.randn(shape.C, shape.M, dtype=DTYPE, generator=torch.Generator().manual_seed(1))
        criterion.centroid_logits.data.add_(0.05 * noise)
    return criterion


class CrossEntropyWithHead(nn.Module):
    """cross_entropy of a linear layer from M features to C logits, whose weight takes a gradient: B C M operations.

    Without a bias, which centroids do not have either.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head = nn.Linear(shape.M, shape.C, bias=False, dtype=DTYPE)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """The loss of features z [B, M] and targets y [B]."""
        return F.cross_entropy(self.head(z), y)


class CompiledCrossEntropy(nn.Module):
    """cross_entropy by torch.compile."""

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """The loss of logits z [B, M] and targets y [B]."""
        return _compiled_cross_entropy(z, y)


def _cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y)


_compiled_cross_entropy = torch.compile(_cross_entropy, dynamic=False, fullgraph=True)


class QuackCrossEntropy(nn.Module):
    """quack's cross-entropy; the mean is taken here where a version gives the losses by row."""

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """The loss of logits z [B, M] and targets y [B]."""
        from quack.cross_entropy import cross_entropy

        result: Tensor = cross_entropy(z, y)
        return result.mean() if result.dim() else result


def _liger(shape: Shape) -> nn.Module:
    from liger_kernel.transformers import LigerCrossEntropyLoss

    criterion: nn.Module = LigerCrossEntropyLoss()
    return criterion


class Collapsed(nn.Module):
    """The loss for fixed centroids as a careful user would write it in PyTorch, compiled or not.

    What depends on the centroids alone is computed once, as NCMILoss does; at C > B that is most of the work.
    """

    log_q: Tensor
    mean_log_q: Tensor
    center: Tensor
    seen: Tensor

    def __init__(self, shape: Shape, *, compiled: bool) -> None:
        super().__init__()
        self.loss = _compiled if compiled else _collapsed
        criterion = ncmi(shape)
        options = criterion.options
        log_q = reference.log_activation(criterion.centroid_logits.detach(), options.activation)
        self.register_buffer("log_q", log_q)
        self.register_buffer("mean_log_q", log_q.mean(dim=0))
        self.register_buffer("center", criterion.center)
        self.register_buffer("seen", torch.zeros((), dtype=torch.bool))
        self.constants: tuple[Any, ...] = (
            options.temperature,
            options.l2_normalize,
            options.activation,
            options.eps,
            criterion.center_momentum,
        )

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """The loss of features z [B, M] and targets y [B]."""
        return self.loss(z, y, self.log_q, self.mean_log_q, self.center, self.seen, *self.constants)


class Literal(nn.Module):
    """The loss for fixed centroids as the paper writes it, with its [B, C, M] tensor."""

    seen: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.ncmi = ncmi(shape)
        self.momentum: Any = self.ncmi.center_momentum
        self.register_buffer("seen", torch.zeros((), dtype=torch.bool))

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """The loss of features z [B, M] and targets y [B]."""
        own = self.ncmi
        _move_center(z, own.center, self.seen, self.momentum)
        return reference.loss(z, y, own.centroid_logits, own.center, None, own.options, literal=True)


def _move_center(z: Tensor, center: Tensor, seen: Tensor, momentum: float) -> None:
    with torch.no_grad():
        mean = z.mean(dim=0)
        center.copy_(torch.where(seen, momentum * center + (1 - momentum) * mean, mean))
        seen.fill_(True)


def _collapsed(
    z: Tensor,
    y: Tensor,
    log_q: Tensor,
    mean_log_q: Tensor,
    center: Tensor,
    seen: Tensor,
    temperature: float,
    l2_normalize: bool,
    activation: str,
    eps: float,
    momentum: float,
) -> Tensor:
    _move_center(z, center, seen, momentum)
    log_p = reference.log_probabilities(z, center, temperature, l2_normalize, activation)
    concentration = reference.kl_divergence(log_p, log_q[y]).mean()
    separation = reference.kl_divergence(log_p, mean_log_q).mean() - concentration / len(log_q)
    return concentration / (separation + eps)


# fullgraph: past the limit on recompilations this raises, where it would otherwise go on uncompiled.
_compiled = torch.compile(_collapsed, dynamic=False, fullgraph=True)


class CentroidStatistics(nn.Module):
    """What the loss needs of fixed centroids, computed once for each change of them."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.criterion = ncmi(shape, learnt=True)

    def forward(self, z: Tensor, y: Tensor) -> Any:
        """The statistics; of the batch only the place counts."""
        logits, options = self.criterion.centroid_logits, self.criterion.options
        backend = ncmi_kernels._backends.resolve(None, z)
        return ncmi_kernels._plain.table_of(logits, options, backend)


class CentroidStep(nn.Module):
    """A step of the centroids, with momentum, from features z [B, M] that have no graph.

    Args:
        shape: B, C and M.
        backend: of the criterion.
        after_forward: a forward pass of the same features comes before it, and is not part of it: as in training,
            where it belongs to the network's step.
        autograd: by what CentroidSGD replaces: the criterion, backward and torch.optim.SGD.
    """

    def __init__(
        self, shape: Shape, backend: str | None = None, *, after_forward: bool = False, autograd: bool = False
    ) -> None:
        super().__init__()
        self.criterion = ncmi(shape, learn_centroids=True, learnt=True, backend=backend)
        self.after_forward, self.autograd, self.centered = after_forward, autograd, False
        self.optimizer: Any = (
            torch.optim.SGD(self.criterion.parameters(), CENTROID_LR, momentum=CENTROID_MOMENTUM)
            if autograd
            else ncmi_kernels.CentroidSGD(self.criterion, CENTROID_LR, CENTROID_MOMENTUM)
        )

    def prepare(self, z: Tensor, y: Tensor) -> None:
        """What comes before a step."""
        if self.after_forward or not self.centered:
            self.criterion(z.detach(), y)
        if self.autograd and not self.centered:
            self.criterion.eval()  # the centre moves in the network's step
        self.centered = True

    def forward(self, z: Tensor, y: Tensor) -> None:
        """The step."""
        if self.autograd:
            self.optimizer.zero_grad()
            self.criterion(z.detach(), y).backward()
            self.optimizer.step()
        else:
            self.optimizer.step(z.detach(), y)


# ------------------------------------------------------------------------------------------------------------
# What is compared
# ------------------------------------------------------------------------------------------------------------

Obstacle = Callable[[Shape, torch.device], str | None]


def _needs(module: str) -> Obstacle:
    return lambda shape, device: None if importlib.util.find_spec(module) else f"{module} is not installed"


def _no_compiler(shape: Shape, device: torch.device) -> str | None:
    if device.type == "cpu":
        compiler = os.environ.get("CXX", "g++")
        return None if shutil.which(compiler) else f"torch.compile needs a C++ compiler ({compiler})"
    if not importlib.util.find_spec("triton"):
        return "torch.compile needs triton, which is not installed"
    compilers = [name for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name]
    return None if any(map(shutil.which, compilers)) else "torch.compile needs a C compiler, and none was found"


def _no_memory(shape: Shape, device: torch.device) -> str | None:
    needed, free = shape.literal_bytes(), devices.free_bytes(device)
    if needed <= free // 2:
        return None
    return f"memory: about {needed / 2**30:.0f} GiB, more than half of the {free / 2**30:.0f} GiB that are free"


_FEATURES_ALONE = Traffic()


@dataclass(frozen=True)
class Implementation:
    """One thing to measure.

    Attributes:
        name: in tables, CSV files and test names.
        build: makes a fresh criterion for a shape, on the CPU.
        obstacle: why it cannot be measured at a shape on a device, or None.
        traffic: what a step has to move.
        share: of the measuring time; it sits out rounds while it has used more. 1 never sits out. (bench_gpu.py and
            bench_scaling.py give all the same share.)
        beside: the name of another one of the same share, with which it has that share and all rounds in common.
        heavy: a step may take seconds and gigabytes, so it is not run more often than needed.
        kernels: one of this package's.
        compiled: its first step runs torch.compile.
        overwrites: its input does not survive a step.
    """

    name: str
    build: Callable[[Shape], nn.Module]
    obstacle: Obstacle = lambda shape, device: None
    traffic: Traffic = _FEATURES_ALONE
    share: float = 1.0
    beside: str = ""
    heavy: bool = False
    kernels: bool = False
    compiled: bool = False
    overwrites: bool = False


def kernels(backend: str | None = None) -> dict[str, Implementation]:
    """What of this package is measured, by its name without the backend, which is "ncmi" where the loss chooses it."""

    def needs_backend(shape: Shape, device: torch.device) -> str | None:
        return None if backend is None else available_backends()[backend]

    def implementation(name: str, build: Callable[[Shape], nn.Module], **traffic: bool) -> Implementation:
        moved = Traffic(**{"table": True, "centre": True, **traffic})
        return Implementation(f"{backend or 'ncmi'} {name}", build, needs_backend, moved, kernels=True)

    def loss(name: str, traffic: dict[str, bool], **options: Any) -> Implementation:
        return implementation(name, lambda shape: ncmi(shape, backend=backend, **options), **traffic)

    def step(name: str, **how: bool) -> Implementation:
        return implementation(name, lambda shape: CentroidStep(shape, backend, **how))

    return {
        "batch": loss("batch", {}),
        "sample": loss("sample", {"one_pass": True}, ratio="sample"),
        "batch, learnt": loss("batch, learnt", {}, learnt=True),
        "batch + centroids": loss("batch + centroids", {"centroids": True}, learn_centroids=True, learnt=True),
        "batch, no centre": loss("batch, no centre", {"centre": False}, center_momentum=None),
        "CentroidSGD": step("CentroidSGD"),
        "CentroidSGD after forward": step("CentroidSGD after forward", after_forward=True),
        "kernels, autograd, SGD": step("kernels, autograd, SGD", autograd=True),
    }


CROSS_ENTROPY = Implementation("cross_entropy", lambda shape: nn.CrossEntropyLoss())
CROSS_ENTROPY_WITH_HEAD = Implementation("cross_entropy with head", CrossEntropyWithHead, share=0.15)
COMPILED_CROSS_ENTROPY = Implementation(
    "cross_entropy compiled", lambda shape: CompiledCrossEntropy(), _no_compiler, compiled=True
)
OTHER_CROSS_ENTROPIES = (
    COMPILED_CROSS_ENTROPY,
    Implementation("liger cross_entropy", _liger, _needs("liger_kernel"), overwrites=True),
    Implementation("quack cross_entropy", lambda shape: QuackCrossEntropy(), _needs("quack")),
)

_OURS = kernels()
NCMI_BATCH, NCMI_SAMPLE = _OURS["batch"], _OURS["sample"]
NCMI_LEARNT, NCMI_CENTROIDS = _OURS["batch, learnt"], _OURS["batch + centroids"]
NCMI_STATISTICS = Implementation("ncmi statistics", CentroidStatistics, kernels=True)
KERNELS = (NCMI_BATCH, NCMI_SAMPLE, NCMI_LEARNT, NCMI_CENTROIDS)
NCMI_FOCUS = Implementation(
    "ncmi focus", lambda shape: ncmi(shape, separation_focus=10.0), share=0.15, beside=CROSS_ENTROPY_WITH_HEAD.name
)

_PLAIN = NCMI_BATCH.traffic
EAGER = Implementation("collapsed eager", lambda shape: Collapsed(shape, compiled=False), traffic=_PLAIN, share=0.15)
COMPILED = Implementation(
    "collapsed compiled", lambda shape: Collapsed(shape, compiled=True), _no_compiler, _PLAIN, share=0.15, compiled=True
)
LITERAL = Implementation("literal", Literal, _no_memory, _PLAIN, share=0.15, heavy=True)
IMPLEMENTATIONS = (
    CROSS_ENTROPY,
    COMPILED_CROSS_ENTROPY,
    *KERNELS,
    EAGER,
    COMPILED,
    LITERAL,
    CROSS_ENTROPY_WITH_HEAD,
    NCMI_FOCUS,
)

PLAIN_CENTROID_STEP = Implementation(
    "PyTorch, autograd, SGD", lambda shape: CentroidStep(shape, "reference", autograd=True), traffic=_PLAIN
)
CENTROID_STEPS = ("CentroidSGD", "CentroidSGD after forward", "kernels, autograd, SGD")  # of `kernels`


# ------------------------------------------------------------------------------------------------------------
# Rounds
# ------------------------------------------------------------------------------------------------------------


class Entry(Protocol):
    """What takes part in rounds; `spent` are the seconds that it has used."""

    candidate: Implementation
    spent: float


AnyEntry = TypeVar("AnyEntry", bound=Entry)


def run_rounds(
    entries: Sequence[AnyEntry],
    take: Callable[[list[AnyEntry], int, random.Random], object],
    deadline: float,
    *,
    least: int,
    most: int,
    each: int = 0,
    max_share: float | None = None,
    warm_up: int = 0,
) -> None:
    """Rounds without the garbage collector, until the deadline.

    Args:
        entries: of which the slow ones sit out rounds. Where all would, the light ones take part.
        take: takes the round of those that are due, adds to their `spent`, and is given the number of the round,
            negative in warm-up, and what to draw an order from.
        deadline: a reading of time.perf_counter. What the heavy ones use is put on top, and is not part of the time
            that the others have a share of: a step of seconds must not cost them their repetitions.
        least: rounds, whatever the deadline is.
        most: rounds.
        each: the first rounds, which nothing sits out.
        max_share: of the time, for each; None: Implementation.share.
        warm_up: rounds before these, for what never sits out.
    """
    order = random.Random(0)
    light = [entry for entry in entries if not entry.candidate.heavy]
    began = time.perf_counter()

    def is_due(entry: AnyEntry, number: int, elapsed: float) -> bool:
        mine, share = entry.candidate, max_share or entry.candidate.share
        if share == 1 or number < 0:
            return share == 1
        pair = [
            other for other in entries if mine.name == other.candidate.beside or mine.beside == other.candidate.name
        ]
        return number < each or sum(other.spent for other in (entry, *pair)) <= share * elapsed

    gc.collect()
    gc.disable()
    try:
        for number in range(-warm_up, most):
            now = time.perf_counter() - sum(entry.spent for entry in entries if entry.candidate.heavy)
            if number >= least and now > deadline:
                break
            due = [entry for entry in entries if is_due(entry, number, now - began)]
            take(due or [*light], number, order)
    finally:
        gc.enable()
