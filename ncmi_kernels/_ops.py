"""The compiled operators (csrc/ops.cpp): fake kernels for tracing, and autograd.

One path, whatever the backend: centroid_stats -> loss forward, input_grad and centroid_grad backward.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import Library

from ncmi_kernels import _backends, reference
from ncmi_kernels._options import REDUCTIONS, Options


class _Operators:
    """The operators' overloads, looked up once: a look-up costs as much as some of the calls."""

    if _backends.load_library() is None:
        centroid_stats = torch.ops.ncmi_kernels.centroid_stats.default
        update_center_ = torch.ops.ncmi_kernels.update_center_.default
        terms = torch.ops.ncmi_kernels.terms.default
        loss = torch.ops.ncmi_kernels.loss.default
        scale_ = torch.ops.ncmi_kernels.scale_.default
        input_grad = torch.ops.ncmi_kernels.input_grad.default
        centroid_grad = torch.ops.ncmi_kernels.centroid_grad.default


ROW_STATS = 9  # columns of the operators' `rows`


class CentroidStats(NamedTuple):
    """What the rows need to know of the centroids: the outputs of the operator centroid_stats."""

    log_activation: Tensor  # [C, M]
    activation: Tensor  # [C, M], or [0, M] for sample_to_centroid
    reference: Tensor  # [2, M]
    norms: Tensor  # [3 C + 2] float64


def centroid_stats(centroid_logits: Tensor, options: Options) -> CentroidStats:
    """Statistics of centroid logits [C, M], float32 or float64. Not differentiable: the autograd Functions are."""
    stats = _Operators.centroid_stats(centroid_logits.detach(), options.softmax, options.centroid_to_sample)
    return CentroidStats(*stats)


# How a forward pass in training moves the running centre first: num_batches_tracked [] int64, momentum.
CenterUpdate = tuple[Tensor, float]


def update_center_(
    center: Tensor, update: CenterUpdate, input: Tensor, target: Tensor, num_classes: int, ignore_index: int
) -> Tensor:
    """Move `center` [M] towards the mean of the rows of `input`, in place; returns a copy of it."""
    return _Operators.update_center_(center, update[0], input, target, update[1], num_classes, ignore_index)


def _call_terms(
    input: Tensor,
    target: Tensor,
    center: Tensor | None,
    stats: CentroidStats,
    options: Options,
) -> tuple[Tensor, Tensor]:
    return _Operators.terms(input, target, center, *stats, *options.for_terms)


def _grads(
    ctx: Any,
    input: Tensor,
    target: Tensor,
    centroid_logits: Tensor,
    center: Tensor | None,
    stats: CentroidStats,
    rows: Tensor,
    upstream: Tensor | None,
    options: Options,
    made: list[Tensor] | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of input [B, M] and centroid_logits [C, M], each only where it is asked for.

    `made` is None, or holds the gradient of input for an upstream gradient of 1 where the forward pass made it: the
    first backward pass takes it out and owns it, a repeated one forms it again, to the same bits.
    """
    grad_input = grad_centroids = None
    if ctx.needs_input_grad[0]:
        grad_input = (
            made.pop()
            if made
            else _Operators.input_grad(
                input,
                target,
                center,
                *stats,
                rows,
                upstream if made is None else None,
                options.centroid_to_sample,
                options.ignore_index,
            )
        )
        if made is not None:
            _Operators.scale_(grad_input, upstream)
    if ctx.needs_input_grad[1]:
        grad_centroids = _Operators.centroid_grad(
            input,
            target,
            center,
            centroid_logits,
            *stats,
            rows,
            upstream,
            options.centroid_to_sample,
            options.ignore_index,
        )
    return grad_input, grad_centroids


def _differentiable_backward() -> bool:
    """Whether this backward pass may itself be differentiated (create_graph=True)."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _reference_grads(
    ctx: Any,
    outputs: tuple[Tensor, ...],
    input: Tensor,
    centroid_logits: Tensor,
    upstream: tuple[Tensor, ...],
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients as a differentiable function of the inputs and of the upstream gradient."""
    wanted = [
        t for t, needed in ((input, ctx.needs_input_grad[0]), (centroid_logits, ctx.needs_input_grad[1])) if needed
    ]
    grads = iter(torch.autograd.grad(outputs, wanted, upstream, create_graph=True))
    return (
        next(grads) if ctx.needs_input_grad[0] else None,
        next(grads) if ctx.needs_input_grad[1] else None,
    )


class _Loss(torch.autograd.Function):
    """The loss, of the arguments of :func:`loss`; what is not differentiated comes in one, as each costs time."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        centroid_logits: Tensor,
        others: tuple[Tensor, Tensor | None, Tensor | None, Options, CentroidStats | None, CenterUpdate | None, bool],
    ) -> Tensor:
        target, center, weight, options, stats, update, one_pass = others
        if stats is None:
            stats = centroid_stats(centroid_logits, options)
        moving = (center, None, None, 0.0) if update is None else (None, center, *update)
        result, rows, moved, grad = _Operators.loss(
            input,
            target,
            *moving,
            *stats,
            weight,
            *options.for_loss,
            one_pass,
        )
        if update is not None:
            center = moved
        ctx.save_for_backward(input, target, centroid_logits)
        ctx.kept = center, weight, stats, rows, options
        ctx.made = [grad] if one_pass else None
        return result

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        input, target, centroid_logits = ctx.saved_tensors
        center, weight, stats, rows, options = ctx.kept
        if _differentiable_backward():
            result = reference.loss(input, target, centroid_logits, center, weight, options)
            grads = _reference_grads(ctx, (result,), input, centroid_logits, (upstream,))
        else:
            grads = _grads(ctx, input, target, centroid_logits, center, stats, rows, upstream, options, ctx.made)
        return *grads, None


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
    ) -> tuple[Tensor, Tensor]:
        stats = centroid_stats(centroid_logits, options)
        values, rows = _call_terms(input, target, center, stats, options)
        ctx.save_for_backward(input, target, centroid_logits)
        ctx.kept = center, stats, rows, options
        return values[0].clone(), values[1].clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        input, target, centroid_logits = ctx.saved_tensors
        center, stats, rows, options = ctx.kept
        if _differentiable_backward():
            outputs = reference.terms(input, target, centroid_logits, center, options)
            grads = _reference_grads(ctx, outputs, input, centroid_logits, upstream)
        else:
            rows = rows.clone()
            rows[:, -2], rows[:, -1] = upstream
            grads = _grads(ctx, input, target, centroid_logits, center, stats, rows, None, options)
        return *grads, None, None, None


