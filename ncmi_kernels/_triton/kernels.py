"""The Triton kernels of the operators, by rows, by columns and by classes.

The formulas are those of csrc/ncmi_math.h and README "What is computed"; the statistics of a row and of the centroids
mean what csrc/cpu/kernels.h says. Every output element has one owner and every sum one order: no atomics, the same bits
each run. Nothing about the batch is read on the host.

Arithmetic is float64 for float64 centroids, else float32. Python floats would reach a kernel as float32, so options
that are floats come as the bits of a double in an int64.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from ncmi_kernels import _backends

INTERPRETED = tl.constexpr(_backends.triton_interprets())  # plain formulas there for what only devices have

# How features become probabilities. NEAR is NSF where every |f| <= 1. SHIFTED can compute every row of NSF: rows that
# are computed at once are of the least kind among them.
SHIFTED = tl.constexpr(0)
NSF = tl.constexpr(1)
NEAR = tl.constexpr(2)
SOFTMAX = tl.constexpr(3)

LN2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)
SMALLEST_LENGTH = tl.constexpr(1e-12)  # as torch.nn.functional.normalize
LARGEST_32 = tl.constexpr(3.4028234663852886e38)
LARGEST_64 = tl.constexpr(1.7976931348623157e308)
# A row of NSF whose largest f is not above this is activated relative to that. Far below zero log 2 sigma lies on a
# grid that is coarse beside that of sigma, where it rounds alike in all columns; and at last sigma underflows.
SHIFTED_FROM = tl.constexpr(-2.0)

# Columns of `rows`, csrc/layout.h RowStats.
STATS = tl.constexpr(9)
SCALE = tl.constexpr(0)
INVERSE_LENGTH = tl.constexpr(1)
ROW_KIND = tl.constexpr(2)
SHIFT = tl.constexpr(3)  # the largest z - c, where log a is relative to that; else 0
INVERSE_NORM = tl.constexpr(4)
OWN_MEAN = tl.constexpr(5)
ALL_MEAN = tl.constexpr(6)
BY_CONCENTRATION = tl.constexpr(7)
BY_SEPARATION = tl.constexpr(8)

# Columns of `norms`, csrc/layout.h ClassStats: a record a class, then one of all with the last three of these.
RECORD = tl.constexpr(8)
LOG_NORM = tl.constexpr(0)
CLASS_SHIFT = tl.constexpr(1)
CLASS_KIND = tl.constexpr(2)
LONE = tl.constexpr(3)  # for the CPU; the rows that it tells are read here like others
WEIGHT_SUM = tl.constexpr(0)
WEIGHTED_LOG_NORM = tl.constexpr(1)
ALL_CLASSES = tl.constexpr(2)

NONE = tl.constexpr(0)
MEAN = tl.constexpr(1)
SUM = tl.constexpr(2)
TERMS = tl.constexpr(3)  # no loss: the terms themselves

WHOLE = tl.constexpr(0)  # sums over the batch: each program forms them itself, over all rows
PARTIAL = tl.constexpr(1)  # each writes those of its rows
LAST = tl.constexpr(2)  # each adds up what PARTIAL wrote


# ----------------------------------------------------------------------------------------------------------------------
# Elements
# ----------------------------------------------------------------------------------------------------------------------


@triton.jit
def _all_classes(norms, classes):
    """C, where the table has records of `classes` of the C classes."""
    return tl.load(norms + classes * RECORD + ALL_CLASSES)


@triton.jit
def _double(bits):
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def _rounded(x, DTYPE: tl.constexpr):
    """To the nearest of DTYPE; the interpreter would cut bfloat16 off."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return bits.to(tl.float32, bitcast=True).to(DTYPE)
    else:
        return x.to(DTYPE)


@triton.jit
def _exp_minus(x):
    """e^-x for x >= -1, 0 past 86.5. float32: relative error under 1 ulp, as in csrc/ncmi_math.h."""
    if x.dtype == tl.float64:
        return tl.exp(-x)
    else:
        bounded = tl.minimum(x, 86.5)
        shifted = 12582912.0 - bounded * 1.44269504  # round(-x / ln 2) in the low mantissa bits
        n = shifted - 12582912.0
        r = -bounded - n * 0.693145751953125  # exact
        r = r - n * 1.42860682e-6
        q = 1.39506030e-3 * r + 8.36895350e-3
        q = q * r + 4.16662041e-2
        q = q * r + 1.66665183e-1
        q = q * r + 5.00000010e-1
        y = (q * (r * r) + r) + 1.0
        bits = y.to(tl.int32, bitcast=True) + (shifted.to(tl.int32, bitcast=True) << 23)
        return tl.where(x < 86.5, bits.to(tl.float32, bitcast=True), 0.0)


@triton.jit
def _log_about_one(v):
    """log v, 1/2 <= v <= 1 + e^-2. float32: of the rounded v itself, small with a small error near v = 1."""
    if v.dtype == tl.float64:
        return tl.log(v)
    else:
        # s + s^2 R(s), R minimax, relative error 4e-9.
        s = v - 1.0
        w = s * s
        even = 0.961277064 * w - 0.0537590549
        odd = 1.01956435 * w + 0.580878876
        even = even * w - 0.169836506
        odd = odd * w + 0.134723511
        even = even * w - 0.249965432
        odd = odd * w + 0.199925626
        even = even * w - 0.5000001
        odd = odd * w + 0.33333442
        return (odd * s + even) * w + s


@triton.jit
def _reciprocal(u):
    """1 / u, 1 <= u <= 2. float32: a special function made accurate by a Newton step."""
    if INTERPRETED or u.dtype == tl.float64:
        return 1.0 / u
    else:
        r = libdevice.fast_dividef(1.0, u)
        return tl.fma(r, tl.fma(-u, r, 1.0), r)


@triton.jit
def _fast_log2(u):
    """log2(u), 1 <= u <= 2: a special function, off by 2^-22."""
    if INTERPRETED:
        return tl.log2(u)
    else:
        return libdevice.fast_log2f(u)


