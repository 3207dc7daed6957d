"""The operators on Triton: outputs allocated, kernels launched.

Called directly in eager mode; under torch.compile through the dispatcher, as opaque operators of a namespace of their
own. Shapes: B rows, M columns, C classes.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from ncmi_kernels import _schema
from ncmi_kernels._options import REDUCTIONS
from ncmi_kernels._triton import launches
from ncmi_kernels._triton.checks import (
    ARITHMETIC,
    DOUBLE,
    INT64,
    check,
    check_batch,
    check_centroids,
    check_matrix,
    check_reduction,
    check_rows,
    check_target,
    require,
)

NAMESPACE = "ncmi_kernels_triton"
REDUCTIONS_AND_TERMS = (*REDUCTIONS, "terms")


def _on(tensor: Tensor) -> AbstractContextManager[Any]:
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def centroid_stats(
    centroid_logits: Tensor, softmax: bool, centroid_to_sample: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits [C, M] to log_activation [C, M], activation [C or 0, M], reference [2, M], norms [C + 1, 8] float64."""
    classes, columns = check_matrix("centroid_logits", centroid_logits, ARITHMETIC)
    require(classes > 0, "centroid_logits must not be empty")
    log_activation = centroid_logits.new_empty((classes, columns))
    activation = centroid_logits.new_empty((classes if centroid_to_sample else 0, columns))
    reference = centroid_logits.new_empty((2, columns))
    norms = centroid_logits.new_empty((classes + 1, _schema.CLASS_STATS), dtype=torch.float64)
    with _on(centroid_logits):
        launches.centroid_stats(
            centroid_logits, softmax, centroid_to_sample, log_activation, activation, reference, norms
        )
    return log_activation, activation, reference, norms


def terms(
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
) -> tuple[Tensor, Tensor]:
    """Concentration and separation [2, B], and the rows' statistics [B, 7], float64."""
    classes = log_activation.shape[0]
    check_centroids(input, log_activation, activation, reference, norms, centroid_to_sample)
    check_batch(input, target, center, log_activation.dtype, classes, ignore_index)
    with _on(input):
        result = norms.new_empty((2, target.shape[0]))
        stats, sums = launches.terms(
            input=input,
            target=target,
            center=center,
            log_activation=log_activation,
            activation=activation,
            reference=reference,
            norms=norms,
            temperature=temperature,
            l2_normalize=l2_normalize,
            softmax=softmax,
            centroid_to_sample=centroid_to_sample,
            ignore_index=ignore_index,
        )
        reduction = REDUCTIONS_AND_TERMS.index("terms")
        launches.finish(
            target=target,
            norms=norms,
            weight=None,
            terms=sums,
            stats=stats,
            coefficients=None,
            result=result,
            means=None,
            eps=0.0,
            ignore_index=ignore_index,
            centroid_to_sample=centroid_to_sample,
            batch_ratio=False,
            reduction=reduction,
            given=False,
        )
    return result, stats


