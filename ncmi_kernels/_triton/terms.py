"""The terms of the rows of a batch: the sums along each that they are made of."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ncmi_kernels import _schema
from ncmi_kernels._options import Features
from ncmi_kernels._schema import Table
from ncmi_kernels._triton import launches
from ncmi_kernels._triton.arguments import Batch, Reduced, Reducing, RowTerms
from ncmi_kernels._triton.checks import check_batch, check_table
from ncmi_kernels._triton.elements import (
    ALL_MEAN,
    INVERSE_LENGTH,
    INVERSE_NORM,
    LOG_NORM,
    NEAR,
    NSF,
    OWN_MEAN,
    OWN_PRIOR,
    PRIOR,
    RECORD,
    ROW_KIND,
    SCALE,
    SHIFT,
    SHIFTED,
    SHIFTED_FROM,
    SMALLEST_LENGTH,
    SOFTMAX,
    STATS,
    activate_for_sums,
    checked,
    coefficients_of,
    double,
    load_features,
    load_rows,
    load_vector,
    near_zero,
    neighbours,
    ratio_of,
    store_coefficients,
    sums3,
    sums4,
    terms_of,
)
from ncmi_kernels._triton.input_grad import grad_rows
from ncmi_kernels._triton.ops import operator
from ncmi_kernels._triton.reduce import TERMS, finish
from ncmi_kernels._triton.tiles import HALF, LARGEST_CHUNKS, bits, row_tile, strides_of

RESCUE_COLUMNS = 128  # at once, where a row is read again because its squares overflowed


@triton.jit
def _load_centroids(
    log_activation, activation, reference, y, at, k, M: tl.constexpr, CENTROID_TO_SAMPLE: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Columns at + k of what rows are compared with: log a_y, reference, of centroid_to_sample a_y and the mean q."""
    # Added to pointers `at` is part of the instruction; added to k it would take a register.
    inside = k < M - at
    own_log = load_rows(log_activation + at, y * M, k, inside, EVEN)
    compared = load_vector(reference + at, k, inside, y.shape[0], EVEN)
    if CENTROID_TO_SAMPLE:
        own_activation = load_rows(activation + at, y * M, k, inside, EVEN)
        q_mean = load_vector(reference + M + at, k, inside, y.shape[0], EVEN)
    else:
        own_activation = own_log
        q_mean = compared
    return own_log, compared, own_activation, q_mean


