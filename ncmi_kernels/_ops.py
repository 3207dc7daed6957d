"""The compiled operators (csrc/ops.cpp): fake kernels for tracing, and autograd.

One path, whatever the backend: centroid_stats -> terms -> loss forward, input_grad and centroid_grad backward.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ncmi_kernels import _backends, reference
from ncmi_kernels._options import REDUCTIONS, Options


class CentroidStats(NamedTuple):
    """What the rows need to know of the centroids: the outputs of the operator centroid_stats."""

    log_activation: Tensor  # [C, M]
    activation: Tensor  # [C, M], or [0, M] for sample_to_centroid
    reference: Tensor  # [2, M]
    norms: Tensor  # [2 C + 2] float64


def centroid_stats(centroid_logits: Tensor, options: Options) -> CentroidStats:
    """Statistics of centroid logits [C, M], float32 or float64. Not differentiable: the autograd Functions are."""
    stats = torch.ops.ncmi_kernels.centroid_stats.default(
        centroid_logits.detach(), options.softmax, options.centroid_to_sample
    )
    return CentroidStats(*stats)


def update_center_(
    center: Tensor,
    num_batches_tracked: Tensor,
    input: Tensor,
    target: Tensor,
    momentum: float,
    num_classes: int,
    ignore_index: int,
) -> Tensor:
    """Move `center` [M] towards the mean of the rows, in place; returns a copy of it."""
    return torch.ops.ncmi_kernels.update_center_.default(
        center, num_batches_tracked, input.detach(), target, momentum, num_classes, ignore_index
    )


class _Saved(NamedTuple):
    """What a forward pass keeps for its backward pass."""

    input: Tensor
    target: Tensor
    centroid_logits: Tensor
    center: Tensor | None
    weight: Tensor | None
    log_activation: Tensor | None
    activation: Tensor | None
    reference: Tensor | None
    norms: Tensor | None
    rows: Tensor | None
    directions: Tensor | None
    coefficients: Tensor | None


def _terms(
    ctx: Any,
    input: Tensor,
    target: Tensor,
    centroid_logits: Tensor,
    center: Tensor | None,
    stats: CentroidStats,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.ncmi_kernels.terms.default(
        input,
        target,
        center,
        *stats,
        options.temperature,
        options.l2_normalize,
        options.softmax,
        options.centroid_to_sample,
        options.ignore_index,
        ctx.needs_input_grad[0],
    )


def _save(
    ctx: Any,
    input: Tensor,
    target: Tensor,
    centroid_logits: Tensor,
    center: Tensor | None,
    weight: Tensor | None,
    stats: CentroidStats,
    rows: Tensor,
    directions: Tensor,
    coefficients: Tensor | None,
    options: Options,
) -> None:
    ctx.options = options
    by_class = (*stats, rows) if ctx.needs_input_grad[2] else (None,) * 5
    by_row = directions if ctx.needs_input_grad[0] else None
    ctx.save_for_backward(input, target, centroid_logits, center, weight, *by_class, by_row, coefficients)


def _backward(
    ctx: Any, saved: _Saved, coefficients: Tensor, upstream: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    options: Options = ctx.options
    grad_input = grad_centroids = None
    if ctx.needs_input_grad[0]:
        grad_input = torch.ops.ncmi_kernels.input_grad.default(
            saved.directions, coefficients, upstream, saved.input.dtype
        )
    if ctx.needs_input_grad[2]:
        grad_centroids = torch.ops.ncmi_kernels.centroid_grad.default(
            saved.input,
            saved.target,
            saved.center,
            saved.centroid_logits,
            saved.log_activation,
            saved.activation,
            saved.reference,
            saved.norms,
            saved.rows,
            coefficients,
            upstream,
            options.softmax,
            options.centroid_to_sample,
            options.ignore_index,
        )
    return grad_input, grad_centroids


def _differentiable_backward() -> bool:
    """Whether this backward pass may itself be differentiated (create_graph=True)."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _reference_backward(
    ctx: Any, outputs: tuple[Tensor, ...], saved: _Saved, upstream: tuple[Tensor, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients as a differentiable function of the inputs and of the upstream gradient."""
    wanted = {i: t for i, t in ((0, saved.input), (2, saved.centroid_logits)) if ctx.needs_input_grad[i]}
    grads = dict(
        zip(wanted, torch.autograd.grad(outputs, list(wanted.values()), upstream, create_graph=True), strict=True)
    )
    return grads.get(0), grads.get(2)


class _Loss(torch.autograd.Function):
    """(input, target, centroid_logits, center, weight, stats, options) -> loss."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        centroid_logits: Tensor,
        center: Tensor | None,
        weight: Tensor | None,
        stats: CentroidStats,
        options: Options,
    ) -> Tensor:
        values, rows, directions = _terms(ctx, input, target, centroid_logits, center, stats, options)
        loss, coefficients = torch.ops.ncmi_kernels.loss.default(
            values,
            target,
            weight,
            options.batch_ratio,
            REDUCTIONS.index(options.reduction),
            options.eps,
            options.ignore_index,
            stats.log_activation.dtype,
        )
        _save(ctx, input, target, centroid_logits, center, weight, stats, rows, directions, coefficients, options)
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        saved = _Saved(*ctx.saved_tensors)
        if _differentiable_backward():
            loss = reference.loss(*saved[:5], ctx.options)
            grad_input, grad_centroids = _reference_backward(ctx, (loss,), saved, upstream)
        else:
            assert saved.coefficients is not None
            grad_input, grad_centroids = _backward(ctx, saved, saved.coefficients, upstream[0])
        return grad_input, None, grad_centroids, None, None, None, None


