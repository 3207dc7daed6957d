"""The loss with `separation_focus`, whose sum over the classes does not factorise: what :mod:`_ops` is without.

The divergences of all samples and classes are a product of [B, M] and [M, C], as the logits of a linear head are, and
each gradient takes another one. The rest is the same operators. A row's gradient is that towards a mixture of the
centroids, weighed by how near they are: the operator input_grad takes these mixtures as a table of centroids, one for
each row.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ncmi_kernels import _ops, _schema, reference
from ncmi_kernels._modes import concrete, jit_tracing, plain_backward, transforming
from ncmi_kernels._options import Options
from ncmi_kernels._problem import Problem
from ncmi_kernels._reduction import reduced, refuse_double_backward, row_weights

# Columns of the operators' `rows` (RowStats in csrc/layout.h) and `norms` (ClassStats, and AllStats in the last row).
SCALE, SHIFT, INVERSE_NORM, OWN_MEAN, ALL_MEAN, BY_CONCENTRATION, BY_SEPARATION = 0, 3, 4, 5, 6, 7, 8
LOG_NORM, LONE = 0, 3
MEAN_LOG_NORM, CLASSES = 1, 2


class CentroidStats(NamedTuple):
    """What the rows need to know of the centroids. Logarithms are relative to what the classes share, hence small."""

    operators: _ops.CentroidStats
    relative: Tensor  # [C, M], log q less what the classes share
    distribution: Tensor  # [C, M] q, or [0, M] for sample_to_centroid
    entropy: Tensor  # [C], sum_k q_k relative_k, or [0]


def centroid_stats(centroid_logits: Tensor, options: Options, backend: str) -> CentroidStats:
    """Statistics of centroid logits [C, M], float32 or float64. Not differentiable: the autograd Functions are."""
    with torch.no_grad():
        stats = _ops.centroid_stats(centroid_logits, options, backend)
        log_norm = stats.norms[:-1, LOG_NORM, None]
        above_mean = (log_norm - stats.norms[-1, MEAN_LOG_NORM]).to(stats.log_activation.dtype)
        relative = stats.log_activation - stats.reference[0] - above_mean
        distribution = stats.activation
        if options.centroid_to_sample:
            distribution = distribution * (-log_norm).exp().to(distribution.dtype)
        entropy = (distribution * relative[: len(distribution)]).sum(dim=1)
        return CentroidStats(stats, relative, distribution, entropy)


class Rows(NamedTuple):
    """What the forward pass knows of a batch; ignored rows are rows of any class, of finite numbers."""

    kept: Tensor  # [B] bool
    classes: Tensor  # [B]
    stats: Tensor  # [B, 9] float64, those of the operators
    level: Tensor  # [B] float64, sum_k p_k (log p_k less what the classes share)
    distribution: Tensor  # [B, M] p
    relative: Tensor | None  # [B, M] log p less what the classes share; centroid_to_sample only
    nearness: Tensor  # [B, C], the weights of the other classes, with sum one; 0 for the own one
    concentration: Tensor  # [B]
    separation: Tensor  # [B]


# Nothing that is kept is a view or comes of an operation in place: torch.compile refuses to keep an alias.
def compute_rows(
    input: Tensor, target: Tensor, center: Tensor | None, stats: CentroidStats, options: Options, backend: str
) -> Rows:
    """The terms of a batch [B, M] and what their derivatives take; without a graph."""
    dtype = stats.relative.dtype
    values, of_rows = _ops.operators(backend).terms(input, target, center, *stats.operators, *options.for_terms)
    kept = target != options.ignore_index
    classes = target.masked_fill(~kept, 0)
    inverse_norm = of_rows[:, INVERSE_NORM]
    log_inverse_norm = torch.where(kept, inverse_norm, 1).log() + stats.operators.norms[-1, MEAN_LOG_NORM]
    level = of_rows[:, ALL_MEAN] + log_inverse_norm

    x = input.to(dtype)
    if center is not None:
        x = x - center
    # An ignored row may hold NaN, which zero times anything would keep. Only a CPU tells for nothing if there is one.
    if not (concrete(x) and x.is_cpu) or not kept.all():
        x = x.masked_fill(~kept[:, None], 0)
    p, log_activation = _activate(x, of_rows, inverse_norm, options, dtype)
    relative = None
    if log_activation is not None:
        relative = log_activation - stats.operators.reference[0] + log_inverse_norm.to(dtype)[:, None]
        divergence = torch.addmm(stats.entropy, relative, stats.distribution.T, alpha=-1)
    else:
        divergence = torch.addmm(level.to(dtype)[:, None], p, stats.relative.T, alpha=-1)

    own = classes[:, None]
    divergence.clamp_(min=0).scatter_(1, own, torch.inf)  # rounding may leave less than zero
    nearest = divergence.amin(dim=1, keepdim=True).clamp_(min=torch.finfo(dtype).tiny)
    nearness = torch.softmax((divergence / nearest).mul_(-options.separation_focus), dim=1)
    separation = divergence.scatter_(1, own, 0).mul_(nearness).sum(dim=1) * _share(stats)
    return Rows(kept, classes, of_rows, level, p, relative, nearness, values[0].clone(), separation)


def _share(stats: CentroidStats) -> float:
    """What the other classes count for in the separation, together."""
    return (len(stats.relative) - 1) / len(stats.relative)


def _activate(
    x: Tensor, of_rows: Tensor, inverse_norm: Tensor, options: Options, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """p [B, M] of centred features, and for centroid_to_sample log a [B, M] as the operators have it."""
    norm = inverse_norm.to(dtype)[:, None]
    scale = of_rows[:, SCALE, None].to(dtype)
    # Shifted rows have every f at -2 or below, and so at least M (2 tau)^2 for the square of their length.
    shifts = not options.l2_normalize or 4 * x.shape[1] * options.temperature**2 < 1.01
    if not (shifts or options.softmax or options.centroid_to_sample):
        return torch.sigmoid(x * scale) * norm, None
    shift = of_rows[:, SHIFT, None].to(dtype)
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


def input_grad(
    input: Tensor,
    center: Tensor | None,
    rows: Rows,
    by_terms: Tensor,
    stats: CentroidStats,
    options: Options,
    backend: str,
) -> Tensor:
    """The gradient of the features [B, M], in their dtype, for those of the terms, `by_terms` [2, B] float64."""
    dtype = stats.relative.dtype
    by_concentration, by_separation = by_terms
    by_all_others = by_separation * _share(stats)
    count = len(input)
    of_rows = rows.stats.clone()
    norms = of_rows.new_zeros((count + 1, _schema.CLASS_STATS))
    norms[:, LONE] = -1
    if options.centroid_to_sample:
        # The operator's (p - q_mean) + (q_y - p) / C, with q_mean = 0 and C = 1, is q_y: what takes its place.
        table = stats.operators.log_activation.index_select(0, rows.classes)
        activation = torch.addmm(rows.distribution, rows.nearness, stats.distribution, alpha=-1)
        of_centroids = stats.operators.reference.clone()
        of_centroids[1] = 0
        norms[-1, CLASSES] = 1
        of_rows[:, BY_CONCENTRATION] = by_concentration
        of_rows[:, BY_SEPARATION] = by_all_others
    else:
        # The operator's by_all (log a - reference) + by_gap (reference - log a_y), with a mixture in the place of
        # log a_y. by_gap is as large as the weights of the mixture, so that these are about one.
        by_all = by_concentration + by_all_others
        by_gap = by_concentration.abs() + by_separation.abs()
        by_gap = torch.where(by_gap == 0, 1, by_gap)
        mixture = rows.nearness * (by_all_others / by_gap).to(dtype)[:, None]
        mixture.scatter_(1, rows.classes[:, None], (by_concentration / by_gap).to(dtype)[:, None])
        activation = stats.operators.activation
        of_centroids = stats.operators.reference
        table = torch.addmm(of_centroids[0], mixture, stats.relative)
        terms = by_concentration * rows.concentration + by_separation * rows.separation
        of_rows[:, OWN_MEAN] = of_rows[:, ALL_MEAN] - (by_all * rows.level - terms) / by_gap
        norms[-1] = stats.operators.norms[-1]
        of_rows[:, BY_CONCENTRATION] = by_gap + (by_all - by_gap) / len(stats.relative)
        of_rows[:, BY_SEPARATION] = by_all - by_gap
    return _ops.operators(backend).input_grad(
        input,
        torch.arange(count, device=input.device).masked_fill_(~rows.kept, -1),
        center,
        table,
        activation,
        of_centroids,
        norms,
        of_rows,
        None,
        options.centroid_to_sample,
        -1,
    )


def centroid_grad(
    centroid_logits: Tensor, rows: Rows, by_terms: Tensor, stats: CentroidStats, options: Options
) -> Tensor:
    """The gradient of the centroid logits [C, M], for those of the terms, `by_terms` [2, B]."""
    by_concentration, by_separation = by_terms.to(stats.relative.dtype)[:, :, None]
    weight = rows.nearness * (by_separation * _share(stats))
    if rows.relative is not None:
        q = stats.distribution
        grad = (stats.relative * weight.sum(dim=0)[:, None]).addmm_(weight.T, rows.relative, alpha=-1).mul_(q)
        grad.index_add_(0, rows.classes, rows.distribution * by_concentration, alpha=-1)
    else:
        log_norm = stats.operators.norms[:-1, LOG_NORM, None] + (0 if options.softmax else math.log(2))
        q = (stats.operators.log_activation - log_norm.to(weight.dtype)).exp_()
        grad = weight.scatter_(1, rows.classes[:, None], by_concentration).neg_().T @ rows.distribution
    grad.addcmul_(q, grad.sum(dim=1, keepdim=True), value=-1)
    return grad if options.softmax else grad.mul_(torch.sigmoid_(-centroid_logits))


def _grads(
    input: Tensor,
    centroid_logits: Tensor,
    center: Tensor | None,
    rows: Rows,
    by_terms: Tensor,
    stats: CentroidStats,
    options: Options,
    backend: str,
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of features and centroid logits, each only where it is wanted."""
    with reference.no_autocast(input.device):
        return (
            input_grad(input, center, rows, by_terms, stats, options, backend) if wanted[0] else None,
            centroid_grad(centroid_logits, rows, by_terms, stats, options) if wanted[1] else None,
        )