@triton.jit
def _add_stretch(
    norm, own, total, own_cross, x, scale, shift, own_log, own_activation, reference, q_mean, inside,
    KIND: tl.constexpr, FAST: tl.constexpr, CENTROID_TO_SAMPLE: tl.constexpr, EVEN: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Adds a stretch of rows, element by element: of NEAR twice a, and of `norm` 2 a - 1, small with a small rounding.

    `total` of NEAR is without the sum of the reference: terms_of subtracts it.

    Past the last column f = 0 and the centroids' numbers are 0; log 2 sigma(0) is 0 as well.
    """
    if KIND == NEAR:
        excess, log = near_zero(x * (0.5 * scale)[:, None])
        if not CENTROID_TO_SAMPLE:
            total -= excess * reference
        norm += excess
        weight = 1.0 + excess
        # A reference of nearly one number in all columns, taken from logarithms of one size, would round alike in all.
        d_all = log
    else:
        if not EVEN:
            x = tl.where(inside[None, :], x, shift[:, None])
        weight, log = activate_for_sums(x, scale[:, None], shift[:, None], KIND, FAST)
        if not EVEN:
            weight = tl.where(inside[None, :], weight, 0.0)
        norm += neighbours(weight, VEC)
        d_all = log - reference
    d_own = log - own_log
    own += weight * d_own
    if CENTROID_TO_SAMPLE:
        total += q_mean * d_all
        own_cross += own_activation * d_own
    else:
        total += weight * d_all
    return norm, own, total, own_cross


@triton.jit
def _row_sums(
    norm, own, total, own_cross, M: tl.constexpr, KIND: tl.constexpr, CENTROID_TO_SAMPLE: tl.constexpr,
    VEC: tl.constexpr,
):  # fmt: skip
    """Of whole rows, float64: sum a, sum a (log a - log a_y), sum a (log a - reference) or sum q_mean (log a -
    reference), sum a_y (log a - log a_y).
    """  # noqa: D205
    half: tl.constexpr = 0.5 if KIND == NEAR else 1.0
    if KIND != NEAR:
        # Logarithms of NEAR are small and of either sign. Those of here may all be about one number.
        norm_sum = tl.sum(norm, axis=1)
        own = neighbours(own, VEC)
        total = neighbours(total, VEC)
        own_cross = neighbours(own_cross, VEC) if CENTROID_TO_SAMPLE else own
        norm = own
    if CENTROID_TO_SAMPLE:
        excess, own_sum, total_sum, cross_sum = sums4(norm, own, total, own_cross)
        cross_sum = cross_sum.to(tl.float64)
        total_sum = total_sum.to(tl.float64)
    else:
        excess, own_sum, total_sum = sums3(norm, own, total)
        total_sum = half * total_sum.to(tl.float64)
        cross_sum = total_sum
    if KIND == NEAR:
        norm_sum = 0.5 * M + 0.5 * excess.to(tl.float64)
    return norm_sum, half * own_sum.to(tl.float64), total_sum, cross_sum


@triton.jit
def _sum_rows(
    xs, input, center, log_activation, activation, reference, row, live, y, scale, shift, unit_stride, column_stride,
    M: tl.constexpr, ALIGN: tl.constexpr, CONTIGUOUS: tl.constexpr, KIND: tl.constexpr, FAST: tl.constexpr,
    CENTROID_TO_SAMPLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRETCHES: tl.constexpr,
    VEC: tl.constexpr,
):  # fmt: skip
    """`_row_sums` of whole rows, from `xs` where they are held on chip."""
    dtype: tl.constexpr = log_activation.dtype.element_ty
    EVEN: tl.constexpr = M % COLUMNS == 0
    k = tl.arange(0, COLUMNS)
    own = tl.full([ROWS, COLUMNS], 0.0, dtype)
    total = tl.full([ROWS, COLUMNS], 0.0, dtype)
    own_cross = tl.full([ROWS, COLUMNS], 0.0, dtype)
    norm = tl.full([ROWS, COLUMNS], 0.0, dtype) if KIND == NEAR else tl.full([ROWS, COLUMNS // VEC], 0.0, tl.float64)
    for j in tl.static_range(STRETCHES):
        inside = k < M - j * COLUMNS
        own_log, compared, own_activation, q_mean = _load_centroids(
            log_activation, activation, reference, y, j * COLUMNS, k, M, CENTROID_TO_SAMPLE, (j + 1) * COLUMNS <= M
        )
        norm, own, total, own_cross = _add_stretch(
            norm, own, total, own_cross, xs[j], scale, shift, own_log, own_activation, compared, q_mean, inside, KIND,
            FAST, CENTROID_TO_SAMPLE, (j + 1) * COLUMNS <= M, VEC,
        )  # fmt: skip
    if STRETCHES == 0:
        for start in range(0, M, COLUMNS):
            inside = k < M - start
            x = load_features(
                input, center, row, live, start, k, inside, unit_stride, column_stride, dtype, ALIGN, CONTIGUOUS, EVEN
            )
            own_log, compared, own_activation, q_mean = _load_centroids(
                log_activation, activation, reference, y, start, k, M, CENTROID_TO_SAMPLE, EVEN
            )
            norm, own, total, own_cross = _add_stretch(
                norm, own, total, own_cross, x, scale, shift, own_log, own_activation, compared, q_mean, inside, KIND,
                FAST, CENTROID_TO_SAMPLE, EVEN, VEC,
            )  # fmt: skip
    return _row_sums(norm, own, total, own_cross, M, KIND, CENTROID_TO_SAMPLE, VEC)


@triton.jit(
    do_not_specialize=[
        "unit_stride",
        "column_stride",
        "target_stride",
        "inverse_temperature_bits",
        "eps",
        "sharpness",
        "ignore_index",
        "classes",
        "B",
        "columns",
        "chunks",
    ]
)
def terms_kernel(
    input, target, center, log_activation, activation, reference, norms, weight, weight_sums, rows, coefficients,
    sums, grad, unit_stride, column_stride, target_stride, inverse_temperature_bits, eps, sharpness, ignore_index,
    classes, B, columns, chunks, M: tl.constexpr, ALIGN: tl.constexpr, CONTIGUOUS: tl.constexpr, L2: tl.constexpr,
    KIND: tl.constexpr, MAY_SHIFT: tl.constexpr, FAST: tl.constexpr, RESCUE: tl.constexpr,
    CENTROID_TO_SAMPLE: tl.constexpr, WITH_GRAD: tl.constexpr, SOFT: tl.constexpr, NORMALIZED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRETCHES: tl.constexpr, VEC: tl.constexpr, CHUNKS: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """One reading of ROWS rows: scale, length and shift to `rows` [B, 8], what `_row_sums` sums to `sums` [4, B].

    WITH_GRAD: all of `rows`, the terms A and G to `sums`, and of the sum over rows of w times the ratio `coefficients`
    [B, 4] and `grad` [B, M], d / d input. w is the class weight, with NORMALIZED over the sum of all, which
    `weight_sums` [chunks] holds.

    A row is STRETCHES times COLUMNS, all on chip, or with STRETCHES = 0 read in a loop, for every pass over it.
    """
    dtype: tl.constexpr = log_activation.dtype.element_ty
    SINGLE: tl.constexpr = STRETCHES > 0
    EVEN: tl.constexpr = M % COLUMNS == 0
    LARGEST: tl.constexpr = MAY_SHIFT or KIND == SOFTMAX
    # Of features whose lengths nobody knows, |f| <= 1 is found out row by row, where that takes no reading of its own.
    LEAST: tl.constexpr = SHIFTED if MAY_SHIFT else KIND
    MOST: tl.constexpr = NEAR if MAY_SHIFT and SINGLE and dtype == tl.float32 else KIND
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    y, live, _ = checked(target, row, target_stride, ignore_index, classes, B)

    # 1. x = z - c, and what its scale and shift need of the whole row.
    infinity: tl.constexpr = float("inf")
    k = tl.arange(0, COLUMNS)
    squares = tl.full([ROWS, COLUMNS], 0.0, dtype)
    largest = tl.full([ROWS, COLUMNS], -infinity, dtype)
    sizes = squares
    xs = ()
    for j in tl.static_range(STRETCHES):
        inside = k < M - j * COLUMNS
        x = load_features(
            input, center, row, live, j * COLUMNS, k, inside, unit_stride, column_stride, dtype, ALIGN, CONTIGUOUS,
            (j + 1) * COLUMNS <= M,
        )  # fmt: skip
        if L2:
            squares += x * x
        if LARGEST:
            largest = tl.maximum(largest, x if (j + 1) * COLUMNS <= M else tl.where(inside[None, :], x, -infinity))
            sizes = tl.maximum(sizes, tl.abs(x))
        xs = xs + (x,)
    if not SINGLE and (L2 or LARGEST):
        for start in range(0, M, COLUMNS):
            inside = k < M - start
            x = load_features(
                input, center, row, live, start, k, inside, unit_stride, column_stride, dtype, ALIGN, CONTIGUOUS, EVEN
            )
            if L2:
                squares += x * x
            if LARGEST:
                largest = tl.maximum(largest, x if EVEN else tl.where(inside[None, :], x, -infinity))
                sizes = tl.maximum(sizes, tl.abs(x))

    # 2. f = x scale, and what log a is relative to.
    inverse_temperature = double(inverse_temperature_bits).to(dtype)
    scale = tl.full([ROWS], 0.0, dtype) + inverse_temperature
    inverse_length = tl.full([ROWS], 0.0, dtype)
    if L2:
        length2 = tl.sum(squares, axis=1)
        prescale = tl.full([ROWS], 1.0, dtype)
        if RESCUE:
            # The squares of huge elements overflow where their length does not. Rare: then the rows are read again, in
            # stretches that cost little code. A trip count that the compiler cannot know keeps it from unrolling them,
            # a barrier from unrolling them by four; in a program of one warp that would double all the code after it.
            overflowed = length2 == infinity
            end = tl.sum(overflowed.to(tl.int32), axis=0) * columns
            tiny: tl.constexpr = 2.0**-520 if dtype == tl.float64 else 2.0**-70
            small_squares = tl.full([ROWS, RESCUE], 0.0, dtype)
            for start in range(0, end, RESCUE):
                column = tl.arange(0, RESCUE)
                small = tiny * load_features(
                    input, center, row, live, start, column, column < M - start, unit_stride, column_stride, dtype,
                    ALIGN, CONTIGUOUS, False,
                )  # fmt: skip
                small_squares += small * small
                if ROWS == 1:
                    tl.debug_barrier()
            prescale = tl.where(overflowed, tiny, prescale)
            length2 = tl.where(overflowed, tl.sum(small_squares, axis=1), length2)
        floored = length2 < SMALLEST_LENGTH * SMALLEST_LENGTH
        inverse = tl.rsqrt(length2)
        if dtype == tl.float64:
            inverse = 1.0 / tl.sqrt(length2)
        else:
            inverse += 0.5 * inverse * (1.0 - (length2 * inverse) * inverse)
        # No rescued row is floored.
        inverse = tl.where(floored, 1.0 / SMALLEST_LENGTH, inverse * prescale)
        scale = inverse_temperature * inverse
        inverse_length = tl.where(floored, 0.0, inverse)
    shift = tl.full([ROWS], 0.0, dtype)
    if LARGEST:
        # An infinite element would otherwise be hidden from the loss: as far below the others as a finite one can be.
        reach = tl.max(sizes, axis=1)
        scale = tl.where(reach == infinity, float("nan"), scale)
        shift = tl.max(largest, axis=1)
    kind = tl.full([], KIND, tl.int32)
    if MAY_SHIFT:
        shift = tl.where(shift * scale <= SHIFTED_FROM, shift, 0.0)
        # As NSF finite elements whose f are not would be taken for infinite ones.
        # A row with NaN is of the kind that others are: it must not change their bits.
        row_kind = tl.where((shift != 0.0) | (reach * scale == infinity), SHIFTED, NSF)
        if MOST == NEAR:
            row_kind = tl.where(reach * scale <= 1.0, NEAR, row_kind)
        kind = tl.min(tl.where(live, row_kind, MOST), axis=0)

    # 3. The sums against the own centroid and against all of them.
    zero = tl.full([ROWS], 0.0, tl.float64)
    norm = zero
    own = zero
    total = zero
    own_cross = zero
    for AS in tl.static_range(LEAST, MOST + 1):
        if kind == AS:
            norm, own, total, own_cross = _sum_rows(
                xs, input, center, log_activation, activation, reference, row, live, y, scale, shift, unit_stride,
                column_stride, M, ALIGN, CONTIGUOUS, AS, FAST, CENTROID_TO_SAMPLE, ROWS, COLUMNS, STRETCHES, VEC,
            )  # fmt: skip

    written = row < B
    of_row = rows + row * STATS
    tl.store(of_row + SCALE, tl.where(live, scale.to(tl.float64), 0.0), mask=written)
    tl.store(of_row + INVERSE_LENGTH, tl.where(live, inverse_length.to(tl.float64), 0.0), mask=written)
    tl.store(of_row + ROW_KIND, zero + kind, mask=written)
    tl.store(of_row + SHIFT, tl.where(live, shift.to(tl.float64), 0.0), mask=written)
    if not WITH_GRAD:
        tl.store(sums + row, norm, mask=written)
        tl.store(sums + B + row, own, mask=written)
        tl.store(sums + 2 * B.to(tl.int64) + row, total, mask=written)
        if CENTROID_TO_SAMPLE:
            tl.store(sums + 3 * B.to(tl.int64) + row, own_cross, mask=written)
    else:
        # 4. The loss of the row, and its gradient while x is here.
        own_log_norm = tl.load(norms + y * RECORD + LOG_NORM)
        own_prior = tl.load(norms + y * RECORD + PRIOR)
        concentration, separation, inverse_norm, own_mean, all_mean = terms_of(
            kind, norm, own, total, own_cross, own_log_norm, own_prior, norms, classes, CENTROID_TO_SAMPLE
        )
        factor = tl.load(weight + y).to(tl.float64) if weight is not None else zero + 1.0
        if NORMALIZED:
            chunk = tl.arange(0, CHUNKS)
            factor = factor / tl.sum(tl.load(weight_sums + chunk, mask=chunk < chunks, other=0.0), axis=0)
        _, by_concentration, by_separation = ratio_of(concentration, separation, double(eps), double(sharpness), SOFT)
        made = coefficients_of(
            own_mean, all_mean, own_prior, factor * by_concentration, factor * by_separation, CENTROID_TO_SAMPLE, False
        )  # fmt: skip
        store_coefficients(coefficients, row, B, live, made)
        tl.store(sums + row, concentration, mask=written)
        tl.store(sums + B + row, separation, mask=written)
        tl.store(of_row + INVERSE_NORM, tl.where(live, inverse_norm, 0.0), mask=written)
        tl.store(of_row + OWN_MEAN, tl.where(live, own_mean, 0.0), mask=written)
        tl.store(of_row + ALL_MEAN, tl.where(live, all_mean, 0.0), mask=written)
        tl.store(of_row + OWN_PRIOR, tl.where(live, own_prior, 0.0), mask=written)
        inverse_length = tl.where(live, inverse_length, 0.0)
        # The same formulas as a backward pass takes, for the same bits: that has no branch for NSF.
        if KIND == NSF:
            kind = tl.where(kind == NEAR, NEAR, SHIFTED)
        for AS in tl.static_range(SHIFTED if KIND == NSF else KIND, MOST + 1):
            if AS != NSF and kind == AS:
                grad_rows(
                    xs, input, center, log_activation, activation, reference, None, None, grad, row, live, y, B,
                    own_log_norm, scale.to(tl.float64), inverse_length.to(tl.float64), shift.to(tl.float64),
                    inverse_norm, made, unit_stride, column_stride, M, ALIGN, CONTIGUOUS, AS, FAST, CENTROID_TO_SAMPLE,
                    ROWS, COLUMNS, STRETCHES, KEEP,
                )  # fmt: skip


def launch_terms(
    batch: Batch,
    table: Table,
    features: Features,
    reducing: Reducing | None = None,
    weight_sums: Tensor | None = None,
    coefficients: Tensor | None = None,
    grad: Tensor | None = None,
) -> RowTerms:
    """The rows' statistics and sums, as terms_kernel leaves them.

    With `grad` [B, M], terms in the place of sums, and the gradient of the loss that `reducing` tells of in the same
    pass, with its `coefficients` [B, 4].
    """
    input, target, center, ignore_index = batch
    log_activation, activation, reference, norms = table
    temperature, l2_normalize, softmax, centroid_to_sample = features
    rows, columns = input.shape
    stats = norms.new_empty((rows, _schema.ROW_STATS))
    sums = norms.new_empty((4, rows))
    of_rows = RowTerms(stats, sums, grad is not None)
    if rows == 0:
        return of_rows
    wide = log_activation.dtype is torch.float64
    # Of a vector of length one over the temperature: |f| <= 1 / temperature.
    reach = 1.0 / temperature if l2_normalize else float("inf")
    kind = SOFTMAX if softmax else NEAR if reach <= 1.0 and not wide else NSF
    dtype = log_activation.dtype if wide else input.dtype
    tile = row_tile(columns, dtype, grad is not None, centroid_to_sample, kind == NEAR)
    launches.launch(
        terms_kernel,
        (-(-rows // tile.rows),),
        input=input,
        target=target,
        center=center,
        log_activation=log_activation,
        activation=activation,
        reference=reference,
        norms=norms,
        weight=None if reducing is None else reducing.weight,
        weight_sums=weight_sums,
        rows=stats,
        coefficients=coefficients,
        sums=sums,
        grad=grad,
        **strides_of(input),
        target_stride=target.stride(0),
        inverse_temperature_bits=bits(1.0 / temperature),
        eps=0 if reducing is None else bits(reducing.eps),
        sharpness=0 if reducing is None else bits(reducing.sharpness),
        ignore_index=ignore_index,
        classes=log_activation.shape[0],
        B=rows,
        columns=columns,
        chunks=0 if weight_sums is None else weight_sums.shape[0],
        M=columns,
        L2=l2_normalize,
        KIND=kind,
        # Every f under -2 takes a length of twice the square root of M; a little less, for rounding.
        MAY_SHIFT=kind == NSF and reach > 1.99 * columns**0.5,
        FAST=input.dtype in HALF,
        RESCUE=min(RESCUE_COLUMNS, tile.columns) if l2_normalize and input.dtype is not torch.float16 else 0,
        CENTROID_TO_SAMPLE=centroid_to_sample,
        WITH_GRAD=grad is not None,
        SOFT=reducing is not None and reducing.sharpness > 0,
        NORMALIZED=weight_sums is not None,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        STRETCHES=tile.stretches,
        VEC=tile.vec,
        CHUNKS=2 * LARGEST_CHUNKS,  # not RESCUE_COLUMNS: an index of both would be kept in between, and spill
        KEEP=tile.keep,
        warps=tile.warps,
    )
    return of_rows


@operator
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
    """Concentration and separation [2, B], and the rows' statistics [B, 8], float64."""
    batch = Batch(input, target, center, ignore_index)
    table = Table(log_activation, activation, reference, norms)
    features = Features(temperature, l2_normalize, softmax, centroid_to_sample)
    check_table(input, table, centroid_to_sample)
    rows, _ = check_batch(batch, log_activation.dtype, log_activation.shape[0])
    with launches.on(input):
        result = norms.new_empty((2, rows))
        of_rows = launch_terms(batch, table, features)
        no_loss = Reducing(None, False, TERMS, 0.0, 0.0, centroid_to_sample)
        finish(target, ignore_index, norms, of_rows, no_loss, Reduced(result))
    return result, of_rows.stats