class _Terms(torch.autograd.Function):
    """(input, target, centroid_logits, center, stats, options) -> concentration [B], separation [B]."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        centroid_logits: Tensor,
        center: Tensor | None,
        stats: CentroidStats,
        options: Options,
    ) -> tuple[Tensor, Tensor]:
        values, rows, directions = _terms(ctx, input, target, centroid_logits, center, stats, options)
        _save(ctx, input, target, centroid_logits, center, None, stats, rows, directions, None, options)
        dtype = stats.log_activation.dtype
        return values[0].to(dtype, copy=True), values[1].to(dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        saved = _Saved(*ctx.saved_tensors)
        if _differentiable_backward():
            terms = reference.terms(
                saved.input, saved.target, saved.centroid_logits, saved.center, ctx.options
            )
            grad_input, grad_centroids = _reference_backward(ctx, terms, saved, upstream)
        else:
            coefficients = torch.stack(upstream).to(torch.float64)
            grad_input, grad_centroids = _backward(ctx, saved, coefficients, None)
        return grad_input, None, grad_centroids, None, None, None


loss = _Loss.apply
terms = _Terms.apply


def _register_fakes() -> None:
    """Shapes and dtypes of each operator's outputs, for torch.compile and torch.export."""

    @torch.library.register_fake("ncmi_kernels::centroid_stats")
    def _(centroid_logits: Tensor, softmax: bool, centroid_to_sample: bool) -> tuple[Tensor, ...]:
        classes, columns = centroid_logits.shape
        return (
            centroid_logits.new_empty((classes, columns)),
            centroid_logits.new_empty((classes if centroid_to_sample else 0, columns)),
            centroid_logits.new_empty((2, columns)),
            centroid_logits.new_empty((2 * classes + 2,), dtype=torch.float64),
        )

    @torch.library.register_fake("ncmi_kernels::terms")
    def _(
        input: Tensor,
        target: Tensor,
        center: Tensor | None,
        log_activation: Tensor,
        activation: Tensor,
        reference: Tensor,
        norms: Tensor,
        temperature: float,
        l2_normalize: bool,
        softmax: bool,
        centroid_to_sample: bool,
        ignore_index: int,
        with_directions: bool,
    ) -> tuple[Tensor, ...]:
        rows, columns = input.shape
        return (
            log_activation.new_empty((2, rows), dtype=torch.float64),
            log_activation.new_empty((3, rows), dtype=torch.float64),
            log_activation.new_empty((2, rows, columns if with_directions else 0)),
        )

    @torch.library.register_fake("ncmi_kernels::loss")
    def _(
        terms: Tensor,
        target: Tensor,
        weight: Tensor | None,
        batch_ratio: bool,
        reduction: int,
        eps: float,
        ignore_index: int,
        dtype: torch.dtype,
    ) -> tuple[Tensor, ...]:
        rows = target.shape[0]
        return (
            terms.new_empty((rows,) if REDUCTIONS[reduction] == "none" else (), dtype=dtype),
            terms.new_empty((2, rows), dtype=torch.float64),
        )

    @torch.library.register_fake("ncmi_kernels::input_grad")
    def _(directions: Tensor, coefficients: Tensor, upstream: Tensor | None, dtype: torch.dtype) -> Tensor:
        return directions.new_empty(directions.shape[1:], dtype=dtype)

    @torch.library.register_fake("ncmi_kernels::centroid_grad")
    def _(
        input: Tensor,
        target: Tensor,
        center: Tensor | None,
        centroid_logits: Tensor,
        log_activation: Tensor,
        activation: Tensor,
        reference: Tensor,
        norms: Tensor,
        rows: Tensor,
        coefficients: Tensor,
        upstream: Tensor | None,
        softmax: bool,
        centroid_to_sample: bool,
        ignore_index: int,
    ) -> Tensor:
        return centroid_logits.new_empty(centroid_logits.shape)

    @torch.library.register_fake("ncmi_kernels::update_center_")
    def _(
        center: Tensor,
        num_batches_tracked: Tensor,
        input: Tensor,
        target: Tensor,
        momentum: float,
        num_classes: int,
        ignore_index: int,
    ) -> Tensor:
        return center.new_empty(center.shape)


if _backends.load_library() is None:
    _register_fakes()
