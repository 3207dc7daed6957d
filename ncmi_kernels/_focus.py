"""The loss with `separation_focus`, whose sum over the classes does not factorise: as matrix products, derived by hand.

What :func:`reference.loss` defines, by one product of [B, M] and [M, C] forward, one backward for the features and one
for the centroids, as in a linear head; on any device, as the products are torch's.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ncmi_kernels import _ops, reference
from ncmi_kernels._options import Options
from ncmi_kernels._reduction import reduced, refuse_double_backward, row_weights

if TYPE_CHECKING:
    from ncmi_kernels._distributed import Group

aten = torch.ops.aten


class Activated(NamedTuple):
    """Log-distributions of some rows, and what their derivative takes."""

    log: Tensor  # [N, M]
    input: Tensor  # [N, M], of the activation
    buffer: Tensor | None  # log_sigmoid's own


def _activate(x: Tensor, softmax: bool) -> Activated:
    """:func:`reference.log_activation` of rows [N, M]."""
    if softmax:
        return Activated(torch.log_softmax(x, dim=1), x, None)
    log_value, buffer = aten.log_sigmoid_forward(x)
    return Activated(torch.log_softmax(log_value, dim=1), x, buffer)


def _activate_backward(grad: Tensor, activated: Activated) -> Tensor:
    """The gradient of the activation's input from that of the log-distribution."""
    grad = aten._log_softmax_backward_data(grad, activated.log, 1, grad.dtype)
    if activated.buffer is None:
        return grad
    return aten.log_sigmoid_backward(grad, activated.input, activated.buffer)


class CentroidStats(NamedTuple):
    """What the rows need to know of the centroids."""

    activated: Activated  # [C, M]
    mean: Tensor  # [M], of the log-distributions over the classes
    relative: Tensor  # [C, M], the log-distributions less their mean
    distribution: Tensor  # [C, M], or [0, M] for sample_to_centroid
    entropy: Tensor  # [C], sum_k q_k relative_k, or [0]


def centroid_stats(centroid_logits: Tensor, options: Options) -> CentroidStats:
    """Statistics of centroid logits [C, M], float32 or float64, without a graph."""
    with torch.no_grad():
        activated = _activate(centroid_logits.detach(), options.softmax)
        mean = activated.log.mean(dim=0)
        relative = activated.log - mean
        distribution = activated.log.exp() if options.centroid_to_sample else relative[:0]
        return CentroidStats(
            activated, mean, relative, distribution, (distribution * relative[: len(distribution)]).sum(dim=1)
        )


class Rows(NamedTuple):
    """What the forward pass knows of a batch."""

    classes: Tensor  # [B], any class for ignored rows
    activated: Activated  # [B, M]
    distribution: Tensor  # [B, M]
    relative: Tensor  # [B, M], the log-distributions less the centroids' mean
    direction: Tensor | None  # [B, M], the centred features at length one, where they are normalised
    length: Tensor | None  # [B, 1], what they were divided by
    nearness: Tensor  # [B, C], the weights of the other classes; 0 for the own one
    concentration: Tensor  # [B]
    separation: Tensor  # [B]


SHORTEST = 1e-12  # the length below which features are not made longer


def compute_rows(input: Tensor, target: Tensor, center: Tensor | None, stats: CentroidStats, options: Options) -> Rows:
    """The terms of a batch [B, M], and what their derivative takes; without a graph."""
    dtype = stats.mean.dtype
    kept = target != options.ignore_index
    x, classes = input.to(dtype), target
    # An ignored row may hold NaN, which zero times anything would keep. Only a CPU tells whether there is one for nothing.
    if not target.is_cpu or not kept.all():
        classes = target.masked_fill(~kept, 0)
        x = torch.where(kept[:, None], x, 0)
    if center is not None:
        x = x - center
    direction = length = None
    if options.l2_normalize:
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_(min=SHORTEST)
        direction = x / length
        x = direction
    else:
        # The sigmoid saturates, and would hide an element that is infinite.
        x = x + (x * 0).sum(dim=1, keepdim=True)
    if options.temperature != 1:
        x = x / options.temperature
    activated = _activate(x, options.softmax)
    p = activated.log.exp()
    relative = activated.log - stats.mean
    index = classes[:, None]
    if options.centroid_to_sample:
        own = stats.relative.index_select(0, classes)
        concentration = (p * (relative - own)).sum(dim=1)
        divergence = torch.addmm(stats.entropy, relative, stats.distribution.T, alpha=-1)
    else:
        divergence = torch.addmm((p * relative).sum(dim=1, keepdim=True), p, stats.relative.T, alpha=-1)
        concentration = divergence.gather(1, index)[:, 0]
    divergence.clamp_(min=0).scatter_(1, index, torch.inf)
    nearest = divergence.amin(dim=1, keepdim=True).clamp_(min=torch.finfo(dtype).tiny)
    nearness = torch.softmax((divergence / nearest).mul_(-options.separation_focus), dim=1)
    nearness.mul_((len(stats.relative) - 1) / len(stats.relative))
    separation = divergence.scatter_(1, index, 0).mul_(nearness).sum(dim=1)
    return Rows(classes, activated, p, relative, direction, length, nearness, concentration, separation)


