"""The operators of the backends, and autograd over them.

One path, whatever the backend: centroid_stats -> loss forward, input_grad and centroid_grad backward.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from ncmi_kernels import _backends, reference
from ncmi_kernels._modes import forward_mode, jit_tracing, mapped_backward, plain_backward, transforming
from ncmi_kernels._options import Options
from ncmi_kernels._problem import CenterUpdate, Problem
from ncmi_kernels._schema import Operators, define, defined

# "cpu" and "cuda": the dispatcher tells them apart by the tensors. Looked up once, as that costs as much as some calls.
_compiled: Operators | None = None
if _backends.load_library() is None:
    define("ncmi_kernels")
    _compiled = defined("ncmi_kernels")


def operators(backend: str) -> Operators:
    """The operators of a backend that can run here."""
    if backend == "triton":
        from ncmi_kernels import _triton

        return _triton.OPERATORS
    assert _compiled is not None
    return _compiled


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
    wanted: Sequence[bool],
    input: Tensor,
    centroid_logits: Tensor,
    problem: Problem,
    rows: Tensor,
    upstream: Tensor | None,
    made: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of input [B, M] and centroid_logits [C, M], each only where it is wanted.

    `made` is the gradient of input for an upstream gradient of 1, where the forward pass made it, or None. It is
    scaled in place.
    """
    grad_input = grad_centroids = None
    target, center, _, options, backend, stats, *_ = problem
    run = operators(backend)
    last = options.centroid_to_sample, options.ignore_index
    if wanted[0]:
        if made is None:
            grad_input = run.input_grad(input, target, center, *stats, rows, upstream, *last)
        else:
            grad_input = made
            run.scale_(grad_input, upstream)
    if wanted[1]:
        grad_centroids = run.centroid_grad(input, target, center, centroid_logits, *stats, rows, upstream, *last)
    return grad_input, grad_centroids


def grads_by_autograd(
    function: Callable[[], Any], inputs: Sequence[Tensor], wanted: Sequence[bool], upstream: Any
) -> tuple[Tensor | None, ...]:
    """For a backward pass that is no plain one: the gradients of `function`, each where it is wanted, else None."""
    create_graph = torch.is_grad_enabled()
    leaves = [each for each, needed in zip(inputs, wanted, strict=False) if needed]
    with torch.enable_grad():
        found = iter(torch.autograd.grad(function(), leaves, upstream, create_graph=create_graph))
    return tuple(next(found) if needed else None for needed in wanted)


def save(ctx: Any, *tensors: Any) -> None:
    """Save what a backward pass needs, for :func:`saved`: autograd lets go of it after that pass, and hooks see it.

    The first two are the centre, or None, and the centroid logits.
    """
    ctx.save_for_backward(*tensors)
    if torch.compiler.is_compiling():
        return
    logits = tensors[1]
    if type(logits) in (Tensor, Parameter) and not logits.is_inference():
        ctx.before = tensors[0], logits._version, logits.data_ptr()
    else:  # no version, or as of a fake tensor no address
        ctx.before = tensors[0], None, None


def saved(ctx: Any) -> tuple[Sequence[Any], bool]:
    """What :func:`save` was given, and whether it is of a forward pass that was repeated at another centre.

    torch.utils.checkpoint without re-entrance repeats a forward pass when its tensors are asked for. By then others may
    have moved the running centre: that of before is the one to use, and what was found of the rows is to be found
    again.

    Raises:
        RuntimeError: the centroids of the repeated pass were modified. (Of others autograd's own error tells.)
    """
    tensors = ctx.saved_tensors
    if torch.compiler.is_compiling():
        return tensors, False
    center, version, address = ctx.before
    if version is not None:
        logits = tensors[1]
        if logits._version != version and logits.data_ptr() == address:  # else a copy of theirs
            raise RuntimeError(
                "centroid_logits: modified by an inplace operation since the forward pass, expected the backward pass "
                "first"
            )
    if tensors[0] is center or center is None or torch.equal(tensors[0], center):
        return tensors, False
    return (center, *tensors[1:]), True


