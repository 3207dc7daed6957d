"""The gradient of the centroids, or a step of SGD by it: sums over the rows of each class, over all, then by class."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ncmi_kernels import _schema
from ncmi_kernels._schema import SGD, Table
from ncmi_kernels._triton import launches
from ncmi_kernels._triton.arguments import Batch, OfAllRows, Rows, Step
from ncmi_kernels._triton.centroid_stats import write_stats
from ncmi_kernels._triton.checks import ARITHMETIC, DOUBLE, check, check_batch, check_rows, check_table, require
from ncmi_kernels._triton.elements import (
    CLASS_KIND,
    CLASS_SHIFT,
    CLASS_WEIGHTS,
    INVERSE_NORM,
    LOG_NORM,
    NEAR,
    PRIOR,
    RECORD,
    ROW_KIND,
    SCALE,
    SHIFT,
    SOFTMAX,
    STATS,
    activate_as,
    double,
    least_kind,
    load_coefficients,
    load_features,
    load_rows,
    load_vector,
    near_zero,
    share_of,
)
from ncmi_kernels._triton.ops import operator
from ncmi_kernels._triton.tiles import HALF, bits, power_of_two, rows_of_chunk, strides_of

_TL = {torch.float32: tl.float32, torch.float64: tl.float64}
_NO_STEP = Step(None, SGD(0.0, 0.0, 0.0, False))


@triton.jit(do_not_specialize=["unit_stride", "column_stride", "upstream_stride", "classes"])
def centroid_sums_kernel(
    input, center, rows, coefficients, upstream, order, class_begin, own_sums, all_sums, factor_sums, unit_stride,
    column_stride, upstream_stride, classes, M: tl.constexpr, ALIGN: tl.constexpr, CONTIGUOUS: tl.constexpr,
    DTYPE: tl.constexpr, FAST: tl.constexpr, CENTROID_TO_SAMPLE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums over the rows of one class, in the order of the batch.

    Of the coefficients of a row: to `own_sums` [C, M] own p; to `all_sums` [C, M] other p, for centroid_to_sample other
    log a; to `factor_sums` [2, C] own and other. Without `own_sums` a class is any set of rows, and nothing of own is
    written; `all_sums` may be None too.
    """
    c = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = k < M
    begin = tl.load(class_begin + c)
    end = tl.load(class_begin + c + 1)
    own_sum = tl.full([ROWS, COLUMNS], 0.0, tl.float64)
    all_sum = tl.full([ROWS, COLUMNS], 0.0, tl.float64)
    owns = tl.full([ROWS], 0.0, tl.float64)
    others = tl.full([ROWS], 0.0, tl.float64)
    for first in range(begin, end, ROWS):
        i = first + tl.arange(0, ROWS)
        live = i < end
        row = tl.load(order + i, mask=live, other=0)
        of_row = rows + row * STATS
        scale = tl.load(of_row + SCALE, mask=live, other=0.0).to(DTYPE)
        shift = tl.load(of_row + SHIFT, mask=live, other=0.0).to(DTYPE)
        kind = least_kind(tl.load(of_row + ROW_KIND, mask=live, other=SOFTMAX))
        inverse_norm = share_of(tl.load(of_row + INVERSE_NORM, mask=live, other=0.0), shift, kind)
        own, other, _, _ = load_coefficients(coefficients, row, live, upstream, upstream_stride)
        x = load_features(
            input, center, row, live, 0, k, inside, unit_stride, column_stride, DTYPE, ALIGN, CONTIGUOUS, False
        )
        x = tl.where(inside[None, :], x, shift[:, None])
        if kind == NEAR:
            excess, log = near_zero(x * (0.5 * scale)[:, None])
            value = 0.5 + 0.5 * excess.to(tl.float64)  # with the rounding of what is small in it
        else:
            value, log, _slope, _value_slope = activate_as(x, scale[:, None], shift[:, None], kind, FAST)
            value = value.to(tl.float64)
        if own_sums is not None:
            own_sum += (own * inverse_norm)[:, None] * value
        if all_sums is not None:
            if CENTROID_TO_SAMPLE:
                all_sum += tl.where(live[:, None], other[:, None] * log.to(tl.float64), 0.0)
            else:
                all_sum += (other * inverse_norm)[:, None] * value
        owns += own
        others += other
    if own_sums is not None:
        tl.store(own_sums + c * M + k, tl.sum(own_sum, axis=0), mask=inside)
    if all_sums is not None:
        tl.store(all_sums + c * M + k, tl.sum(all_sum, axis=0), mask=inside)
    if tl.program_id(1) == 0:
        if own_sums is not None:
            tl.store(factor_sums + c, tl.sum(owns, axis=0))
        tl.store(factor_sums + classes + c, tl.sum(others, axis=0))


