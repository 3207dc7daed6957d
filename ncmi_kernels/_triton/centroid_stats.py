"""Statistics of the centroids: log a(xi), a(xi), their normalisers, and the sums over classes that replace a loop."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ncmi_kernels import _schema
from ncmi_kernels._schema import Table
from ncmi_kernels._triton import launches
from ncmi_kernels._triton.checks import ARITHMETIC, DOUBLE, check, check_matrix, require
from ncmi_kernels._triton.elements import (
    CLASS_KIND,
    CLASS_SHIFT,
    LOG_NORM,
    LONE,
    PRIOR,
    RECORD,
    RECORD_BLOCK,
    REFERENCE_SUM,
    SHIFTED,
    SHIFTED_FROM,
    SOFTMAX,
    WEIGHT_SUM,
    WEIGHTED_LOG_NORM,
    activate_for_sums,
    load_features,
    near_zero,
    neighbours,
)
from ncmi_kernels._triton.ops import operator
from ncmi_kernels._triton.tiles import row_tile, strides_of


@triton.jit(do_not_specialize=["unit_stride", "column_stride", "prior_stride", "classes"])
def centroid_rows_kernel(
    logits, prior, log_activation, activation, norms, unit_stride, column_stride, prior_stride, classes,
    M: tl.constexpr, ALIGN: tl.constexpr, CONTIGUOUS: tl.constexpr, KIND: tl.constexpr, WITH_ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """log a(xi) and a(xi) [C, M], and of `norms` [C + 1, 9] the records of the classes.

    Their `prior` [C] may be where it is written.
    """
    dtype: tl.constexpr = log_activation.dtype.element_ty
    EVEN: tl.constexpr = M % COLUMNS == 0
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < classes
    infinity: tl.constexpr = float("inf")
    k = tl.arange(0, COLUMNS)
    largest = tl.full([ROWS, COLUMNS], -infinity, dtype)
    sizes = tl.full([ROWS, COLUMNS], 0.0, dtype)
    for start in range(0, M, COLUMNS):
        inside = k < M - start
        x = load_features(
            logits, None, row, live, start, k, inside, unit_stride, column_stride, dtype, ALIGN, CONTIGUOUS, EVEN
        )
        sizes = tl.maximum(sizes, tl.abs(x))
        largest = tl.maximum(largest, x if EVEN else tl.where(inside[None, :], x, -infinity))
    shift = tl.max(largest, axis=1)
    if KIND == SHIFTED:
        shift = tl.where(shift <= SHIFTED_FROM, shift, 0.0)
    # As terms_kernel: an infinite element is not to be hidden.
    scale = tl.where(tl.max(sizes, axis=1) == infinity, float("nan"), tl.full([ROWS], 1.0, dtype))
    norm = tl.full([ROWS, COLUMNS // VEC], 0.0, tl.float64)
    for start in range(0, M, COLUMNS):
        inside = k < M - start
        x = load_features(
            logits, None, row, live, start, k, inside, unit_stride, column_stride, dtype, ALIGN, CONTIGUOUS, EVEN
        )
        if not EVEN:
            x = tl.where(inside[None, :], x, shift[:, None])
        value, log = activate_for_sums(x, scale[:, None], shift[:, None], KIND, False)
        added = value
        if KIND == SHIFTED and dtype == tl.float32:
            # What rounding does to a centroid, all rows of its class suffer alike.
            near = tl.abs(x) <= 1.0
            excess, near_log = near_zero(tl.where(near, 0.5 * x, 0.0))
            log = tl.where(near, near_log, log)
            value = tl.where(near, 0.5 + 0.5 * excess, value)
            added = tl.where(near, 0.5 * excess, added)
            halves = tl.where(near, 0.5, tl.full(x.shape, 0.0, dtype))
            if not EVEN:
                halves = tl.where(inside[None, :], halves, 0.0)
            norm += neighbours(halves, VEC)
        if not EVEN:
            added = tl.where(inside[None, :], added, 0.0)
        norm += neighbours(added.to(tl.float64), VEC)
        # A logarithm at the end of the range would make sums of it infinite.
        log = tl.maximum(log, -(2.0**1008) if dtype == tl.float64 else -(2.0**112), propagate_nan=tl.PropagateNan.ALL)
        at = row * M + start
        mask = live[:, None] if EVEN else live[:, None] & inside[None, :]
        tl.store((log_activation + at)[:, None] + k[None, :], log, mask=mask)
        if WITH_ACTIVATION:
            tl.store((activation + at)[:, None] + k[None, :], value, mask=mask)
    of_class = norms + row * RECORD
    column = tl.arange(0, RECORD_BLOCK)
    unset = tl.where(column == LONE, -1.0, 0.0).to(tl.float64)
    unset = tl.broadcast_to(unset[None, :], [ROWS, RECORD_BLOCK])
    of_lone = (column >= LONE) & (column < PRIOR)
    tl.store(of_class[:, None] + column[None, :], unset, mask=live[:, None] & of_lone[None, :])
    tl.store(of_class + LOG_NORM, tl.log(tl.sum(norm, axis=1)), mask=live)
    tl.store(of_class + CLASS_SHIFT, shift.to(tl.float64), mask=live)
    tl.store(of_class + CLASS_KIND, tl.full([ROWS], KIND, tl.float64), mask=live)
    if prior is not None:
        known = tl.load(prior + row * prior_stride, mask=live, other=0.0)
    else:
        known = tl.full([ROWS], 1.0, tl.float64) / classes.to(tl.float64)
    tl.store(of_class + PRIOR, known, mask=live)


@triton.jit(do_not_specialize=["classes"])
def centroid_columns_kernel(
    log_activation, activation, norms, reference, residual, weighted, classes, M, CENTROID_TO_SAMPLE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`reference` [2, M]: the mean over classes of log a(xi), for centroid_to_sample weighted with q, and the mean q.

    Means are by the priors. What rounding `reference` lost goes to `residual` [M], the mean q times the mean log_norm
    under it to `weighted` [M].
    """
    dtype: tl.constexpr = reference.dtype.element_ty
    k = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    log_sum = tl.full([ROWS, COLUMNS], 0.0, tl.float64)
    q_sum = log_sum
    norm_sum = log_sum
    for first in range(0, classes, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < classes)[:, None] & (k < M)[None, :]
        at = (row.to(tl.int64) * M)[:, None] + k[None, :]
        log = tl.load(log_activation + at, mask=mask, other=0.0).to(tl.float64)
        prior = tl.load(norms + row * RECORD + PRIOR, mask=row < classes, other=0.0)[:, None]
        if CENTROID_TO_SAMPLE:
            log_norm = tl.load(norms + row * RECORD + LOG_NORM, mask=row < classes, other=0.0)[:, None]
            q = tl.load(activation + at, mask=mask, other=0.0).to(tl.float64) * (prior * tl.exp(-log_norm))
            q_sum += q
            log_sum += q * log
            norm_sum += q * log_norm
        else:
            log_sum += prior * log
    log_mean = tl.sum(log_sum, axis=0)
    q_mean = tl.sum(q_sum, axis=0)
    if CENTROID_TO_SAMPLE:
        some = q_mean > 0
        exact = tl.where(some, log_mean / tl.where(some, q_mean, 1.0), 0.0)
        norm_mean = tl.where(some, tl.sum(norm_sum, axis=0) / tl.where(some, q_mean, 1.0), 0.0)
        tl.store(weighted + k, q_mean.to(dtype).to(tl.float64) * norm_mean, mask=k < M)
    else:
        exact = log_mean
    weight = q_mean.to(dtype)
    rounded = exact.to(dtype)
    tl.store(reference + k, rounded, mask=k < M)
    tl.store(reference + M + k, weight, mask=k < M)
    tl.store(residual + k, exact - rounded.to(tl.float64), mask=k < M)