def _run_loss(
    input: Tensor, centroid_logits: Tensor, problem: Problem, seen: list[Tensor] | None, one_pass: bool
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The loss, and what its backward pass needs; with `one_pass` also the gradient of the input."""
    target, center, weight, options, backend, stats, _, update = problem
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
    return result, (center, centroid_logits, input, target, weight, grad if one_pass else None, rows, *stats)


class _Loss(torch.autograd.Function):
    """The loss, of the arguments of :func:`loss`."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, centroid_logits: Tensor, problem: Problem, seen: list[Tensor] | None
    ) -> Tensor:
        options = problem.options
        # By sample the gradient of a row is known once the row is: made in this pass, it needs no second one. Half
        # precisions wait for the upstream gradient, which may be what keeps them from underflow.
        one_pass = (
            options.scalar_by_sample
            and not torch.compiler.is_compiling()
            and ctx.needs_input_grad[0]
            and input.dtype is centroid_logits.dtype
        )
        result, kept = _run_loss(input, centroid_logits, problem, seen, one_pass)
        save(ctx, *kept)
        ctx.options, ctx.backend = options, problem.backend
        ctx.spent = False  # whether a backward pass has taken over the gradient that the forward pass made
        return result

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (center, centroid_logits, input, target, weight, made, rows, *stats), repeated = saved(ctx)
        problem = Problem(target, center, weight, ctx.options, ctx.backend, stats)
        wanted = ctx.needs_input_grad
        if not plain_backward(upstream):
            by_reference = mapped_backward(upstream)
            return (
                *grads_by_autograd(
                    lambda: _transformable_loss(input, centroid_logits, problem, by_reference),
                    (input, centroid_logits),
                    wanted[:2],
                    upstream,
                ),
                None,
                None,
            )
        if repeated:
            rows, made = _rows_of_loss(input, problem, made is not None)
        elif made is not None and ctx.spent:
            made = _grads((True, False), input, centroid_logits, problem, rows, None)[0]
        if made is not None:
            ctx.spent = True
        return *_grads(wanted, input, centroid_logits, problem, rows, upstream, made), None, None


def _rows_of_loss(input: Tensor, problem: Problem, with_grad: bool = False) -> tuple[Tensor, Tensor | None]:
    """The rows' statistics with the derivatives of the loss, and for an upstream gradient of 1 that of the input."""
    target, center, weight, options, backend, stats, *_ = problem
    _, rows, _, grad, _ = operators(backend).loss(
        input, target, center, None, None, 0.0, *stats, weight, *options.for_loss, with_grad
    )
    return rows, grad if with_grad else None


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
        save(ctx, center, centroid_logits, input, target, rows, *stats)
        ctx.options, ctx.backend = options, backend
        return values[0].clone(), values[1].clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (center, centroid_logits, input, target, rows, *stats), repeated = saved(ctx)
        options, backend = ctx.options, ctx.backend
        wanted = ctx.needs_input_grad[:2]
        grads: tuple[Tensor | None, ...]
        if plain_backward(*upstream):
            if repeated:
                rows = operators(backend).terms(input, target, center, *stats, *options.for_terms)[1]
            else:
                rows = rows.clone()
            rows[:, -2], rows[:, -1] = upstream
            problem = Problem(target, center, None, options, backend, stats)
            grads = _grads(wanted, input, centroid_logits, problem, rows, None)
        elif forward_mode() or mapped_backward(*upstream):
            grads = _pull_by_reference(input, target, centroid_logits, center, options, upstream)
        else:
            grads = _TermsGrad.apply(*upstream, input, target, centroid_logits, center, options, backend, wanted)
        return *grads, None, None, None, None


# ------------------------------------------------------------------------------------------------------------
# The same for what transforms the computation: torch.func, create_graph. Values and first derivatives come from the
# kernels, further ones from the reference. In this style, which torch.func wants, the Functions above would take twice
# the time for a small batch.
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


