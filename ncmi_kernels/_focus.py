"""The way of a batch with `separation_focus`, whose sum over the classes does not factorise: as :mod:`_plain`.

The divergences of all samples and classes are a product of [B, M] and [M, C], as the logits of a linear head are, and
each gradient takes another one. The rest is the same operators: a row is compared with a mixture of the centroids,
weighed by how near they are, in the place of the mean of all of them.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ncmi_kernels import _ops, _plain, reference
from ncmi_kernels._modes import concrete
from ncmi_kernels._options import Options
from ncmi_kernels._problem import Problem
from ncmi_kernels._schema import ALL_MEAN, CLASS_LOG_NORM, INVERSE_NORM, MEAN_LOG_NORM, SCALE, SHIFT


class Table(NamedTuple):
    """:class:`_plain.Table`, and logarithms relative to what the classes share, hence small."""

    log_activation: Tensor  # [C, M]
    activation: Tensor  # [C, M], or [0, M] for sample_to_centroid
    reference: Tensor  # [2, M]
    norms: Tensor  # [C + 1, 8] float64
    relative: Tensor  # [C, M], log q less what the classes share
    distribution: Tensor  # [C, M] q, or [0, M] for sample_to_centroid
    entropy: Tensor  # [C], sum_k q_k relative_k, or [0]


def table_of(centroid_logits: Tensor, options: Options, backend: str) -> Table:
    """The table of centroid logits [C, M], float32 or float64. Not differentiable: the autograd Functions are."""
    with torch.no_grad(), reference.no_autocast(centroid_logits.device):
        table = _plain.table_of(centroid_logits, options, backend)
        log_norm = table.norms[:-1, CLASS_LOG_NORM, None]
        above_mean = (log_norm - table.norms[-1, MEAN_LOG_NORM]).to(table.log_activation.dtype)
        relative = table.log_activation - table.reference[0] - above_mean
        distribution = table.activation
        if options.centroid_to_sample:
            distribution = distribution * (-log_norm).exp().to(distribution.dtype)
        entropy = (distribution * relative[: len(distribution)]).sum(dim=1)
        return Table(*table, relative, distribution, entropy)


class Rows(NamedTuple):
    """What the backward passes need to know of a batch; of ignored rows any finite numbers."""

    stats: Tensor  # [B, 7] float64, those of the operators; all_mean is that to the row's own mixture
    coefficients: Tensor | None  # [B, 4] float64; None where there are only terms
    nearness: Tensor  # [B, C], the weights of the other classes, with sum one; 0 for the own one
    distribution: Tensor  # [B, M] p
    relative: Tensor | None  # [B, M] log p less what the classes share; centroid_to_sample only


def forward(input: Tensor, centroid_logits: Tensor, problem: Problem, with_grad: bool = False) -> _plain.Found:
    """As :func:`_plain.forward`, but that a gradient never comes of the same pass."""
    if problem.table is None:
        problem = problem._replace(table=table_of(centroid_logits, problem.options, problem.backend))
    values, rows = terms(input, problem)
    result, coefficients, means = _plain.reduce(values, rows.stats, problem)
    rows = rows._replace(coefficients=coefficients)
    return _plain.Found(result.to(centroid_logits.dtype), means, rows, problem.table, problem.center)


# Nothing that is kept is a view or comes of an operation in place: torch.compile refuses to keep an alias.
def terms(input: Tensor, problem: Problem) -> tuple[Tensor, Rows]:
    """As :func:`_plain.terms`; without a graph."""
    with torch.no_grad(), reference.no_autocast(input.device):
        return _terms(input, problem)


def _terms(input: Tensor, problem: Problem) -> tuple[Tensor, Rows]:
    target, center, _, options, backend, table, *_ = problem
    dtype = table.relative.dtype
    values, stats = _ops.operators(backend).terms(input, target, center, *table[:4], *options.for_terms)
    kept, classes = _classes(problem)
    inverse_norm = stats[:, INVERSE_NORM]
    log_inverse_norm = torch.where(kept, inverse_norm, 1).log() + table.norms[-1, MEAN_LOG_NORM]
    level = stats[:, ALL_MEAN] + log_inverse_norm  # sum_k p_k (log p_k less what the classes share)

    x = input.to(dtype)
    if center is not None:
        x = x - center
    # An ignored row may hold NaN, which zero times anything would keep. Only a CPU tells for nothing if there is one.
    if not (concrete(x) and x.is_cpu) or not kept.all():
        x = x.masked_fill(~kept[:, None], 0)
    p, log_activation = _activate(x, stats, inverse_norm, options, dtype)
    relative = None
    if log_activation is not None:
        relative = log_activation - table.reference[0] + log_inverse_norm.to(dtype)[:, None]
        divergence = torch.addmm(table.entropy, relative, table.distribution.T, alpha=-1)
    else:
        divergence = torch.addmm(level.to(dtype)[:, None], p, table.relative.T, alpha=-1)

    own = classes[:, None]
    divergence.clamp_(min=0).scatter_(1, own, torch.inf)  # rounding may leave less than zero
    nearest = divergence.amin(dim=1, keepdim=True).clamp_(min=torch.finfo(dtype).tiny)
    nearness = torch.softmax((divergence / nearest).mul_(-options.separation_focus), dim=1)
    from_mixture = divergence.scatter_(1, own, 0).mul_(nearness).sum(dim=1)
    share = (len(table.relative) - 1) / len(table.relative)  # what the other classes count for, together
    values = torch.stack([values[0], torch.where(kept, from_mixture.double() * share, 0)])
    stats = torch.cat([stats[:, :ALL_MEAN], (from_mixture - log_inverse_norm)[:, None]], dim=1)
    return values, Rows(stats, None, nearness, p, relative)


def _classes(problem: Problem) -> tuple[Tensor, Tensor]:
    """Which rows count, [B], and their classes, [B]; of the others any class."""
    kept = problem.target != problem.options.ignore_index
    return kept, problem.target.masked_fill(~kept, 0)


def _activate(
    x: Tensor, stats: Tensor, inverse_norm: Tensor, options: Options, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """p [B, M] of centred features, and for centroid_to_sample log a [B, M] as the operators have it."""
    norm = inverse_norm.to(dtype)[:, None]
    scale = stats[:, SCALE, None].to(dtype)
    # Shifted rows have every f at -2 or below, and so at least M (2 tau)^2 for the square of their length.
    shifts = not options.l2_normalize or 4 * x.shape[1] * options.temperature**2 < 1.01
    if not (shifts or options.softmax or options.centroid_to_sample):
        return torch.sigmoid(x * scale) * norm, None
    shift = stats[:, SHIFT, None].to(dtype)
    shifted = ((x - shift) * scale).clamp_(min=torch.finfo(dtype).min)  # finite, where the logits are
    if options.softmax:
        log_activation = shifted
        p = log_activation.exp() * norm
    else:
        # log 2 sigma, as the operators have it: small and exact where f is small, which log sigma + log 2 would not be.
        f = x * scale
        plain = f.clamp(max=0).sub_(f.abs().neg_().expm1_().div_(2).log1p_())
        below = shifted.sub_(f.clamp(max=0).exp_().log1p_())
        log_activation = torch.where(shift != 0, below, plain)  # NSF shifts by what is below zero, or not at all
        p = log_activation.exp() * (norm / 2)
    return p, log_activation if options.centroid_to_sample else None


def input_grad(input: Tensor, problem: Problem, rows: Rows, upstream: Tensor | None) -> Tensor:
    """As :func:`_plain.input_grad`."""
    target, center, _, options, backend, table, *_ = problem
    with torch.no_grad(), reference.no_autocast(input.device):
        if options.centroid_to_sample:
            mixture = rows.nearness @ table.distribution
        else:
            mixture = torch.addmm(table.reference[0], rows.nearness, table.relative)
    return _ops.operators(backend).input_grad(
        input,
        target,
        center,
        *table[:4],
        rows.stats,
        rows.coefficients,
        upstream,
        options.centroid_to_sample,
        options.ignore_index,
        mixture,
    )


def centroid_grad(
    input: Tensor, centroid_logits: Tensor, problem: Problem, rows: Rows, upstream: Tensor | None
) -> Tensor:
    """As :func:`_plain.centroid_grad`."""
    options, table = problem.options, problem.table
    kept, classes = _classes(problem)
    assert rows.coefficients is not None
    coefficients = rows.coefficients
    if upstream is not None:
        # Ignored rows have zeros, which an infinite gradient would not keep.
        coefficients = torch.where(kept, coefficients.T * upstream, 0).T
    with torch.no_grad(), reference.no_autocast(input.device):
        own, other = coefficients[:, :2].to(table.relative.dtype).T[:, :, None]
        weight = rows.nearness * other
        if rows.relative is not None:
            q = table.distribution
            grad = (table.relative * weight.sum(dim=0)[:, None]).addmm_(weight.T, rows.relative, alpha=-1).mul_(q)
            grad.index_add_(0, classes, rows.distribution * own, alpha=-1)
        else:
            log_norm = table.norms[:-1, CLASS_LOG_NORM, None] + (0 if options.softmax else math.log(2))
            q = (table.log_activation - log_norm.to(weight.dtype)).exp_()
            grad = weight.scatter_(1, classes[:, None], own).neg_().T @ rows.distribution
        grad.addcmul_(q, grad.sum(dim=1, keepdim=True), value=-1)
        return grad if options.softmax else grad.mul_(torch.sigmoid_(-centroid_logits))