@triton.jit
def _near(y):
    """T = 2 sigma - 1 and log 2 sigma at f = 2 y, |f| <= 1.

    T = tanh y and log 2 sigma = y - log cosh y, from minimax polynomials in y^2 with relative errors under 2e-8: both
    are small with small errors, so the pair is consistent without being made so.
    """
    w = y * y
    t = 0.0172414882 * w - 0.0530454929
    t = t * w + 0.133258789
    t = t * w - 0.333331439
    c = -0.00566055892 * w + 0.0220276752
    c = c * w - 0.0833201598
    c = c * w + 0.499999758
    return t * (y * w) + y, y - c * w


@triton.jit
def _opaque(x):
    """A number that the compiler does not know to be `x`: what is computed of it is computed again, not kept."""
    if INTERPRETED:
        return x
    elif x.dtype == tl.float64:
        return tl.inline_asm_elementwise("mov.b64 $0, $1;", "=d,d", [x], dtype=tl.float64, is_pure=False, pack=1)
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=False, pack=1)


@triton.jit
def _activate(x, scale, shift, KIND: tl.constexpr, FAST: tl.constexpr):
    """Value a, log (log a, of NSF log 2 a), slope d log a / d f and value * slope, of f = x scale.

    `scale` and `shift` are [ROWS, 1]. The shift of SOFTMAX is the largest x, and a is relative to it: e^((x - shift)
    scale). That of SHIFTED is 0, or the largest x where a is sigma e^-max(f) / 2, and then these values are of 2 a: see
    `_share`. Other kinds do not look at it.
    """
    if KIND == NEAR:
        t, log = _near(x * (0.5 * scale))
        value = 0.5 + 0.5 * t
        slope = 0.5 - 0.5 * t
        value_slope = 0.25 - 0.25 * (t * t)
    else:
        # A logarithm has to be finite, as 0 times it has to be 0.
        finite: tl.constexpr = 0.5 * (LARGEST_64 if x.dtype == tl.float64 else LARGEST_32)
        if KIND == NSF:
            g = x * scale
        else:
            # At the largest x 0, whatever is fused: the difference comes first.
            g = (x - shift) * scale
            if KIND == SOFTMAX:
                g = tl.maximum(g, -finite, propagate_nan=tl.PropagateNan.ALL)
        size = tl.abs(g)
        small = tl.exp2(size * -LOG2_E) if FAST else _exp_minus(size)
        if KIND == SOFTMAX:
            value = small
            log = g
            slope = tl.full(x.shape, 1.0, x.dtype)
            value_slope = value
        else:
            if KIND == NSF:
                # min(g, 0), exactly, but NaN for an infinite f: the saturated sigmoid would hide it from the loss.
                below = 0.5 * g - 0.5 * size
            else:
                below = tl.clamp(g, -finite, 0.0, propagate_nan=tl.PropagateNan.ALL)
            u = 1.0 + small
            if KIND == SHIFTED:
                shifted = shift != 0.0
                u = 1.0 + small * tl.where(shifted, _exp_minus(-shift * scale), 1.0)
            if FAST:
                # sigma from log sigma: a pair by construction, three special functions and no division.
                log2_u = _fast_log2(u)
                r = tl.exp2(-log2_u)
                log_sigma = below * LOG2_E - log2_u
                value = tl.exp2(log_sigma)
                log = log_sigma * LN2 + (tl.where(shifted, 0.0, LN2) if KIND == SHIFTED else LN2)
            else:
                # sigma and log sigma from the same rounded u: an exact pair of a slightly moved f.
                r = _reciprocal(u)
                value = tl.where(g <= 0, small * r, r)
                log = below - _log_about_one(u * (tl.where(shifted, 1.0, 0.5) if KIND == SHIFTED else 0.5))
            slope = tl.where(g <= 0, r, small * r)
            value_slope = small * (r * r)
    return value, log, slope, value_slope


@triton.jit
def _share(inverse_norm, shift, kind):
    """What times a value of `_activate` is p: half of `inverse_norm` [ROWS] where that value is of 2 a."""
    half = tl.where(kind == SHIFTED, 0.5, 1.0)
    return tl.where(shift != 0.0, half * inverse_norm, inverse_norm)


@triton.jit
def _activate_for_sums(x, scale, shift, KIND: tl.constexpr, FAST: tl.constexpr):
    """a and its log. Of rows far below zero all columns may round alike: there a is of the rounded log."""
    value, log, _, _ = _activate(x, scale, shift, KIND, FAST)
    if KIND == SHIFTED:
        value = tl.where(shift != 0.0, 0.5 * value, value) if FAST else 0.5 * _exp_minus(-log)
    return value, log


@triton.jit
def _least_kind(kinds):
    """What the backward passes compute rows of these kinds as, float64 as the statistics hold them."""
    least = tl.min(kinds, axis=0)
    return tl.where((least == NEAR) | (least == SOFTMAX), least, SHIFTED).to(tl.int32)


@triton.jit
def _activate_as(x, scale, shift, kind, FAST: tl.constexpr):
    """`_activate` as `kind`, a number on the device."""
    if kind == SOFTMAX:
        value, log, slope, value_slope = _activate(x, scale, shift, SOFTMAX, FAST)
    elif kind == NEAR:
        value, log, slope, value_slope = _activate(x, scale, shift, NEAR, FAST)
    else:
        value, log, slope, value_slope = _activate(x, scale, shift, SHIFTED, FAST)
    return value, log, slope, value_slope


# ----------------------------------------------------------------------------------------------------------------------
# Stretches of rows
# ----------------------------------------------------------------------------------------------------------------------


@triton.jit
def _load_vector(pointer, k, inside, ROWS: tl.constexpr, EVEN: tl.constexpr):
    """A vector [ROWS, N] that is the same in all rows; 0 past its end."""
    # Each row loads it, from the cache: a single one would come in another layout and be handed around by shuffles.
    pointers = pointer + (tl.full([ROWS], 0, tl.int32)[:, None] + k[None, :])
    if EVEN:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=inside[None, :], other=0.0)


@triton.jit
def _load_rows(pointer, row, k, inside, EVEN: tl.constexpr):
    """Rows [rows, N] that start at the offsets `row`; 0 past their end."""
    pointers = pointer + row[:, None] + k[None, :]
    if EVEN:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=inside[None, :], other=0.0)