def grads(
    rows: Rows, by_terms: Tensor, stats: CentroidStats, options: Options, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the features [B, M] and the centroid logits [C, M], each only where it is wanted.

    `by_terms` [2, B] are those of concentration and separation.
    """
    by_concentration, by_separation = by_terms.to(rows.relative.dtype)[:, :, None]
    shares = rows.nearness * by_separation  # [B, C]
    index = rows.classes[:, None]
    grad_input = grad_centroids = None
    if options.centroid_to_sample:
        own = (rows.relative - stats.relative.index_select(0, rows.classes)).mul_(rows.distribution)
        if wanted[0]:
            grad = torch.addmm(own.mul_(by_concentration), shares, stats.distribution, alpha=-1)
            grad_input = _input_grad(grad, rows, options)
        if wanted[1]:
            grad = (stats.relative * shares.sum(dim=0)[:, None]).addmm_(shares.T, rows.relative, alpha=-1)
            grad.mul_(stats.distribution).index_add_(0, rows.classes, rows.distribution * by_concentration, alpha=-1)
            grad_centroids = _activate_backward(grad, stats.activated)
        return grad_input, grad_centroids
    shares.scatter_(1, index, by_concentration)
    if wanted[0]:
        grad = torch.addmm(rows.relative * shares.sum(dim=1, keepdim=True), shares, stats.relative, alpha=-1)
        grad_input = _input_grad(grad.mul_(rows.distribution), rows, options)
    if wanted[1]:
        grad_centroids = _activate_backward((shares.T @ rows.distribution).neg_(), stats.activated)
    return grad_input, grad_centroids


def _input_grad(grad: Tensor, rows: Rows, options: Options) -> Tensor:
    """The gradient of the features from that of the log-distributions."""
    grad = _activate_backward(grad, rows.activated)
    if options.temperature != 1:
        grad.div_(options.temperature)
    if rows.direction is None or rows.length is None:
        return grad
    along = (grad * rows.direction).sum(dim=1, keepdim=True)
    # A length that was held above its bound does not depend on the features.
    along.masked_fill_(rows.length <= SHORTEST, 0)
    return grad.sub_(rows.direction * along).div_(rows.length)


class _Terms(torch.autograd.Function):
    """Concentration and separation, of the arguments of :func:`terms`."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, centroid_logits: Tensor, target: Tensor, center: Tensor | None, options: Options
    ) -> tuple[Tensor, Tensor]:
        with reference.no_autocast(input.device):
            stats = centroid_stats(centroid_logits, options)
            of_rows = compute_rows(input, target, center, stats, options)
        ctx.save_for_backward(input, target, centroid_logits)
        ctx.kept = center, options, stats, of_rows
        return of_rows.concentration.clone(), of_rows.separation.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        input, target, centroid_logits = ctx.saved_tensors
        center, options, stats, of_rows = ctx.kept
        if _ops._plain_backward():
            with reference.no_autocast(input.device):
                found = grads(of_rows, torch.stack(upstream), stats, options, ctx.needs_input_grad[:2])
            return *_in_dtype_of(input, found), None, None, None
        return (
            *_reference_grads(
                lambda: reference.terms(input, target, centroid_logits, center, options),
                (input, centroid_logits),
                upstream,
                ctx.needs_input_grad,
            ),
            None,
            None,
            None,
        )


