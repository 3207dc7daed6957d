"""The operators (declared in csrc/ops.cpp): fake kernels for tracing, and autograd.

One path, whatever the backend: centroid_stats -> loss forward, input_grad and centroid_grad backward.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import Library

from ncmi_kernels import _backends, reference
from ncmi_kernels._options import REDUCTIONS, Options


@dataclass
class Operators:
    """One backend's implementation of the operators of csrc/ops.cpp, called with the arguments declared there."""

    centroid_stats: Callable[..., Any]
    update_center_: Callable[..., Any]
    terms: Callable[..., Any]
    loss: Callable[..., Any]
    scale_: Callable[..., Any]
    input_grad: Callable[..., Any]
    centroid_grad: Callable[..., Any]
    class_totals: Callable[..., Any]
    centroid_step_: Callable[..., Any]


NAMES = tuple(field.name for field in fields(Operators))


# "cpu" and "cuda": the dispatcher tells them apart by the tensors. Looked up once, as that costs as much as some calls.
_compiled = (
    Operators(*(getattr(torch.ops.ncmi_kernels, name).default for name in NAMES))
    if _backends.load_library() is None
    else None
)


def operators(backend: str) -> Operators:
    """The operators of a backend that can run here."""
    if backend == "triton":
        from ncmi_kernels import _triton

        return _triton.OPERATORS
    assert _compiled is not None
    return _compiled


ROW_STATS, CLASS_STATS = 9, 8  # columns of the operators' `rows` and `norms`


class CentroidStats(NamedTuple):
    """What the rows need to know of the centroids: the outputs of the operator centroid_stats."""

    log_activation: Tensor  # [C, M]
    activation: Tensor  # [C, M], or [0, M] for sample_to_centroid
    reference: Tensor  # [2, M]
    norms: Tensor  # [C + 1, 8] float64: a record a class, then one of all


def centroid_stats(centroid_logits: Tensor, options: Options, backend: str) -> CentroidStats:
    """Statistics of centroid logits [C, M], float32 or float64. Not differentiable: the autograd Functions are."""
    stats = operators(backend).centroid_stats(centroid_logits.detach(), options.softmax, options.centroid_to_sample)
    return CentroidStats(*stats)


# How a forward pass in training moves the running centre first: num_batches_tracked [] int64, momentum.
CenterUpdate = tuple[Tensor, float]


