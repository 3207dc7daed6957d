"""Kernels over the batch: from the rows' sums to the loss, the running centre, and sums over rows."""

import triton
import triton.language as tl

from ncmi_kernels._triton.elements import (
    ALL_MEAN,
    INVERSE_NORM,
    LOG_NORM,
    OWN_MEAN,
    RECORD,
    STATS,
    checked,
    class_count,
    double,
    load_features,
    store_coefficients,
)
from ncmi_kernels._triton.rows import coefficients_of, terms_of

NONE = tl.constexpr(0)
MEAN = tl.constexpr(1)
SUM = tl.constexpr(2)
TERMS = tl.constexpr(3)  # no loss: the terms themselves

WHOLE = tl.constexpr(0)  # sums over the batch: each program forms them itself, over all rows
PARTIAL = tl.constexpr(1)  # each writes those of its rows
LAST = tl.constexpr(2)  # each adds up what PARTIAL wrote


# ----------------------------------------------------------------------------------------------------------------------
# From the rows' sums to the terms, the loss and its derivatives by the terms
# ----------------------------------------------------------------------------------------------------------------------


@triton.jit
def _terms_tile(
    row, target, norms, weight, terms, rows, target_stride, ignore_index, classes, B, CENTROID_TO_SAMPLE: tl.constexpr,
    GIVEN: tl.constexpr,
):  # fmt: skip
    """Of BLOCK rows: A and G (0 where a row does not count), 1 / S, the means under p, the class weight or 0."""
    y, live, wrong = checked(target, row, target_stride, ignore_index, classes, B)
    tl.device_assert(wrong == 0, "target: out of range, expected a class in [0, C) or ignore_index")
    first = tl.load(terms + row, mask=live, other=1.0)
    second = tl.load(terms + B + row, mask=live, other=0.0)
    if GIVEN:
        concentration = first
        separation = second
        inverse_norm = tl.load(rows + row * STATS + INVERSE_NORM, mask=live, other=0.0)
        own_mean = tl.load(rows + row * STATS + OWN_MEAN, mask=live, other=0.0)
        all_mean = tl.load(rows + row * STATS + ALL_MEAN, mask=live, other=0.0)
    else:
        total = tl.load(terms + 2 * B.to(tl.int64) + row, mask=live, other=0.0)
        own_cross = tl.load(terms + 3 * B.to(tl.int64) + row, mask=live, other=0.0) if CENTROID_TO_SAMPLE else second
        concentration, separation, inverse_norm, own_mean, all_mean = terms_of(
            first, second, total, own_cross, tl.load(norms + y * RECORD + LOG_NORM), norms, classes, CENTROID_TO_SAMPLE
        )
        inverse_norm = tl.where(live, inverse_norm, 0.0)
        own_mean = tl.where(live, own_mean, 0.0)
        all_mean = tl.where(live, all_mean, 0.0)
    concentration = tl.where(live, concentration, 0.0)
    separation = tl.where(live, separation, 0.0)
    factor = tl.where(live, 1.0, concentration * 0.0)
    if weight is not None:
        factor = tl.load(weight + y, mask=live, other=0.0).to(tl.float64)
    return concentration, separation, inverse_norm, own_mean, all_mean, tl.where(live, factor, 0.0), live


@triton.jit
def _batch_sums(concentration, separation, factor, live, eps, BATCH_RATIO: tl.constexpr):
    """Of BLOCK rows: the sums of w, of w A, of w G, and for the ratio by sample of w A / (G + eps)."""
    first = tl.sum(tl.where(live, factor * concentration, 0.0), axis=0)
    second = tl.sum(tl.where(live, factor * separation, 0.0), axis=0)
    third = tl.full([], 0.0, tl.float64)
    if not BATCH_RATIO:
        third = tl.sum(tl.where(live, factor * (concentration * (1.0 / (separation + eps))), 0.0), axis=0)
    return tl.sum(factor, axis=0), first, second, third


