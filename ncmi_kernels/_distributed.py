"""The loss over the processes of a torch.distributed group, each with a batch of its own.

The loss needs of the other batches only sums: one all-reduce of the centre's, one of the terms'. Everything else is
the operators of the local path, given the derivatives of the global loss by each row's terms.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ncmi_kernels import _ops, reference
from ncmi_kernels._problem import Problem, check_range
from ncmi_kernels._reduction import reduced, refuse_double_backward, row_weights


class _GroupLoss(torch.autograd.Function):
    """The loss, of the arguments of :func:`loss`."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, centroid_logits: Tensor, problem: Problem, seen: list[Tensor] | None
    ) -> Tensor:
        result, by_terms, means, rows, stats = _of_group(input, centroid_logits, problem)
        if seen is not None:
            seen.append(means)
        center, weight = problem.center, problem.weight
        _ops.save(ctx, center, centroid_logits, input, problem.target, weight, by_terms, rows, *(stats or ()))
        ctx.options, ctx.backend, ctx.group = problem.options, problem.backend, problem.group
        return result.to(centroid_logits.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("process_group")
        (center, centroid_logits, input, target, weight, by_terms, rows, *stats), repeated = _ops.saved(ctx)
        problem = Problem(target, center, weight, ctx.options, ctx.backend, stats or None, ctx.group)
        wanted = ctx.needs_input_grad[:2]
        if repeated:
            _, by_terms, _, rows, _ = _of_group(input, centroid_logits, problem)
        if stats:
            return *_ops._grads(wanted, input, centroid_logits, problem, rows, upstream), None, None
        leaves = [t.detach().requires_grad_(needed) for t, needed in zip((input, centroid_logits), wanted, strict=True)]
        found = iter(_reference_grads(leaves, problem, by_terms * upstream))
        return *(next(found) if leaf.requires_grad else None for leaf in leaves), None, None


def _of_group(
    input: Tensor, centroid_logits: Tensor, problem: Problem
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Sequence[Tensor] | None]:
    """What :func:`reduced` gives, and of kernels the rows with the derivatives by their terms, and the statistics."""
    terms, rows, stats = _terms(input, centroid_logits, problem)
    result, by_terms, means = reduced(*terms, problem.options, problem.group)
    # Of the average that DistributedDataParallel takes over the processes, the sum is left.
    assert problem.group is not None
    by_terms = by_terms * problem.group.size
    if rows is not None:
        rows[:, -2:] = by_terms.T
    return result, by_terms, means, rows, stats


def _terms(
    input: Tensor, centroid_logits: Tensor, problem: Problem
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor | None, Sequence[Tensor] | None]:
    """Concentration, separation and weight of each row and whether it counts; of kernels their `rows` and `stats`."""
    target, center, weight, options, backend, stats, *_ = problem
    if backend == "reference":
        check_range(target, len(centroid_logits), options.ignore_index)
        terms = reference.weighted_terms(input, target, centroid_logits, center, weight, options)
        return (*terms, target != options.ignore_index), None, None
    stats = stats or _ops.centroid_stats(centroid_logits, options, backend)
    values, rows = _ops.operators(backend).terms(input, target, center, *stats, *options.for_terms)
    return (values[0], values[1], *row_weights(target, weight, options.ignore_index)), rows, stats


def _reference_grads(leaves: list[Tensor], problem: Problem, grad: Tensor) -> tuple[Tensor, ...]:
    """The gradients by those of `leaves` (input and centroid_logits) that require one, `grad` [2, B] by the terms."""
    target, center, weight, options, *_ = problem
    with torch.enable_grad():
        terms = reference.weighted_terms(leaves[0], target, leaves[1], center, weight, options)[:2]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return torch.autograd.grad(terms, wanted, tuple(grad.to(terms[0].dtype)))


def loss(input: Tensor, centroid_logits: Tensor, problem: Problem, *, seen: list[Any] | None = None) -> Tensor:
    """The loss over the batches of all processes, a scalar; the gradients times their number."""
    return _GroupLoss.apply(input, centroid_logits, problem, seen)


def centroid_gradient(input: Tensor, centroid_logits: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """This process's part of the gradient by `centroid_logits` of the loss of all processes, and means of terms [2]."""
    target, center, _, options, backend, _, group, _ = problem
    terms, rows, stats = _terms(input, centroid_logits, problem)
    _, by_terms, means = reduced(*terms, options, group)
    if rows is None:
        return _reference_grads([input, centroid_logits.requires_grad_()], problem, by_terms)[0], means
    assert stats is not None
    rows[:, -2:] = by_terms.T
    last = options.centroid_to_sample, options.ignore_index
    grad = _ops.operators(backend).centroid_grad(input, target, center, centroid_logits, *stats, rows, None, *last)
    return grad, means