@triton.jit(do_not_specialize=["classes"])
def centroid_constants_kernel(
    reference, residual, weighted, norms, classes, M, CENTROID_TO_SAMPLE: tl.constexpr, COLUMNS: tl.constexpr
):
    """The last record of `norms`, AllStats of csrc, whose weighted_log_norm is less what rounding lost; one program.

    The loss of rounding `reference` enters the mean under p; taken under the mean centroid instead it goes into a
    constant. The two differ where p is far from the centroids, and there the terms are large.
    """
    total = tl.full([COLUMNS], 0.0, tl.float64)
    lost = tl.full([COLUMNS], 0.0, tl.float64)
    constant = tl.full([COLUMNS], 0.0, tl.float64)
    compared = tl.full([COLUMNS], 0.0, tl.float64)
    if not CENTROID_TO_SAMPLE:
        largest = tl.full([COLUMNS], float("-inf"), tl.float64)
        for start in range(0, M, COLUMNS):
            k = start + tl.arange(0, COLUMNS)
            part = tl.load(reference + k, mask=k < M, other=float("-inf")).to(tl.float64)
            largest = tl.maximum(largest, part)
        top = tl.max(largest, axis=0)
        for start in range(0, classes, COLUMNS):
            row = start + tl.arange(0, COLUMNS)
            prior = tl.load(norms + row * RECORD + PRIOR, mask=row < classes, other=0.0)
            constant += prior * tl.load(norms + row * RECORD + LOG_NORM, mask=row < classes, other=0.0)
    for start in range(0, M, COLUMNS):
        k = start + tl.arange(0, COLUMNS)
        left = tl.load(residual + k, mask=k < M, other=0.0)
        log = tl.load(reference + k, mask=k < M, other=0.0).to(tl.float64)
        if CENTROID_TO_SAMPLE:
            w = tl.load(reference + M + k, mask=k < M, other=0.0).to(tl.float64)
            constant += tl.load(weighted + k, mask=k < M, other=0.0) - w * left
            compared += w * log
        else:
            w = tl.where(k < M, tl.exp(log - top), 0.0)
            compared += log
            lost += w * left
        total += w
    weight_sum = tl.sum(total, axis=0)
    constant_sum = tl.sum(constant, axis=0)
    if not CENTROID_TO_SAMPLE:
        constant_sum -= tl.sum(lost, axis=0) / weight_sum
        weight_sum = weight_sum * 0.0 + 1.0
    column = tl.arange(0, RECORD_BLOCK)
    record = tl.where(column == WEIGHTED_LOG_NORM, constant_sum, 0.0)
    record = tl.where(column == WEIGHT_SUM, weight_sum, record)
    record = tl.where(column == REFERENCE_SUM, tl.sum(compared, axis=0), record)
    tl.store(norms + classes * RECORD + column, record, mask=column < RECORD)


