"""The loss: one autograd Function, whatever the backend and the way through it."""

from typing import Any

import torch
from torch import Tensor

from ncmi_kernels import _ops, reference
from ncmi_kernels._autograd import apply, grads_by_autograd, restored, save, saved
from ncmi_kernels._modes import forward_mode, jit_tracing, mapped_backward, plain_backward, transforming
from ncmi_kernels._plain import Found
from ncmi_kernels._problem import Problem, check_range
from ncmi_kernels._schema import SGD
from ncmi_kernels._terms import transformable_loss, way_of


class _Loss(torch.autograd.Function):
    """The loss of a problem, the means of its terms, and if asked for what the way found of the rows."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, centroid_logits: Tensor, problem: Problem, with_rows: bool
    ) -> tuple[Tensor, ...]:
        options, shards = problem.options, problem.shards
        compiling = torch.compiler.is_compiling()
        wanted = ctx.needs_input_grad
        found = way_of(options, shards).forward(input, centroid_logits, problem, (wanted[0], wanted[1] or with_rows))
        batch = input, problem.target, problem.weight, problem.class_prior
        save(ctx, found.center, centroid_logits, *batch, found.grad, *found.rows, *found.table)
        ctx.options, ctx.backend, ctx.group, ctx.shards = options, problem.backend, problem.group, shards
        ctx.spent = False  # whether a backward pass has taken over the gradient that the forward pass made
        if not compiling:
            ctx.set_materialize_grads(False)
        if not with_rows:
            ctx.mark_non_differentiable(found.means)
            return found.loss, found.means
        ctx.mark_non_differentiable(found.means, *[each for each in found.rows if each is not None])
        return found.loss, found.means, *found.rows

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return None, None, None, None
        options, group, shards = ctx.options, ctx.group, ctx.shards
        way = way_of(options, shards)
        (center, centroid_logits, input, target, weight, prior, grad, *kept), repeated = saved(ctx)
        rows, table = restored(way, kept)
        problem = Problem(target, center, weight, options, ctx.backend, table, group, None, shards, prior)
        wanted = ctx.needs_input_grad
        if group is not None:
            reference.refuse_double_backward()
        elif not plain_backward(upstream):
            by_reference = mapped_backward(upstream)
            return (
                *grads_by_autograd(
                    lambda: transformable_loss(input, centroid_logits, problem, by_reference),
                    (input, centroid_logits),
                    wanted[:2],
                    upstream,
                ),
                None,
                None,
            )
        if repeated:
            found = way.forward(input, centroid_logits, problem, wanted[:2])
            rows, grad = found.rows, found.grad
        # Of the average that DistributedDataParallel takes over the processes, the sum is left. Gradients of shards are
        # not averaged.
        alone = group is None or options.reduction == "none"
        shared = upstream if alone else upstream * group.size
        grad_input = grad_centroids = None
        if wanted[0] and grad is None:
            grad_input = way.input_grad(input, problem, rows, shared)
        elif wanted[0]:
            grad_input = way.input_grad(input, problem, rows, None) if ctx.spent else grad
            ctx.spent = True
            _ops.operators(ctx.backend).scale_(grad_input, upstream)
        if wanted[1]:
            of_centroids = shared if shards is None else upstream
            grad_centroids = way.centroid_grad(input, centroid_logits, problem, rows, of_centroids)
        return grad_input, grad_centroids, None, None


def loss(input: Tensor, centroid_logits: Tensor, problem: Problem, *, with_rows: bool = False) -> Found:
    """The loss of features [N, M] and centroid logits [C K, M]. A table that the problem lacks is computed.

    With a group, the loss over the batches of all processes, and gradients times their number. `with_rows`: for
    :func:`centroid_gradient` and the step of the centroids.

    Raises:
        RuntimeError: with a group within a transform of torch.func, forward mode or torch.jit.trace.
    """
    target, center, weight, options, backend, _, group, update, shards, prior = problem
    if group is not None and (transforming() or forward_mode() or jit_tracing()):
        raise RuntimeError(
            "process_group: got several processes within a torch.func transform, forward-mode derivatives or "
            "torch.jit.trace, expected None: these do not communicate"
        )
    if backend == "reference":
        check_range(target, len(centroid_logits) // options.centroids_per_class, options.ignore_index)
        value, means = reference.loss_and_means(
            input, target, centroid_logits, center, weight, options, prior, group=group
        )
        return Found(value, means)
    if transforming() or jit_tracing():
        assert update is None
        return Found(transformable_loss(input, centroid_logits, problem), None)  # means would outlive the transform
    graph = torch.is_grad_enabled() and (input.requires_grad or centroid_logits.requires_grad)
    if not (graph or torch.compiler.is_compiling()):
        found: Found = way_of(options, shards).forward(input, centroid_logits, problem, (False, with_rows))
        return found
    if not with_rows or torch.compiler.is_compiling():
        value, means = apply(_Loss, input, centroid_logits, problem, False)
        return Found(value, means)
    value, means, *rows = apply(_Loss, input, centroid_logits, problem, True)
    return Found(value, means, way_of(options, shards).Rows(*rows))


def centroid_gradient(
    input: Tensor, centroid_logits: Tensor, problem: Problem, known: Found | None = None
) -> tuple[Tensor, Tensor]:
    """Without a graph: the gradient of :func:`loss` by `centroid_logits` [C K, M], and means of terms [2].

    The means are NaN where no row counts. With a group, the gradient of the loss of all processes' rows, the same bits
    on each. `known` is what :func:`loss` gave, with rows, of the same batch at the same centroids and centre.
    """
    input, centroid_logits = input.detach(), centroid_logits.detach()
    group = problem.group
    if problem.backend == "reference":
        with torch.enable_grad():
            leaf = centroid_logits.requires_grad_()
            value, means, *_ = loss(input, leaf, problem)
            grad = torch.autograd.grad(value, leaf)[0]
        assert means is not None
        if group is not None:
            grad = group.all_reduce(grad / group.size)
        return grad, means
    way = way_of(problem.options, problem.shards)
    if known is None or known.means is None:
        found = way.forward(input, centroid_logits, problem, (False, True))
        rows, means, problem = found.rows, found.means, problem._replace(table=found.table)
    else:
        rows, means = known.rows, known.means
        if problem.table is None:
            table = way.table_of(centroid_logits, problem.options, problem.backend, problem.class_prior)
            problem = problem._replace(table=table)
    grad = way.centroid_grad(input, centroid_logits, problem, rows, None)
    return grad if group is None or problem.shards is not None else group.all_reduce(grad), means


def centroid_step_(
    input: Tensor,
    centroid_logits: Tensor,
    problem: Problem,
    known: Found | None,
    momentum_buffer: Tensor | None,
    sgd: SGD,
) -> Any:
    """A way's `centroid_step_`; no graph uses the old table unnoticed, as all see that the centroids changed."""
    way = way_of(problem.options)
    rows = way.forward(input, centroid_logits, problem, (False, True)).rows if known is None else known.rows
    table = way.centroid_step_(input, centroid_logits, problem, rows, momentum_buffer, sgd)
    # The operators pass the dispatcher's layers that would do it.
    torch.autograd.graph.increment_version(centroid_logits)
    if momentum_buffer is not None:
        torch.autograd.graph.increment_version(momentum_buffer)
    return table


def sgd_(logits: Tensor, grad: Tensor, means: Tensor, momentum_buffer: Tensor | None, sgd: SGD) -> None:
    """A step of torch.optim.SGD by a gradient, in place; none by one that is not finite, or of terms that are not.

    Nothing here waits for a device.
    """
    total: Any = grad.sum()
    if hasattr(total, "full_tensor"):
        total = total.full_tensor()
    usable = total.isfinite() & means.isfinite().all()
    step = grad
    if sgd.weight_decay:
        step = step.add(logits, alpha=sgd.weight_decay)
    if momentum_buffer is not None:
        average = momentum_buffer.mul(sgd.momentum).add_(step)
        step = step.add(average, alpha=sgd.momentum) if sgd.nesterov else average
        momentum_buffer.copy_(torch.where(usable, average, momentum_buffer))
    logits.copy_(torch.where(usable, logits.add(step, alpha=-sgd.lr), logits))
