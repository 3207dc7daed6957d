"""What the Triton kernels are made of: constants, activations, loads, and sums along rows.

The formulas are those of csrc/ncmi_math.h and docs/maths.md; the statistics of a row and of the centroids
mean what csrc/layout.h says.

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
STATS = tl.constexpr(8)
SCALE = tl.constexpr(0)
INVERSE_LENGTH = tl.constexpr(1)
ROW_KIND = tl.constexpr(2)
SHIFT = tl.constexpr(3)  # the largest z - c, where log a is relative to that; else 0
INVERSE_NORM = tl.constexpr(4)
OWN_MEAN = tl.constexpr(5)
ALL_MEAN = tl.constexpr(6)
OWN_PRIOR = tl.constexpr(7)

# Columns of `coefficients`, csrc/layout.h Coefficients.
COEFFICIENTS = tl.constexpr(4)
OWN = tl.constexpr(0)
OTHER = tl.constexpr(1)
SHARE = tl.constexpr(2)
CONSTANT = tl.constexpr(3)

# Columns of `norms`, csrc/layout.h ClassStats: a record a class, then one of all with the last two of these.
RECORD = tl.constexpr(9)
RECORD_BLOCK = tl.constexpr(16)  # the power of two that holds one
LOG_NORM = tl.constexpr(0)
CLASS_SHIFT = tl.constexpr(1)
CLASS_KIND = tl.constexpr(2)
LONE = tl.constexpr(3)  # for the CPU; the rows that it tells are read here like others
PRIOR = tl.constexpr(8)
WEIGHT_SUM = tl.constexpr(0)
WEIGHTED_LOG_NORM = tl.constexpr(1)
REFERENCE_SUM = tl.constexpr(2)

CLASS_WEIGHTS = tl.constexpr(2)  # columns of `class_weights`, csrc/layout.h ClassWeights: other, base

# Stages of what needs sums over the batch.
WHOLE = tl.constexpr(0)  # each program forms them itself, over all rows
PARTIAL = tl.constexpr(1)  # each writes those of its rows
LAST = tl.constexpr(2)  # each adds up what PARTIAL wrote


# ----------------------------------------------------------------------------------------------------------------------
# Numbers
# ----------------------------------------------------------------------------------------------------------------------


@triton.jit
def double(bits):
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """To the nearest of DTYPE; the interpreter would cut bfloat16 off."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return bits.to(tl.float32, bitcast=True).to(DTYPE)
    else:
        return x.to(DTYPE)


@triton.jit
def exp_minus(x):
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
def near_zero(y):
    """T = 2 sigma - 1 and log 2 sigma at f = 2 y, |f| <= 1.

    T = tanh y and log 2 sigma = y - log cosh y, from minimax polynomials in y^2 with relative errors under 5e-8: both
    are small with small errors, so the pair is consistent without being made so. Divergences are of the order y^2 of
    log cosh y, so its 1/2 is exact.
    """
    w = y * y
    t = 0.0172414882 * w - 0.0530454929
    t = t * w + 0.133258789
    t = t * w - 0.333331439
    c = -0.00580790453 * w + 0.0220917389
    c = c * w - 0.0833280832
    c = c * w + 0.5
    return t * (y * w) + y, y - c * w


@triton.jit
def opaque(x):
    """A number that the compiler does not know to be `x`: what is computed of it is computed again, not kept."""
    if INTERPRETED:
        return x
    elif x.dtype == tl.float64:
        return tl.inline_asm_elementwise("mov.b64 $0, $1;", "=d,d", [x], dtype=tl.float64, is_pure=False, pack=1)
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=False, pack=1)


# ----------------------------------------------------------------------------------------------------------------------
# Activations
# ----------------------------------------------------------------------------------------------------------------------


@triton.jit
def activate(x, scale, shift, KIND: tl.constexpr, FAST: tl.constexpr):
    """Value a, log (log a, of NSF log 2 a), slope d log a / d f and value * slope, of f = x scale.

    `scale` and `shift` are [ROWS, 1]. The shift of SOFTMAX is the largest x, and a is relative to it: e^((x - shift)
    scale). That of SHIFTED is 0, or the largest x where a is sigma e^-max(f) / 2, and then these values are of 2 a: see
    `share_of`. Other kinds do not look at it.
    """
    if KIND == NEAR:
        t, log = near_zero(x * (0.5 * scale))
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
        small = tl.exp2(size * -LOG2_E) if FAST else exp_minus(size)
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
                u = 1.0 + small * tl.where(shifted, exp_minus(-shift * scale), 1.0)
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
def share_of(inverse_norm, shift, kind):
    """What times a value of `activate` is p: half of `inverse_norm` [ROWS] where that value is of 2 a."""
    half = tl.where(kind == SHIFTED, 0.5, 1.0)
    return tl.where(shift != 0.0, half * inverse_norm, inverse_norm)


