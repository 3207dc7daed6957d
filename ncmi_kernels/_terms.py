"""Concentration and separation as autograd sees them; and the loss from them, where torch.func transforms it."""

from typing import Any

import torch
from torch import Tensor

from ncmi_kernels import _focus, _plain, reference
from ncmi_kernels._autograd import apply, restored, save, saved
from ncmi_kernels._modes import forward_mode, mapped_backward, plain_backward, transforming
from ncmi_kernels._options import Options
from ncmi_kernels._problem import Problem
from ncmi_kernels._schema import ALL_MEAN, OWN_MEAN, OWN_PRIOR


def way_of(options: Options, shards: Any = None) -> Any:
    """What has `forward`, `input_grad` and `centroid_grad`, and their `Rows` and `Table`, for these options."""
    if shards is not None:
        return shards
    return _focus if options.every_pair else _plain


class _Terms(torch.autograd.Function):
    """Concentration and separation, of the arguments of :func:`terms`."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, centroid_logits: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
        options, prior = problem.options, problem.class_prior
        way = way_of(options)
        table = way.table_of(centroid_logits, options, problem.backend, prior)
        problem = problem._replace(table=table)
        values, rows = way.terms(input, problem, ctx.needs_input_grad[0])
        save(ctx, problem.center, centroid_logits, input, problem.target, prior, *rows, *table)
        ctx.options, ctx.backend = options, problem.backend
        dtype = centroid_logits.dtype
        return values[0].to(dtype, copy=True), values[1].to(dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (center, centroid_logits, input, target, prior, *kept), repeated = saved(ctx)
        options, backend = ctx.options, ctx.backend
        way = way_of(options)
        rows, table = restored(way, kept)
        problem = Problem(target, center, None, options, backend, table, class_prior=prior)
        wanted = ctx.needs_input_grad[:2]
        if plain_backward(*upstream):
            if repeated:
                _, rows = way.terms(input, problem, wanted[0])
            rows = rows._replace(coefficients=coefficients_of(rows.stats, upstream, options))
            return (
                way.input_grad(input, problem, rows, None) if wanted[0] else None,
                way.centroid_grad(input, centroid_logits, problem, rows, None) if wanted[1] else None,
                None,
            )
        if forward_mode() or mapped_backward(*upstream):
            grads = _pull_by_reference(input, target, centroid_logits, center, prior, options, upstream)
        else:
            batch = input, target, centroid_logits, center, prior
            grads = _TermsGrad.apply(*upstream, *batch, options, backend, wanted)
        return *grads, None


def coefficients_of(stats: Tensor, upstream: tuple[Tensor, ...], options: Options) -> Tensor:
    """The coefficients [B, 4] of rows, as the operator reduce has them, for gradients [B] of both terms."""
    by_concentration, by_separation = (each.double() for each in upstream)
    own_mean, all_mean = stats[:, OWN_MEAN], stats[:, ALL_MEAN]
    own_prior = stats[:, OWN_PRIOR]
    other, share = by_separation, by_separation * own_prior
    if options.every_pair:
        other, share = by_separation * (1 - own_prior), torch.zeros_like(share)
    if options.centroid_to_sample:
        own, constant = by_concentration, by_concentration * own_mean
    else:
        own, share = by_concentration - share, torch.zeros_like(share)
        constant = own * own_mean + other * all_mean
    return torch.stack([own, other, share, constant], dim=1)


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
    prior: Tensor | None,
    options: Options,
    upstream: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor]:
    """The gradients of input and centroid logits for those of the terms, differentiable and mappable in every way."""
    pull: Any = torch.func.vjp(
        lambda z, xi: reference.terms(z, target, xi, center, options, prior), input, centroid_logits
    )[1]
    return pull(upstream)


class _TransformableTerms(torch.autograd.Function):
    """Concentration and separation, of the arguments of :func:`terms`."""

    @staticmethod
    def forward(
        input: Tensor,
        target: Tensor,
        centroid_logits: Tensor,
        center: Tensor | None,
        prior: Tensor | None,
        options: Options,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        way = way_of(options)
        table = way.table_of(centroid_logits, options, backend, prior)
        values, _ = way.terms(input, Problem(target, center, None, options, backend, table))
        dtype = centroid_logits.dtype
        return values[0].to(dtype, copy=True), values[1].to(dtype, copy=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:5])
        ctx.options, ctx.backend = inputs[5:]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        input, target, centroid_logits, center, prior = ctx.saved_tensors
        wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        if forward_mode() or mapped_backward(*upstream):
            grad_input, grad_centroids = _pull_by_reference(
                input, target, centroid_logits, center, prior, ctx.options, upstream
            )
        else:
            grad_input, grad_centroids = _TermsGrad.apply(
                *upstream, input, target, centroid_logits, center, prior, ctx.options, ctx.backend, wanted
            )
        return grad_input, None, grad_centroids, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        one_batch = all(dim is None for dim in in_dims[2:5])
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
        prior: Tensor | None,
        options: Options,
        backend: str,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        way = way_of(options)
        table = way.table_of(centroid_logits, options, backend, prior)
        problem = Problem(target, center, None, options, backend, table)
        _, rows = way.terms(input, problem, wanted[0])
        upstream = upstream_concentration, upstream_separation
        rows = rows._replace(coefficients=coefficients_of(rows.stats, upstream, options))
        return (
            way.input_grad(input, problem, rows, None) if wanted[0] else None,
            way.centroid_grad(input, centroid_logits, problem, rows, None) if wanted[1] else None,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, Tensor | None]) -> None:
        ctx.save_for_backward(*inputs[:7])
        ctx.options, ctx.wanted = inputs[7], inputs[9]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        concentration, separation, input, target, centroid_logits, center, prior = ctx.saved_tensors

        def grads(concentration: Tensor, separation: Tensor, input: Tensor, centroid_logits: Tensor) -> Any:
            upstream_of_terms = concentration, separation
            both = _pull_by_reference(input, target, centroid_logits, center, prior, ctx.options, upstream_of_terms)
            return tuple(grad for grad, is_wanted in zip(both, ctx.wanted, strict=True) if is_wanted)

        pull: Any = torch.func.vjp(grads, concentration, separation, input, centroid_logits)[1]
        grad_concentration, grad_separation, grad_input, grad_centroids = pull(
            tuple(grad for grad, is_wanted in zip(upstream, ctx.wanted, strict=True) if is_wanted)
        )
        return grad_concentration, grad_separation, grad_input, None, grad_centroids, None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        one_batch = all(dim is None for dim in in_dims[4:7]) and not args[-1][1]
        return _map_slices(_TermsGrad, info, in_dims, args, 4, one_batch)


def transformable_loss(input: Tensor, centroid_logits: Tensor, problem: Problem, by_reference: bool = False) -> Tensor:
    """The loss for a transform of torch.func, or to be differentiated more than once."""
    target, center, weight, options, backend, *_ = problem
    prior = problem.class_prior
    if by_reference or forward_mode():
        return reference.loss(input, target, centroid_logits, center, weight, options, prior)
    kept = target != options.ignore_index
    classes = target.masked_fill(~kept, 0)
    # An ignored row may hold NaN, which zero times anything would keep.
    input = torch.where(kept[:, None], input, 0)
    batch = input, classes, centroid_logits, center, prior
    concentration, separation = _TransformableTerms.apply(*batch, options, backend)
    return reference.reduce(*reference.weigh(concentration, separation, kept, classes, weight), options)[0]


def terms(input: Tensor, centroid_logits: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """Concentration [B] and separation [B] of [B, M] features, of which none is ignored."""
    target, center, _, options, backend, *_ = problem
    prior = problem.class_prior
    if backend == "reference":
        return reference.terms(input, target, centroid_logits, center, options, prior)
    if transforming():
        return _TransformableTerms.apply(input, target, centroid_logits, center, prior, options, backend)
    return apply(_Terms, input, centroid_logits, problem)