def _save(
    ctx: Any,
    input: Tensor,
    target: Tensor,
    centroid_logits: Tensor,
    center: Tensor | None,
    weight: Tensor | None,
    by_terms: Tensor | None,
    stats: CentroidStats,
    rows: Rows,
) -> None:
    _ops.save(ctx, center, centroid_logits, input, target, weight, by_terms, *stats.operators, *stats[1:], *rows)


def _saved(ctx: Any) -> tuple[Any, ...]:
    """What :func:`_save` was given, and whether rows are to be found again (:func:`_ops.saved`)."""
    (center, centroid_logits, input, target, weight, by_terms, *kept), repeated = _ops.saved(ctx)
    operators, others, rows = kept[:4], kept[4:7], kept[7:]
    stats = CentroidStats(_ops.CentroidStats(*operators), *others)
    return input, target, centroid_logits, center, weight, by_terms, stats, Rows(*rows), repeated


class _Loss(torch.autograd.Function):
    """The loss, of the arguments of :func:`loss`."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, centroid_logits: Tensor, problem: Problem, seen: list[Any] | None) -> Tensor:
        target, center, weight, options, backend, stats, group, _ = problem
        with reference.no_autocast(input.device):
            stats = stats or centroid_stats(centroid_logits, options, backend)
            rows = compute_rows(input, target, center, stats, options, backend)
        result, by_terms, means = _reduced(rows, problem)
        if seen is not None:
            seen.append(means)
            if not torch.compiler.is_compiling():
                seen.append(rows)
        _save(ctx, input, target, centroid_logits, center, weight, by_terms, stats, rows)
        ctx.options, ctx.backend, ctx.group = options, backend, group
        return result.to(stats.relative.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        input, target, centroid_logits, center, weight, by_terms, stats, rows, repeated = _saved(ctx)
        options, backend, group = ctx.options, ctx.backend, ctx.group
        wanted = ctx.needs_input_grad
        if plain_backward(upstream):
            if repeated:
                with reference.no_autocast(input.device):
                    rows = compute_rows(input, target, center, stats, options, backend)
                by_terms = _reduced(rows, Problem(target, center, weight, options, backend, stats, group))[1]
            # Ignored rows have zeros, which an infinite gradient would not keep.
            by_terms = torch.where(rows.kept, by_terms * upstream, 0)
            return *_grads(input, centroid_logits, center, rows, by_terms, stats, options, backend, wanted), None, None
        if group is not None:
            refuse_double_backward("process_group")
        return (
            *_ops.grads_by_autograd(
                lambda: reference.loss(input, target, centroid_logits, center, weight, options),
                (input, centroid_logits),
                wanted[:2],
                upstream,
            ),
            None,
            None,
        )


def _reduced(rows: Rows, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    options, group = problem.options, problem.group
    w, kept = row_weights(problem.target, problem.weight, options.ignore_index)
    result, by_terms, means = reduced(rows.concentration, rows.separation, w, kept, options, group)
    if group is not None:
        by_terms = by_terms * group.size  # of the average that DistributedDataParallel takes, the sum is left
    return result, by_terms, means


class _Terms(torch.autograd.Function):
    """Concentration and separation, of the arguments of :func:`terms`."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        centroid_logits: Tensor,
        target: Tensor,
        center: Tensor | None,
        options: Options,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        with reference.no_autocast(input.device):
            stats = centroid_stats(centroid_logits, options, backend)
            rows = compute_rows(input, target, center, stats, options, backend)
        _save(ctx, input, target, centroid_logits, center, None, None, stats, rows)
        ctx.options, ctx.backend = options, backend
        return rows.concentration.clone(), rows.separation.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        input, target, centroid_logits, center, _, _, stats, rows, repeated = _saved(ctx)
        options, backend = ctx.options, ctx.backend
        wanted = ctx.needs_input_grad[:2]
        grads: tuple[Tensor | None, ...]
        if plain_backward(*upstream):
            if repeated:
                with reference.no_autocast(input.device):
                    rows = compute_rows(input, target, center, stats, options, backend)
            by_terms = torch.stack(upstream).double()
            grads = _grads(input, centroid_logits, center, rows, by_terms, stats, options, backend, wanted)
        else:
            grads = _ops.grads_by_autograd(
                lambda: reference.terms(input, target, centroid_logits, center, options),
                (input, centroid_logits),
                wanted,
                upstream,
            )
        return *grads, None, None, None, None