def loss(
    input: Tensor,
    target: Tensor,
    centroid_logits: Tensor,
    center: Tensor | None,
    weight: Tensor | None,
    options: Options,
    stats: CentroidStats | None,
    update: CenterUpdate | None,
) -> Tensor:
    """The loss of [B, M] features. `stats` belong to `centroid_logits`, or are computed; `update` moves `center`."""
    # By sample the gradient of a row is known once the row is: made in this pass, it needs no second one. Half
    # precisions wait for the upstream gradient, which may be what keeps them from underflow.
    one_pass = (
        options.scalar_by_sample
        and input.requires_grad
        and torch.is_grad_enabled()
        and input.dtype is centroid_logits.dtype
        and not torch.compiler.is_compiling()
    )
    return _Loss.apply(input, centroid_logits, (target, center, weight, options, stats, update, one_pass))


def terms(
    input: Tensor, target: Tensor, centroid_logits: Tensor, center: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """Concentration [B] and separation [B] of [B, M] features."""
    return _Terms.apply(input, centroid_logits, target, center, options)


def _register_fakes() -> None:
    """Shapes and dtypes of each operator's outputs, for torch.compile and torch.export."""

    @torch.library.register_fake("ncmi_kernels::centroid_stats")
    def _(centroid_logits: Tensor, softmax: bool, centroid_to_sample: bool) -> tuple[Tensor, ...]:
        classes, columns = centroid_logits.shape
        return (
            centroid_logits.new_empty((classes, columns)),
            centroid_logits.new_empty((classes if centroid_to_sample else 0, columns)),
            centroid_logits.new_empty((2, columns)),
            centroid_logits.new_empty((3 * classes + 2,), dtype=torch.float64),
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
    ) -> tuple[Tensor, ...]:
        rows = input.shape[0]
        return log_activation.new_empty((2, rows)), norms.new_empty((rows, ROW_STATS))

    @torch.library.register_fake("ncmi_kernels::loss")
    def _(
        input: Tensor,
        target: Tensor,
        center: Tensor | None,
        running_center: Tensor | None,
        num_batches_tracked: Tensor | None,
        momentum: float,
        log_activation: Tensor,
        activation: Tensor,
        reference: Tensor,
        norms: Tensor,
        weight: Tensor | None,
        temperature: float,
        l2_normalize: bool,
        softmax: bool,
        centroid_to_sample: bool,
        batch_ratio: bool,
        reduction: int,
        eps: float,
        ignore_index: int,
        with_grad: bool,
    ) -> tuple[Tensor, ...]:
        rows = input.shape[0]
        return (
            log_activation.new_empty((rows,) if REDUCTIONS[reduction] == "none" else ()),
            norms.new_empty((rows, ROW_STATS)),
            log_activation.new_empty((0 if running_center is None else input.shape[1],)),
            log_activation.new_empty(input.shape if with_grad else (0,)),
        )

    @torch.library.register_fake("ncmi_kernels::scale_")
    def _(grad: Tensor, upstream: Tensor) -> None:
        return None

    @torch.library.register_fake("ncmi_kernels::input_grad")
    def _(
        input: Tensor,
        target: Tensor,
        center: Tensor | None,
        log_activation: Tensor,
        activation: Tensor,
        reference: Tensor,
        norms: Tensor,
        rows: Tensor,
        upstream: Tensor | None,
        centroid_to_sample: bool,
        ignore_index: int,
    ) -> Tensor:
        return input.new_empty(input.shape)

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
        upstream: Tensor | None,
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


def _skip_autograd() -> Library:
    """Let calls pass the dispatcher's autograd layer: its fallback costs as much as the smaller kernels do.

    The autograd Functions above, which alone call the operators, run them without gradients.
    """
    library = Library("ncmi_kernels", "IMPL", "Autograd")
    for name in ("centroid_stats", "update_center_", "terms", "loss", "scale_", "input_grad", "centroid_grad"):
        library.impl(name, torch.library.fallthrough_kernel)
    return library


if _backends.load_library() is None:
    _register_fakes()
    _library = _skip_autograd()  # lasts as long as this object