@triton.jit
def _load_centroids(
    log_activation, activation, reference, y, at, k, M: tl.constexpr, CENTROID_TO_SAMPLE: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Columns at + k of what rows are compared with: log a_y, reference, of centroid_to_sample a_y and the mean q."""
    # Added to pointers `at` is part of the instruction; added to k it would take a register.
    inside = k < M - at
    own_log = _load_rows(log_activation + at, y * M, k, inside, EVEN)
    compared = _load_vector(reference + at, k, inside, y.shape[0], EVEN)
    if CENTROID_TO_SAMPLE:
        own_activation = _load_rows(activation + at, y * M, k, inside, EVEN)
        q_mean = _load_vector(reference + M + at, k, inside, y.shape[0], EVEN)
    else:
        own_activation = own_log
        q_mean = compared
    return own_log, compared, own_activation, q_mean


@triton.jit
def _load_features(
    input, center, row, live, at, k, inside, unit_stride, column_stride, DTYPE: tl.constexpr, ALIGN: tl.constexpr,
    CONTIGUOUS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """z - center [rows, N], columns at + k; past the last column 0, in rows that are not `live` anything finite."""
    # The row stride comes in units of ALIGN elements: the compiler has to see that for 16-byte loads.
    base = input + row * (unit_stride.to(tl.int64) * ALIGN)
    if CONTIGUOUS:
        pointers = (base + at)[:, None] + k[None, :]
    else:
        stride = column_stride.to(tl.int64)
        pointers = (base + at * stride)[:, None] + (k * stride)[None, :]
    mask = live[:, None] if EVEN else live[:, None] & inside[None, :]
    x = tl.load(pointers, mask=mask, other=0.0).to(DTYPE)
    if center is not None:
        x -= _load_vector(center + at, k, inside, row.shape[0], EVEN)
    return x


@triton.jit
def _checked(target, row, stride, ignore_index, classes, B):
    """Classes that are safe to read, which rows count, and which of their classes are out of range."""
    y = tl.load(target + row * stride, mask=row < B, other=0)
    live = (row < B) & (y != ignore_index)
    inside = (y >= 0) & (y < classes)
    return tl.where(live & inside, y, 0), live, live & (inside == 0)


@triton.jit
def _add3(a0, b0, c0, a1, b1, c1):
    return a0 + a1, b0 + b1, c0 + c1


@triton.jit
def _add4(a0, b0, c0, d0, a1, b1, c1, d1):
    return a0 + a1, b0 + b1, c0 + c1, d0 + d1


@triton.jit
def _sums3(a, b, c):
    """Sums along rows: in one go, so that threads meet once."""
    if INTERPRETED:
        return tl.sum(a, axis=1), tl.sum(b, axis=1), tl.sum(c, axis=1)
    else:
        return tl.reduce((a, b, c), 1, _add3)


@triton.jit
def _sums4(a, b, c, d):
    if INTERPRETED:
        return tl.sum(a, axis=1), tl.sum(b, axis=1), tl.sum(c, axis=1), tl.sum(d, axis=1)
    else:
        return tl.reduce((a, b, c, d), 1, _add4)


@triton.jit
def _neighbours(value, VEC: tl.constexpr):
    """Sums of VEC neighbours, float64 from there: a conversion for each element is too dear."""
    groups: tl.constexpr = value.shape[1] // VEC
    return tl.sum(tl.reshape(value, [value.shape[0], groups, VEC]), axis=2).to(tl.float64)


@triton.jit
def _add_stretch(
    norm, own, total, own_cross, x, scale, shift, own_log, own_activation, reference, q_mean, inside,
    KIND: tl.constexpr, FAST: tl.constexpr, CENTROID_TO_SAMPLE: tl.constexpr, EVEN: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Adds a stretch of rows, element by element: of NEAR twice a, and of `norm` 2 a - 1, small with a small rounding.

    Past the last column f = 0 and the centroids' numbers are 0; log 2 sigma(0) is 0 as well.
    """
    if KIND == NEAR:
        excess, log = _near(x * (0.5 * scale)[:, None])
        weight = 1.0 + excess
        norm += excess
    else:
        if not EVEN:
            x = tl.where(inside[None, :], x, shift[:, None])
        weight, log = _activate_for_sums(x, scale[:, None], shift[:, None], KIND, FAST)
        if not EVEN:
            weight = tl.where(inside[None, :], weight, 0.0)
        norm += _neighbours(weight, VEC)
    d_own = log - own_log
    d_all = log - reference
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
        own = _neighbours(own, VEC)
        total = _neighbours(total, VEC)
        own_cross = _neighbours(own_cross, VEC) if CENTROID_TO_SAMPLE else own
        norm = own
    if CENTROID_TO_SAMPLE:
        excess, own_sum, total_sum, cross_sum = _sums4(norm, own, total, own_cross)
        cross_sum = cross_sum.to(tl.float64)
        total_sum = total_sum.to(tl.float64)
    else:
        excess, own_sum, total_sum = _sums3(norm, own, total)
        total_sum = half * total_sum.to(tl.float64)
        cross_sum = total_sum
    if KIND == NEAR:
        norm_sum = 0.5 * M + 0.5 * excess.to(tl.float64)
    return norm_sum, half * own_sum.to(tl.float64), total_sum, cross_sum


@triton.jit
def _terms_of(norm, own, total, own_cross, own_log_norm, norms, classes, CENTROID_TO_SAMPLE: tl.constexpr):
    """A, G, 1 / S and the means under p: KL divergences as differences of logarithms, then of log-normalisers."""
    inverse_classes = 1.0 / _all_classes(norms, classes)
    log_norm = tl.log(norm)
    inverse_norm = 1.0 / norm
    own_mean = own * inverse_norm
    all_mean = total * inverse_norm
    own_gap = log_norm - own_log_norm
    concentration = own_mean - own_gap
    weighted_log_norm = tl.load(norms + classes * RECORD + WEIGHTED_LOG_NORM)
    if CENTROID_TO_SAMPLE:
        weight_sum = tl.load(norms + classes * RECORD + WEIGHT_SUM)
        separation = (weight_sum * log_norm - weighted_log_norm) - total
        separation += (own_cross * tl.exp(-own_log_norm) - own_gap) * inverse_classes
    else:
        separation = all_mean - (log_norm - weighted_log_norm) - concentration * inverse_classes
    # Divergences are not negative; their rounding may be. NaN stays.
    concentration = tl.where(concentration < 0.0, 0.0, concentration)
    separation = tl.where(separation < 0.0, 0.0, separation)
    return concentration, separation, inverse_norm, own_mean, all_mean


@triton.jit
def _grad_factors(
    scale, shift, inverse_norm, own_mean, all_mean, alpha, beta, own_log_norm, all_classes, dtype: tl.constexpr,
    KIND: tl.constexpr, CENTROID_TO_SAMPLE: tl.constexpr,
):  # fmt: skip
    """What `_grad_stretch` multiplies by, formed in double: numbers [ROWS, 1] of `dtype`."""
    inverse_norm = _share(inverse_norm, shift, KIND)
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
def _grad_stretch(
    x, scale, shift, factors, own_log, own_activation, reference, q_mean, inside, KIND: tl.constexpr,
    FAST: tl.constexpr, CENTROID_TO_SAMPLE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """d loss / d z of a stretch, but for what the chain rule of the length takes away; 0 past the last column."""
    scale = scale.to(x.dtype)[:, None]
    shift = shift.to(x.dtype)[:, None]
    if not EVEN:
        x = tl.where(inside[None, :], x, shift)
    value, log, slope, value_slope = _activate(x, scale, shift, KIND, FAST)
    if CENTROID_TO_SAMPLE:
        # (1 - sigma) [alpha p (log p - log q_y - A) + beta (p - mean over v of q_v + (q_y - p) / C)]
        by_concentration, own_mean, by_separation, share, own_share = factors
        grad = by_concentration * (value_slope * (log - own_log - own_mean))
        grad += by_separation * (slope * ((share * value - q_mean) + own_share * own_activation))
    else:
        # (1 - sigma) p [alpha' (all + gap - mean) + beta (all - mean)] with all = log a - reference and
        # gap = reference - log a_y.
        by_all, by_gap, constant = factors
        grad = value_slope * (by_all * (log - reference) + (by_gap * (reference - own_log) - constant))
    if not EVEN:
        grad = tl.where(inside[None, :], grad, 0.0)
    return grad


@triton.jit
def _grad_rows(
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
        scale = _opaque(scale)
        shift = _opaque(shift)
    # g - x (x . g) / ||x||^2: the product is not known until the row is done.
    dot = tl.full([ROWS, COLUMNS], 0.0, dtype)
    gs = ()
    for j in tl.static_range(STRETCHES):
        inside = k < M - j * COLUMNS
        own_log, compared, own_activation, q_mean = _load_centroids(
            log_activation, activation, reference, y, j * COLUMNS, k, M, CENTROID_TO_SAMPLE, (j + 1) * COLUMNS <= M
        )
        g = _grad_stretch(
            xs[j], scale, shift, factors, own_log, own_activation, compared, q_mean, inside, KIND, FAST,
            CENTROID_TO_SAMPLE, (j + 1) * COLUMNS <= M,
        )  # fmt: skip
        dot += xs[j] * g
        if KEEP:
            gs = gs + (g,)
    if not SINGLE:
        for start in range(0, M, COLUMNS):
            inside = k < M - start
            x = _load_features(
                input, center, row, live, start, k, inside, unit_stride, column_stride, dtype, ALIGN, CONTIGUOUS, EVEN
            )
            own_log, compared, own_activation, q_mean = _load_centroids(
                log_activation, activation, reference, y, start, k, M, CENTROID_TO_SAMPLE, EVEN
            )
            g = _grad_stretch(
                x, scale, shift, factors, own_log, own_activation, compared, q_mean, inside, KIND, FAST,
                CENTROID_TO_SAMPLE, EVEN,
            )  # fmt: skip
            dot += x * g
    # x . g may be infinite where no length counts, and the square of a length's inverse may underflow.
    inverse_length = inverse_length.to(dtype)
    share = tl.where(inverse_length == 0.0, 0.0, tl.sum(dot, axis=1) * inverse_length)[:, None]
    inverse_length = inverse_length[:, None]
    if not KEEP:
        scale = _opaque(scale)
        shift = _opaque(shift)
    for j in tl.static_range(STRETCHES):
        inside = k < M - j * COLUMNS
        if KEEP:
            g = gs[j]
        else:
            own_log, compared, own_activation, q_mean = _load_centroids(
                log_activation, activation, reference, y, j * COLUMNS, k, M, CENTROID_TO_SAMPLE, (j + 1) * COLUMNS <= M
            )
            g = _grad_stretch(
                xs[j], scale, shift, factors, own_log, own_activation, compared, q_mean, inside, KIND, FAST,
                CENTROID_TO_SAMPLE, (j + 1) * COLUMNS <= M,
            )  # fmt: skip
        g = tl.where(live[:, None], g, 0.0) - (xs[j] * inverse_length) * share
        mask = written[:, None] if (j + 1) * COLUMNS <= M else written[:, None] & inside[None, :]
        tl.store((grad + row * M + j * COLUMNS)[:, None] + k[None, :], _rounded(g, out), mask=mask)
    if not SINGLE:
        for start in range(0, M, COLUMNS):
            inside = k < M - start
            x = _load_features(
                input, center, row, live, start, k, inside, unit_stride, column_stride, dtype, ALIGN, CONTIGUOUS, EVEN
            )
            own_log, compared, own_activation, q_mean = _load_centroids(
                log_activation, activation, reference, y, start, k, M, CENTROID_TO_SAMPLE, EVEN
            )
            g = _grad_stretch(
                x, scale, shift, factors, own_log, own_activation, compared, q_mean, inside, KIND, FAST,
                CENTROID_TO_SAMPLE, EVEN,
            )  # fmt: skip
            g = tl.where(live[:, None], g, 0.0) - (x * inverse_length) * share
            mask = written[:, None] if EVEN else written[:, None] & inside[None, :]
            tl.store((grad + row * M + start)[:, None] + k[None, :], _rounded(g, out), mask=mask)


# ----------------------------------------------------------------------------------------------------------------------
# Rows
# ----------------------------------------------------------------------------------------------------------------------


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
            x = _load_features(
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
        "ignore_index",
        "classes",
        "B",
        "columns",
        "chunks",
    ]
)
def terms_kernel(
    input, target, center, log_activation, activation, reference, norms, weight, weight_sums, rows, sums, grad,
    unit_stride, column_stride, target_stride, inverse_temperature_bits, eps, ignore_index, classes, B, columns, chunks,
    M: tl.constexpr, ALIGN: tl.constexpr, CONTIGUOUS: tl.constexpr, L2: tl.constexpr, KIND: tl.constexpr,
    MAY_SHIFT: tl.constexpr, FAST: tl.constexpr, RESCUE: tl.constexpr, CENTROID_TO_SAMPLE: tl.constexpr,
    WITH_GRAD: tl.constexpr, NORMALIZED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    STRETCHES: tl.constexpr, VEC: tl.constexpr, CHUNKS: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """One reading of ROWS rows: scale, length and shift to `rows` [B, 9], what `_sum_stretch` sums to `sums` [4, B].

    WITH_GRAD: all of `rows`, the terms A and G to `sums`, and to `grad` [B, M] d / d input of the sum over rows of
    w A / (G + eps), w the class weight, with NORMALIZED over the sum of all, which `weight_sums` [chunks] holds.

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
    y, live, _ = _checked(target, row, target_stride, ignore_index, classes, B)

    # 1. x = z - c, and what its scale and shift need of the whole row.
    infinity: tl.constexpr = float("inf")
    k = tl.arange(0, COLUMNS)
    squares = tl.full([ROWS, COLUMNS], 0.0, dtype)
    largest = tl.full([ROWS, COLUMNS], -infinity, dtype)
    sizes = squares
    xs = ()
    for j in tl.static_range(STRETCHES):
        inside = k < M - j * COLUMNS
        x = _load_features(
            input,
            center,
            row,
            live,
            j * COLUMNS,
            k,
            inside,
            unit_stride,
            column_stride,
            dtype,
            ALIGN,
            CONTIGUOUS,
            (j + 1) * COLUMNS <= M,
        )
        if L2:
            squares += x * x
        if LARGEST:
            largest = tl.maximum(largest, x if (j + 1) * COLUMNS <= M else tl.where(inside[None, :], x, -infinity))
            sizes = tl.maximum(sizes, tl.abs(x))
        xs = xs + (x,)
    if not SINGLE and (L2 or LARGEST):
        for start in range(0, M, COLUMNS):
            inside = k < M - start
            x = _load_features(
                input, center, row, live, start, k, inside, unit_stride, column_stride, dtype, ALIGN, CONTIGUOUS, EVEN
            )
            if L2:
                squares += x * x
            if LARGEST:
                largest = tl.maximum(largest, x if EVEN else tl.where(inside[None, :], x, -infinity))
                sizes = tl.maximum(sizes, tl.abs(x))

    # 2. f = x scale, and what log a is relative to.
    inverse_temperature = _double(inverse_temperature_bits).to(dtype)
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
                small = tiny * _load_features(
                    input,
                    center,
                    row,
                    live,
                    start,
                    column,
                    column < M - start,
                    unit_stride,
                    column_stride,
                    dtype,
                    ALIGN,
                    CONTIGUOUS,
                    False,
                )
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
        all_classes = _all_classes(norms, classes)
        concentration, separation, inverse_norm, own_mean, all_mean = _terms_of(
            norm, own, total, own_cross, own_log_norm, norms, classes, CENTROID_TO_SAMPLE
        )
        factor = tl.load(weight + y).to(tl.float64) if weight is not None else zero + 1.0
        if NORMALIZED:
            chunk = tl.arange(0, CHUNKS)
            factor = factor / tl.sum(tl.load(weight_sums + chunk, mask=chunk < chunks, other=0.0), axis=0)
        inverse = 1.0 / (separation + _double(eps))
        alpha = tl.where(live, factor * inverse, 0.0)
        beta = tl.where(live, -(factor * ((concentration * inverse) * inverse)), 0.0)
        tl.store(sums + row, concentration, mask=written)
        tl.store(sums + B + row, separation, mask=written)
        tl.store(of_row + INVERSE_NORM, tl.where(live, inverse_norm, 0.0), mask=written)
        tl.store(of_row + OWN_MEAN, tl.where(live, own_mean, 0.0), mask=written)
        tl.store(of_row + ALL_MEAN, tl.where(live, all_mean, 0.0), mask=written)
        tl.store(of_row + BY_CONCENTRATION, alpha, mask=written)
        tl.store(of_row + BY_SEPARATION, beta, mask=written)
        # The same formulas as a backward pass takes, for the same bits: that has no branch for NSF.
        if KIND == NSF:
            kind = tl.where(kind == NEAR, NEAR, SHIFTED)
        for AS in tl.static_range(SHIFTED if KIND == NSF else KIND, MOST + 1):
            if AS != NSF and kind == AS:
                _grad_rows(
                    xs, input, center, log_activation, activation, reference, grad, row, live, y, B, own_log_norm,
                    scale.to(tl.float64), inverse_length.to(tl.float64), shift.to(tl.float64), inverse_norm,
                    own_mean, all_mean, alpha, beta, unit_stride, column_stride, all_classes, M, ALIGN, CONTIGUOUS,
                    AS, FAST, CENTROID_TO_SAMPLE, ROWS, COLUMNS, STRETCHES, KEEP,
                )  # fmt: skip


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
    y, live, _ = _checked(target, row, target_stride, ignore_index, classes, B)
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
    all_classes = _all_classes(norms, classes)
    kind = _least_kind(tl.load(of_row + ROW_KIND, mask=live, other=SOFTMAX))
    k = tl.arange(0, COLUMNS)
    xs = ()
    for j in tl.static_range(STRETCHES):
        inside = k < M - j * COLUMNS
        x = _load_features(
            input,
            center,
            row,
            live,
            j * COLUMNS,
            k,
            inside,
            unit_stride,
            column_stride,
            dtype,
            ALIGN,
            CONTIGUOUS,
            (j + 1) * COLUMNS <= M,
        )
        xs = xs + (x,)
    # All of a row in one branch: a branch for each stretch would pass what it made through registers that spill.
    if kind == NEAR:
        _grad_rows(
            xs, input, center, log_activation, activation, reference, grad, row, live, y, B, own_log_norm, scale,
            inverse_length, shift, inverse_norm, own_mean, all_mean, alpha, beta, unit_stride, column_stride,
            all_classes, M, ALIGN, CONTIGUOUS, NEAR, FAST, CENTROID_TO_SAMPLE, ROWS, COLUMNS, STRETCHES, KEEP,
        )  # fmt: skip
    elif kind == SOFTMAX:
        _grad_rows(
            xs, input, center, log_activation, activation, reference, grad, row, live, y, B, own_log_norm, scale,
            inverse_length, shift, inverse_norm, own_mean, all_mean, alpha, beta, unit_stride, column_stride,
            all_classes, M, ALIGN, CONTIGUOUS, SOFTMAX, FAST, CENTROID_TO_SAMPLE, ROWS, COLUMNS, STRETCHES, KEEP,
        )  # fmt: skip
    else:
        _grad_rows(
            xs, input, center, log_activation, activation, reference, grad, row, live, y, B, own_log_norm, scale,
            inverse_length, shift, inverse_norm, own_mean, all_mean, alpha, beta, unit_stride, column_stride,
            all_classes, M, ALIGN, CONTIGUOUS, SHIFTED, FAST, CENTROID_TO_SAMPLE, ROWS, COLUMNS, STRETCHES, KEEP,
        )  # fmt: skip


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
# The batch: from the rows' sums to the terms, the loss and its derivatives by the terms
# ----------------------------------------------------------------------------------------------------------------------


@triton.jit
def _terms_tile(
    row, target, norms, weight, sums, target_stride, ignore_index, classes, B, CENTROID_TO_SAMPLE: tl.constexpr,
    FINISHED: tl.constexpr,
):  # fmt: skip
    """Of BLOCK rows: A and G (0 where a row does not count), 1 / S, the means under p, the class weight or 0."""
    y, live, wrong = _checked(target, row, target_stride, ignore_index, classes, B)
    tl.device_assert(wrong == 0, "target: out of range, expected a class in [0, C) or ignore_index")
    norm = tl.load(sums + row, mask=live, other=1.0)
    own = tl.load(sums + B + row, mask=live, other=0.0)
    if FINISHED:
        concentration = tl.where(live, norm, 0.0)
        separation = own
        inverse_norm = norm
        own_mean = own
        all_mean = own
    else:
        total = tl.load(sums + 2 * B.to(tl.int64) + row, mask=live, other=0.0)
        own_cross = tl.load(sums + 3 * B.to(tl.int64) + row, mask=live, other=0.0) if CENTROID_TO_SAMPLE else own
        concentration, separation, inverse_norm, own_mean, all_mean = _terms_of(
            norm, own, total, own_cross, tl.load(norms + y * RECORD + LOG_NORM), norms, classes, CENTROID_TO_SAMPLE
        )
        concentration = tl.where(live, concentration, 0.0)
        separation = tl.where(live, separation, 0.0)
        inverse_norm = tl.where(live, inverse_norm, 0.0)
        own_mean = tl.where(live, own_mean, 0.0)
        all_mean = tl.where(live, all_mean, 0.0)
    factor = tl.where(live, 1.0, concentration * 0.0)
    if weight is not None:
        factor = tl.load(weight + y, mask=live, other=0.0).to(tl.float64)
    return concentration, separation, inverse_norm, own_mean, all_mean, tl.where(live, factor, 0.0), live


@triton.jit
def _batch_sums(concentration, separation, factor, live, eps, BATCH_RATIO: tl.constexpr):
    """Of BLOCK rows: the sums of w, of w A, of w G, and for the ratio by sample of w A / (G + eps)."""
    first = tl.sum(tl.where(live, factor * concentration, 0.0), axis=0)
    second = tl.sum(tl.where(live, factor * separation, 0.0), axis=0)
    third = first
    if not BATCH_RATIO:
        third = tl.sum(tl.where(live, factor * (concentration * (1.0 / (separation + eps))), 0.0), axis=0)
    return tl.sum(factor, axis=0), first, second, third


@triton.jit(do_not_specialize=["target_stride", "eps", "ignore_index", "classes", "B", "tiles", "columns"], debug=True)
def finish_kernel(
    target, norms, weight, sums, partials, rows, loss, means, center, batches, moved_center, moved_batches,
    target_stride, eps, ignore_index, classes, B, tiles, columns, CENTROID_TO_SAMPLE: tl.constexpr,
    BATCH_RATIO: tl.constexpr, REDUCTION: tl.constexpr, FINISHED: tl.constexpr, STAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """From `sums` [4, B] of the rows to what REDUCTION asks for: the loss [] or [B], or for TERMS A and G [2, B].

    And but for TERMS to `means` [2] of A and G. Writes the columns of `rows` [B, 9] that terms_kernel left out: with
    FINISHED it left none.
    Stage PARTIAL writes its sums over them to `partials` [4, tiles], LAST reads those; WHOLE does without.

    Where there is a `center` [columns], this moves it, as nothing comes after that could fail.
    """
    eps = _double(eps)
    zero = tl.full([BLOCK], 0.0, tl.float64)
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    concentration, separation, inverse_norm, own_mean, all_mean, factor, live = _terms_tile(
        row, target, norms, weight, sums, target_stride, ignore_index, classes, B, CENTROID_TO_SAMPLE, FINISHED
    )
    if STAGE == PARTIAL:
        weights, first, second, third = _batch_sums(concentration, separation, factor, live, eps, BATCH_RATIO)
        tile = partials + tl.program_id(0)
        tl.store(tile, weights)
        tl.store(tile + tiles, first)
        tl.store(tile + 2 * tiles, second)
        tl.store(tile + 3 * tiles, third)
    else:
        if REDUCTION != TERMS:
            # Summed over a block at the end, in one order for any number of programs.
            weights = tl.sum(zero, axis=0)
            first = weights
            second = weights
            third = weights
            for tile in range(0, tiles if STAGE == WHOLE else tl.cdiv(tiles, BLOCK)):
                i = tile * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
                if STAGE == WHOLE:
                    a, g, _, _, _, w, counts = _terms_tile(
                        i, target, norms, weight, sums, target_stride, ignore_index, classes, B, CENTROID_TO_SAMPLE,
                        FINISHED,
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
            first = first / weights
            second = second / weights
            if tl.program_id(0) == 0:
                tl.store(means, first)
                tl.store(means + 1, second)
            if REDUCTION == MEAN:
                factor = factor / weights
                third = third / weights
        if REDUCTION == TERMS:
            dtype = loss.dtype.element_ty
            tl.store(loss + row, concentration.to(dtype), mask=row < B)
            tl.store(loss + B + row, separation.to(dtype), mask=row < B)
            by_concentration = zero
            by_separation = zero
        else:
            inverse = 1.0 / (second + eps) if BATCH_RATIO else 1.0 / (separation + eps)
            ratio = first * inverse if BATCH_RATIO else concentration * inverse
            by_concentration = tl.where(live, factor * inverse, 0.0)
            by_separation = tl.where(live, -(factor * (ratio * inverse)), 0.0)
            if REDUCTION == NONE:
                value = tl.where(live, factor * ratio, 0.0)
                tl.store(loss + row, value.to(loss.dtype.element_ty), mask=row < B)
            elif tl.program_id(0) == 0:
                value = ratio if BATCH_RATIO else third
                tl.store(loss, value.to(loss.dtype.element_ty))
        if not FINISHED:
            of_row = rows + row * STATS
            tl.store(of_row + INVERSE_NORM, inverse_norm, mask=row < B)
            tl.store(of_row + OWN_MEAN, own_mean, mask=row < B)
            tl.store(of_row + ALL_MEAN, all_mean, mask=row < B)
            tl.store(of_row + BY_CONCENTRATION, by_concentration, mask=row < B)
            tl.store(of_row + BY_SEPARATION, by_separation, mask=row < B)
        if center is not None:
            for start in range(tl.program_id(0) * BLOCK, columns, tiles * BLOCK):
                k = start + tl.arange(0, BLOCK)
                tl.store(center + k, tl.load(moved_center + k, mask=k < columns), mask=k < columns)
            if tl.program_id(0) == 0:
                tl.store(batches, tl.load(moved_batches))


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
            y, live, wrong = _checked(target, row, target_stride, ignore_index, classes, last)
            if WITH_SUMS:
                partial += _load_features(
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
        keep = tl.where(tracked == 0, 0.0, _double(momentum))
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


# ----------------------------------------------------------------------------------------------------------------------
# Centroids: log a(xi), a(xi), their normalisers, and the sums over classes that stand in for the loop over them
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
        x = _load_features(
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
        x = _load_features(
            logits, None, row, live, start, k, inside, unit_stride, column_stride, dtype, ALIGN, CONTIGUOUS, EVEN
        )
        if not EVEN:
            x = tl.where(inside[None, :], x, shift[:, None])
        value, log = _activate_for_sums(x, scale[:, None], shift[:, None], KIND, False)
        added = value
        if KIND == SHIFTED and dtype == tl.float32:
            # What rounding does to a centroid, all rows of its class suffer alike.
            near = tl.abs(x) <= 1.0
            excess, near_log = _near(tl.where(near, 0.5 * x, 0.0))
            log = tl.where(near, near_log, log)
            value = tl.where(near, 0.5 + 0.5 * excess, value)
            added = tl.where(near, 0.5 * excess, added)
            halves = tl.where(near, 0.5, tl.full(x.shape, 0.0, dtype))
            if not EVEN:
                halves = tl.where(inside[None, :], halves, 0.0)
            norm += _neighbours(halves, VEC)
        if not EVEN:
            added = tl.where(inside[None, :], added, 0.0)
        norm += _neighbours(added.to(tl.float64), VEC)
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
    input, center, norms, rows, upstream, order, class_begin, own_sums, all_sums, factor_sums, unit_stride,
    column_stride, upstream_stride, classes, M: tl.constexpr, ALIGN: tl.constexpr, CONTIGUOUS: tl.constexpr,
    DTYPE: tl.constexpr, FAST: tl.constexpr, CENTROID_TO_SAMPLE: tl.constexpr, WITH_OWN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums over the rows of one class, in the order of the batch.

    To `own_sums` [C, M] those of own_factor p; to `all_sums` [C, M] those of beta p, for centroid_to_sample of beta log
    a; to `factor_sums` [2, C] those of own_factor and beta. own_factor is alpha, for sample_to_centroid alpha - beta /
    C: the own class is one of those that G sums over. Without WITH_OWN a class is any set of rows, and only `all_sums`
    and the sums of beta are written.
    """
    c = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = k < M
    begin = tl.load(class_begin + c)
    end = tl.load(class_begin + c + 1)
    inverse_classes = 1.0 / _all_classes(norms, classes) if WITH_OWN else 0.0
    own = tl.full([ROWS, COLUMNS], 0.0, tl.float64)
    total = tl.full([ROWS, COLUMNS], 0.0, tl.float64)
    own_factors = tl.full([ROWS], 0.0, tl.float64)
    betas = tl.full([ROWS], 0.0, tl.float64)
    for first in range(begin, end, ROWS):
        i = first + tl.arange(0, ROWS)
        live = i < end
        row = tl.load(order + i, mask=live, other=0)
        of_row = rows + row * STATS
        scale = tl.load(of_row + SCALE, mask=live, other=0.0).to(DTYPE)
        shift = tl.load(of_row + SHIFT, mask=live, other=0.0).to(DTYPE)
        kind = _least_kind(tl.load(of_row + ROW_KIND, mask=live, other=SOFTMAX))
        inverse_norm = _share(tl.load(of_row + INVERSE_NORM, mask=live, other=0.0), shift, kind)
        own_factor = tl.load(of_row + BY_CONCENTRATION, mask=live, other=0.0)
        beta = tl.load(of_row + BY_SEPARATION, mask=live, other=0.0)
        if upstream is not None:
            factor = tl.load(upstream + row * upstream_stride, mask=live, other=0.0).to(tl.float64)
            own_factor *= factor
            beta *= factor
        if WITH_OWN and not CENTROID_TO_SAMPLE:
            own_factor -= beta * inverse_classes
        x = _load_features(
            input, center, row, live, 0, k, inside, unit_stride, column_stride, DTYPE, ALIGN, CONTIGUOUS, False
        )
        x = tl.where(inside[None, :], x, shift[:, None])
        value, log, _, _ = _activate_as(x, scale[:, None], shift[:, None], kind, FAST)
        value = value.to(tl.float64)
        if WITH_OWN:
            own += (own_factor * inverse_norm)[:, None] * value
        if CENTROID_TO_SAMPLE:
            total += tl.where(live[:, None], beta[:, None] * log.to(tl.float64), 0.0)
        else:
            total += (beta * inverse_norm)[:, None] * value
        own_factors += own_factor
        betas += beta
    if WITH_OWN:
        tl.store(own_sums + c * M + k, tl.sum(own, axis=0), mask=inside)
    tl.store(all_sums + c * M + k, tl.sum(total, axis=0), mask=inside)
    if tl.program_id(1) == 0:
        if WITH_OWN:
            tl.store(factor_sums + c, tl.sum(own_factors, axis=0))
        tl.store(factor_sums + classes + c, tl.sum(betas, axis=0))


@triton.jit(do_not_specialize=["unit_stride", "column_stride", "classes", "lr", "momentum", "weight_decay"])
def centroid_grad_kernel(
    logits, norms, own_sums, all_sums, factor_sums, totals, grad, momentum_buffer, class_begin, unit_stride,
    column_stride, classes, lr, momentum, weight_decay, M: tl.constexpr, ALIGN: tl.constexpr, CONTIGUOUS: tl.constexpr,
    CENTROID_TO_SAMPLE: tl.constexpr, GIVEN: tl.constexpr, NESTEROV: tl.constexpr, COLUMNS: tl.constexpr,
    CLASSES: tl.constexpr,
):  # fmt: skip
    """d loss / d xi [C, M], one class a program, from class_sums_kernel's sums and their `totals` [M] over classes.

    GIVEN: `totals` [M + 1] are not of these sums, and the last of them is the sum of beta. Without `grad` it goes into
    a step of torch.optim.SGD on `logits` and, where there is one, `momentum_buffer`, both [C, M] and contiguous.
    """
    dtype: tl.constexpr = logits.dtype.element_ty
    c = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    live = c < classes
    kind = tl.load(norms + tl.program_id(0) * RECORD + CLASS_KIND)
    shift = tl.load(norms + c * RECORD + CLASS_SHIFT).to(dtype)
    inverse_norm = _share(tl.exp(-tl.load(norms + c * RECORD + LOG_NORM)), shift, kind)
    own_factor = tl.load(factor_sums + c)
    beta = tl.load(factor_sums + classes + c)
    inverse_classes = 1.0 / _all_classes(norms, classes)
    if GIVEN:
        beta_sum = tl.load(totals + M)
    else:
        parts = tl.full([CLASSES], 0.0, tl.float64)
        for start in range(0, classes, CLASSES):
            v = start + tl.arange(0, CLASSES)
            parts += tl.load(factor_sums + classes + v, mask=v < classes, other=0.0)
        beta_sum = tl.sum(parts, axis=0)
    mean = tl.full([1], 0.0, tl.float64)
    # sample_to_centroid: slope (q (own_factor + beta_sum / C) - own - totals / C). centroid_to_sample:
    # slope ((1 / C) q (s - sum_k q s) - own + own_factor q), s = sum over the rows of other classes of
    # beta_i (log q_c - log p_i), up to what is constant along the row.
    PASSES: tl.constexpr = 2 if CENTROID_TO_SAMPLE else 1
    for step in tl.static_range(PASSES):
        for start in range(0, M, COLUMNS):
            k = start + tl.arange(0, COLUMNS)
            inside = k < M
            x = _load_features(
                logits, None, c, live, 0, k, inside, unit_stride, column_stride, dtype, ALIGN, CONTIGUOUS, False
            )
            shifted = tl.where(inside[None, :], x, shift[:, None])
            value, log, slope, _ = _activate_as(shifted, tl.full([1, 1], 1.0, dtype), shift[:, None], kind, False)
            q = value.to(tl.float64) * inverse_norm[:, None]
            own = _load_rows(own_sums, c * M, k, inside, False)
            total = _load_vector(totals, k, inside, 1, False)
            if CENTROID_TO_SAMPLE:
                s = (beta_sum - beta)[:, None] * log.to(tl.float64)
                s -= total - _load_rows(all_sums, c * M, k, inside, False)
                if step == 0:
                    mean += tl.sum(tl.where(inside[None, :], q * s, 0.0), axis=1)
                by_log = inverse_classes * q * (s - mean[:, None]) - (own - own_factor[:, None] * q)
            else:
                by_log = (own_factor[:, None] + inverse_classes * beta_sum) * q - (own + inverse_classes * total)
            if step == PASSES - 1:
                g = (slope.to(tl.float64) * by_log).to(dtype)
                at = (c * M)[:, None] + k[None, :]
                if grad is not None:
                    tl.store(grad + at, g, mask=inside[None, :])
                else:
                    # A row whose terms are not finite has a beta that is not: such a batch moves nothing, nor does one
                    # without a row that counts.
                    counted = tl.load(class_begin + classes) - tl.load(class_begin)
                    counted = tl.where(beta_sum - beta_sum == 0.0, counted, 0)
                    moved = (inside & (tl.full([COLUMNS], 0, tl.int64) + counted > 0))[None, :]
                    g += _double(weight_decay).to(dtype) * x
                    if momentum_buffer is not None:
                        keep = _double(momentum).to(dtype)
                        average = keep * tl.load(momentum_buffer + at, mask=inside[None, :], other=0.0) + g
                        g = g + keep * average if NESTEROV else average
                    # A small tile has copies of its elements in several threads: all have read when one overwrites.
                    tl.debug_barrier()
                    tl.store(logits + at, x - _double(lr).to(dtype) * g, mask=moved)
                    if momentum_buffer is not None:
                        tl.store(momentum_buffer + at, average, mask=moved)
