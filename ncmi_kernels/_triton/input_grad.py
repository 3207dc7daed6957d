"""Kernels by row of the batch: d loss / d input."""

import triton
import triton.language as tl

from ncmi_kernels._triton.elements import (
    ALL_MEAN,
    BY_CONCENTRATION,
    BY_SEPARATION,
    INVERSE_LENGTH,
    INVERSE_NORM,
    LOG_NORM,
    NEAR,
    OWN_MEAN,
    RECORD,
    ROW_KIND,
    SCALE,
    SHIFT,
    SHIFTED,
    SOFTMAX,
    STATS,
    activate,
    checked,
    class_count,
    least_kind,
    load_features,
    load_rows,
    load_vector,
    opaque,
    rounded,
    share_of,
)


@triton.jit
def _grad_factors(
    scale, shift, inverse_norm, own_mean, all_mean, alpha, beta, own_log_norm, all_classes, dtype: tl.constexpr,
    KIND: tl.constexpr, CENTROID_TO_SAMPLE: tl.constexpr,
):  # fmt: skip
    """What `_grad_stretch` multiplies by, formed in double: numbers [ROWS, 1] of `dtype`."""
    inverse_norm = share_of(inverse_norm, shift, KIND)
    inverse_classes = 1.0 / all_classes
    if CENTROID_TO_SAMPLE:
        factors = (
            (alpha * scale * inverse_norm).to(dtype)[:, None],
            own_mean.to(dtype)[:, None],
            (beta * scale).to(dtype)[:, None],
            (inverse_norm * (1.0 - inverse_classes)).to(dtype)[:, None],
            (tl.exp(-own_log_norm) * inverse_classes).to(dtype)[:, None],
        )
    else:
        # With alpha' = alpha - beta / C. Near a minimum alpha' + beta is small beside either.
        by_gap = alpha - beta * inverse_classes
        factor = scale * inverse_norm
        factors = (
            (factor * (by_gap + beta)).to(dtype)[:, None],
            (factor * by_gap).to(dtype)[:, None],
            (factor * (by_gap * own_mean + beta * all_mean)).to(dtype)[:, None],
        )
    return factors