@triton.jit
def activate_for_sums(x, scale, shift, KIND: tl.constexpr, FAST: tl.constexpr):
    """a and its log. Of rows far below zero all columns may round alike: there a is of the rounded log."""
    value, log, _, _ = activate(x, scale, shift, KIND, FAST)
    if KIND == SHIFTED:
        value = tl.where(shift != 0.0, 0.5 * value, value) if FAST else 0.5 * exp_minus(-log)
    return value, log


@triton.jit
def least_kind(kinds):
    """What the backward passes compute rows of these kinds as, float64 as the statistics hold them."""
    least = tl.min(kinds, axis=0)
    return tl.where((least == NEAR) | (least == SOFTMAX), least, SHIFTED).to(tl.int32)


@triton.jit
def activate_as(x, scale, shift, kind, FAST: tl.constexpr):
    """`activate` as `kind`, a number on the device."""
    if kind == SOFTMAX:
        value, log, slope, value_slope = activate(x, scale, shift, SOFTMAX, FAST)
    elif kind == NEAR:
        value, log, slope, value_slope = activate(x, scale, shift, NEAR, FAST)
    else:
        value, log, slope, value_slope = activate(x, scale, shift, SHIFTED, FAST)
    return value, log, slope, value_slope


# ----------------------------------------------------------------------------------------------------------------------
# Loads
# ----------------------------------------------------------------------------------------------------------------------


@triton.jit
def load_vector(pointer, k, inside, ROWS: tl.constexpr, EVEN: tl.constexpr):
    """A vector [ROWS, N] that is the same in all rows; 0 past its end."""
    # Each row loads it, from the cache: a single one would come in another layout and be handed around by shuffles.
    pointers = pointer + (tl.full([ROWS], 0, tl.int32)[:, None] + k[None, :])
    if EVEN:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=inside[None, :], other=0.0)


@triton.jit
def load_rows(pointer, row, k, inside, EVEN: tl.constexpr):
    """Rows [rows, N] that start at the offsets `row`; 0 past their end."""
    pointers = pointer + row[:, None] + k[None, :]
    if EVEN:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=inside[None, :], other=0.0)