def _centroid_sums(
    batch: Batch,
    rows: Rows,
    order: Tensor,
    begin: Tensor,
    dtype: torch.dtype,
    centroid_to_sample: bool,
    with_own: bool,
    with_all: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Sums by class of the rows in `order`, float64: of own p [C, M], and of other p or other log a [C, M].

    And of own and other [2, C], of these without `with_own` only the second.
    """
    input, center = batch.input, batch.center
    classes, columns = begin.shape[0] - 1, input.shape[1]
    own_sums = rows.stats.new_empty((classes, columns)) if with_own else None
    all_sums = rows.stats.new_empty((classes, columns)) if with_all else None
    factor_sums = rows.stats.new_empty((2, classes))
    width = power_of_two(columns, 256)
    launches.launch(
        centroid_sums_kernel,
        (classes, -(-columns // width)),
        input=input,
        center=center,
        rows=rows.stats,
        coefficients=rows.coefficients,
        upstream=rows.upstream,
        order=order,
        class_begin=begin,
        own_sums=own_sums,
        all_sums=all_sums,
        factor_sums=factor_sums,
        **strides_of(input),
        upstream_stride=rows.upstream_stride,
        classes=classes,
        M=columns,
        DTYPE=_TL[dtype],
        FAST=input.dtype in HALF,
        CENTROID_TO_SAMPLE=centroid_to_sample,
        ROWS=4,
        COLUMNS=width,
    )
    return own_sums, all_sums, factor_sums


@triton.jit(do_not_specialize=["chunks"])
def fold_kernel(sums, folded, chunks, M, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The sums over the first dimension of `sums` [chunks, M] float64, to `folded` [M]."""
    k = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.full([ROWS, COLUMNS], 0.0, tl.float64)
    for first in range(0, chunks, ROWS):
        chunk = first + tl.arange(0, ROWS)
        mask = (chunk < chunks)[:, None] & (k < M)[None, :]
        total += tl.load(sums + (chunk.to(tl.int64) * M)[:, None] + k[None, :], mask=mask, other=0.0)
    tl.store(folded + k, tl.sum(total, axis=0), mask=k < M)


def _fold(sums: Tensor, totals: Tensor) -> None:
    """To `totals` [M, or more] the sums of `sums` [C, M] over C."""
    chunks, columns = sums.shape
    launches.launch(
        fold_kernel, (-(-columns // 64),), sums=sums, folded=totals, chunks=chunks, M=columns, ROWS=32, COLUMNS=64
    )


@operator
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
    chunk_rows = rows_of_chunk(count)
    begin = torch.arange(0, count + chunk_rows, chunk_rows, device=target.device)
    begin = torch.minimum(begin, (ignored == 0).sum())
    totals = rows.new_empty((columns + 1,))
    with launches.on(input):
        _, sums, factor_sums = _centroid_sums(batch, of_rows, order, begin, dtype, centroid_to_sample, False, True)
        assert sums is not None
        _fold(sums, totals)
        totals[columns] = factor_sums[1].sum()
    return totals


@triton.jit(do_not_specialize=["unit_stride", "column_stride", "classes", "lr", "momentum", "weight_decay"])
def centroid_grad_kernel(
    logits, norms, own_sums, all_sums, factor_sums, totals, reference, class_weights, weighted, upstream, grad,
    momentum_buffer, class_begin, unit_stride, column_stride, classes, lr, momentum, weight_decay, M: tl.constexpr,
    ALIGN: tl.constexpr, CONTIGUOUS: tl.constexpr, CENTROID_TO_SAMPLE: tl.constexpr, GIVEN: tl.constexpr,
    NESTEROV: tl.constexpr, COLUMNS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """d loss / d xi [C, M], one class a program, from centroid_sums_kernel's sums and their `totals` [M] over classes.

    GIVEN: `totals` [M + 1] are not of these sums, and the last of them is the sum of other. `class_weights` [C, 2] and
    `weighted` [C, M], times `upstream`, if given, take the place of the totals: a class has its own. Without `grad` it
    goes into a step of torch.optim.SGD on `logits` and, where there is one, `momentum_buffer`, both [C, M] and
    contiguous.
    """
    dtype: tl.constexpr = logits.dtype.element_ty
    c = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    live = c < classes
    kind = tl.load(norms + tl.program_id(0) * RECORD + CLASS_KIND)
    shift = tl.load(norms + c * RECORD + CLASS_SHIFT).to(dtype)
    inverse_norm = share_of(tl.exp(-tl.load(norms + c * RECORD + LOG_NORM)), shift, kind)
    own_sum = tl.load(factor_sums + c)
    other_sum = tl.load(factor_sums + classes + c)
    prior = tl.load(norms + c * RECORD + PRIOR)[:, None]
    if GIVEN:
        other_total = tl.load(totals + M)
    else:
        parts = tl.full([CLASSES], 0.0, tl.float64)
        for start in range(0, classes, CLASSES):
            v = start + tl.arange(0, CLASSES)
            parts += tl.load(factor_sums + classes + v, mask=v < classes, other=0.0)
        other_total = tl.sum(parts, axis=0)
    other_of_all = other_total
    if class_weights is not None:
        prior = tl.full([1, 1], 1.0, tl.float64)
        by = tl.load(upstream).to(tl.float64) if upstream is not None else 1.0
        other_of_all = by * tl.load(class_weights + c * CLASS_WEIGHTS)
        base = by * tl.load(class_weights + c * CLASS_WEIGHTS + 1)
    mean = tl.full([1], 0.0, tl.float64)
    # sample_to_centroid: slope (q (own_sum + prior other_total) - own - prior totals). centroid_to_sample:
    # slope (prior q (s - sum_k q s) - own + own_sum q), s = sum over the rows of other classes of
    # other_i (log q_c - log p_i), up to what is constant along the row. With class_weights 1 is in the place of prior,
    # and s is over all rows.
    PASSES: tl.constexpr = 2 if CENTROID_TO_SAMPLE else 1
    for step in tl.static_range(PASSES):
        for start in range(0, M, COLUMNS):
            k = start + tl.arange(0, COLUMNS)
            inside = k < M
            x = load_features(
                logits, None, c, live, 0, k, inside, unit_stride, column_stride, dtype, ALIGN, CONTIGUOUS, False
            )
            shifted = tl.where(inside[None, :], x, shift[:, None])
            value, log, slope, _ = activate_as(shifted, tl.full([1, 1], 1.0, dtype), shift[:, None], kind, False)
            q = value.to(tl.float64) * inverse_norm[:, None]
            own = load_rows(own_sums, c * M, k, inside, False)
            if class_weights is not None:
                total = by * load_rows(weighted, c * M, k, inside, False).to(tl.float64)
                if not CENTROID_TO_SAMPLE:
                    total += base[:, None]
            else:
                total = load_vector(totals, k, inside, 1, False)
            if CENTROID_TO_SAMPLE:
                if class_weights is not None:
                    log -= load_vector(reference, k, inside, 1, False)  # as of the rows in their product
                    s = other_of_all[:, None] * log.to(tl.float64) - total
                else:
                    s = (other_total - other_sum)[:, None] * log.to(tl.float64)
                    s -= total - load_rows(all_sums, c * M, k, inside, False)
                if step == 0:
                    mean += tl.sum(tl.where(inside[None, :], q * s, 0.0), axis=1)
                by_log = prior * q * (s - mean[:, None]) - (own - own_sum[:, None] * q)
            else:
                by_log = (own_sum[:, None] + prior * other_of_all) * q - (own + prior * total)
            if step == PASSES - 1:
                g = (slope.to(tl.float64) * by_log).to(dtype)
                at = (c * M)[:, None] + k[None, :]
                if grad is not None:
                    tl.store(grad + at, g, mask=inside[None, :])
                else:
                    # A row whose terms are not finite has a coefficient `other` that is not: such a batch moves
                    # nothing, nor does one without a row that counts.
                    counted = tl.load(class_begin + classes) - tl.load(class_begin)
                    counted = tl.where(other_total - other_total == 0.0, counted, 0)
                    moved = (inside & (tl.full([COLUMNS], 0, tl.int64) + counted > 0))[None, :]
                    g += double(weight_decay).to(dtype) * x
                    if momentum_buffer is not None:
                        keep = double(momentum).to(dtype)
                        average = keep * tl.load(momentum_buffer + at, mask=inside[None, :], other=0.0) + g
                        g = g + keep * average if NESTEROV else average
                    # A small tile has copies of its elements in several threads: all have read when one overwrites.
                    tl.debug_barrier()
                    tl.store(logits + at, x - double(lr).to(dtype) * g, mask=moved)
                    if momentum_buffer is not None:
                        tl.store(momentum_buffer + at, average, mask=moved)


def _by_class(
    batch: Batch,
    centroid_logits: Tensor,
    table: Table,
    rows: Rows,
    centroid_to_sample: bool,
    of_all: OfAllRows,
    to: Tensor | Step,
) -> None:
    """The gradient of the centroids to a tensor [C, M], or a step by it."""
    target = batch.target
    classes, columns = centroid_logits.shape
    grad, step = (None, to) if isinstance(to, Step) else (to, _NO_STEP)
    lr, momentum, weight_decay, nesterov = step.sgd
    totals, class_weights, weighted = of_all
    # Rows by class in the order of the batch, ignored ones last. No count is read on the host.
    of_class = torch.where(target == batch.ignore_index, classes, target)
    of_class, order = torch.sort(of_class, stable=True)
    begin = torch.searchsorted(of_class, torch.arange(classes + 1, device=target.device))
    own_sums, all_sums, factor_sums = _centroid_sums(
        batch, rows, order, begin, centroid_logits.dtype, centroid_to_sample, True, class_weights is None
    )
    folded = totals
    if totals is None and class_weights is None:
        assert all_sums is not None
        folded = table.norms.new_empty((columns,))
        _fold(all_sums, folded)
    launches.launch(
        centroid_grad_kernel,
        (classes,),
        logits=centroid_logits,
        norms=table.norms,
        own_sums=own_sums,
        all_sums=all_sums,
        factor_sums=factor_sums,
        totals=folded,
        reference=table.reference,
        class_weights=class_weights,
        weighted=weighted,
        upstream=None if class_weights is None else rows.upstream,
        grad=grad,
        momentum_buffer=step.momentum_buffer,
        class_begin=begin,
        **strides_of(centroid_logits),
        classes=classes,
        lr=bits(lr),
        momentum=bits(momentum),
        weight_decay=bits(weight_decay),
        M=columns,
        CENTROID_TO_SAMPLE=centroid_to_sample,
        GIVEN=totals is not None,
        NESTEROV=nesterov,
        COLUMNS=power_of_two(columns, 2048 if class_weights is None else 1024),  # past these, registers spill
        CLASSES=1024,
    )


def _check_of_all_rows(of_all: OfAllRows, input: Tensor, log_activation: Tensor) -> None:
    totals, class_weights, weighted = of_all
    classes, columns = log_activation.shape
    check("totals", totals, input, DOUBLE, (columns + 1,))
    check("class_weights", class_weights, input, DOUBLE, (classes, _schema.CLASS_WEIGHTS))
    check("weighted", weighted, input, (log_activation.dtype,), (classes, columns))
    require((class_weights is None) == (weighted is None), "pass both class_weights and weighted")


@operator
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
    class_weights: Tensor | None = None,
    weighted: Tensor | None = None,
) -> Tensor:
    """d loss / d centroid_logits [C, M]; `totals` [M + 1] float64 are for the sums over all rows, as class_totals.

    So are `class_weights` [C, 2] float64 and `weighted` [C, M], of each class.
    """
    batch = Batch(input, target, center, ignore_index)
    table = Table(log_activation, activation, reference, norms)
    of_rows = Rows(rows, coefficients, upstream)
    check_table(input, table, centroid_to_sample)
    classes, columns = log_activation.shape
    check_batch(batch, log_activation.dtype, classes)
    check_rows(input, of_rows)
    check("centroid_logits", centroid_logits, input, (log_activation.dtype,), (classes, columns), strided=True)
    of_all = OfAllRows(totals, class_weights, weighted)
    _check_of_all_rows(of_all, input, log_activation)
    if class_weights is not None and upstream is not None:
        check("upstream", upstream, input, ARITHMETIC, ())
    grad = torch.empty((classes, columns), dtype=centroid_logits.dtype, device=centroid_logits.device)
    with launches.on(input):
        _by_class(batch, centroid_logits, table, of_rows, centroid_to_sample, of_all, grad)
    return grad


@operator
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
    class_weights: Tensor | None = None,
    weighted: Tensor | None = None,
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
    of_all = OfAllRows(None, class_weights, weighted)
    _check_of_all_rows(of_all, input, log_activation)
    with launches.on(input):
        step = Step(momentum_buffer, SGD(lr, momentum, weight_decay, nesterov))
        _by_class(batch, centroid_logits, table, of_rows, centroid_to_sample, of_all, step)
        write_stats(centroid_logits, norms.select(1, _schema.PRIOR), softmax, centroid_to_sample, table)
