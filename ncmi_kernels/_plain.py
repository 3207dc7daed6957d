"""The way of a batch through the operators: forward, and each backward pass.

:mod:`_focus` and the classes of :mod:`_shards` have the same three functions for what takes more than these calls.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ncmi_kernels import _ops
from ncmi_kernels._options import Options
from ncmi_kernels._problem import Problem
from ncmi_kernels._schema import SGD, Table


def table_of(centroid_logits: Tensor, options: Options, backend: str, prior: Tensor | None = None) -> Table:
    """The table of centroid logits [C, M], float32 or float64. Not differentiable: the autograd Functions are.

    `prior` [C] float64, as of the operator centroid_stats.
    """
    stats = _ops.operators(backend).centroid_stats
    return Table(*stats(centroid_logits.detach(), options.softmax, options.centroid_to_sample, prior))


class Rows(NamedTuple):
    """What the backward passes need to know of a batch; outputs of the operator loss."""

    stats: Tensor  # [B, 8] float64
    coefficients: Tensor | None  # [B, 4] float64; None where there are only terms


class Found(NamedTuple):
    """What a forward pass finds."""

    loss: Tensor  # [], or [B] for reduction "none"
    means: Tensor | None  # [2] float64, of the terms: NaN where no row counts. None within a transform
    rows: Any = None  # Rows, or those of another way; with a graph only where they were asked for
    table: Any = None  # Table, likewise
    center: Tensor | None = None  # the centre of the batch, where that was moved the new one
    grad: Tensor | None = None  # of the input, for an upstream gradient of 1, where the same pass made it


def forward(input: Tensor, centroid_logits: Tensor, problem: Problem, wanted: tuple[bool, bool]) -> Found:
    """The loss, and what its backward passes need. `wanted`: whether gradients of input and centroids are to come."""
    target, center, weight, options, backend, table, group, update, *_ = problem
    # By sample the gradient of a row is known once the row is: made in this pass, it needs no second one. Half
    # precisions wait for the upstream gradient, which may be what keeps them from underflow.
    with_grad = (
        options.scalar_by_sample
        and wanted[0]
        and group is None
        and input.dtype is centroid_logits.dtype
        and not torch.compiler.is_compiling()
    )
    if table is None:
        table = table_of(centroid_logits, options, backend, problem.class_prior)
    run = _ops.operators(backend)
    if group is not None:
        terms, stats = run.terms(input, target, center, *table, *options.features, options.ignore_index)
        loss, coefficients, means = reduce(terms, stats, problem._replace(table=table))
        return Found(loss.to(centroid_logits.dtype), means, Rows(stats, coefficients), table, center)
    moving = (center, None, None, 0.0) if update is None else (None, center, *update)
    loss, stats, coefficients, moved, grad, means = run.loss(
        input, target, *moving, *table, weight, *options.features, *options.loss, with_grad
    )
    if update is not None:
        center = moved
    return Found(loss, means, Rows(stats, coefficients), table, center, grad if with_grad else None)


def terms(input: Tensor, problem: Problem, with_input_grad: bool = False) -> tuple[Tensor, Rows]:
    """Terms [2, B] float64, and what is known of the rows: no coefficients yet.

    `with_input_grad`: whether :func:`input_grad` is to come, for which other ways find more.
    """
    target, center, _, options, backend, table, *_ = problem
    values, stats = _ops.operators(backend).terms(
        input, target, center, *table, *options.features, options.ignore_index
    )
    return values, Rows(stats, None)


class Reduced(NamedTuple):
    """What the terms of the rows come to; all float64."""

    loss: Tensor  # [] or [B]
    coefficients: Tensor  # [B, 4]
    means: Tensor  # [2]


def reduce(terms: Tensor, stats: Tensor, problem: Problem) -> Reduced:
    """The loss of terms [2, B] and statistics [B, 8]; with a group, of the rows of all its processes."""
    target, _, weight, options, backend, _, group, *_ = problem
    run = _ops.operators(backend).reduce
    batch = terms, stats, target, weight
    how = options.centroid_to_sample, options.every_pair
    loss, coefficients, means, sums = run(*batch, None, *how, *options.loss)
    if group is not None:
        loss, coefficients, means, _ = run(*batch, group.all_reduce(sums), *how, *options.loss)
    return Reduced(loss, coefficients, means)


def input_grad(input: Tensor, problem: Problem, rows: Rows, upstream: Tensor | None) -> Tensor:
    """d loss / d input [B, M] for an upstream gradient, None for 1."""
    target, center, _, options, backend, table, *_ = problem
    run = _ops.operators(backend).input_grad
    return run(input, target, center, *table, *rows, upstream, options.centroid_to_sample, options.ignore_index)


def centroid_grad(
    input: Tensor,
    centroid_logits: Tensor,
    problem: Problem,
    rows: Rows,
    upstream: Tensor | None,
    totals: Tensor | None = None,
) -> Tensor:
    """d loss / d centroid_logits [C, M], of a group the part of this process's rows; `totals` as of the operator."""
    target, center, _, options, backend, table, *_ = problem
    run = _ops.operators(backend).centroid_grad
    last = options.centroid_to_sample, options.ignore_index, totals
    return run(input, target, center, centroid_logits, *table, *rows, upstream, *last)


def class_totals(input: Tensor, problem: Problem, rows: Rows, upstream: Tensor | None) -> Tensor:
    """What the gradients of all centroids have of all rows, [M + 1] float64."""
    target, center, _, options, backend, *_ = problem
    run = _ops.operators(backend).class_totals
    return run(input, target, center, *rows, upstream, options.centroid_to_sample, options.ignore_index)


def centroid_step_(
    input: Tensor, centroid_logits: Tensor, problem: Problem, rows: Rows, momentum_buffer: Tensor | None, sgd: SGD
) -> Any:
    """Move `centroid_logits` [C, M] against :func:`centroid_grad`, in place; `momentum_buffer` goes with a momentum.

    Returns the table of the new ones, to which the problem's has been changed. A batch with terms that are not finite
    moves nothing.
    """
    target, center, _, options, backend, table, *_ = problem
    flags = options.softmax, options.centroid_to_sample, options.ignore_index
    run = _ops.operators(backend).centroid_step_
    run(input, target, center, centroid_logits, momentum_buffer, *table, *rows, *flags, *sgd)
    return table