@triton.jit
def load_features(
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
        x -= load_vector(center + at, k, inside, row.shape[0], EVEN)
    return x


@triton.jit
def checked(target, row, stride, ignore_index, classes, B):
    """Classes that are safe to read, which rows count, and which of their classes are out of range."""
    y = tl.load(target + row * stride, mask=row < B, other=0)
    live = (row < B) & (y != ignore_index)
    inside = (y >= 0) & (y < classes)
    return tl.where(live & inside, y, 0), live, live & (inside == 0)


@triton.jit
def load_coefficients(coefficients, row, live, upstream, upstream_stride):
    """Own, other, share and constant, times the upstream gradient; 0 in rows that are not `live`."""
    of_row = coefficients + row * COEFFICIENTS
    own = tl.load(of_row + OWN, mask=live, other=0.0)
    other = tl.load(of_row + OTHER, mask=live, other=0.0)
    share = tl.load(of_row + SHARE, mask=live, other=0.0)
    constant = tl.load(of_row + CONSTANT, mask=live, other=0.0)
    if upstream is not None:
        factor = tl.load(upstream + row * upstream_stride, mask=live, other=0.0).to(tl.float64)
        own *= factor
        other *= factor
        share *= factor
        constant *= factor
    return own, other, share, constant


@triton.jit
def store_coefficients(pointer, row, B, live, coefficients):
    """To `pointer` [B, 4]; zeros in rows that do not count."""
    own, other, share, constant = coefficients
    of_row = pointer + row * COEFFICIENTS
    tl.store(of_row + OWN, tl.where(live, own, 0.0), mask=row < B)
    tl.store(of_row + OTHER, tl.where(live, other, 0.0), mask=row < B)
    tl.store(of_row + SHARE, tl.where(live, share, 0.0), mask=row < B)
    tl.store(of_row + CONSTANT, tl.where(live, constant, 0.0), mask=row < B)


# ----------------------------------------------------------------------------------------------------------------------
# Sums along rows
# ----------------------------------------------------------------------------------------------------------------------


@triton.jit
def _add3(a0, b0, c0, a1, b1, c1):
    return a0 + a1, b0 + b1, c0 + c1


@triton.jit
def _add4(a0, b0, c0, d0, a1, b1, c1, d1):
    return a0 + a1, b0 + b1, c0 + c1, d0 + d1


@triton.jit
def sums3(a, b, c):
    """Sums along rows: in one go, so that threads meet once."""
    if INTERPRETED:
        return tl.sum(a, axis=1), tl.sum(b, axis=1), tl.sum(c, axis=1)
    else:
        return tl.reduce((a, b, c), 1, _add3)


@triton.jit
def sums4(a, b, c, d):
    if INTERPRETED:
        return tl.sum(a, axis=1), tl.sum(b, axis=1), tl.sum(c, axis=1), tl.sum(d, axis=1)
    else:
        return tl.reduce((a, b, c, d), 1, _add4)


@triton.jit
def neighbours(value, VEC: tl.constexpr):
    """Sums of VEC neighbours, float64 from there: a conversion for each element is too dear."""
    groups: tl.constexpr = value.shape[1] // VEC
    return tl.sum(tl.reshape(value, [value.shape[0], groups, VEC]), axis=2).to(tl.float64)


# ----------------------------------------------------------------------------------------------------------------------
# Rows' sums to terms, terms to coefficients
# ----------------------------------------------------------------------------------------------------------------------


@triton.jit
def terms_of(
    kind, norm, own, total, own_cross, own_log_norm, own_prior, norms, classes, CENTROID_TO_SAMPLE: tl.constexpr
):  # fmt: skip
    """A, G, 1 / S and the means under p: KL divergences as differences of logarithms, then of log-normalisers.

    `total` of rows of NEAR is without the sum of the reference.
    """
    reference_sum = tl.load(norms + classes * RECORD + REFERENCE_SUM)
    total -= tl.where(kind == NEAR, reference_sum if CENTROID_TO_SAMPLE else 0.5 * reference_sum, 0.0)
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
        separation += (own_cross * tl.exp(-own_log_norm) - own_gap) * own_prior
    else:
        separation = all_mean - (log_norm - weighted_log_norm) - concentration * own_prior
    # Divergences are not negative; their rounding may be. NaN stays.
    concentration = tl.where(concentration < 0.0, 0.0, concentration)
    separation = tl.where(separation < 0.0, 0.0, separation)
    return concentration, separation, inverse_norm, own_mean, all_mean


@triton.jit
def ratio_of(concentration, separation, eps, sharpness, SOFT: tl.constexpr):
    """r = A / (G + eps), with SOFT log(1 + r^sharpness) / sharpness, and its derivatives by A and by G."""
    inverse = 1.0 / (separation + eps)
    value = concentration * inverse
    by_concentration = inverse
    by_separation = -(value * inverse)
    if SOFT:
        r = tl.where(value < 1e-100, 1e-100, value)
        u = sharpness * tl.log(r)
        e = tl.exp(-tl.abs(u))
        share = tl.where(u < 0.0, e, 1.0) / (1.0 + e)
        share = tl.where(value < 1e-100, 0.0, share)  # on its centroid: as in csrc/ncmi_math.h
        rounded = 1.0 + e
        log_one_plus = tl.where(rounded == 1.0, e, tl.log(rounded) * (e / (rounded - 1.0)))
        value = (tl.where(u > 0.0, u, 0.0) + log_one_plus) / sharpness + (u - u)  # NaN stays
        by_concentration = share * inverse / r
        by_separation = -(share * inverse)
    return value, by_concentration, by_separation


@triton.jit
def coefficients_of(
    own_mean, all_mean, own_prior, by_concentration, by_separation, CENTROID_TO_SAMPLE: tl.constexpr,
    FOCUS: tl.constexpr,
):  # fmt: skip
    """Own, other, share and constant of rows, from the derivatives of the loss by their terms, as in csrc/rows.h."""
    zero = tl.full(own_mean.shape, 0.0, tl.float64)
    share = zero if FOCUS else by_separation * own_prior
    other = by_separation * (1.0 - own_prior) if FOCUS else by_separation
    if CENTROID_TO_SAMPLE:
        return by_concentration, other, share, by_concentration * own_mean
    else:
        own = by_concentration - share
        return own, other, zero, own * own_mean + other * all_mean
