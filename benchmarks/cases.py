"""The shapes and the implementations that the benchmark and its tests share.

Every implementation is a criterion, `criterion(z, y) -> loss`, with z [B, M] and y [B]. The NCMI ones use the
defaults of :class:`NCMILoss` in training mode, so each of them also moves the running centre in every step.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ncmi_kernels import NCMILoss, reference

DTYPE = torch.float32

# Tensors of B C M elements that live at once in a step of the literal form: measured 4.0 to 4.2.
LITERAL_TENSORS = 4.5


class Shape(NamedTuple):
    """Batch size, number of classes and feature dimension."""

    B: int
    C: int
    M: int

    def __str__(self) -> str:
        return f"{self.B}x{self.C}x{self.M}"

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """The inverse of str: "256x1000x1000"."""
        sizes = [int(size) for size in text.split("x")]
        if len(sizes) != 3 or min(sizes) < 1 or sizes[1] < 2 or sizes[2] < 2:
            raise ValueError(f"shape: got {text!r}, expected BxCxM with B >= 1, C >= 2 and M >= 2")
        return cls(*sizes)

    def literal_bytes(self) -> int:
        """About what a forward and backward step of the literal form allocates."""
        return int(LITERAL_TENSORS * self.B * self.C * self.M * DTYPE.itemsize)


SHAPES = (Shape(128, 100, 512), Shape(256, 1000, 1000), Shape(1024, 1000, 2048), Shape(4096, 1000, 1000))


def batch(shape: Shape, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features z [B, M], a leaf that requires a gradient, and targets y [B] that suit cross-entropy too."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(shape.B, shape.M, dtype=DTYPE, generator=generator).requires_grad_()
    return z, torch.randint(min(shape.C, shape.M), (shape.B,), generator=generator)


def _ncmi(shape: Shape, *, learn_centroids: bool = False, learnt: bool = False, **options: Any) -> NCMILoss:
    """`learnt`: centroids that learning has moved. Those of the start, one-hot, the kernels need not read."""
    criterion = NCMILoss(shape.C, shape.M, learn_centroids=learn_centroids, dtype=DTYPE, **options)
    if learnt:
        noise = torch.randn(shape.C, shape.M, dtype=DTYPE, generator=torch.Generator().manual_seed(1))
        criterion.centroid_logits.data.add_(0.05 * noise)
    return criterion


class Collapsed(nn.Module):
    """The loss for fixed centroids as a careful user would write it in PyTorch, compiled.

    It differs from `reference.loss` in its own favour: what depends on the centroids alone is computed once,
    as NCMILoss does; at C > B that is most of the work.
    """

    log_q: Tensor
    mean_log_q: Tensor
    center: Tensor
    seen: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        ncmi = _ncmi(shape)
        options = ncmi.options
        log_q = reference.log_activation(ncmi.centroid_logits.detach(), options.activation)
        self.register_buffer("log_q", log_q)
        self.register_buffer("mean_log_q", log_q.mean(dim=0))
        self.register_buffer("center", ncmi.center)
        self.register_buffer("seen", torch.zeros((), dtype=torch.bool))
        self.constants: tuple[Any, ...] = (
            options.temperature,
            options.l2_normalize,
            options.activation,
            options.eps,
            ncmi.center_momentum,
        )

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """The loss of features z [B, M] and targets y [B]."""
        return _compiled(z, y, self.log_q, self.mean_log_q, self.center, self.seen, *self.constants)


class Literal(nn.Module):
    """The loss for fixed centroids as the paper writes it, with its [B, C, M] tensor."""

    seen: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.ncmi = _ncmi(shape)
        self.momentum: Any = self.ncmi.center_momentum
        self.register_buffer("seen", torch.zeros((), dtype=torch.bool))

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """The loss of features z [B, M] and targets y [B]."""
        ncmi = self.ncmi
        _move_center(z, ncmi.center, self.seen, self.momentum)
        return reference.loss(z, y, ncmi.centroid_logits, ncmi.center, None, ncmi.options, literal=True)


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


def _no_compiler(shape: Shape) -> str | None:
    compiler = os.environ.get("CXX", "g++")
    return None if shutil.which(compiler) else f"torch.compile needs a C++ compiler ({compiler})"


def _no_memory(shape: Shape) -> str | None:
    needed, free = shape.literal_bytes(), free_bytes()
    if needed <= free // 2:
        return None
    return f"about {needed / 2**30:.0f} GiB, more than half of the {free / 2**30:.0f} GiB that are free"


def free_bytes() -> int:
    """Memory that this process may still take: what the system has, within the limit of its cgroup."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (maximum := limit.read_text().strip()) != "max":
        free = min(free, int(maximum) - int(used.read_text()))
    return free


@dataclass(frozen=True)
class Implementation:
    """One thing to measure.

    Attributes:
        name: in tables, CSV files and test names.
        build: makes a fresh criterion for a shape.
        obstacle: why it cannot be measured at a shape, or None.
        share: of the measuring time; it sits out rounds while it has used more. 1 never sits out.
        heavy: a step may take seconds and gigabytes, so it is not run more often than needed.
    """

    name: str
    build: Callable[[Shape], nn.Module]
    obstacle: Callable[[Shape], str | None] = lambda shape: None
    share: float = 1.0
    heavy: bool = False


CROSS_ENTROPY = Implementation("cross_entropy", lambda shape: nn.CrossEntropyLoss())
NCMI_BATCH = Implementation("ncmi batch", _ncmi)
NCMI_SAMPLE = Implementation("ncmi sample", lambda shape: _ncmi(shape, ratio="sample"))
NCMI_LEARNT = Implementation("ncmi batch, learnt", lambda shape: _ncmi(shape, learnt=True))
NCMI_CENTROIDS = Implementation("ncmi batch + centroids", lambda shape: _ncmi(shape, learn_centroids=True, learnt=True))
EAGER = Implementation("collapsed eager", lambda shape: _ncmi(shape, backend="reference"), share=0.15)
COMPILED = Implementation("collapsed compiled", Collapsed, obstacle=_no_compiler, share=0.15)
LITERAL = Implementation("literal", Literal, obstacle=_no_memory, share=0.15, heavy=True)

KERNELS = (NCMI_BATCH, NCMI_SAMPLE, NCMI_LEARNT, NCMI_CENTROIDS)
IMPLEMENTATIONS = (CROSS_ENTROPY, *KERNELS, EAGER, COMPILED, LITERAL)