class _Loss(torch.autograd.Function):
    """The loss, of the arguments of :func:`loss`."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, centroid_logits: Tensor, others: tuple[Any, ...]) -> Tensor:
        target, center, weight, options, stats, group, seen = others
        with reference.no_autocast(input.device):
            stats = stats or centroid_stats(centroid_logits, options)
            of_rows = compute_rows(input, target, center, stats, options)
        w = row_weights(target, weight, options.ignore_index)
        result, by_terms, means = reduced(of_rows.concentration, of_rows.separation, w, options, group)
        if group is not None:
            by_terms = by_terms * group.size  # of the average that DistributedDataParallel takes, the sum is left
        if seen is not None:
            seen += [means, of_rows]
        ctx.save_for_backward(input, target, centroid_logits)
        ctx.kept = center, weight, options, stats, of_rows, by_terms, group
        return result.to(stats.mean.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        input, target, centroid_logits = ctx.saved_tensors
        center, weight, options, stats, of_rows, by_terms, group = ctx.kept
        if _ops._plain_backward():
            with reference.no_autocast(input.device):
                found = grads(of_rows, by_terms * upstream, stats, options, ctx.needs_input_grad[:2])
            return *_in_dtype_of(input, found), None
        if group is not None:
            refuse_double_backward("process_group")
        return *_reference_grads(
            lambda: reference.loss(input, target, centroid_logits, center, weight, options),
            (input, centroid_logits),
            (upstream,),
            ctx.needs_input_grad,
        ), None


def _in_dtype_of(input: Tensor, found: tuple[Tensor | None, Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
    """The gradients, that of the features in the dtype of these."""
    return None if found[0] is None else found[0].to(input.dtype), found[1]


def _reference_grads(
    function: Callable[[], Any], inputs: tuple[Tensor, Tensor], upstream: tuple[Tensor, ...], wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of `function` as the definition has them, for what differentiates or maps them again."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        found = iter(
            torch.autograd.grad(
                function(),
                [each for each, needed in zip(inputs, wanted, strict=False) if needed],
                upstream,
                create_graph=create_graph,
            )
        )
    first, second = (next(found) if needed else None for needed in wanted[:2])
    return first, second


def as_reference() -> bool:
    """Whether the definition runs in the place of what is here: torch.func transforms it, Inductor fuses it."""
    return _ops.transforming() or torch.compiler.is_compiling()


def terms(
    input: Tensor, target: Tensor, centroid_logits: Tensor, center: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """As :func:`_ops.terms`, of checked targets."""
    if as_reference():
        return reference.terms(input, target, centroid_logits, center, options)
    return _Terms.apply(input, centroid_logits, target, center, options)


def loss(
    input: Tensor,
    target: Tensor,
    centroid_logits: Tensor,
    center: Tensor | None,
    weight: Tensor | None,
    options: Options,
    stats: CentroidStats | None,
    group: "Group | None" = None,
    *,
    seen: list[Any] | None = None,
) -> Tensor:
    """As :func:`_ops.loss`, of checked targets; over the processes of a `group` as :func:`_distributed.loss`."""
    if as_reference():
        return reference.loss(input, target, centroid_logits, center, weight, options, means=seen)
    return _Loss.apply(input, centroid_logits, (target, center, weight, options, stats, group, seen))


def centroid_gradient(
    input: Tensor,
    target: Tensor,
    centroid_logits: Tensor,
    center: Tensor | None,
    weight: Tensor | None,
    options: Options,
    stats: CentroidStats | None,
    of_rows: Rows | None,
    group: "Group | None" = None,
) -> Tensor:
    """As :func:`_ops.centroid_gradient`; `of_rows` are what :func:`loss` has seen of the same batch, or None.

    With a `group`, this process's part of the gradient of the loss of all processes' rows.
    """
    with torch.no_grad(), reference.no_autocast(input.device):
        stats = stats or centroid_stats(centroid_logits, options)
        of_rows = of_rows or compute_rows(input, target, center, stats, options)
        w = row_weights(target, weight, options.ignore_index)
        by_terms = reduced(of_rows.concentration, of_rows.separation, w, options, group)[1]
        grad = grads(of_rows, by_terms, stats, options, (False, True))[1]
    assert grad is not None
    return grad