@triton.jit
def _load_compared(
    log_activation, activation, reference, y, at, k, M: tl.constexpr, CENTROID_TO_SAMPLE: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Columns at + k of what a row is compared with: log a_y, of centroid_to_sample a_y, reference or mean q."""
    inside = k < M - at
    own_log = load_rows(log_activation + at, y * M, k, inside, EVEN)
    if CENTROID_TO_SAMPLE:
        own_activation = load_rows(activation + at, y * M, k, inside, EVEN)
        compared = load_vector(reference + M + at, k, inside, y.shape[0], EVEN)
    else:
        own_activation = own_log
        compared = load_vector(reference + at, k, inside, y.shape[0], EVEN)
    return own_log, own_activation, compared


@triton.jit
def _grad_stretch(
    x, scale, shift, factors, own_log, own_activation, compared, inside, KIND: tl.constexpr,
    FAST: tl.constexpr, CENTROID_TO_SAMPLE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """d loss / d z of a stretch, but for what the chain rule of the length takes away; 0 past the last column."""
    scale = scale.to(x.dtype)[:, None]
    shift = shift.to(x.dtype)[:, None]
    if not EVEN:
        x = tl.where(inside[None, :], x, shift)
    value, log, slope, value_slope = activate(x, scale, shift, KIND, FAST)
    if CENTROID_TO_SAMPLE:
        # (1 - sigma) [alpha p (log p - log q_y - A) + beta (p - mean over v of q_v + (q_y - p) / C)]
        by_concentration, own_mean, by_separation, share, own_share = factors
        grad = by_concentration * (value_slope * (log - own_log - own_mean))
        grad += by_separation * (slope * ((share * value - compared) + own_share * own_activation))
    else:
        # (1 - sigma) p [alpha' (all + gap - mean) + beta (all - mean)] with all = log a - reference and
        # gap = reference - log a_y.
        by_all, by_gap, constant = factors
        grad = value_slope * (by_all * (log - compared) + (by_gap * (compared - own_log) - constant))
    if not EVEN:
        grad = tl.where(inside[None, :], grad, 0.0)
    return grad


@triton.jit
def grad_rows(
    xs, input, center, log_activation, activation, reference, grad, row, live, y, B, own_log_norm, scale,
    inverse_length, shift, inverse_norm, own_mean, all_mean, alpha, beta, unit_stride, column_stride, all_classes,
    M: tl.constexpr, ALIGN: tl.constexpr, CONTIGUOUS: tl.constexpr, KIND: tl.constexpr, FAST: tl.constexpr,
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
    k = tl.arange(0, COLUMNS)
    factors = _grad_factors(
        scale, shift, inverse_norm, own_mean, all_mean, alpha, beta, own_log_norm, all_classes, dtype, KIND,
        CENTROID_TO_SAMPLE,
    )  # fmt: skip
    if not KEEP:
        scale = opaque(scale)
        shift = opaque(shift)
    # g - x (x . g) / ||x||^2: the product is not known until the row is done.
    dot = tl.full([ROWS, COLUMNS], 0.0, dtype)
    gs = ()
    for j in tl.static_range(STRETCHES):
        inside = k < M - j * COLUMNS
        own_log, own_activation, compared = _load_compared(
            log_activation, activation, reference, y, j * COLUMNS, k, M, CENTROID_TO_SAMPLE, (j + 1) * COLUMNS <= M
        )
        g = _grad_stretch(
            xs[j], scale, shift, factors, own_log, own_activation, compared, inside, KIND, FAST,
            CENTROID_TO_SAMPLE, (j + 1) * COLUMNS <= M,
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
            own_log, own_activation, compared = _load_compared(
                log_activation, activation, reference, y, start, k, M, CENTROID_TO_SAMPLE, EVEN
            )
            g = _grad_stretch(
                x, scale, shift, factors, own_log, own_activation, compared, inside, KIND, FAST,
                CENTROID_TO_SAMPLE, EVEN,
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
            own_log, own_activation, compared = _load_compared(
                log_activation, activation, reference, y, j * COLUMNS, k, M, CENTROID_TO_SAMPLE, (j + 1) * COLUMNS <= M
            )
            g = _grad_stretch(
                xs[j], scale, shift, factors, own_log, own_activation, compared, inside, KIND, FAST,
                CENTROID_TO_SAMPLE, (j + 1) * COLUMNS <= M,
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
            own_log, own_activation, compared = _load_compared(
                log_activation, activation, reference, y, start, k, M, CENTROID_TO_SAMPLE, EVEN
            )
            g = _grad_stretch(
                x, scale, shift, factors, own_log, own_activation, compared, inside, KIND, FAST,
                CENTROID_TO_SAMPLE, EVEN,
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
    input, target, center, log_activation, activation, reference, norms, rows, upstream, grad, unit_stride,
    column_stride, target_stride, upstream_stride, ignore_index, classes, B, M: tl.constexpr, ALIGN: tl.constexpr,
    CONTIGUOUS: tl.constexpr, FAST: tl.constexpr, CENTROID_TO_SAMPLE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, STRETCHES: tl.constexpr, KEEP: tl.constexpr,
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
    own_mean = tl.load(of_row + OWN_MEAN, mask=live, other=0.0)
    all_mean = tl.load(of_row + ALL_MEAN, mask=live, other=0.0)
    alpha = tl.load(of_row + BY_CONCENTRATION, mask=live, other=0.0)
    beta = tl.load(of_row + BY_SEPARATION, mask=live, other=0.0)
    if upstream is not None:
        factor = tl.load(upstream + row * upstream_stride, mask=live, other=0.0).to(tl.float64)
        alpha *= factor
        beta *= factor
    own_log_norm = tl.load(norms + y * RECORD + LOG_NORM)
    all_classes = class_count(norms, classes)
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
            xs, input, center, log_activation, activation, reference, grad, row, live, y, B, own_log_norm, scale,
            inverse_length, shift, inverse_norm, own_mean, all_mean, alpha, beta, unit_stride, column_stride,
            all_classes, M, ALIGN, CONTIGUOUS, NEAR, FAST, CENTROID_TO_SAMPLE, ROWS, COLUMNS, STRETCHES, KEEP,
        )  # fmt: skip
    elif kind == SOFTMAX:
        grad_rows(
            xs, input, center, log_activation, activation, reference, grad, row, live, y, B, own_log_norm, scale,
            inverse_length, shift, inverse_norm, own_mean, all_mean, alpha, beta, unit_stride, column_stride,
            all_classes, M, ALIGN, CONTIGUOUS, SOFTMAX, FAST, CENTROID_TO_SAMPLE, ROWS, COLUMNS, STRETCHES, KEEP,
        )  # fmt: skip
    else:
        grad_rows(
            xs, input, center, log_activation, activation, reference, grad, row, live, y, B, own_log_norm, scale,
            inverse_length, shift, inverse_norm, own_mean, all_mean, alpha, beta, unit_stride, column_stride,
            all_classes, M, ALIGN, CONTIGUOUS, SHIFTED, FAST, CENTROID_TO_SAMPLE, ROWS, COLUMNS, STRETCHES, KEEP,
        )  # fmt: skip