def reduce(
    terms: Tensor,
    rows: Tensor,
    target: Tensor,
    norms: Tensor,
    weight: Tensor | None,
    totals: Tensor | None,
    centroid_to_sample: bool,
    focus: bool,
    batch_ratio: bool,
    reduction: int,
    eps: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss [] or [B] of terms [2, B], the rows' coefficients [B, 4], means [2] and sums [4], float64."""
    (count, _), (records, _) = check_matrix("rows", rows, DOUBLE), check_matrix("norms", norms, DOUBLE)
    classes = records - 1
    check("rows", rows, terms, DOUBLE, (count, _schema.ROW_STATS))
    check("terms", terms, terms, DOUBLE, (2, count))
    check("norms", norms, terms, DOUBLE, (records, _schema.CLASS_STATS))
    require(records > (count > 0), "norms must not be empty")
    check_target(target, terms, count, classes, ignore_index)
    check("weight", weight, terms, ARITHMETIC, (classes,))
    check("totals", totals, terms, DOUBLE, (4,))
    check_reduction(batch_ratio, reduction)
    with _on(terms):
        loss = norms.new_empty((count,) if REDUCTIONS[reduction] == "none" else ())
        coefficients = norms.new_empty((count, _schema.COEFFICIENTS))
        means, sums = norms.new_empty((2,)), norms.new_empty((4,))
        launches.finish(
            target=target,
            norms=norms,
            weight=weight,
            terms=terms,
            stats=rows,
            coefficients=coefficients,
            result=loss,
            means=means,
            eps=eps,
            ignore_index=ignore_index,
            centroid_to_sample=centroid_to_sample,
            batch_ratio=batch_ratio,
            reduction=reduction,
            given=True,
            focus=focus,
            totals=totals,
            sums=sums,
        )
    return loss, coefficients, means, sums


def update_center_(
    center: Tensor,
    num_batches_tracked: Tensor,
    input: Tensor,
    target: Tensor,
    momentum: float,
    num_classes: int,
    ignore_index: int,
) -> Tensor:
    """Move `center` [M] towards the mean of the rows of `input` [B, M] that count; returns a copy of it."""
    require(center.dtype in ARITHMETIC, "center must be float32, float64")
    check_batch(input, target, center, center.dtype, num_classes, ignore_index)
    check("num_batches_tracked", num_batches_tracked, input, INT64, ())
    with _on(input):
        sums, counts, _ = launches.column_sums(input, target, None, ignore_index, num_classes, True, False)
        assert sums is not None
        return launches.move_center(sums, counts, center, num_batches_tracked, momentum, True)[0]


def loss(
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
    """The loss [] or [B], the rows' statistics [B, 7] and coefficients [B, 4], the moved centre [M] or [0],
    d loss / d input or [0], means [2].
    """  # noqa: D205
    dtype, classes = log_activation.dtype, log_activation.shape[0]
    check_centroids(input, log_activation, activation, reference, norms, centroid_to_sample)
    rows, columns = check_batch(
        input, target, center if running_center is None else running_center, dtype, classes, ignore_index
    )
    check("weight", weight, input, (dtype,), (classes,))
    check("num_batches_tracked", num_batches_tracked, input, INT64, ())
    check_reduction(batch_ratio, reduction)
    scalar, mean = REDUCTIONS[reduction] != "none", REDUCTIONS[reduction] == "mean"
    require(
        (running_center is None) == (num_batches_tracked is None) and (center is None or running_center is None),
        "pass center, or running_center with num_batches_tracked",
    )
    require(
        not with_grad or (not batch_ratio and scalar and input.dtype is dtype),
        "with_grad needs ratio by sample, a scalar loss, and input in the arithmetic type",
    )
    normalized = with_grad and mean
    with _on(input):
        result = log_activation.new_empty(() if scalar else (rows,))
        coefficients = norms.new_empty((rows, _schema.COEFFICIENTS))
        means = norms.new_empty((2,))
        nothing = log_activation.new_empty((0,))
        grad = log_activation.new_empty((rows, columns)) if with_grad else None
        weight_sums = moved = None
        if running_center is not None or normalized:
            moving = running_center is not None
            sums, counts, weight_sums = launches.column_sums(
                input, target, weight, ignore_index, classes, moving, normalized
            )
            if running_center is not None:
                assert num_batches_tracked is not None
                assert sums is not None
                # Until the last launch only a copy: a call that fails has moved nothing.
                moved = launches.move_center(sums, counts, running_center, num_batches_tracked, momentum, False)
                center = moved[0]
        stats, row_sums = launches.terms(
            input=input,
            target=target,
            center=center,
            log_activation=log_activation,
            activation=activation,
            reference=reference,
            norms=norms,
            temperature=temperature,
            l2_normalize=l2_normalize,
            softmax=softmax,
            centroid_to_sample=centroid_to_sample,
            ignore_index=ignore_index,
            weight=weight,
            weight_sums=weight_sums,
            eps=eps,
            coefficients=coefficients,
            grad=grad,
        )
        launches.finish(
            target=target,
            norms=norms,
            weight=weight,
            terms=row_sums,
            stats=stats,
            coefficients=None if with_grad else coefficients,
            result=result,
            means=means,
            eps=eps,
            ignore_index=ignore_index,
            centroid_to_sample=centroid_to_sample,
            batch_ratio=batch_ratio,
            reduction=reduction,
            given=with_grad,
            center=running_center,
            batches=num_batches_tracked,
            moved=moved,
        )
    moved_center = nothing if moved is None else moved[0]
    return result, stats, coefficients, moved_center, nothing if grad is None else grad, means


def scale_(grad: Tensor, upstream: Tensor) -> None:
    """`grad` [B, M] times `upstream` [], in place; 0 stays 0."""
    shape = check_matrix("grad", grad, ARITHMETIC) if grad.numel() else tuple(grad.shape)
    check("grad", grad, grad, ARITHMETIC, shape)
    check("upstream", upstream, grad, (grad.dtype,), ())
    if grad.numel():
        with _on(grad):
            launches.scale(grad, upstream)


def input_grad(
    input: Tensor,
    target: Tensor,
    center: Tensor | None,
    log_activation: Tensor,
    activation: Tensor,
    reference: Tensor,
    norms: Tensor,
    rows: Tensor,
    coefficients: Tensor,
    upstream: Tensor | None,
    centroid_to_sample: bool,
    ignore_index: int,
    row_reference: Tensor | None = None,
) -> Tensor:
    """d loss / d input [B, M], in the dtype of `input`; `upstream` is None, a scalar or [B]."""
    classes = log_activation.shape[0]
    check_centroids(input, log_activation, activation, reference, norms, centroid_to_sample)
    count, columns = check_batch(input, target, center, log_activation.dtype, classes, ignore_index)
    check_rows(input, rows, coefficients, upstream)
    check("row_reference", row_reference, input, (log_activation.dtype,), (count, columns))
    require(
        (input.dtype is torch.float64) == (log_activation.dtype is torch.float64),
        "float64 input and float64 centroid_logits go together",
    )
    grad = torch.empty((count, columns), dtype=input.dtype, device=input.device)
    if count:
        with _on(input):
            launches.input_grad(
                input=input,
                target=target,
                center=center,
                log_activation=log_activation,
                activation=activation,
                reference=reference,
                norms=norms,
                rows=rows,
                coefficients=coefficients,
                upstream=upstream,
                centroid_to_sample=centroid_to_sample,
                ignore_index=ignore_index,
                row_reference=row_reference,
                grad=grad,
            )
    return grad


def centroid_grad(
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
    centroid_to_sample: bool,
    ignore_index: int,
    totals: Tensor | None = None,
) -> Tensor:
    """d loss / d centroid_logits [C, M]; `totals` [M + 1] float64 are for the sums over all rows, as class_totals."""
    check_centroids(input, log_activation, activation, reference, norms, centroid_to_sample)
    classes, columns = log_activation.shape
    check_batch(input, target, center, log_activation.dtype, classes, ignore_index)
    check_rows(input, rows, coefficients, upstream)
    check("centroid_logits", centroid_logits, input, (log_activation.dtype,), (classes, columns), strided=True)
    check("totals", totals, input, DOUBLE, (columns + 1,))
    grad = torch.empty((classes, columns), dtype=centroid_logits.dtype, device=centroid_logits.device)
    with _on(input):
        launches.centroid_grad(
            input=input,
            target=target,
            center=center,
            centroid_logits=centroid_logits,
            norms=norms,
            rows=rows,
            coefficients=coefficients,
            upstream=upstream,
            centroid_to_sample=centroid_to_sample,
            ignore_index=ignore_index,
            totals=totals,
            grad=grad,
        )
    return grad


def centroid_step_(
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
    coefficients: Tensor,
    softmax: bool,
    centroid_to_sample: bool,
    ignore_index: int,
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
) -> None:
    """A step of SGD on contiguous `centroid_logits` and `momentum_buffer` [C, M]; the statistics follow."""
    check_centroids(input, log_activation, activation, reference, norms, centroid_to_sample)
    check_batch(input, target, center, log_activation.dtype, log_activation.shape[0], ignore_index)
    check_rows(input, rows, coefficients, None)
    for name, tensor in (("centroid_logits", centroid_logits), ("momentum_buffer", momentum_buffer)):
        check(name, tensor, input, (log_activation.dtype,), tuple(log_activation.shape))
    with _on(input):
        launches.centroid_grad(
            input=input,
            target=target,
            center=center,
            centroid_logits=centroid_logits,
            norms=norms,
            rows=rows,
            coefficients=coefficients,
            upstream=None,
            centroid_to_sample=centroid_to_sample,
            ignore_index=ignore_index,
            totals=None,
            grad=None,
            momentum_buffer=momentum_buffer,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            nesterov=nesterov,
        )
        launches.centroid_stats(
            centroid_logits, softmax, centroid_to_sample, log_activation, activation, reference, norms
        )


def class_totals(
    input: Tensor,
    target: Tensor,
    center: Tensor | None,
    rows: Tensor,
    coefficients: Tensor,
    upstream: Tensor | None,
    centroid_to_sample: bool,
    ignore_index: int,
) -> Tensor:
    """What each class's gradient has of all rows, [M + 1] float64: the sums of other p or other log a, and of other."""
    dtype = torch.float64 if input.dtype is torch.float64 else torch.float32
    count, columns = check_batch(input, target, center, dtype, 2**63 - 1, ignore_index)
    check_rows(input, rows, coefficients, upstream)
    # Chunks of the rows that count, the others last, for classes.
    ignored, order = torch.sort((target == ignore_index).to(torch.int32), stable=True)
    chunk_rows = max(launches.SMALLEST_CHUNK, -(-count // launches.LARGEST_CHUNKS))
    begin = torch.arange(0, count + chunk_rows, chunk_rows, device=target.device)
    begin = torch.minimum(begin, (ignored == 0).sum())
    totals = rows.new_empty((columns + 1,))
    with _on(input):
        sums, factor_sums = launches.class_sums(
            input, center, rows, coefficients, upstream, order, begin, dtype, centroid_to_sample, False
        )
        launches.fold(sums[1], totals)
        totals[columns] = factor_sums[1].sum()
    return totals


# ----------------------------------------------------------------------------------------------------------------------
# For the dispatcher
# ----------------------------------------------------------------------------------------------------------------------

_schema.define(NAMESPACE)
_implementations = Library(NAMESPACE, "IMPL")
for _name in _schema.SCHEMAS:
    _implementations.impl(_name, globals()[_name], "CompositeExplicitAutograd")


def _eager_or_traced(name: str) -> Callable[..., Any]:
    """The function itself, but while torch.compile or torch.export traces: then an operator that they do not open."""
    eager = globals()[name]
    operator = getattr(getattr(torch.ops, NAMESPACE), name).default

    def run(*args: Any) -> Any:
        return operator(*args) if torch.compiler.is_compiling() else eager(*args)

    return run


OPERATORS = _schema.Operators(**{name: _eager_or_traced(name) for name in _schema.SCHEMAS})
