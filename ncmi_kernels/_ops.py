"""The operators (declared in csrc/ops.cpp): fake kernels for tracing, and autograd.

One path, whatever the backend: centroid_stats -> loss forward, input_grad and centroid_grad backward.
"""

from collections.abc import Callable, Sequence
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


# Whether a transform of torch.func is active. It has no public name; autograd.Function asks the same.
transforming: Callable[[], bool] = torch._C._are_functorch_transforms_active


def _grads(
    wanted: Sequence[bool],
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
    """The gradients of input [B, M] and centroid_logits [C, M], each only where it is wanted.

    `made` is None, or holds the gradient of input for an upstream gradient of 1 where the forward pass made it: the
    first backward pass takes it out and owns it, a repeated one forms it again, to the same bits.
    """
    grad_input = grad_centroids = None
    run = operators(backend)
    if wanted[0]:
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
    if wanted[1]:
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


def _plain_backward() -> bool:
    """Whether this backward pass is neither differentiated (create_graph) nor mapped (vmap)."""
    return not (torch.is_grad_enabled() or transforming()) or torch.compiler.is_compiling()


def grads_by_autograd(
    function: Callable[[], Any], inputs: Sequence[Tensor], wanted: Sequence[bool], upstream: Any
) -> tuple[Tensor | None, ...]:
    """For a backward pass that is no plain one: the gradients of `function`, each where it is wanted, else None."""
    create_graph = torch.is_grad_enabled()
    leaves = [each for each, needed in zip(inputs, wanted, strict=False) if needed]
    with torch.enable_grad():
        found = iter(torch.autograd.grad(function(), leaves, upstream, create_graph=create_graph))
    return tuple(next(found) if needed else None for needed in wanted)


Given = tuple[Tensor, int] | None  # a tensor that the graph uses and does not own, with its version


def given_center(center: Tensor | None) -> Given:
    """A centre that nothing but its version tells of a change.

    Not saved as other tensors are: a forward pass that torch.utils.checkpoint repeats finds a centre that moved on.
    """
    if center is None or torch.compiler.is_compiling() or center.is_inference():
        return None
    return center, center._version


def check_unchanged(**tensors: Given) -> None:
    """Raise RuntimeError for one that was modified since the forward pass."""
    for name, given in tensors.items():
        if given is not None and given[0]._version != given[1]:
            raise RuntimeError(
                f"{name}: modified by an inplace operation since the forward pass, expected the backward pass first"
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
        target, center, weight, options, backend, stats, update, one_pass, seen = others
        # Statistics that were given, a step of the centroids overwrites. Autograd sees that it moves the centroids, but
        # not where hooks on saved tensors put copies in their place.
        ctx.given = None if stats is None else (centroid_logits, centroid_logits._version)
        ctx.given_center = None if update is not None else given_center(center)
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
        if seen is not None:
            seen.append(means_of_terms)
            if not torch.compiler.is_compiling():
                seen.append(rows)
        ctx.save_for_backward(input, target, centroid_logits)
        ctx.kept = center, weight, stats, rows, options, backend
        ctx.made = [grad] if one_pass else None
        return result

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        input, target, centroid_logits = ctx.saved_tensors
        center, weight, stats, rows, options, backend = ctx.kept
        check_unchanged(centroid_logits=ctx.given, center=ctx.given_center)
        if _plain_backward():
            grads = _grads(
                ctx.needs_input_grad,
                input,
                target,
                centroid_logits,
                center,
                stats,
                rows,
                upstream,
                options,
                backend,
                ctx.made,
            )
            return *grads, None
        return grads_by_autograd(
            lambda: _transformable_loss(input, target, centroid_logits, center, weight, options, backend),
            (input, centroid_logits),
            ctx.needs_input_grad,
            upstream,
        )


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
        ctx.save_for_backward(input, target, centroid_logits, center)
        ctx.kept = stats, rows, options, backend
        return values[0].clone(), values[1].clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        input, target, centroid_logits, center = ctx.saved_tensors
        stats, rows, options, backend = ctx.kept
        wanted = ctx.needs_input_grad[:2]
        if _plain_backward():
            rows = rows.clone()
            rows[:, -2], rows[:, -1] = upstream
            grads = _grads(wanted, input, target, centroid_logits, center, stats, rows, None, options, backend)
        else:
            grads = _TermsGrad.apply(*upstream, input, target, centroid_logits, center, options, backend, wanted)
        return *grads, None, None, None, None


# ------------------------------------------------------------------------------------------------------------
# The same for what transforms the computation: torch.func, create_graph. Values and first derivatives come from the
# kernels, further ones and the forward mode from the reference. In this style, which torch.func wants, the Functions
# above would take twice the time for a small batch.
# ------------------------------------------------------------------------------------------------------------


def _map_slices(
    function: Any, info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...], rowwise: int, one_batch: bool
) -> tuple[tuple[Tensor | None, ...], tuple[int | None, ...]]:
    """vmap's rule of the Functions below; the first `rowwise` arguments, and the outputs, have a row a sample.

    The slices of the mapped dimension make `one_batch` where only those arguments are mapped, else they are batches.
    """
    size = info.batch_size
    outputs: list[Tensor | None]
    if one_batch:
        moved = [
            arg.expand(size, *arg.shape) if dim is None else arg.movedim(dim, 0)
            for arg, dim in zip(args[:rowwise], in_dims, strict=False)
        ]
        whole = function.apply(*(arg.flatten(0, 1) for arg in moved), *args[rowwise:])
        outputs = [None if output is None else output.unflatten(0, moved[0].shape[:2]) for output in whole]
    else:
        if size == 0:
            raise ValueError("vmap: got a dimension of size 0, expected at least 1 where centroids or centres differ")
        slices = [
            function.apply(
                *(arg.select(dim, i) if isinstance(dim, int) else arg for arg, dim in zip(args, in_dims, strict=True))
            )
            for i in range(size)
        ]
        outputs = [None if each[0] is None else torch.stack(each) for each in zip(*slices, strict=True)]
    return tuple(outputs), tuple(None if output is None else 0 for output in outputs)


def _jvp(function: Callable[..., Any], points: tuple[Tensor, ...], tangents: tuple[Tensor | None, ...]) -> Any:
    """The derivative of `function` at `points` along `tangents`, where None is zero."""
    along = tuple(
        torch.zeros_like(point) if tangent is None else tangent for point, tangent in zip(points, tangents, strict=True)
    )
    return torch.func.jvp(function, points, along)[1]


class _TransformableTerms(torch.autograd.Function):
    """Concentration and separation, of the arguments of :func:`terms`."""

    @staticmethod
    def forward(
        input: Tensor, target: Tensor, centroid_logits: Tensor, center: Tensor | None, options: Options, backend: str
    ) -> tuple[Tensor, Tensor]:
        stats = centroid_stats(centroid_logits, options, backend)
        values, _ = operators(backend).terms(input, target, center, *stats, *options.for_terms)
        return values[0].clone(), values[1].clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.save_for_forward(*inputs[:4])
        ctx.kept = inputs[4:]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        grad_input, grad_centroids = _TermsGrad.apply(*upstream, *ctx.saved_tensors, *ctx.kept, wanted)
        return grad_input, None, grad_centroids, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor]:
        input, target, centroid_logits, center = ctx.saved_tensors
        options, _ = ctx.kept
        return _jvp(
            lambda z, xi: reference.terms(z, target, xi, center, options),
            (input, centroid_logits),
            (tangents[0], tangents[2]),
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        one_batch = in_dims[2] is None and in_dims[3] is None
        return _map_slices(_TransformableTerms, info, in_dims, args, 2, one_batch)


class _TermsGrad(torch.autograd.Function):
    """The gradients of both terms for the gradients of these, [B] each; differentiable."""

    @staticmethod
    def forward(
        upstream_concentration: Tensor,
        upstream_separation: Tensor,
        input: Tensor,
        target: Tensor,
        centroid_logits: Tensor,
        center: Tensor | None,
        options: Options,
        backend: str,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        stats = centroid_stats(centroid_logits, options, backend)
        _, rows = operators(backend).terms(input, target, center, *stats, *options.for_terms)
        rows[:, -2], rows[:, -1] = upstream_concentration, upstream_separation
        return _grads(wanted, input, target, centroid_logits, center, stats, rows, None, options, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, Tensor | None]) -> None:
        ctx.save_for_backward(*inputs[:6])
        ctx.save_for_forward(*inputs[:6])
        ctx.options, ctx.wanted = inputs[6], inputs[8]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        function, points = _TermsGrad._by_reference(ctx)
        pull: Any = torch.func.vjp(function, *points)[1]
        grad_concentration, grad_separation, grad_input, grad_centroids = pull(
            tuple(grad for grad, is_wanted in zip(upstream, ctx.wanted, strict=True) if is_wanted)
        )
        return grad_concentration, grad_separation, grad_input, None, grad_centroids, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        function, points = _TermsGrad._by_reference(ctx)
        found = iter(_jvp(function, points, (*tangents[:3], tangents[4])))
        return tuple(next(found) if is_wanted else None for is_wanted in ctx.wanted)

    @staticmethod
    def _by_reference(ctx: Any) -> tuple[Callable[..., tuple[Tensor, ...]], tuple[Tensor, ...]]:
        """The gradients that are wanted, as a function of tensors, and those tensors."""
        concentration, separation, input, target, centroid_logits, center = ctx.saved_tensors

        def grads(concentration: Tensor, separation: Tensor, input: Tensor, centroid_logits: Tensor) -> Any:
            pull: Any = torch.func.vjp(
                lambda z, xi: reference.terms(z, target, xi, center, ctx.options), input, centroid_logits
            )[1]
            both = pull((concentration, separation))
            return tuple(grad for grad, is_wanted in zip(both, ctx.wanted, strict=True) if is_wanted)

        return grads, (concentration, separation, input, centroid_logits)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        one_batch = in_dims[4] is None and in_dims[5] is None and not args[-1][1]
        return _map_slices(_TermsGrad, info, in_dims, args, 4, one_batch)


def _transformable_loss(
    input: Tensor,
    target: Tensor,
    centroid_logits: Tensor,
    center: Tensor | None,
    weight: Tensor | None,
    options: Options,
    backend: str,
) -> Tensor:
    kept = target != options.ignore_index
    classes = target.masked_fill(~kept, 0)
    # An ignored row may hold NaN, which zero times anything would keep.
    input = torch.where(kept[:, None], input, 0)
    concentration, separation = _TransformableTerms.apply(input, classes, centroid_logits, center, options, backend)
    return reference.reduce(*reference.weigh(concentration, separation, kept, classes, weight), options)


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
    seen: list[Tensor] | None = None,
) -> Tensor:
    """The loss of [B, M] features. `stats` belong to `centroid_logits`, or are computed; `update` moves `center`.

    To `seen` are appended what :func:`reference.loss` appends and, but in compiled code, the rows' statistics for
    :func:`centroid_step_`. Nothing within a transform of torch.func, which it would outlive.
    """
    if transforming():
        assert update is None
        return _transformable_loss(input, target, centroid_logits, center, weight, options, backend)
    # By sample the gradient of a row is known once the row is: made in this pass, it needs no second one. Half
    # precisions wait for the upstream gradient, which may be what keeps them from underflow.
    one_pass = (
        options.scalar_by_sample
        and input.requires_grad
        and torch.is_grad_enabled()
        and input.dtype is centroid_logits.dtype
        and not torch.compiler.is_compiling()
    )
    others = target, center, weight, options, backend, stats, update, one_pass, seen
    result = _Loss.apply(input, centroid_logits, others)
    if seen is not None and torch.compiler.is_compiling():
        seen.append(seen.pop().detach())  # what leaves a traced Function requires a gradient
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
    rows: Tensor | None,
    momentum_buffer: Tensor | None,
    sgd: tuple[float, float, float, bool],
) -> None:
    """Move `centroid_logits` [C, M] against :func:`centroid_gradient`, in place; `stats` become those of the new ones.

    `rows` are what :func:`loss` gave of the same batch at the same centroids and centre, or None.

    No graph uses the old `stats` unnoticed: all that have them see that the centroids have changed.
    `sgd` is learning rate, momentum, weight decay and whether the momentum is Nesterov's; `momentum_buffer` goes with a
    momentum. A batch with terms that are not finite moves nothing.
    """
    run = operators(backend)
    if rows is None:
        rows = run.loss(input, target, center, None, None, 0.0, *stats, weight, *options.for_loss, False)[1]
    run.centroid_step_(
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


def terms(
    input: Tensor,
    target: Tensor,
    centroid_logits: Tensor,
    center: Tensor | None,
    options: Options,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Concentration [B] and separation [B] of [B, M] features."""
    if transforming():
        return _TransformableTerms.apply(input, target, centroid_logits, center, options, backend)
    return _Terms.apply(input, centroid_logits, target, center, options, backend)


def register_fakes(namespace: str) -> None:
    """Shapes and dtypes of each operator's outputs, for torch.compile and torch.export."""

    @torch.library.register_fake(f"{namespace}::centroid_stats")
    def _(centroid_logits: Tensor, softmax: bool, centroid_to_sample: bool) -> tuple[Tensor, ...]:
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
    ) -> None:
        return None

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
