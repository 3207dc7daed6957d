"""With separation_focus: what lies between the matrix products, whose tiles of [rows, classes] are changed in place."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ncmi_kernels import _schema
from ncmi_kernels._schema import Table
from ncmi_kernels._triton import launches
from ncmi_kernels._triton.arguments import Batch
from ncmi_kernels._triton.checks import (
    ARITHMETIC,
    DOUBLE,
    check,
    check_batch,
    check_matrix,
    check_table,
    check_target,
    require,
)
from ncmi_kernels._triton.elements import (
    ALL_MEAN,
    CLASS_WEIGHTS,
    COEFFICIENTS,
    INVERSE_NORM,
    LARGEST_32,
    LARGEST_64,
    LOG_NORM,
    NEAR,
    OTHER,
    OWN_PRIOR,
    PRIOR,
    RECORD,
    ROW_KIND,
    SCALE,
    SHIFT,
    SHIFTED,
    SOFTMAX,
    STATS,
    WEIGHT_SUM,
    WEIGHTED_LOG_NORM,
    activate,
    checked,
    double,
    exp_minus,
    least_kind,
    load_features,
    load_rows,
    load_vector,
    near_zero,
)
from ncmi_kernels._triton.ops import operator
from ncmi_kernels._triton.tiles import HALF, bits, power_of_two, rows_of_chunk, strides_of

SMALLEST_DIVERGENCE = tl.constexpr(1.17549435e-38)  # that others are measured by


def _tile(columns: int, widest: int, elements: int) -> dict[str, Any]:
    """Of a matrix with so many columns, as kernels name it. With `elements` of 512 or more no thread has copies."""
    width = power_of_two(columns, widest)
    return {"ROWS": max(1, elements // width), "COLUMNS": width}


# ----------------------------------------------------------------------------------------------------------------------
# Factors of the products
# ----------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["classes"])
def focus_table_kernel(
    log_activation, activation, reference, norms, relative, distribution, class_level, classes, M,
    CENTROID_TO_SAMPLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`relative` and `distribution` [C, M], and `class_level` [2, C], the sums over the columns and the priors."""
    dtype: tl.constexpr = relative.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < classes
    log_norm = tl.load(norms + row * RECORD + LOG_NORM, mask=live, other=0.0)
    above_mean = log_norm - tl.load(norms + classes * RECORD + WEIGHTED_LOG_NORM)
    inverse_norm = tl.exp(-log_norm)
    level = tl.full([ROWS], 0.0, tl.float64)
    for start in range(0, M, COLUMNS):
        k = start + tl.arange(0, COLUMNS)
        mask = live[:, None] & (k < M)[None, :]
        at = (row * M)[:, None] + k[None, :]
        log = tl.load(log_activation + at, mask=mask, other=0.0).to(tl.float64)
        compared = load_vector(reference, k, k < M, ROWS, False).to(tl.float64)
        value = (log - compared) - above_mean[:, None]
        tl.store(relative + at, value.to(dtype), mask=mask)
        if CENTROID_TO_SAMPLE:
            q = tl.load(activation + at, mask=mask, other=0.0).to(tl.float64) * inverse_norm[:, None]
            q_mean = load_vector(reference + M, k, k < M, ROWS, False).to(tl.float64)
            tl.store(distribution + at, (q - q_mean).to(dtype), mask=mask)
            value *= q
        # Not of what is rounded: columns that are equal round alike.
        level += tl.sum(tl.where(mask, value, 0.0), axis=1)
    tl.store(class_level + row, level, mask=live)
    prior = tl.load(norms + row * RECORD + PRIOR, mask=live, other=0.0)
    tl.store(class_level + classes + row, prior, mask=live)


