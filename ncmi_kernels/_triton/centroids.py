"""Kernels by class: the statistics of the centroids, and the gradient of their logits or a step of SGD by it."""

import triton
import triton.language as tl

from ncmi_kernels._triton.elements import (
    ALL_CLASSES,
    CLASS_KIND,
    CLASS_SHIFT,
    INVERSE_NORM,
    LOG_NORM,
    LONE,
    RECORD,
    ROW_KIND,
    SCALE,
    SHIFT,
    SHIFTED,
    SHIFTED_FROM,
    SOFTMAX,
    STATS,
    WEIGHT_SUM,
    WEIGHTED_LOG_NORM,
    activate_as,
    activate_for_sums,
    class_count,
    double,
    least_kind,
    load_coefficients,
    load_features,
    load_rows,
    load_vector,
    near_zero,
    neighbours,
    share_of,
)

# ----------------------------------------------------------------------------------------------------------------------
# Statistics: log a(xi), a(xi), their normalisers, and the sums over classes that stand in for the loop over them
# ----------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["unit_stride", "column_stride", "classes"])
def centroid_rows_kernel(
    logits, log_activation, activation, norms, unit_stride, column_stride, classes, M: tl.constexpr,
    ALIGN: tl.constexpr, CONTIGUOUS: tl.constexpr, KIND: tl.constexpr, WITH_ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """log a(xi) and a(xi) [C, M], and of `norms` [C + 1, 8] the records of the classes."""
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
    column = tl.arange(0, RECORD)
    unset = tl.where(column == LONE, -1.0, 0.0).to(tl.float64)
    unset = tl.broadcast_to(unset[None, :], [ROWS, RECORD])
    tl.store(of_class[:, None] + column[None, :], unset, mask=live[:, None] & (column >= LONE)[None, :])
    tl.store(of_class + LOG_NORM, tl.log(tl.sum(norm, axis=1)), mask=live)
    tl.store(of_class + CLASS_SHIFT, shift.to(tl.float64), mask=live)
    tl.store(of_class + CLASS_KIND, tl.full([ROWS], KIND, tl.float64), mask=live)


@triton.jit(do_not_specialize=["classes"])
def centroid_columns_kernel(
    log_activation, activation, norms, reference, residual, weighted, classes, M, CENTROID_TO_SAMPLE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`reference` [2, M]: the mean over classes of log a(xi), for centroid_to_sample weighted with q, and the mean q.

    What rounding it lost goes to `residual` [M], the mean q times the mean log_norm under it to `weighted` [M].
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
        if CENTROID_TO_SAMPLE:
            log_norm = tl.load(norms + row * RECORD + LOG_NORM, mask=row < classes, other=0.0)[:, None]
            q = tl.load(activation + at, mask=mask, other=0.0).to(tl.float64) * tl.exp(-log_norm)
            q_sum += q
            log_sum += q * log
            norm_sum += q * log_norm
        else:
            log_sum += log
    log_mean = tl.sum(log_sum, axis=0)
    inverse_classes = 1.0 / classes.to(tl.float64)
    q_mean = tl.sum(q_sum, axis=0)
    if CENTROID_TO_SAMPLE:
        some = q_mean > 0
        exact = tl.where(some, log_mean / tl.where(some, q_mean, 1.0), 0.0)
        weight = (q_mean * inverse_classes).to(dtype)
        norm_mean = tl.where(some, tl.sum(norm_sum, axis=0) / tl.where(some, q_mean, 1.0), 0.0)
        tl.store(weighted + k, weight.to(tl.float64) * norm_mean, mask=k < M)
    else:
        exact = log_mean * inverse_classes
        weight = q_mean.to(dtype)
    rounded = exact.to(dtype)
    tl.store(reference + k, rounded, mask=k < M)
    tl.store(reference + M + k, weight, mask=k < M)
    tl.store(residual + k, exact - rounded.to(tl.float64), mask=k < M)


@triton.jit(do_not_specialize=["classes"])
def centroid_constants_kernel(
    reference, residual, weighted, norms, classes, M, CENTROID_TO_SAMPLE: tl.constexpr, COLUMNS: tl.constexpr
):
    """The last record of `norms`: weight_sum, weighted_log_norm less what rounding `reference` lost, C; one program.

    The loss of rounding enters the mean under p; taken under the mean centroid instead it goes into a constant. The two
    differ where p is far from the centroids, and there the terms are large.
    """
    total = tl.full([COLUMNS], 0.0, tl.float64)
    lost = tl.full([COLUMNS], 0.0, tl.float64)
    constant = tl.full([COLUMNS], 0.0, tl.float64)
    if not CENTROID_TO_SAMPLE:
        largest = tl.full([COLUMNS], float("-inf"), tl.float64)
        for start in range(0, M, COLUMNS):
            k = start + tl.arange(0, COLUMNS)
            part = tl.load(reference + k, mask=k < M, other=float("-inf")).to(tl.float64)
            largest = tl.maximum(largest, part)
        top = tl.max(largest, axis=0)
        for start in range(0, classes, COLUMNS):
            row = start + tl.arange(0, COLUMNS)
            constant += tl.load(norms + row * RECORD + LOG_NORM, mask=row < classes, other=0.0)
    for start in range(0, M, COLUMNS):
        k = start + tl.arange(0, COLUMNS)
        left = tl.load(residual + k, mask=k < M, other=0.0)
        if CENTROID_TO_SAMPLE:
            w = tl.load(reference + M + k, mask=k < M, other=0.0).to(tl.float64)
            constant += tl.load(weighted + k, mask=k < M, other=0.0)
        else:
            w = tl.exp(tl.load(reference + k, mask=k < M, other=float("-inf")).to(tl.float64) - top)
        total += w
        lost += w * left
    weight_sum = tl.sum(total, axis=0)
    lost_sum = tl.sum(lost, axis=0)
    constant_sum = tl.sum(constant, axis=0)
    if not CENTROID_TO_SAMPLE:
        lost_sum = lost_sum / weight_sum
        constant_sum = constant_sum / classes.to(tl.float64)
        weight_sum = weight_sum * 0.0 + 1.0
    column = tl.arange(0, RECORD)
    record = tl.where(column == WEIGHTED_LOG_NORM, constant_sum - lost_sum, 0.0)
    record = tl.where(column == ALL_CLASSES, classes.to(tl.float64), record)
    tl.store(norms + classes * RECORD + column, tl.where(column == WEIGHT_SUM, weight_sum, record))


# ----------------------------------------------------------------------------------------------------------------------
# Centroid gradient: sums over the rows of each class, over all classes, then class by class
# ----------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["unit_stride", "column_stride", "upstream_stride", "classes"])
def class_sums_kernel(
    input, center, rows, coefficients, upstream, order, class_begin, own_sums, all_sums, factor_sums, unit_stride,
    column_stride, upstream_stride, classes, M: tl.constexpr, ALIGN: tl.constexpr, CONTIGUOUS: tl.constexpr,
    DTYPE: tl.constexpr, FAST: tl.constexpr, CENTROID_TO_SAMPLE: tl.constexpr, WITH_OWN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums over the rows of one class, in the order of the batch.

    Of the coefficients of a row: to `own_sums` [C, M] own p; to `all_sums` [C, M] other p, for centroid_to_sample other
    log a; to `factor_sums` [2, C] own and other. Without WITH_OWN a class is any set of rows, and only `all_sums` and
    the sums of other are written.
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
        value, log, _, _ = activate_as(x, scale[:, None], shift[:, None], kind, FAST)
        value = value.to(tl.float64)
        if WITH_OWN:
            own_sum += (own * inverse_norm)[:, None] * value
        if CENTROID_TO_SAMPLE:
            all_sum += tl.where(live[:, None], other[:, None] * log.to(tl.float64), 0.0)
        else:
            all_sum += (other * inverse_norm)[:, None] * value
        owns += own
        others += other
    if WITH_OWN:
        tl.store(own_sums + c * M + k, tl.sum(own_sum, axis=0), mask=inside)
    tl.store(all_sums + c * M + k, tl.sum(all_sum, axis=0), mask=inside)
    if tl.program_id(1) == 0:
        if WITH_OWN:
            tl.store(factor_sums + c, tl.sum(owns, axis=0))
        tl.store(factor_sums + classes + c, tl.sum(others, axis=0))


@triton.jit(do_not_specialize=["unit_stride", "column_stride", "classes", "lr", "momentum", "weight_decay"])
def centroid_grad_kernel(
    logits, norms, own_sums, all_sums, factor_sums, totals, grad, momentum_buffer, class_begin, unit_stride,
    column_stride, classes, lr, momentum, weight_decay, M: tl.constexpr, ALIGN: tl.constexpr, CONTIGUOUS: tl.constexpr,
    CENTROID_TO_SAMPLE: tl.constexpr, GIVEN: tl.constexpr, NESTEROV: tl.constexpr, COLUMNS: tl.constexpr,
    CLASSES: tl.constexpr,
):  # fmt: skip
    """d loss / d xi [C, M], one class a program, from class_sums_kernel's sums and their `totals` [M] over classes.

    GIVEN: `totals` [M + 1] are not of these sums, and the last of them is the sum of other. Without `grad` it goes into
    a step of torch.optim.SGD on `logits` and, where there is one, `momentum_buffer`, both [C, M] and contiguous.
    """
    dtype: tl.constexpr = logits.dtype.element_ty
    c = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    live = c < classes
    kind = tl.load(norms + tl.program_id(0) * RECORD + CLASS_KIND)
    shift = tl.load(norms + c * RECORD + CLASS_SHIFT).to(dtype)
    inverse_norm = share_of(tl.exp(-tl.load(norms + c * RECORD + LOG_NORM)), shift, kind)
    own_sum = tl.load(factor_sums + c)
    other_sum = tl.load(factor_sums + classes + c)
    inverse_classes = 1.0 / class_count(norms, classes)
    if GIVEN:
        other_total = tl.load(totals + M)
    else:
        parts = tl.full([CLASSES], 0.0, tl.float64)
        for start in range(0, classes, CLASSES):
            v = start + tl.arange(0, CLASSES)
            parts += tl.load(factor_sums + classes + v, mask=v < classes, other=0.0)
        other_total = tl.sum(parts, axis=0)
    mean = tl.full([1], 0.0, tl.float64)
    # sample_to_centroid: slope (q (own_sum + other_total / C) - own - totals / C). centroid_to_sample:
    # slope ((1 / C) q (s - sum_k q s) - own + own_sum q), s = sum over the rows of other classes of
    # other_i (log q_c - log p_i), up to what is constant along the row.
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
            total = load_vector(totals, k, inside, 1, False)
            if CENTROID_TO_SAMPLE:
                s = (other_total - other_sum)[:, None] * log.to(tl.float64)
                s -= total - load_rows(all_sums, c * M, k, inside, False)
                if step == 0:
                    mean += tl.sum(tl.where(inside[None, :], q * s, 0.0), axis=1)
                by_log = inverse_classes * q * (s - mean[:, None]) - (own - own_sum[:, None] * q)
            else:
                by_log = (own_sum[:, None] + inverse_classes * other_total) * q - (own + inverse_classes * total)
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
