"""The shapes and the implementations that all benchmarks and their tests share.

Every implementation is a criterion, `criterion(z, y) -> loss`, with z [B, M] and y [B]. The NCMI ones use the
defaults of :class:`NCMILoss` in training mode, so each of them also moves the running centre in every step.

compare.py runs this with older revisions of the package, too: what these may lack is looked up where it is used.
"""

import importlib.util
import os
import shutil
from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import devices
import torch
import torch.nn.functional as F
from devices import CPU
from torch import Tensor, nn

import ncmi_kernels
from ncmi_kernels import NCMILoss, available_backends, reference

DTYPE = torch.float32
FORWARD, NO_GRAD, BACKWARD, FULL = "forward", "no-grad forward", "backward", "forward+backward"
CENTROID_STEP = "centroid step"
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
        if len(sizes) != 3 or min(sizes) < 1 or min(sizes[1:]) < 2:
            raise ArgumentTypeError(f"got {text!r}, expected BxCxM with B >= 1, C >= 2 and M >= 2")
        return cls(*sizes)

    def literal_bytes(self) -> int:
        """About what a step of the literal form allocates: 4.0 to 4.2 tensors of B C M elements were measured."""
        return int(4.5 * self.B * self.C * self.M * DTYPE.itemsize)


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


# ------------------------------------------------------------------------------------------------------------
# Criteria
# ------------------------------------------------------------------------------------------------------------


class SeveralCentroids(nn.Module):
    """C centroids in all, learnt with a focus, of a fourth as many classes."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.classes = max(2, shape.C // 4)
        options: dict[str, Any] = {"centroids_per_class": 4, "separation_focus": 10.0, "learn_centroids": True}
        self.ncmi = ncmi(shape._replace(C=self.classes), **options)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """The loss of features z [B, M] and targets y [B], of C classes."""
        return self.ncmi(z, y % self.classes)


class CrossEntropyWithHead(nn.Module):
    """cross_entropy of a linear layer from M features to C logits, whose weight takes a gradient: B C M operations.

    Without a bias, which centroids do not have either. `fused`: by torch's linear_cross_entropy, which keeps no logits.
    """

    def __init__(self, shape: Shape, *, fused: bool = False) -> None:
        super().__init__()
        self.head = nn.Linear(shape.M, shape.C, bias=False, dtype=DTYPE)
        self.fused = fused

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """The loss of features z [B, M] and targets y [B]."""
        if self.fused:
            return F.linear_cross_entropy(z, self.head.weight, y)
        return F.cross_entropy(self.head(z), y)


class Loss(nn.Module):
    """A function of logits z [B, M] and targets y [B] as a criterion; the mean, where it gives losses by row."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """The loss."""
        loss = self.function(z, y)
        return loss.mean() if loss.dim() else loss


def _cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y)


_compiled_cross_entropy = torch.compile(_cross_entropy, dynamic=False, fullgraph=True)


def _liger(shape: Shape) -> nn.Module:
    from liger_kernel.transformers import LigerCrossEntropyLoss

    criterion: nn.Module = LigerCrossEntropyLoss()
    return criterion


def _quack(shape: Shape) -> nn.Module:
    from quack.cross_entropy import cross_entropy

    return Loss(cross_entropy)


def _move_center(z: Tensor, center: Tensor, seen: Tensor, momentum: Any) -> None:
    with torch.no_grad():
        mean = z.mean(dim=0)
        center.copy_(torch.where(seen, momentum * center + (1 - momentum) * mean, mean))
        seen.fill_(True)


class Plain(nn.Module):
    """The loss for fixed centroids in PyTorch."""

    seen: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.ncmi = ncmi(shape)
        self.register_buffer("seen", torch.zeros((), dtype=torch.bool))


class Literal(Plain):
    """As the paper writes it, with its [B, C, M] tensor."""

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """The loss of features z [B, M] and targets y [B]."""
        own = self.ncmi
        _move_center(z, own.center, self.seen, own.center_momentum)
        return reference.loss(z, y, own.centroid_logits, own.center, None, own.options, literal=True)


class Collapsed(Plain):
    """As a careful user would write it, compiled or not.

    What depends on the centroids alone is computed once, as NCMILoss does; at C > B that is most of the work.
    """

    log_q: Tensor
    mean_log_q: Tensor

    def __init__(self, shape: Shape, *, compiled: bool) -> None:
        super().__init__(shape)
        self.loss = _compiled if compiled else _collapsed
        options = self.ncmi.options
        log_q = reference.log_activation(self.ncmi.centroid_logits.detach(), options.activation)
        self.register_buffer("log_q", log_q)
        self.register_buffer("mean_log_q", log_q.mean(dim=0))
        self.constants = options.temperature, options.l2_normalize, options.activation, options.eps

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """The loss of features z [B, M] and targets y [B]."""
        centre = self.ncmi.center, self.seen, self.ncmi.center_momentum
        return self.loss(z, y, self.log_q, self.mean_log_q, centre, self.constants)


def _collapsed(z: Tensor, y: Tensor, log_q: Tensor, mean_log_q: Tensor, centre: Any, constants: Any) -> Tensor:
    _move_center(z, *centre)
    *shown, eps = constants
    log_p = reference.log_probabilities(z, centre[0], *shown)
    concentration = reference.kl_divergence(log_p, log_q[y]).mean()
    separation = reference.kl_divergence(log_p, mean_log_q).mean() - concentration / len(log_q)
    return concentration / (separation + eps)


# fullgraph: past the limit on recompilations this raises, where it would otherwise go on uncompiled.
_compiled = torch.compile(_collapsed, dynamic=False, fullgraph=True)


def backend_of(device: torch.device) -> str:
    """The backend that the loss chooses there."""
    return ncmi_kernels._backends.resolve(None, torch.empty(0, device=device))


class CentroidStatistics(nn.Module):
    """What the loss needs of fixed centroids, computed once for each change of them."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.criterion = ncmi(shape, learnt=True)

    def forward(self, z: Tensor, y: Tensor) -> Any:
        """The statistics; of the batch only the place counts."""
        logits, options = self.criterion.centroid_logits, self.criterion.options
        operators = ncmi_kernels._ops.operators(backend_of(z.device))
        return operators.centroid_stats(logits.detach(), options.softmax, options.centroid_to_sample)


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