def update_center_(
    center: Tensor,
    update: CenterUpdate,
    input: Tensor,
    target: Tensor,
    num_classes: int,
    ignore_index: int,
    backend: str,
) -> Tensor:
    """Move `center` [M] towards the mean of the rows of `input`, in place; returns a copy of it."""
    move = operators(backend).update_center_
    return move(center, update[0], input, target, update[1], num_classes, ignore_index)


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
    backend: str,
    made: list[Tensor] | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of input [B, M] and centroid_logits [C, M], each only where it is asked for.

    `made` is None, or holds the gradient of input for an upstream gradient of 1 where the forward pass made it: the
    first backward pass takes it out and owns it, a repeated one forms it again, to the same bits.
    """
    grad_input = grad_centroids = None
    run = operators(backend)
    if ctx.needs_input_grad[0]:
        grad_input = (
            made.pop()
            if made
            else run.input_grad(
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
            run.scale_(grad_input, upstream)
    if ctx.needs_input_grad[1]:
        grad_centroids = run.centroid_grad(
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
        others: tuple[
            Tensor,
            Tensor | None,
            Tensor | None,
            Options,
            str,
            CentroidStats | None,
            CenterUpdate | None,
            bool,
            list[Tensor] | None,
        ],
    ) -> Tensor:
        target, center, weight, options, backend, stats, update, one_pass, means = others
        if stats is None:
            stats = centroid_stats(centroid_logits, options, backend)
        moving = (center, None, None, 0.0) if update is None else (None, center, *update)
        result, rows, moved, grad, means_of_terms = operators(backend).loss(
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
        if means is not None:
            means.append(means_of_terms)
        ctx.save_for_backward(input, target, centroid_logits)
        ctx.kept = center, weight, stats, rows, options, backend
        ctx.made = [grad] if one_pass else None
        return result

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        input, target, centroid_logits = ctx.saved_tensors
        center, weight, stats, rows, options, backend = ctx.kept
        if _differentiable_backward():
            result = reference.loss(input, target, centroid_logits, center, weight, options)
            grads = _reference_grads(ctx, (result,), input, centroid_logits, (upstream,))
        else:
            grads = _grads(
                ctx, input, target, centroid_logits, center, stats, rows, upstream, options, backend, ctx.made
            )
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
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        stats = centroid_stats(centroid_logits, options, backend)
        values, rows = operators(backend).terms(input, target, center, *stats, *options.for_terms)
        ctx.save_for_backward(input, target, centroid_logits)
        ctx.kept = center, stats, rows, options, backend
        return values[0].clone(), values[1].clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        input, target, centroid_logits = ctx.saved_tensors
        center, stats, rows, options, backend = ctx.kept
        if _differentiable_backward():
            outputs = reference.terms(input, target, centroid_logits, center, options)
            grads = _reference_grads(ctx, outputs, input, centroid_logits, upstream)
        else:
            rows = rows.clone()
            rows[:, -2], rows[:, -1] = upstream
            grads = _grads(ctx, input, target, centroid_logits, center, stats, rows, None, options, backend)
        return *grads, None, None, None, None


def loss(
    input: Tensor,
    target: Tensor,
    centroid_logits: Tensor,
    center: Tensor | None,
    weight: Tensor | None,
    options: Options,
    backend: str,
    stats: CentroidStats | None,
    update: CenterUpdate | None,
    *,
    means: list[Tensor] | None = None,
) -> Tensor:
    """The loss of [B, M] features. `stats` belong to `centroid_logits`, or are computed; `update` moves `center`.

    To `means` is appended what :func:`reference.loss` appends.
    """
    # By sample the gradient of a row is known once the row is: made in this pass, it needs no second one. Half
    # precisions wait for the upstream gradient, which may be what keeps them from underflow.
    one_pass = (
        options.scalar_by_sample
        and input.requires_grad
        and torch.is_grad_enabled()
        and input.dtype is centroid_logits.dtype
        and not torch.compiler.is_compiling()
    )
    others = target, center, weight, options, backend, stats, update, one_pass, means
    result = _Loss.apply(input, centroid_logits, others)
    if means is not None and torch.compiler.is_compiling():
        means.append(means.pop().detach())  # what leaves a traced Function requires a gradient
    return result


def centroid_gradient(
    input: Tensor,
    target: Tensor,
    centroid_logits: Tensor,
    center: Tensor | None,
    weight: Tensor | None,
    options: Options,
    backend: str,
    stats: CentroidStats | None,
) -> Tensor:
    """The gradient of the loss of [B, M] features by `centroid_logits` [C, M], without a graph."""
    run = operators(backend)
    stats = stats or centroid_stats(centroid_logits, options, backend)
    rows = run.loss(input, target, center, None, None, 0.0, *stats, weight, *options.for_loss, False)[1]
    return run.centroid_grad(
        input,
        target,
        center,
        centroid_logits,
        *stats,
        rows,
        None,
        options.centroid_to_sample,
        options.ignore_index,
    )


def centroid_step_(
    input: Tensor,
    target: Tensor,
    centroid_logits: Tensor,
    center: Tensor | None,
    weight: Tensor | None,
    options: Options,
    backend: str,
    stats: CentroidStats,
    momentum_buffer: Tensor | None,
    sgd: tuple[float, float, float, bool],
) -> CentroidStats:
    """Move `centroid_logits` [C, M] against :func:`centroid_gradient`, in place; the statistics of the new ones.

    `sgd` is learning rate, momentum, weight decay and whether the momentum is Nesterov's; `momentum_buffer` goes with a
    momentum.
    """
    run = operators(backend)
    rows = run.loss(input, target, center, None, None, 0.0, *stats, weight, *options.for_loss, False)[1]
    new_stats = run.centroid_step_(
        input,
        target,
        center,
        centroid_logits,
        momentum_buffer,
        *stats,
        rows,
        options.softmax,
        options.centroid_to_sample,
        options.ignore_index,
        *sgd,
    )
    # The operators pass the dispatcher's layers that would do it.
    torch.autograd.graph.increment_version(centroid_logits)
    if momentum_buffer is not None:
        torch.autograd.graph.increment_version(momentum_buffer)
    return CentroidStats(*new_stats)


def terms(
    input: Tensor,
    target: Tensor,
    centroid_logits: Tensor,
    center: Tensor | None,
    options: Options,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Concentration [B] and separation [B] of [B, M] features."""
    return _Terms.apply(input, centroid_logits, target, center, options, backend)


