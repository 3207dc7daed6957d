"""d loss / d input, by row of the batch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ncmi_kernels._schema import Table
from ncmi_kernels._triton import launches
from ncmi_kernels._triton.arguments import Batch, Rows
from ncmi_kernels._triton.checks import check, check_batch, check_rows, check_table, require
from ncmi_kernels._triton.elements import (
    INVERSE_LENGTH,
    INVERSE_NORM,
    LOG_NORM,
    NEAR,
    RECORD,
    ROW_KIND,
    SCALE,
    SHIFT,
    SHIFTED,
    SOFTMAX,
    STATS,
    activate,
    checked,
    least_kind,
    load_coefficients,
    load_features,
    load_rows,
    load_vector,
    opaque,
    rounded,
    share_of,
)
from ncmi_kernels._triton.ops import operator
from ncmi_kernels._triton.tiles import HALF, row_tile, strides_of


@triton.jit
def _grad_factors(
    scale, shift, inverse_norm, coefficients, own_log_norm, dtype: tl.constexpr, KIND: tl.constexpr,
    CENTROID_TO_SAMPLE: tl.constexpr,
):  # fmt: skip
    """What `_grad_stretch` multiplies by, formed in double: numbers [ROWS, 1] of `dtype`."""
    own, other, share, constant = coefficients
    inverse_norm = share_of(inverse_norm, shift, KIND)
    if CENTROID_TO_SAMPLE:
        # Rounding 1 / S moves all of p by a share of it, which is much beside p - q: the constant takes it back.
        rounded_norm = inverse_norm.to(dtype)
        moved = 1.0 - inverse_norm / rounded_norm.to(tl.float64)
        return (
            rounded_norm[:, None],
            (scale * own).to(dtype)[:, None],
            (scale * (constant + share + other * moved)).to(dtype)[:, None],
            (scale * other).to(dtype)[:, None],
            (scale * share * tl.exp(-own_log_norm)).to(dtype)[:, None],
        )
    else:
        # Near a minimum own + other is small beside either.
        factor = scale * inverse_norm
        return (
            (factor * (own + other)).to(dtype)[:, None],
            (factor * own).to(dtype)[:, None],
            (factor * constant).to(dtype)[:, None],
        )


@triton.jit
def _grad_stretch(
    x, scale, shift, factors, log_activation, activation, reference, row_reference, row_own, row, y, at, k,
    M: tl.constexpr, KIND: tl.constexpr, FAST: tl.constexpr, CENTROID_TO_SAMPLE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """d loss / d z of columns at + k, but for what the chain rule of the length takes away; 0 past the last column."""
    # Added to pointers `at` is part of the instruction; added to k it would take a register.
    inside = k < M - at
    if row_own is not None:
        own_log = load_rows(row_own + at, row * M, k, inside, EVEN)
    else:
        own_log = load_rows(log_activation + at, y * M, k, inside, EVEN)
    if row_reference is not None:
        compared = load_rows(row_reference + at, row * M, k, inside, EVEN)
    else:
        compared = load_vector(reference + (M if CENTROID_TO_SAMPLE else 0) + at, k, inside, y.shape[0], EVEN)
    scale = scale.to(x.dtype)[:, None]
    shift = shift.to(x.dtype)[:, None]
    if not EVEN:
        x = tl.where(inside[None, :], x, shift)
    value, log, slope, value_slope = activate(x, scale, shift, KIND, FAST)
    if CENTROID_TO_SAMPLE:
        # (1 - sigma) {p [own (log a - log a_y) - constant - share] + other (p - q) + share q_y}
        inverse_norm, own, constant, other, share = factors
        own_activation = load_rows(activation + at, y * M, k, inside, EVEN)
        p = inverse_norm * value
        above = tl.fma(inverse_norm, value, -compared)
        grad = slope * (p * (own * (log - own_log) - constant) + other * above + share * own_activation)
    else:
        # (1 - sigma) p [own (log a - log a_y) + other (log a - reference) - constant], with log a - log a_y as
        # (log a - reference) + (reference - log a_y).
        own_and_other, own, constant = factors
        grad = value_slope * (own_and_other * (log - compared) + (own * (compared - own_log) - constant))
    if not EVEN:
        grad = tl.where(inside[None, :], grad, 0.0)
    return grad


@triton.jit
def grad_rows(
    xs, input, center, log_activation, activation, reference, row_reference, row_own, grad, row, live, y, B,
    own_log_norm, scale, inverse_length, shift, inverse_norm, coefficients, unit_stride, column_stride, M: tl.constexpr,
    ALIGN: tl.constexpr, CONTIGUOUS: tl.constexpr, KIND: tl.constexpr, FAST: tl.constexpr,
    CENTROID_TO_SAMPLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRETCHES: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """Write d loss / d z of whole rows, from `xs` where they are held on chip; 0 for rows that do not count.

    With KEEP the gradient is on chip as well until its last part is known; else it is formed twice.
    """
    SINGLE: tl.constexpr = STRETCHES > 0
    EVEN: tl.constexpr = M % COLUMNS == 0
    dtype: tl.constexpr = log_activation.dtype.element_ty
    out: tl.constexpr = grad.dtype.element_ty
    written = row < B
    of_row = tl.where(written, row, 0)
    k = tl.arange(0, COLUMNS)
    factors = _grad_factors(scale, shift, inverse_norm, coefficients, own_log_norm, dtype, KIND, CENTROID_TO_SAMPLE)
    if not KEEP:
        scale = opaque(scale)
        shift = opaque(shift)
    # g - x (x . g) / ||x||^2: the product is not known until the row is done.
    dot = tl.full([ROWS, COLUMNS], 0.0, dtype)
    gs = ()
    for j in tl.static_range(STRETCHES):
        inside = k < M - j * COLUMNS
        g = _grad_stretch(
            xs[j], scale, shift, factors, log_activation, activation, reference, row_reference, row_own, of_row, y,
            j * COLUMNS, k, M, KIND, FAST, CENTROID_TO_SAMPLE, (j + 1) * COLUMNS <= M,
        )  # fmt: skip
        dot += xs[j] * g
        if KEEP:
            gs = gs + (g,)
    if not SINGLE:
        for start in range(0, M, COLUMNS):
            inside = k < M - start
            x = load_features(
                input, center, row, live, start, k, inside, unit_stride, column_stride, dtype, ALIGN, CONTIGUOUS, EVEN
            )
            g = _grad_stretch(
                x, scale, shift, factors, log_activation, activation, reference, row_reference, row_own, of_row, y,
                start, k, M, KIND, FAST, CENTROID_TO_SAMPLE, EVEN,
            )  # fmt: skip
            dot += x * g
    # x . g may be infinite where no length counts, and the square of a length's inverse may underflow.
    inverse_length = inverse_length.to(dtype)
    share = tl.where(inverse_length == 0.0, 0.0, tl.sum(dot, axis=1) * inverse_length)[:, None]
    inverse_length = inverse_length[:, None]
    if not KEEP:
        scale = opaque(scale)
        shift = opaque(shift)
    for j in tl.static_range(STRETCHES):
        inside = k < M - j * COLUMNS
        if KEEP:
            g = gs[j]
        else:
            g = _grad_stretch(
                xs[j], scale, shift, factors, log_activation, activation, reference, row_reference, row_own, of_row, y,
                j * COLUMNS, k, M, KIND, FAST, CENTROID_TO_SAMPLE, (j + 1) * COLUMNS <= M,
            )  # fmt: skip
        g = tl.where(live[:, None], g, 0.0) - (xs[j] * inverse_length) * share
        mask = written[:, None] if (j + 1) * COLUMNS <= M else written[:, None] & inside[None, :]
        tl.store((grad + row * M + j * COLUMNS)[:, None] + k[None, :], rounded(g, out), mask=mask)
    if not SINGLE:
        for start in range(0, M, COLUMNS):
            inside = k < M - start
            x = load_features(
                input, center, row, live, start, k, inside, unit_stride, column_stride, dtype, ALIGN, CONTIGUOUS, EVEN
            )
            g = _grad_stretch(
                x, scale, shift, factors, log_activation, activation, reference, row_reference, row_own, of_row, y,
                start, k, M, KIND, FAST, CENTROID_TO_SAMPLE, EVEN,
            )  # fmt: skip
            g = tl.where(live[:, None], g, 0.0) - (x * inverse_length) * share
            mask = written[:, None] if EVEN else written[:, None] & inside[None, :]
            tl.store((grad + row * M + start)[:, None] + k[None, :], rounded(g, out), mask=mask)


@triton.jit(
    do_not_specialize=[
        "unit_stride",
        "column_stride",
        "target_stride",
        "upstream_stride",
        "ignore_index",
        "classes",
        "B",
    ]
)
def input_grad_kernel(
    input, target, center, log_activation, activation, reference, row_reference, row_own, norms, rows, coefficients,
    upstream, grad, unit_stride, column_stride, target_stride, upstream_stride, ignore_index, classes, B,
    M: tl.constexpr, ALIGN: tl.constexpr, CONTIGUOUS: tl.constexpr, FAST: tl.constexpr,
    CENTROID_TO_SAMPLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRETCHES: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """d loss / d input, `grad` [B, M] in the dtype of input: rows read once, written once."""
    dtype: tl.constexpr = log_activation.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    y, live, _ = checked(target, row, target_stride, ignore_index, classes, B)
    of_row = rows + row * STATS
    scale = tl.load(of_row + SCALE, mask=live, other=0.0)
    inverse_length = tl.load(of_row + INVERSE_LENGTH, mask=live, other=0.0)
    shift = tl.load(of_row + SHIFT, mask=live, other=0.0)
    inverse_norm = tl.load(of_row + INVERSE_NORM, mask=live, other=0.0)
    of_gradient = load_coefficients(coefficients, row, live, upstream, upstream_stride)
    own_log_norm = tl.load(norms + y * RECORD + LOG_NORM)
    kind = least_kind(tl.load(of_row + ROW_KIND, mask=live, other=SOFTMAX))
    k = tl.arange(0, COLUMNS)
    xs = ()
    for j in tl.static_range(STRETCHES):
        inside = k < M - j * COLUMNS
        x = load_features(
            input, center, row, live, j * COLUMNS, k, inside, unit_stride, column_stride, dtype, ALIGN, CONTIGUOUS,
            (j + 1) * COLUMNS <= M,
        )  # fmt: skip
        xs = xs + (x,)
    # All of a row in one branch: a branch for each stretch would pass what it made through registers that spill.
    if kind == NEAR:
        grad_rows(
            xs, input, center, log_activation, activation, reference, row_reference, row_own, grad, row, live, y, B,
            own_log_norm, scale, inverse_length, shift, inverse_norm, of_gradient, unit_stride, column_stride, M, ALIGN,
            CONTIGUOUS, NEAR, FAST, CENTROID_TO_SAMPLE, ROWS, COLUMNS, STRETCHES, KEEP,
        )  # fmt: skip
    elif kind == SOFTMAX:
        grad_rows(
            xs, input, center, log_activation, activation, reference, row_reference, row_own, grad, row, live, y, B,
            own_log_norm, scale, inverse_length, shift, inverse_norm, of_gradient, unit_stride, column_stride, M, ALIGN,
            CONTIGUOUS, SOFTMAX, FAST, CENTROID_TO_SAMPLE, ROWS, COLUMNS, STRETCHES, KEEP,
        )  # fmt: skip
    else:
        grad_rows(
            xs, input, center, log_activation, activation, reference, row_reference, row_own, grad, row, live, y, B,
            own_log_norm, scale, inverse_length, shift, inverse_norm, of_gradient, unit_stride, column_stride, M, ALIGN,
            CONTIGUOUS, SHIFTED, FAST, CENTROID_TO_SAMPLE, ROWS, COLUMNS, STRETCHES, KEEP,
        )  # fmt: skip


@operator
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
    row_own: Tensor | None = None,
) -> Tensor:
    """d loss / d input [B, M], in the dtype of `input`; `upstream` is None, a scalar or [B]."""
    batch = Batch(input, target, center, ignore_index)
    table = Table(log_activation, activation, reference, norms)
    of_rows = Rows(rows, coefficients, upstream)
    check_table(input, table, centroid_to_sample)
    count, columns = check_batch(batch, log_activation.dtype, log_activation.shape[0])
    check_rows(input, of_rows)
    for name, tensor in (("row_reference", row_reference), ("row_own", row_own)):
        check(name, tensor, input, (log_activation.dtype,), (count, columns))
    require(
        (input.dtype is torch.float64) == (log_activation.dtype is torch.float64),
        "float64 input and float64 centroid_logits go together",
    )
    grad = torch.empty((count, columns), dtype=input.dtype, device=input.device)
    if count:
        tile = row_tile(columns, input.dtype, True, centroid_to_sample)
        with launches.on(input):
            launches.launch(
                input_grad_kernel,
                (-(-count // tile.rows),),
                input=input,
                target=target,
                center=center,
                log_activation=log_activation,
                activation=activation,
                reference=reference,
                row_reference=row_reference,
                row_own=row_own,
                norms=norms,
                rows=rows,
                coefficients=coefficients,
                upstream=upstream,
                grad=grad,
                **strides_of(input),
                target_stride=target.stride(0),
                upstream_stride=of_rows.upstream_stride,
                ignore_index=ignore_index,
                classes=log_activation.shape[0],
                B=count,
                M=columns,
                FAST=input.dtype in HALF,
                CENTROID_TO_SAMPLE=centroid_to_sample,
                ROWS=tile.rows,
                COLUMNS=tile.columns,
                STRETCHES=tile.stretches,
                KEEP=tile.keep,
                warps=tile.warps,
            )
    return grad