class Traffic(NamedTuple):
    """What an implementation has to read and write, besides one read of the features in each pass."""

    table: bool = False  # the rows of log q [C, M] of the batch's classes, float32, in each pass
    centre: bool = False  # the mean of the features, before the forward pass
    one_pass: bool = False  # the gradient is made in the forward pass, for float32
    centroids: bool = False  # gradient of the centroid logits [C, M], float32

    def model_bytes(self, shape: Shape, itemsize: int, mode: str, cache_bytes: int) -> int | None:
        """The bytes that a step has to move through memory; None where that is nothing.

        A floor, not what an implementation does move. cross_entropy is counted as two passes, which it is in torch.
        Finding the mean of the features reads them once more, from the cache where they fit into it. A batch of B
        samples has at most B classes, whose rows of log q it reads. A step of the centroids reads the features, reads
        and writes the centroids and their momentum, and writes the next log q.
        """
        B, C, M = shape
        features, table, own_rows = B * M * itemsize, 4 * C * M, 4 * min(B, C) * M
        if mode == CENTROID_STEP:
            return features + 5 * table
        forward = features + own_rows * self.table + table * self.centroids
        if self.centre and features > cache_bytes:
            forward += features
        if mode == NO_GRAD:
            return forward
        backward = 2 * features + own_rows * self.table
        if self.one_pass and itemsize == 4:
            forward, backward = forward + features, 0
        if self.centroids:
            backward += features + 2 * table
        return {FORWARD: forward, BACKWARD: backward, FULL: forward + backward}[mode] or None


Obstacle = Callable[[Shape, torch.device], str | None]


def _needs(module: str) -> Obstacle:
    return lambda shape, device: None if importlib.util.find_spec(module) else f"{module} is not installed"


def _no_linear_cross_entropy(shape: Shape, device: torch.device) -> str | None:
    return None if hasattr(F, "linear_cross_entropy") else f"torch {torch.__version__} has no linear_cross_entropy"