def loss(input: Tensor, centroid_logits: Tensor, problem: Problem, *, seen: list[Any] | None = None) -> Tensor:
    """As :func:`_ops.loss`; with a group as :func:`_distributed.loss`. torch.func transforms the reference."""
    if transforming() or jit_tracing():
        target, center, weight, options, *_ = problem
        assert problem.group is None
        return reference.loss(input, target, centroid_logits, center, weight, options)
    result = _Loss.apply(input, centroid_logits, problem, seen)
    if seen is not None and torch.compiler.is_compiling():
        seen.append(seen.pop().detach())  # what leaves a traced Function requires a gradient
    return result


def terms(
    input: Tensor, target: Tensor, centroid_logits: Tensor, center: Tensor | None, options: Options, backend: str
) -> tuple[Tensor, Tensor]:
    """As :func:`_ops.terms`."""
    if transforming() or jit_tracing():
        return reference.terms(input, target, centroid_logits, center, options)
    return _Terms.apply(input, centroid_logits, target, center, options, backend)


def centroid_gradient(
    input: Tensor, centroid_logits: Tensor, problem: Problem, rows: Rows | None = None
) -> tuple[Tensor, Tensor]:
    """As :func:`_ops.centroid_gradient`; `rows` are what :func:`loss` has seen of the same batch, or None.

    With a group, this process's part of the gradient of the loss of all processes' rows.
    """
    target, center, weight, options, backend, stats, group, _ = problem
    with torch.no_grad(), reference.no_autocast(input.device):
        stats = stats or centroid_stats(centroid_logits, options, backend)
        rows = rows or compute_rows(input, target, center, stats, options, backend)
        w, kept = row_weights(target, weight, options.ignore_index)
        _, by_terms, means = reduced(rows.concentration, rows.separation, w, kept, options, group)
        return centroid_grad(centroid_logits, rows, by_terms, stats, options), means
