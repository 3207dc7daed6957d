"""The loss over the processes of a torch.distributed group, each with a batch of its own.

The loss needs of the other batches only sums: one all-reduce of the centre's, one of the terms'. Everything else is
the operators of the local path, given the derivatives of the global loss by each row's terms.
"""

from typing import Any

import torch
from torch import Tensor

from ncmi_kernels import _focus, _ops, functional, reference
from ncmi_kernels._group import Group
from ncmi_kernels._options import Options
from ncmi_kernels._reduction import reduced, refuse_double_backward, row_weights


class _GroupLoss(torch.autograd.Function):
    """The loss, of the arguments of :func:`loss` brought to [B, M] and to the dtype of the arithmetic."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, centroid_logits: Tensor, others: tuple[Any, ...]) -> Tensor:
        target, center, weight, options, backend, stats, group, means = others
        result, by_terms, mean_terms, rows, stats = _of_group(
            input, target, centroid_logits, center, weight, options, backend, stats, group
        )
        if means is not None:
            means.append(mean_terms)
        _ops.save(ctx, center, centroid_logits, input, target, weight, by_terms, rows, *(stats or ()))
        ctx.options, ctx.backend, ctx.group = options, backend, group
        return result.to(centroid_logits.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("process_group")
        (center, centroid_logits, input, target, weight, by_terms, rows, *kept), repeated = _ops.saved(ctx)
        options, backend, group = ctx.options, ctx.backend, ctx.group
        wanted = ctx.needs_input_grad[:2]
        stats = _ops.CentroidStats(*kept) if kept else None
        if repeated:
            _, by_terms, _, rows, _ = _of_group(
                input, target, centroid_logits, center, weight, options, backend, stats, group
            )
        if stats is not None:
            grads = _ops._grads(wanted, input, target, centroid_logits, center, stats, rows, upstream, options, backend)
            return *grads, None
        leaves = [t.detach().requires_grad_(needed) for t, needed in zip((input, centroid_logits), wanted, strict=True)]
        found = iter(_reference_grads(leaves, target, center, weight, options, by_terms * upstream))
        return *(next(found) if leaf.requires_grad else None for leaf in leaves), None


def _of_group(
    input: Tensor,
    target: Tensor,
    centroid_logits: Tensor,
    center: Tensor | None,
    weight: Tensor | None,
    options: Options,
    backend: str,
    stats: _ops.CentroidStats | None,
    group: Group,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, _ops.CentroidStats | None]:
    """What :func:`reduced` gives, and of kernels the rows with the derivatives by their terms, and the statistics."""
    terms, rows, stats = _terms(input, target, centroid_logits, center, weight, options, backend, stats)
    result, by_terms, means = reduced(*terms, options, group)
    # Of the average that DistributedDataParallel takes over the processes, the sum is left.
    by_terms = by_terms * group.size
    if rows is not None:
        rows[:, -2:] = by_terms.T
    return result, by_terms, means, rows, stats


def _terms(
    input: Tensor,
    target: Tensor,
    centroid_logits: Tensor,
    center: Tensor | None,
    weight: Tensor | None,
    options: Options,
    backend: str,
    stats: _ops.CentroidStats | None,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor | None, _ops.CentroidStats | None]:
    """Concentration, separation and weight of each row and whether it counts; of kernels their `rows` and `stats`."""
    if backend == "reference":
        functional.check_range(target, len(centroid_logits), options.ignore_index)
        terms = reference.weighted_terms(input, target, centroid_logits, center, weight, options)
        return (*terms, target != options.ignore_index), None, None
    stats = stats or _ops.centroid_stats(centroid_logits, options, backend)
    values, rows = _ops.operators(backend).terms(input, target, center, *stats, *options.for_terms)
    return (values[0], values[1], *row_weights(target, weight, options.ignore_index)), rows, stats


def _reference_grads(
    leaves: list[Tensor], target: Tensor, center: Tensor | None, weight: Tensor | None, options: Options, grad: Tensor
) -> tuple[Tensor, ...]:
    """The gradients by those of `leaves` (input and centroid_logits) that require one, `grad` [2, B] by the terms."""
    with torch.enable_grad():
        terms = reference.weighted_terms(leaves[0], target, leaves[1], center, weight, options)[:2]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return torch.autograd.grad(terms, wanted, tuple(grad.to(terms[0].dtype)))


def loss(
    input: Tensor,
    target: Tensor,
    centroid_logits: Tensor,
    center: Tensor | None,
    weight: Tensor | None,
    options: Options,
    backend: str,
    stats: Any,
    group: Group,
    means: list[Any] | None = None,
) -> Tensor:
    """:func:`functional.loss`, a scalar, over the batches of all processes; the gradients times their number."""
    rows, classes = functional.flatten(input, target)
    rows, centroid_logits, center, weight = functional.to_arithmetic_dtype(rows, centroid_logits, center, weight)
    if options.separation_focus and backend != "reference":
        focused = (classes, centroid_logits, center, weight, options, backend, stats)
        return _focus.loss(rows, *focused, group=group, seen=means)
    others = (classes, center, weight, options, backend, stats, group, means)
    return _GroupLoss.apply(rows, centroid_logits, others)


def centroid_gradient(
    input: Tensor,
    target: Tensor,
    centroid_logits: Tensor,
    center: Tensor | None,
    weight: Tensor | None,
    options: Options,
    backend: str,
    stats: Any,
    group: Group,
    seen_rows: _focus.Rows | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`functional.centroid_gradient` of the batches of all processes; the same bits on each."""
    logits = centroid_logits.detach()
    rows, classes = functional.flatten(input.detach(), target)
    rows, wide, center, weight = functional.to_arithmetic_dtype(rows, logits, center, weight)
    if options.separation_focus and backend != "reference":
        others = (classes, wide, center, weight, options, backend, stats, seen_rows)
        grad, means = _focus.centroid_gradient(rows, *others, group)
        return group.all_reduce(grad).to(logits.dtype), means
    terms, row_stats, stats = _terms(rows, classes, wide, center, weight, options, backend, stats)
    _, by_terms, means = reduced(*terms, options, group)
    if row_stats is None:
        grad = _reference_grads([rows, wide.requires_grad_()], classes, center, weight, options, by_terms)[0]
    else:
        assert stats is not None
        row_stats[:, -2:] = by_terms.T
        grad = _ops.operators(backend).centroid_grad(
            rows,
            classes,
            center,
            wide,
            *stats,
            row_stats,
            None,
            options.centroid_to_sample,
            options.ignore_index,
        )
    return group.all_reduce(grad).to(logits.dtype), means