def _pull_by_reference(
    input: Tensor,
    target: Tensor,
    centroid_logits: Tensor,
    center: Tensor | None,
    options: Options,
    upstream: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor]:
    """The gradients of input and centroid logits for those of the terms, differentiable and mappable in every way."""
    pull: Any = torch.func.vjp(lambda z, xi: reference.terms(z, target, xi, center, options), input, centroid_logits)[1]
    return pull(upstream)


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
        ctx.options, ctx.backend = inputs[4:]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        input, target, centroid_logits, center = ctx.saved_tensors
        wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        if forward_mode() or mapped_backward(*upstream):
            grad_input, grad_centroids = _pull_by_reference(
                input, target, centroid_logits, center, ctx.options, upstream
            )
        else:
            grad_input, grad_centroids = _TermsGrad.apply(
                *upstream, input, target, centroid_logits, center, ctx.options, ctx.backend, wanted
            )
        return grad_input, None, grad_centroids, None, None, None

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
        problem = Problem(target, center, None, options, backend, stats)
        return _grads(wanted, input, centroid_logits, problem, rows, None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, Tensor | None]) -> None:
        ctx.save_for_backward(*inputs[:6])
        ctx.options, ctx.wanted = inputs[6], inputs[8]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        concentration, separation, input, target, centroid_logits, center = ctx.saved_tensors

        def grads(concentration: Tensor, separation: Tensor, input: Tensor, centroid_logits: Tensor) -> Any:
            upstream_of_terms = concentration, separation
            both = _pull_by_reference(input, target, centroid_logits, center, ctx.options, upstream_of_terms)
            return tuple(grad for grad, is_wanted in zip(both, ctx.wanted, strict=True) if is_wanted)

        pull: Any = torch.func.vjp(grads, concentration, separation, input, centroid_logits)[1]
        grad_concentration, grad_separation, grad_input, grad_centroids = pull(
            tuple(grad for grad, is_wanted in zip(upstream, ctx.wanted, strict=True) if is_wanted)
        )
        return grad_concentration, grad_separation, grad_input, None, grad_centroids, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        one_batch = in_dims[4] is None and in_dims[5] is None and not args[-1][1]
        return _map_slices(_TermsGrad, info, in_dims, args, 4, one_batch)


def _transformable_loss(input: Tensor, centroid_logits: Tensor, problem: Problem, by_reference: bool = False) -> Tensor:
    target, center, weight, options, backend, *_ = problem
    if by_reference or forward_mode():
        return reference.loss(input, target, centroid_logits, center, weight, options)
    kept = target != options.ignore_index
    classes = target.masked_fill(~kept, 0)
    # An ignored row may hold NaN, which zero times anything would keep.
    input = torch.where(kept[:, None], input, 0)
    concentration, separation = _TransformableTerms.apply(input, classes, centroid_logits, center, options, backend)
    return reference.reduce(*reference.weigh(concentration, separation, kept, classes, weight), options)


def loss(input: Tensor, centroid_logits: Tensor, problem: Problem, *, seen: list[Tensor] | None = None) -> Tensor:
    """The loss of [B, M] features. Statistics that the problem lacks are computed.

    To `seen` are appended what :func:`reference.loss` appends and, but in compiled code, the rows' statistics for
    :func:`centroid_step_`. Nothing within a transform of torch.func, which it would outlive.
    """
    compiling = torch.compiler.is_compiling()
    if transforming() or jit_tracing():
        assert problem.center_update is None
        return _transformable_loss(input, centroid_logits, problem)
    graph = torch.is_grad_enabled() and (input.requires_grad or centroid_logits.requires_grad)
    if not (graph or compiling):
        return _run_loss(input, centroid_logits, problem, seen, one_pass=False)[0]
    result = _Loss.apply(input, centroid_logits, problem, seen)
    if seen is not None and compiling:
        seen.append(seen.pop().detach())  # what leaves a traced Function requires a gradient
    return result


def centroid_gradient(input: Tensor, centroid_logits: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """Without a graph: the gradient of the loss of [B, M] features by `centroid_logits` [C, M], and means of terms [2].

    The means are NaN where no row counts.
    """
    target, center, weight, options, backend, stats, *_ = problem
    run = operators(backend)
    stats = stats or centroid_stats(centroid_logits, options, backend)
    _, rows, _, _, means = run.loss(input, target, center, None, None, 0.0, *stats, weight, *options.for_loss, False)
    grad = run.centroid_grad(
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
    return grad, means


class SGD(NamedTuple):
    """The numbers of a step of torch.optim.SGD, in the order that the operator centroid_step_ takes them."""

    lr: float
    momentum: float
    weight_decay: float
    nesterov: bool


def centroid_step_(
    input: Tensor,
    centroid_logits: Tensor,
    problem: Problem,
    rows: Tensor | None,
    momentum_buffer: Tensor | None,
    sgd: SGD,
) -> None:
    """Move `centroid_logits` [C, M] against :func:`centroid_gradient`, in place.

    The problem's statistics, which are those of the centroids, become those of the new ones. No graph uses the old ones
    unnoticed: all that have them see that the centroids have changed.

    `rows` are what :func:`loss` gave of the same batch at the same centroids and centre, or None; `momentum_buffer`
    goes with a momentum. A batch with terms that are not finite moves nothing.
    """
    target, center, _, options, backend, stats, *_ = problem
    run = operators(backend)
    if rows is None:
        rows, _ = _rows_of_loss(input, problem)
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