@triton.jit(do_not_specialize=["target_stride", "eps", "ignore_index", "classes", "B", "tiles", "columns"], debug=True)
def finish_kernel(
    target, norms, weight, terms, totals, partials, rows, coefficients, loss, means, sums, center, batches,
    moved_center, moved_batches, target_stride, eps, ignore_index, classes, B, tiles, columns,
    CENTROID_TO_SAMPLE: tl.constexpr, FOCUS: tl.constexpr, BATCH_RATIO: tl.constexpr, REDUCTION: tl.constexpr,
    GIVEN: tl.constexpr, STAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From the sums of the rows to what REDUCTION asks for: the loss [] or [B], or for TERMS A and G [2, B].

    `terms` are the rows' sums [4, B], and the columns of `rows` [B, 7] that terms_kernel left out are written; or with
    GIVEN they are A and G [2, B]. But for TERMS also `means` [2] of A and G, and where there are pointers for them
    `coefficients` [B, 4] and the `sums` [4] over the rows. Those are formed in stages: PARTIAL writes its own to
    `partials` [4, tiles], LAST reads them; WHOLE does without. Or they are not formed, and are those in `totals` [4].

    Where there is a `center` [columns], this moves it, as nothing comes after that could fail.
    """
    eps = double(eps)
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    concentration, separation, inverse_norm, own_mean, all_mean, factor, live = _terms_tile(
        row, target, norms, weight, terms, rows, target_stride, ignore_index, classes, B, CENTROID_TO_SAMPLE, GIVEN
    )
    if STAGE == PARTIAL:
        weights, first, second, third = _batch_sums(concentration, separation, factor, live, eps, BATCH_RATIO)
        tile = partials + tl.program_id(0)
        tl.store(tile, weights)
        tl.store(tile + tiles, first)
        tl.store(tile + 2 * tiles, second)
        tl.store(tile + 3 * tiles, third)
    else:
        if not GIVEN:
            of_row = rows + row * STATS
            tl.store(of_row + INVERSE_NORM, inverse_norm, mask=row < B)
            tl.store(of_row + OWN_MEAN, own_mean, mask=row < B)
            tl.store(of_row + ALL_MEAN, all_mean, mask=row < B)
        if REDUCTION == TERMS:
            tl.store(loss + row, concentration, mask=row < B)
            tl.store(loss + B + row, separation, mask=row < B)
        else:
            if totals is not None:
                weights = tl.load(totals)
                first = tl.load(totals + 1)
                second = tl.load(totals + 2)
                third = tl.load(totals + 3)
            else:
                # Summed over a block at the end, in one order for any number of programs.
                weights = tl.full([], 0.0, tl.float64)
                first = weights
                second = weights
                third = weights
                for tile in range(0, tiles if STAGE == WHOLE else tl.cdiv(tiles, BLOCK)):
                    i = tile * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
                    if STAGE == WHOLE:
                        a, g, _, _, _, w, counts = _terms_tile(
                            i, target, norms, weight, terms, rows, target_stride, ignore_index, classes, B,
                            CENTROID_TO_SAMPLE, GIVEN,
                        )  # fmt: skip
                        d_weights, d_first, d_second, d_third = _batch_sums(a, g, w, counts, eps, BATCH_RATIO)
                    else:
                        d_weights = tl.sum(tl.load(partials + i, mask=i < tiles, other=0.0), axis=0)
                        d_first = tl.sum(tl.load(partials + tiles + i, mask=i < tiles, other=0.0), axis=0)
                        d_second = tl.sum(tl.load(partials + 2 * tiles + i, mask=i < tiles, other=0.0), axis=0)
                        d_third = tl.sum(tl.load(partials + 3 * tiles + i, mask=i < tiles, other=0.0), axis=0)
                    weights += d_weights
                    first += d_first
                    second += d_second
                    third += d_third
            # No row that counts: 0 / 0, as cross_entropy.
            first_mean = first / weights
            second_mean = second / weights
            if REDUCTION == MEAN:
                factor = factor / weights
            inverse = 1.0 / (second_mean + eps) if BATCH_RATIO else 1.0 / (separation + eps)
            ratio = first_mean * inverse if BATCH_RATIO else concentration * inverse
            if coefficients is not None:
                by_separation = -(factor * (ratio * inverse))
                made = coefficients_of(
                    own_mean, all_mean, factor * inverse, by_separation, class_count(norms, classes),
                    CENTROID_TO_SAMPLE, FOCUS,
                )  # fmt: skip
                store_coefficients(coefficients, row, B, live, made)
            if REDUCTION == NONE:
                value = tl.where(live, factor * ratio, 0.0)
                tl.store(loss + row, value.to(loss.dtype.element_ty), mask=row < B)
            if tl.program_id(0) == 0:
                if REDUCTION != NONE:
                    if BATCH_RATIO:
                        value = ratio
                    elif REDUCTION == MEAN:
                        value = third / weights
                    else:
                        value = third
                    tl.store(loss, value.to(loss.dtype.element_ty))
                tl.store(means, first_mean)
                tl.store(means + 1, second_mean)
                if sums is not None:
                    tl.store(sums, weights)
                    tl.store(sums + 1, first)
                    tl.store(sums + 2, second)
                    tl.store(sums + 3, third)
        if center is not None:
            for start in range(tl.program_id(0) * BLOCK, columns, tiles * BLOCK):
                k = start + tl.arange(0, BLOCK)
                tl.store(center + k, tl.load(moved_center + k, mask=k < columns), mask=k < columns)
            if tl.program_id(0) == 0:
                tl.store(batches, tl.load(moved_batches))


@triton.jit(do_not_specialize=["size"])
def scale_kernel(grad, upstream, size, BLOCK: tl.constexpr):
    """`grad` [size] times `upstream` [], in place; neither read nor written where that is 1.

    Rows that do not count stay 0, whatever comes.
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(upstream)
    if factor != 1.0:
        value = tl.load(grad + i, mask=i < size)
        tl.store(grad + i, tl.where(value == 0.0, value, value * factor), mask=i < size)


# ----------------------------------------------------------------------------------------------------------------------
# Columns: the running centre, and the weights of a batch
# ----------------------------------------------------------------------------------------------------------------------


@triton.jit(
    do_not_specialize=["unit_stride", "column_stride", "target_stride", "ignore_index", "classes", "B", "chunk_rows"],
    debug=True,
)
def column_sums_kernel(
    input, target, weight, sums, counts, weight_sums, unit_stride, column_stride, target_stride, ignore_index, classes,
    B, chunk_rows, M: tl.constexpr, ALIGN: tl.constexpr, CONTIGUOUS: tl.constexpr, WITH_SUMS: tl.constexpr,
    WITH_WEIGHTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of a chunk of rows that count: column sums to `sums` [chunks, M], how many, and the sum of their weights."""
    chunk = tl.program_id(0)
    k = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    dtype: tl.constexpr = tl.float64 if input.dtype.element_ty == tl.float64 else tl.float32
    UNROLL: tl.constexpr = 4  # rows that are added before they go to a double
    total = tl.full([ROWS, COLUMNS], 0.0, tl.float64)
    count = tl.full([ROWS], 0.0, tl.float64)
    weights = tl.full([ROWS], 0.0, tl.float64)
    first = chunk.to(tl.int64) * chunk_rows
    last = tl.minimum(first + chunk_rows, B)
    for begin in range(0, chunk_rows, ROWS * UNROLL):
        partial = tl.full([ROWS, COLUMNS], 0.0, dtype)
        for step in tl.static_range(UNROLL):
            row = first + begin + step * ROWS + tl.arange(0, ROWS)
            y, live, wrong = checked(target, row, target_stride, ignore_index, classes, last)
            if WITH_SUMS:
                partial += load_features(
                    input, None, row, live, 0, k, k < M, unit_stride, column_stride, dtype, ALIGN, CONTIGUOUS, False
                )
            tl.device_assert(wrong == 0, "target: out of range, expected a class in [0, C) or ignore_index")
            counted = tl.where(live, 1.0, 0.0).to(tl.float64)
            count += counted
            if WITH_WEIGHTS:
                if weight is not None:
                    weights += tl.load(weight + y, mask=live, other=0.0).to(tl.float64)
                else:
                    weights += counted
        total += partial.to(tl.float64)
    if WITH_SUMS:
        tl.store(sums + chunk.to(tl.int64) * M + k, tl.sum(total, axis=0), mask=k < M)
    if tl.program_id(1) == 0:
        tl.store(counts + chunk, tl.sum(count, axis=0))
        if WITH_WEIGHTS:
            tl.store(weight_sums + chunk, tl.sum(weights, axis=0))


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


@triton.jit
def _moved(sums, center, k, chunks, M, count, keep, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Columns of the moved centre in its dtype; and as it was."""
    total = tl.full([ROWS, COLUMNS], 0.0, tl.float64)
    for first in range(0, chunks, ROWS):
        chunk = first + tl.arange(0, ROWS)
        mask = (chunk < chunks)[:, None] & (k < M)[None, :]
        total += tl.load(sums + (chunk.to(tl.int64) * M)[:, None] + k[None, :], mask=mask, other=0.0)
    mean = tl.sum(total, axis=0) / count
    before = tl.load(center + k, mask=k < M, other=0.0)
    moved = tl.where(keep == 0.0, mean, keep * before.to(tl.float64) + (1.0 - keep) * mean)
    return moved.to(center.dtype.element_ty), before


@triton.jit(do_not_specialize=["chunks", "count_chunks", "momentum", "tiles"])
def move_center_kernel(
    sums, counts, center, batches, copy, moved_center, moved_batches, wrongs, chunks, count_chunks, momentum, tiles, M,
    STAGE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """`center` [M] moved by the column sums [chunks, M], to `copy` [M], and `batches`, how often, to `moved_batches`.

    And, where there is one, to `moved_center`; that and `moved_batches` may be `center` and `batches` themselves. A
    batch without rows says nothing, and one NaN, or a mean too large, must not stay in the centre for good: then both
    are as before. STAGE: WHOLE, one program does it all; else each
    has COLUMNS columns, which PARTIAL leaves in `copy` and whether any is not finite in `wrongs` [tiles], and LAST
    makes final.
    """
    start = tl.program_id(0) * COLUMNS
    end = M if STAGE == WHOLE else start + COLUMNS
    # Nobody reads what LAST changes: `batches` and the centre are read by the stage before.
    tracked = tl.load(batches)
    if STAGE == LAST:
        wrong = tl.full([COLUMNS], 0, tl.int32)
        for first in range(0, tiles, COLUMNS):
            tile = first + tl.arange(0, COLUMNS)
            wrong |= tl.load(wrongs + tile, mask=tile < tiles, other=0)
        finite = tl.sum(wrong, axis=0) == 0
        k = start + tl.arange(0, COLUMNS)
        moved = tl.load(copy + k, mask=k < M, other=0.0)
        before = tl.load(center + k, mask=k < M, other=0.0)
        moved = tl.where(finite, moved, before)
        if moved_center is not None:
            tl.store(moved_center + k, moved, mask=k < M)
        tl.store(copy + k, moved, mask=k < M)
    else:
        chunk = tl.arange(0, CHUNKS)
        count = tl.sum(tl.load(counts + chunk, mask=chunk < count_chunks, other=0.0), axis=0)
        keep = tl.where(tracked == 0, 0.0, double(momentum))
        wrong = tl.full([COLUMNS], 0, tl.int32)
        for at in range(start, end, COLUMNS):
            k = at + tl.arange(0, COLUMNS)
            moved, before = _moved(sums, center, k, chunks, M, count, keep, ROWS, COLUMNS)
            wrong |= ((k < M) & ((tl.abs(moved) < float("inf")) == 0)).to(tl.int32)
            if STAGE == PARTIAL:
                tl.store(copy + k, moved, mask=k < M)
        finite = (tl.sum(wrong, axis=0) == 0) & (count > 0.0)
        if STAGE == PARTIAL:
            tl.store(wrongs + tl.program_id(0), tl.where(finite, 0, 1))
        else:
            for at in range(start, end, COLUMNS):
                k = at + tl.arange(0, COLUMNS)
                moved, before = _moved(sums, center, k, chunks, M, count, keep, ROWS, COLUMNS)
                moved = tl.where(finite, moved, before)
                if moved_center is not None:
                    tl.store(moved_center + k, moved, mask=k < M)
                tl.store(copy + k, moved, mask=k < M)
    if STAGE != PARTIAL and tl.program_id(0) == 0:
        tl.store(moved_batches, tracked + tl.where(finite & (tracked < 2**63 - 1), 1, 0))