def register_fakes(namespace: str) -> None:
    """Shapes and dtypes of each operator's outputs, for torch.compile and torch.export."""

    @torch.library.register_fake(f"{namespace}::centroid_stats")
    def centroid_stats(centroid_logits: Tensor, softmax: bool, centroid_to_sample: bool) -> tuple[Tensor, ...]:
        classes, columns = centroid_logits.shape
        return (
            centroid_logits.new_empty((classes, columns)),
            centroid_logits.new_empty((classes if centroid_to_sample else 0, columns)),
            centroid_logits.new_empty((2, columns)),
            centroid_logits.new_empty((classes + 1, CLASS_STATS), dtype=torch.float64),
        )

    @torch.library.register_fake(f"{namespace}::centroid_step_")
    def _(
        input: Tensor,
        target: Tensor,
        center: Tensor | None,
        centroid_logits: Tensor,
        momentum_buffer: Tensor | None,
        log_activation: Tensor,
        activation: Tensor,
        reference: Tensor,
        norms: Tensor,
        rows: Tensor,
        softmax: bool,
        centroid_to_sample: bool,
        ignore_index: int,
        lr: float,
        momentum: float,
        weight_decay: float,
        nesterov: bool,
    ) -> tuple[Tensor, ...]:
        return centroid_stats(centroid_logits, softmax, centroid_to_sample)

    @torch.library.register_fake(f"{namespace}::terms")
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

    @torch.library.register_fake(f"{namespace}::loss")
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
            norms.new_empty((2,)),
        )

    @torch.library.register_fake(f"{namespace}::scale_")
    def _(grad: Tensor, upstream: Tensor) -> None:
        return None

    @torch.library.register_fake(f"{namespace}::input_grad")
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

    @torch.library.register_fake(f"{namespace}::centroid_grad")
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
        totals: Tensor | None = None,
    ) -> Tensor:
        return centroid_logits.new_empty(centroid_logits.shape)

    @torch.library.register_fake(f"{namespace}::class_totals")
    def _(
        input: Tensor,
        target: Tensor,
        center: Tensor | None,
        rows: Tensor,
        upstream: Tensor | None,
        centroid_to_sample: bool,
        ignore_index: int,
    ) -> Tensor:
        return rows.new_empty((input.shape[1] + 1,))

    @torch.library.register_fake(f"{namespace}::update_center_")
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


def skip_autograd(namespace: str) -> Library:
    """Let calls pass the dispatcher's autograd layer: its fallback costs as much as the smaller kernels do.

    The autograd Functions above, which alone call the operators, run them without gradients. Lasts as long as the
    object that is returned.
    """
    library = Library(namespace, "IMPL", "Autograd")
    for name in NAMES:
        library.impl(name, torch.library.fallthrough_kernel)
    return library


if _backends.load_library() is None:
    register_fakes("ncmi_kernels")
    _library = skip_autograd("ncmi_kernels")