def _no_compiler(shape: Shape, device: torch.device) -> str | None:
    if device.type == "cpu":
        compiler = os.environ.get("CXX", "g++")
        return None if shutil.which(compiler) else f"torch.compile needs a C++ compiler ({compiler})"
    return _needs("triton")(shape, device)


def _no_memory(shape: Shape, device: torch.device) -> str | None:
    needed, free = shape.literal_bytes(), devices.free_bytes(device)
    if needed <= free // 2:
        return None
    return f"memory: about {needed / 2**30:.0f} GiB, more than half of the {free / 2**30:.0f} GiB that are free"


@dataclass(frozen=True)
class Implementation:
    """One thing to measure.

    Attributes:
        name: in tables, CSV files and test names.
        build: makes a fresh criterion for a shape, on the CPU.
        obstacle: why it cannot be measured at a shape on a device, or None.
        traffic: what a step has to move.
        share: of the measuring time, in bench_loss.py; it sits out rounds while it has used more. 1 never sits out.
        group: of implementations that have this share and all rounds in common; "": its own.
        heavy: a step may take seconds and gigabytes, so it is not run more often than needed.
        kernels: one of this package's.
        compiled: its first step runs torch.compile.
        overwrites: its input does not survive a step.
    """

    name: str
    build: Callable[[Shape], nn.Module]
    obstacle: Obstacle = lambda shape, device: None
    traffic: Traffic = Traffic()  # noqa: RUF009
    share: float = 1.0
    group: str = ""
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
CROSS_ENTROPY_WITH_HEAD = Implementation(
    "cross_entropy with head", CrossEntropyWithHead, share=0.15, group="with products"
)
LINEAR_CROSS_ENTROPY = Implementation(
    "linear_cross_entropy",
    lambda shape: CrossEntropyWithHead(shape, fused=True),
    _no_linear_cross_entropy,
    share=0.15,
    group="with products",
)
COMPILED_CROSS_ENTROPY = Implementation(
    "cross_entropy compiled", lambda shape: Loss(_compiled_cross_entropy), _no_compiler, compiled=True
)
OTHER_CROSS_ENTROPIES = (
    COMPILED_CROSS_ENTROPY,
    Implementation("liger cross_entropy", _liger, _needs("liger_kernel"), overwrites=True),
    Implementation("quack cross_entropy", _quack, _needs("quack")),
)

_OURS = kernels()
NCMI_BATCH, NCMI_SAMPLE = _OURS["batch"], _OURS["sample"]
NCMI_LEARNT, NCMI_CENTROIDS = _OURS["batch, learnt"], _OURS["batch + centroids"]
NCMI_STATISTICS = Implementation("ncmi statistics", CentroidStatistics, kernels=True)
KERNELS = (NCMI_BATCH, NCMI_SAMPLE, NCMI_LEARNT, NCMI_CENTROIDS)
NCMI_FOCUS = Implementation(
    "ncmi focus", lambda shape: ncmi(shape, separation_focus=10.0), share=0.15, group="with products"
)
NCMI_FOCUS_CENTROIDS = Implementation(
    "ncmi focus + centroids",
    lambda shape: ncmi(shape, separation_focus=10.0, learn_centroids=True, learnt=True),
    share=0.15,
    group="with products",
)
NCMI_SEVERAL_CENTROIDS = Implementation(
    "ncmi focus + centroids, 4 a class", SeveralCentroids, share=0.15, group="with products"
)
# As large as those of the head.
WITH_PRODUCTS = (LINEAR_CROSS_ENTROPY, NCMI_FOCUS, NCMI_FOCUS_CENTROIDS, NCMI_SEVERAL_CENTROIDS)

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
    *WITH_PRODUCTS,
)

CENTROID_STEPS = ("CentroidSGD", "CentroidSGD after forward", "kernels, autograd, SGD")  # of `kernels`
PLAIN_CENTROID_STEP = Implementation(
    "PyTorch, autograd, SGD", lambda shape: CentroidStep(shape, "reference", autograd=True), traffic=_PLAIN
)
OUR_NAMES = [each.name for each in (*KERNELS, NCMI_STATISTICS, NCMI_FOCUS)]