@operator
def focus_table(
    log_activation: Tensor, activation: Tensor, reference: Tensor, norms: Tensor, centroid_to_sample: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The centroids in products: relative [C, M], distribution [C or 0, M], class_level [2, C] float64."""
    check_table(log_activation, Table(log_activation, activation, reference, norms), centroid_to_sample)
    classes, columns = log_activation.shape
    relative, distribution = torch.empty_like(log_activation), torch.empty_like(activation)
    class_level = norms.new_empty((2, classes))
    tile = _tile(columns, 1024, 1024)
    if classes:
        with launches.on(log_activation):
            launches.launch(
                focus_table_kernel,
                (-(-classes // tile["ROWS"]),),
                log_activation=log_activation,
                activation=activation,
                reference=reference,
                norms=norms,
                relative=relative,
                distribution=distribution,
                class_level=class_level,
                classes=classes,
                M=columns,
                CENTROID_TO_SAMPLE=centroid_to_sample,
                **tile,
            )
    return relative, distribution, class_level


@triton.jit
def _in_product(rows, row, live):
    """Share and base of p = share (base + x): x is 2 a - 1, but 2 a of shifted rows, and a of softmax."""
    of_row = rows + row * STATS
    inverse_norm = tl.load(of_row + INVERSE_NORM, mask=live, other=0.0)
    softmax = tl.load(of_row + ROW_KIND, mask=live, other=SOFTMAX) == SOFTMAX
    shifted = tl.load(of_row + SHIFT, mask=live, other=0.0) != 0.0
    return tl.where(softmax, inverse_norm, 0.5 * inverse_norm), tl.where(softmax | shifted, 0.0, 1.0)


@triton.jit
def _relative_log_norm(rows, row, live, norms, classes):
    """log sum_k a_k less what the classes share."""
    inverse_norm = tl.load(rows + row * STATS + INVERSE_NORM, mask=live, other=1.0)
    return -tl.log(inverse_norm) - tl.load(norms + classes * RECORD + WEIGHTED_LOG_NORM)


@triton.jit
def _x_and_log(x, scale, shift, KIND: tl.constexpr, FAST: tl.constexpr):
    """The x of `_in_product`, and log a as `activate` has it."""
    if KIND == NEAR:
        in_product, log = near_zero(x * (0.5 * scale))
    else:
        value, log, _, _ = activate(x, scale, shift, KIND, FAST)
        in_product = value
        if KIND == SHIFTED:
            # As in activate_for_sums, far below zero of the rounded log.
            far = value if FAST else exp_minus(-log)
            in_product = tl.where(shift != 0.0, far, (value - 0.5) + (value - 0.5))
    return in_product, log


@triton.jit(
    do_not_specialize=["unit_stride", "column_stride", "target_stride", "ignore_index", "classes", "B"],
)
def focus_rows_kernel(
    input, target, center, reference, norms, rows, out, unit_stride, column_stride, target_stride, ignore_index,
    classes, B, M, ALIGN: tl.constexpr, CONTIGUOUS: tl.constexpr, FAST: tl.constexpr, CENTROID_TO_SAMPLE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of `out` [B, M]: x of `_in_product`, for CENTROID_TO_SAMPLE log p less what the classes share."""
    dtype: tl.constexpr = out.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = k < M
    _, live, _ = checked(target, row, target_stride, ignore_index, classes, B)
    of_row = rows + row * STATS
    scale = tl.load(of_row + SCALE, mask=live, other=0.0).to(dtype)[:, None]
    shift = tl.load(of_row + SHIFT, mask=live, other=0.0).to(dtype)[:, None]
    kind = least_kind(tl.load(of_row + ROW_KIND, mask=live, other=SOFTMAX))
    x = load_features(
        input, center, row, live, 0, k, inside, unit_stride, column_stride, dtype, ALIGN, CONTIGUOUS, False
    )
    if kind == SOFTMAX:
        in_product, log = _x_and_log(x, scale, shift, SOFTMAX, FAST)
    elif kind == NEAR:
        in_product, log = _x_and_log(x, scale, shift, NEAR, FAST)
    else:
        in_product, log = _x_and_log(x, scale, shift, SHIFTED, FAST)
    if CENTROID_TO_SAMPLE:
        log_norm = _relative_log_norm(rows, row, live, norms, classes).to(dtype)
        in_product = (log - load_vector(reference, k, inside, ROWS, False)) - log_norm[:, None]
    at = (row * M)[:, None] + k[None, :]
    tl.store(out + at, tl.where(live[:, None], in_product, 0.0), mask=(row < B)[:, None] & inside[None, :])


@operator
def focus_rows(
    input: Tensor,
    target: Tensor,
    center: Tensor | None,
    log_activation: Tensor,
    activation: Tensor,
    reference: Tensor,
    norms: Tensor,
    rows: Tensor,
    centroid_to_sample: bool,
    ignore_index: int,
) -> Tensor:
    """The rows in products, [B, M] in the arithmetic type; 0 in ignored ones."""
    check_table(input, Table(log_activation, activation, reference, norms), centroid_to_sample)
    classes = log_activation.shape[0]
    count, columns = check_batch(Batch(input, target, center, ignore_index), log_activation.dtype, classes)
    check("rows", rows, input, DOUBLE, (count, _schema.ROW_STATS))
    out = log_activation.new_empty((count, columns))
    tile = _tile(columns, 1024, 2048)
    if count:
        with launches.on(input):
            launches.launch(
                focus_rows_kernel,
                (-(-count // tile["ROWS"]), -(-columns // tile["COLUMNS"])),
                input=input,
                target=target,
                center=center,
                reference=reference,
                norms=norms,
                rows=rows,
                out=out,
                **strides_of(input),
                target_stride=target.stride(0),
                ignore_index=ignore_index,
                classes=classes,
                B=count,
                M=columns,
                FAST=input.dtype in HALF,
                CENTROID_TO_SAMPLE=centroid_to_sample,
                **tile,
            )
    return out


# ----------------------------------------------------------------------------------------------------------------------
# Products to weights
# ----------------------------------------------------------------------------------------------------------------------


@triton.jit
def _divergences(
    product, class_level, at, v, y, classes, period, level, base, share, CENTROID_TO_SAMPLE: tl.constexpr,
    SEVERAL: tl.constexpr,
):  # fmt: skip
    """Of rows from centroids v [ROWS, N]; these' priors, and which count: of other classes, with a prior. NaN stays."""
    values = load_rows(product, at, v, v < classes, False)
    levels = load_vector(class_level, v, v < classes, at.shape[0], False)
    if CENTROID_TO_SAMPLE:
        d = (level[:, None] + (levels - values.to(tl.float64))).to(values.dtype)
    else:
        d = level[:, None] - (base[:, None] * levels + share[:, None] * values.to(tl.float64))
        d = d.to(values.dtype)
    # Rounding may leave less than zero.
    d = tl.where(d < SMALLEST_DIVERGENCE, SMALLEST_DIVERGENCE, d)
    prior = load_vector(class_level + classes, v, v < classes, at.shape[0], False)
    of_class = v % period if SEVERAL else v
    return d, prior, (prior > 0.0) & (of_class[None, :] != y[:, None])


@triton.jit
def _level(rows, row, live, norms, classes, CENTROID_TO_SAMPLE: tl.constexpr):
    """What the divergences of rows have beside their products: level, base times share, share."""
    of_row = rows + row * STATS
    level = tl.load(of_row + ALL_MEAN, mask=live, other=0.0)
    log_norm = _relative_log_norm(rows, row, live, norms, classes)
    if CENTROID_TO_SAMPLE:
        # Of the row and the mean q; all_mean is by the sum of a.
        inverse_norm = tl.load(of_row + INVERSE_NORM, mask=live, other=1.0)
        level = log_norm * tl.load(norms + classes * RECORD + WEIGHT_SUM) - level / inverse_norm
        share = level
        base = level
    else:
        share, base = _in_product(rows, row, live)
        base *= share
        level -= log_norm
    return level, base, share


@triton.jit
def _nearest(
    product, class_level, at, y, classes, period, level, base, share, CENTROID_TO_SAMPLE: tl.constexpr,
    SEVERAL: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The least of the divergences of rows from the centroids of other classes that have a prior; never NaN."""
    infinity: tl.constexpr = float("inf")
    nearest = tl.full([at.shape[0]], infinity, product.dtype.element_ty)
    for start in range(0, classes, COLUMNS):
        v = start + tl.arange(0, COLUMNS)
        d, _, other = _divergences(
            product, class_level, at, v, y, classes, period, level, base, share, CENTROID_TO_SAMPLE, SEVERAL
        )
        nearest = tl.minimum(nearest, tl.min(tl.where(other, d, infinity), axis=1))
    return nearest


@triton.jit(do_not_specialize=["target_stride", "ignore_index", "period", "B"])
def focus_nearest_kernel(
    product, nearest, rows, target, norms, class_level, target_stride, ignore_index, classes, period, B,
    CENTROID_TO_SAMPLE: tl.constexpr, SEVERAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`nearest` [B]: the least of the divergences of the rows of `product` [B, C] from centroids of other classes."""
    dtype: tl.constexpr = product.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    y, live, _ = checked(target, row, target_stride, ignore_index, period, B)
    level, base, share = _level(rows, row, live, norms, classes, CENTROID_TO_SAMPLE)
    at = tl.minimum(row, B - 1) * classes  # rows that do not count are read as the last one
    least = _nearest(
        product, class_level, at, y, classes, period, level, base, share, CENTROID_TO_SAMPLE, SEVERAL, COLUMNS
    )
    largest: tl.constexpr = LARGEST_64 if dtype == tl.float64 else LARGEST_32
    least = tl.minimum(least, largest).to(tl.float64)
    tl.store(nearest + row, tl.where(live, least, 0.0), mask=row < B)


@triton.jit(do_not_specialize=["focus", "target_stride", "ignore_index", "period", "B"])
def focus_weights_kernel(
    product, separation, rows, target, norms, class_level, shared, focus, target_stride, ignore_index, classes, period,
    B, CENTROID_TO_SAMPLE: tl.constexpr, SEVERAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Rows of `product` [B, C] to weights in place, their `separation` [B], and all_mean and own_prior of `rows`.

    `classes` are centroids; with SEVERAL a class has those whose number is that of the class modulo `period`. With
    `shared` [3, B] they are a part of all, and what is left is as the operator says.
    """
    dtype: tl.constexpr = product.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    y, live, _ = checked(target, row, target_stride, ignore_index, period, B)
    of_row = rows + row * STATS
    level, base, share = _level(rows, row, live, norms, classes, CENTROID_TO_SAMPLE)
    # Formed again for each pass: a row is read from the cache. Rows that do not count are read as the last one.
    at = tl.minimum(row, B - 1) * classes
    if shared is not None:
        nearest = tl.load(shared + row, mask=live, other=1.0).to(dtype)
    else:
        nearest = _nearest(
            product, class_level, at, y, classes, period, level, base, share, CENTROID_TO_SAMPLE, SEVERAL, COLUMNS
        )
    by = double(focus) / nearest.to(tl.float64)
    largest: tl.constexpr = LARGEST_64 if dtype == tl.float64 else LARGEST_32
    by_distance = tl.minimum(by, largest).to(dtype)
    total = tl.full([ROWS], 0.0, tl.float64)
    weighted = tl.full([ROWS], 0.0, tl.float64)
    for start in range(0, classes, COLUMNS):
        v = start + tl.arange(0, COLUMNS)
        d, prior, other = _divergences(
            product, class_level, at, v, y, classes, period, level, base, share, CENTROID_TO_SAMPLE, SEVERAL
        )
        farther = d - nearest[:, None]
        e = tl.where(other, prior * exp_minus(by_distance[:, None] * farther).to(tl.float64), 0.0)
        total += tl.sum(e, axis=1)
        weighted += tl.sum(tl.where(other, e * farther.to(tl.float64), 0.0), axis=1)
    inverse = 1.0 / total
    mean = nearest.to(tl.float64) + weighted * inverse
    # No other class has a prior; with NaN in the place of D `weighted` is NaN.
    mean = tl.where((total == 0.0) & (weighted == 0.0), 0.0, mean)
    own_prior = tl.full([ROWS], 0.0, tl.float64)
    for first in range(0, classes, period):
        own_prior += tl.load(class_level + classes + first + y)
    if shared is not None:
        inverse = tl.full([ROWS], 1.0, tl.float64)
    # Everything has been read that is now overwritten.
    tl.debug_barrier()
    for start in range(0, classes, COLUMNS):
        v = start + tl.arange(0, COLUMNS)
        d, prior, other = _divergences(
            product, class_level, at, v, y, classes, period, level, base, share, CENTROID_TO_SAMPLE, SEVERAL
        )
        e = exp_minus(by_distance[:, None] * (d - nearest[:, None])).to(tl.float64)
        weight = (e * (prior * inverse[:, None])).to(dtype)
        mask = (row < B)[:, None] & (v < classes)[None, :]
        tl.store(product + at[:, None] + v[None, :], tl.where(other & live[:, None], weight, 0.0), mask=mask)
    if shared is not None:
        tl.store(shared + B + row, tl.where(live, total, 0.0), mask=row < B)
        tl.store(shared + 2 * B + row, tl.where(live, weighted, 0.0), mask=row < B)
    else:
        tl.store(of_row + ALL_MEAN, mean + _relative_log_norm(rows, row, live, norms, classes), mask=live)
        tl.store(of_row + OWN_PRIOR, own_prior, mask=live)
        mean *= 1.0 - own_prior
        tl.store(separation + row, tl.where(live, mean, 0.0), mask=row < B)


class _Products(NamedTuple):
    """What both operators take, under the kernels' names for it; and its launch."""

    product: Tensor  # [B, C]
    rows: Tensor
    target: Tensor
    norms: Tensor
    class_level: Tensor
    centroid_to_sample: bool
    ignore_index: int
    centroids_per_class: int

    def launch(self, kernel: Any, **more: Any) -> None:
        """Check what is given, and launch the kernel for all rows."""
        product, rows, target, norms, class_level, centroid_to_sample, ignore_index, own = self
        count, classes = check_matrix("product", product, ARITHMETIC)
        check("product", product, product, ARITHMETIC, (count, classes))
        check("rows", rows, product, DOUBLE, (count, _schema.ROW_STATS))
        check("norms", norms, product, DOUBLE, (classes + 1, _schema.CLASS_STATS))
        check("class_level", class_level, product, DOUBLE, (2, classes))
        require(own > 0 and classes % own == 0, "centroids_per_class does not divide the number of centroids")
        check_target(target, product, count, classes // own, ignore_index)
        tile = _tile(classes, 2048, 512)
        if not count:
            return
        with launches.on(product):
            launches.launch(
                kernel,
                (-(-count // tile["ROWS"]),),
                product=product,
                rows=rows,
                target=target,
                norms=norms,
                class_level=class_level,
                target_stride=target.stride(0),
                ignore_index=ignore_index,
                classes=classes,
                period=classes // own,
                B=count,
                CENTROID_TO_SAMPLE=centroid_to_sample,
                SEVERAL=own > 1,
                **tile,
                **more,
                warps=max(4, tile["COLUMNS"] // 128),
            )


@operator
def focus_nearest(
    product: Tensor,
    rows: Tensor,
    target: Tensor,
    norms: Tensor,
    class_level: Tensor,
    centroid_to_sample: bool,
    ignore_index: int,
    centroids_per_class: int = 1,
) -> Tensor:
    """[B] float64: the least divergence of each row of `product` [B, C] from a centroid of another class."""
    nearest = rows.new_empty(product.shape[:1])
    of = _Products(product, rows, target, norms, class_level, centroid_to_sample, ignore_index, centroids_per_class)
    of.launch(focus_nearest_kernel, nearest=nearest)
    return nearest


@operator
def focus_weights_(
    product: Tensor,
    separation: Tensor,
    rows: Tensor,
    target: Tensor,
    norms: Tensor,
    class_level: Tensor,
    focus: float,
    centroid_to_sample: bool,
    ignore_index: int,
    centroids_per_class: int = 1,
    shared: Tensor | None = None,
) -> None:
    """`product` [B, C] to weights, in place; the `separation` [B] by them, all_mean and own_prior of `rows` [B, 8]."""
    count = product.shape[:1]
    check("separation", separation, product, DOUBLE, tuple(count))
    if shared is not None:
        check("shared", shared, product, DOUBLE, (3, *count))
    of = _Products(product, rows, target, norms, class_level, centroid_to_sample, ignore_index, centroids_per_class)
    of.launch(focus_weights_kernel, separation=separation, shared=shared, focus=bits(focus))


# ----------------------------------------------------------------------------------------------------------------------
# Weights to what the centroids' gradient takes
# ----------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["target_stride", "ignore_index", "B", "chunk_rows"])
def focus_sums_kernel(
    weights, sums, rows, coefficients, target, target_stride, ignore_index, classes, B, chunk_rows,
    CENTROID_TO_SAMPLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of a chunk of rows of `weights` [B, C]: what they are multiplied by, and their `sums` [chunks, C, 2]."""
    dtype: tl.constexpr = weights.dtype.element_ty
    chunk = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    others = tl.full([ROWS, COLUMNS], 0.0, tl.float64)
    bases = tl.full([ROWS, COLUMNS], 0.0, tl.float64)
    first = chunk * chunk_rows
    last = tl.minimum(first + chunk_rows, B)
    for begin in range(0, chunk_rows, ROWS):
        row = first + begin + tl.arange(0, ROWS)
        _, live, _ = checked(target, row, target_stride, ignore_index, classes, last)
        other = tl.load(coefficients + row * COEFFICIENTS + OTHER, mask=live, other=0.0)
        at = (row * classes)[:, None] + v[None, :]
        mask = live[:, None] & (v < classes)[None, :]
        weight = tl.load(weights + at, mask=mask, other=0.0)
        others += other[:, None] * weight.to(tl.float64)
        by = other
        if not CENTROID_TO_SAMPLE:
            share, base = _in_product(rows, row, live)
            by = other * share
            bases += (by * base)[:, None] * weight.to(tl.float64)
        tl.store(weights + at, weight * by.to(dtype)[:, None], mask=mask)
    of_class = sums + (chunk * classes + v) * CLASS_WEIGHTS
    tl.store(of_class, tl.sum(others, axis=0), mask=v < classes)
    tl.store(of_class + 1, tl.sum(bases, axis=0), mask=v < classes)


@operator
def focus_sums_(
    weights: Tensor,
    class_weights: Tensor,
    rows: Tensor,
    coefficients: Tensor,
    target: Tensor,
    centroid_to_sample: bool,
    ignore_index: int,
) -> None:
    """`weights` [B, C] times other and share of their rows, in place; added to `class_weights` [C, 2], their sums."""
    count, classes = check_matrix("weights", weights, ARITHMETIC)
    check("weights", weights, weights, ARITHMETIC, (count, classes))
    check("class_weights", class_weights, weights, DOUBLE, (classes, _schema.CLASS_WEIGHTS))
    check("rows", rows, weights, DOUBLE, (count, _schema.ROW_STATS))
    check("coefficients", coefficients, weights, DOUBLE, (count, _schema.COEFFICIENTS))
    check_target(target, weights, count, classes, ignore_index)
    chunk_rows = rows_of_chunk(count)
    chunks = -(-count // chunk_rows)
    tile = _tile(classes, 128, 1024)
    if count:
        with launches.on(weights):
            sums = class_weights.new_empty((chunks, *class_weights.shape))
            launches.launch(
                focus_sums_kernel,
                (chunks, -(-classes // tile["COLUMNS"])),
                weights=weights,
                sums=sums,
                rows=rows,
                coefficients=coefficients,
                target=target,
                target_stride=target.stride(0),
                ignore_index=ignore_index,
                classes=classes,
                B=count,
                chunk_rows=chunk_rows,
                CENTROID_TO_SAMPLE=centroid_to_sample,
                **tile,
            )
            class_weights += sums.sum(dim=0)