def write_stats(
    centroid_logits: Tensor, prior: Tensor | None, softmax: bool, centroid_to_sample: bool, table: Table
) -> None:
    """What the operator gives of the logits [C, M], into this table; `prior` may be that of the table."""
    log_activation, activation, reference, norms = table
    classes, columns = centroid_logits.shape
    workspace = norms.new_empty((2, columns))
    residual, weighted = workspace[0], workspace[1]
    tile = row_tile(columns, centroid_logits.dtype, True)
    launches.launch(
        centroid_rows_kernel,
        (-(-classes // tile.rows),),
        logits=centroid_logits,
        prior=prior,
        log_activation=log_activation,
        activation=activation,
        norms=norms,
        **strides_of(centroid_logits),
        prior_stride=0 if prior is None else prior.stride(0),
        classes=classes,
        M=columns,
        KIND=SOFTMAX if softmax else SHIFTED,
        WITH_ACTIVATION=centroid_to_sample,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        VEC=tile.vec,
        warps=tile.warps,
    )
    launches.launch(
        centroid_columns_kernel,
        (-(-columns // 16),),
        log_activation=log_activation,
        activation=activation,
        norms=norms,
        reference=reference,
        residual=residual,
        weighted=weighted,
        classes=classes,
        M=columns,
        CENTROID_TO_SAMPLE=centroid_to_sample,
        ROWS=128,
        COLUMNS=16,
    )
    launches.launch(
        centroid_constants_kernel,
        (1,),
        reference=reference,
        residual=residual,
        weighted=weighted,
        norms=norms,
        classes=classes,
        M=columns,
        CENTROID_TO_SAMPLE=centroid_to_sample,
        COLUMNS=512,
    )


@operator
def centroid_stats(
    centroid_logits: Tensor, softmax: bool, centroid_to_sample: bool, prior: Tensor | None = None
) -> Table:
    """Logits [C, M] to log_activation [C, M], activation [C or 0, M], reference [2, M], norms [C + 1, 9] float64.

    `prior` [C] float64: what a class counts for in the separation; None: 1 / C each.
    """
    classes, columns = check_matrix("centroid_logits", centroid_logits, ARITHMETIC)
    require(classes > 0, "centroid_logits must not be empty")
    check("prior", prior, centroid_logits, DOUBLE, (classes,))
    log_activation = centroid_logits.new_empty((classes, columns))
    activation = centroid_logits.new_empty((classes if centroid_to_sample else 0, columns))
    reference = centroid_logits.new_empty((2, columns))
    norms = centroid_logits.new_empty((classes + 1, _schema.CLASS_STATS), dtype=torch.float64)
    table = Table(log_activation, activation, reference, norms)
    with launches.on(centroid_logits):
        write_stats(centroid_logits, prior, softmax, centroid_to_sample, table)
    return table
