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
from ncmi_kernels._schema import SGD, Table
from ncmi_kernels._triton import launches
from ncmi_kernels._triton.arguments import Batch, Features, Moving, Reduced, Reducing, Rows
from ncmi_kernels._triton.batch import TERMS
from ncmi_kernels._triton.checks import (
    ARITHMETIC,
    DOUBLE,
    INT64,
    check,
    check_batch,
    check_matrix,
    check_reducing,
    check_rows,
    check_table,
    check_target,
    require,
)

NAMESPACE = "ncmi_kernels_triton"


def _on(tensor: Tensor) -> AbstractContextManager[Any]:
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def centroid_stats(centroid_logits: Tensor, softmax: bool, centroid_to_sample: bool) -> Table:
    """Logits [C, M] to log_activation [C, M], activation [C or 0, M], reference [2, M], norms [C + 1, 8] float64."""
    classes, columns = check_matrix("centroid_logits", centroid_logits, ARITHMETIC)
    require(classes > 0, "centroid_logits must not be empty")
    log_activation = centroid_logits.new_empty((classes, columns))
    activation = centroid_logits.new_empty((classes if centroid_to_sample else 0, columns))
    reference = centroid_logits.new_empty((2, columns))
    norms = centroid_logits.new_empty((classes + 1, _schema.CLASS_STATS), dtype=torch.float64)
    table = Table(log_activation, activation, reference, norms)
    with _on(centroid_logits):
        launches.centroid_stats(centroid_logits, softmax, centroid_to_sample, table)
    return table


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
    batch = Batch(input, target, center, ignore_index)
    table = Table(log_activation, activation, reference, norms)
    features = Features(temperature, l2_normalize, softmax, centroid_to_sample)
    check_table(input, table, centroid_to_sample)
    rows, _ = check_batch(batch, log_activation.dtype, log_activation.shape[0])
    with _on(input):
        result = norms.new_empty((2, rows))
        stats, sums = launches.terms(batch, table, features)
        no_loss = Reducing(None, False, TERMS, 0.0, centroid_to_sample)
        launches.finish(target, ignore_index, norms, no_loss, sums, stats, Reduced(result))
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
) -> Reduced:
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
    by = Reducing(weight, batch_ratio, reduction, eps, centroid_to_sample, focus)
    check_reducing(by)
    with _on(terms):
        loss = norms.new_empty((count,) if REDUCTIONS[reduction] == "none" else ())
        coefficients = norms.new_empty((count, _schema.COEFFICIENTS))
        reduced = Reduced(loss, coefficients, norms.new_empty((2,)), norms.new_empty((4,)))
        launches.finish(target, ignore_index, norms, by, terms, rows, reduced, given=True, totals=totals)
    return reduced


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
    batch = Batch(input, target, center, ignore_index)
    check_batch(batch, center.dtype, num_classes)
    check("num_batches_tracked", num_batches_tracked, input, INT64, ())
    with _on(input):
        sums, counts, _ = launches.column_sums(batch, num_classes, None, True, False)
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
    batch = Batch(input, target, center if running_center is None else running_center, ignore_index)
    table = Table(log_activation, activation, reference, norms)
    features = Features(temperature, l2_normalize, softmax, centroid_to_sample)
    by = Reducing(weight, batch_ratio, reduction, eps, centroid_to_sample)
    check_table(input, table, centroid_to_sample)
    dtype, classes = log_activation.dtype, log_activation.shape[0]
    rows, columns = check_batch(batch, dtype, classes)
    check("weight", weight, input, (dtype,), (classes,))
    check("num_batches_tracked", num_batches_tracked, input, INT64, ())
    check_reducing(by)
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
        moved_center = grad = log_activation.new_empty((0,))
        weight_sums = moving = None
        if running_center is not None or normalized:
            sums, counts, weight_sums = launches.column_sums(
                batch, classes, weight, running_center is not None, normalized
            )
            if running_center is not None:
                assert num_batches_tracked is not None
                assert sums is not None
                # Until the last launch only a copy: a call that fails has moved nothing.
                moved = launches.move_center(sums, counts, running_center, num_batches_tracked, momentum, False)
                moving = Moving(running_center, num_batches_tracked, *moved)
                moved_center = moving.moved_center
                batch = batch._replace(center=moved_center)
        if with_grad:
            grad = log_activation.new_empty((rows, columns))
            stats, row_sums = launches.terms(batch, table, features, by, weight_sums, coefficients, grad)
            reduced = Reduced(result, None, means)
        else:
            stats, row_sums = launches.terms(batch, table, features)
            reduced = Reduced(result, coefficients, means)
        launches.finish(target, ignore_index, norms, by, row_sums, stats, reduced, given=with_grad, moving=moving)
    return result, stats, coefficients, moved_center, grad, means


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
    batch = Batch(input, target, center, ignore_index)
    table = Table(log_activation, activation, reference, norms)
    of_rows = Rows(rows, coefficients, upstream)
    check_table(input, table, centroid_to_sample)
    count, columns = check_batch(batch, log_activation.dtype, log_activation.shape[0])
    check_rows(input, of_rows)
    check("row_reference", row_reference, input, (log_activation.dtype,), (count, columns))
    require(
        (input.dtype is torch.float64) == (log_activation.dtype is torch.float64),
        "float64 input and float64 centroid_logits go together",
    )
    grad = torch.empty((count, columns), dtype=input.dtype, device=input.device)
    if count:
        with _on(input):
            launches.input_grad(batch, table, of_rows, centroid_to_sample, row_reference, grad)
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
    batch = Batch(input, target, center, ignore_index)
    table = Table(log_activation, activation, reference, norms)
    of_rows = Rows(rows, coefficients, upstream)
    check_table(input, table, centroid_to_sample)
    classes, columns = log_activation.shape
    check_batch(batch, log_activation.dtype, classes)
    check_rows(input, of_rows)
    check("centroid_logits", centroid_logits, input, (log_activation.dtype,), (classes, columns), strided=True)
    check("totals", totals, input, DOUBLE, (columns + 1,))
    grad = torch.empty((classes, columns), dtype=centroid_logits.dtype, device=centroid_logits.device)
    with _on(input):
        launches.centroid_grad(batch, centroid_logits, norms, of_rows, centroid_to_sample, totals, grad)
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
    batch = Batch(input, target, center, ignore_index)
    table = Table(log_activation, activation, reference, norms)
    of_rows = Rows(rows, coefficients, None)
    check_table(input, table, centroid_to_sample)
    check_batch(batch, log_activation.dtype, log_activation.shape[0])
    check_rows(input, of_rows)
    for name, tensor in (("centroid_logits", centroid_logits), ("momentum_buffer", momentum_buffer)):
        check(name, tensor, input, (log_activation.dtype,), tuple(log_activation.shape))
    with _on(input):
        sgd = SGD(lr, momentum, weight_decay, nesterov)
        launches.centroid_grad(
            batch, centroid_logits, norms, of_rows, centroid_to_sample, momentum_buffer=momentum_buffer, sgd=sgd
        )
        launches.centroid_stats(centroid_logits, softmax, centroid_to_sample, table)


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
    batch, of_rows = Batch(input, target, center, ignore_index), Rows(rows, coefficients, upstream)
    count, columns = check_batch(batch, dtype, 2**63 - 1)
    check_rows(input, of_rows)
    # Chunks of the rows that count, the others last, for classes.
    ignored, order = torch.sort((target == ignore_index).to(torch.int32), stable=True)
    chunk_rows = max(launches.SMALLEST_CHUNK, -(-count // launches.LARGEST_CHUNKS))
    begin = torch.arange(0, count + chunk_rows, chunk_rows, device=target.device)
    begin = torch.minimum(begin, (ignored == 0).sum())
    totals = rows.new_empty((columns + 1,))
    with _on(input):
        sums, factor_sums = launches.class_sums(batch, of_rows, order, begin, dtype, centroid_to_sample, False)
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
