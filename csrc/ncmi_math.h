// The scalar formulas of NCMI, written once for both C++ backends (Triton has its own).
//
// Everything here is plain arithmetic on one element: no memory, no loops over rows, no library type. The
// CPU kernels inline these functions into loops that the compiler vectorises for several instruction sets; a
// device compiler can inline the same ones into its kernels.
//
// Notation (arXiv 2601.02543, docs/maths.md): f is a centred, scaled feature, sigma the logistic
// function, p = sigma(f) / S with S = sum_k sigma(f_k) the normalised sigmoid (NSF), q_y the own-class centroid.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#define NCMI_INLINE static __host__ __device__ __forceinline__
#define NCMI_INLINE_MEMBER __host__ __device__ __forceinline__
#else
#define NCMI_INLINE static inline __attribute__((always_inline))
#define NCMI_INLINE_MEMBER inline __attribute__((always_inline))
#endif

namespace ncmi {

template <class To, class From>
NCMI_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs types of one size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

template <class T>
inline constexpr T kLargest = T(0);
template <>
inline constexpr float kLargest<float> = 3.4028234e38f;
template <>
inline constexpr double kLargest<double> = 1.7976931348623157e308;

constexpr double kSmallestLength = 1e-12;  // as torch.nn.functional.normalize

NCMI_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
NCMI_INLINE constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
NCMI_INLINE constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

// They order as the magnitudes do, and no NaN gets lost among them.
NCMI_INLINE uint32_t magnitude_bits(float x) { return bit_cast<uint32_t>(x) & 0x7fffffffu; }
NCMI_INLINE uint64_t magnitude_bits(double x) { return bit_cast<uint64_t>(x) & 0x7fffffffffffffffu; }

// ---------------------------------------------------------------------------------------------------------
// Elementary functions. The float versions are branch-free so that a loop over them vectorises.
// ---------------------------------------------------------------------------------------------------------

NCMI_INLINE float absolute(float x) { return bit_cast<float>(magnitude_bits(x)); }
NCMI_INLINE double absolute(double x) { return fabs(x); }

// e^-x for x >= 0. Past 86.5 the result is 0: no denormals, and rows that small are rescaled by their maximum before
// it matters. The bound is an integer minimum (non-negative floats order as integers), which no compiler turns into a
// branch; it sends NaN there too, so callers see to NaN themselves.
// Relative error under 1 ulp: -x = n ln 2 + r, e^r = 1 + r + r^2 Q(r), Q minimax (3e-9) on |r| <= ln(2) / 2.
NCMI_INLINE float exp_minus(float x) {
  const float kRoundToInt = 12582912.0f;  // 1.5 * 2^23: adding it leaves round(x) in the low mantissa bits
  const uint32_t bits = bit_cast<uint32_t>(x);
  x = bit_cast<float>(bits < 0x42ad0000u ? bits : 0x42ad0000u);  // 86.5
  const float shifted = kRoundToInt - x * 1.44269504f;
  const float n = shifted - kRoundToInt;
  float r = -x - n * 0.693145751953125f;  // ln 2 in two parts, the first short enough that n times it is exact
  r = r - n * 1.42860682e-6f;
  float q = 1.39506030e-3f;
  q = q * r + 8.36895350e-3f;
  q = q * r + 4.16662041e-2f;
  q = q * r + 1.66665183e-1f;
  q = q * r + 5.00000010e-1f;
  const float y = (q * (r * r) + r) + 1.0f;
  const uint32_t result = bit_cast<uint32_t>(y) + (bit_cast<uint32_t>(shifted) << 23);  // y * 2^n
  return bit_cast<float>(bits < 0x42ad0000u ? result : 0u);
}
NCMI_INLINE double exp_minus(double x) { return exp(-x); }

// log(u / 2) for u in [1, 2]. s = u / 2 - 1 is exact there, so this is the logarithm of the rounded u itself, and
// near u = 2, that is f = 0, it is small with a small error. log(1 + s) = s + s^2 R(s), R minimax on [-1/2, 0],
// relative error 4e-9: below what rounding the result costs.
NCMI_INLINE float log_half(float u) {
  const float s = u * 0.5f - 1.0f;
  // Even and odd powers apart: half the chain of dependent operations. Measured with AVX2, no faster and no slower.
  const float w = s * s;
  float even = -1.74594502f;
  float odd = -2.48232513f;
  even = even * w - 1.97671632f;
  odd = odd * w - 0.595368491f;
  even = even * w - 0.341047529f;
  odd = odd * w + 0.175690033f;
  even = even * w - 0.251888541f;
  odd = odd * w + 0.333262151f;
  even = even * w - 0.500000917f;
  return (odd * s + even) * w + s;
}
NCMI_INLINE double log_half(double u) { return log1p(u * 0.5 - 1.0); }

// 1 / u for u in [1, 2], to an ulp. On a GPU the hardware's approximation and one Newton step: a division there
// provides for denormals.
NCMI_INLINE float reciprocal(float u) {
#if defined(__CUDA_ARCH__)
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(u));
  return r + r * (1.0f - u * r);
#else
  return 1.0f / u;
#endif
}
NCMI_INLINE double reciprocal(double u) { return 1.0 / u; }

// The hardware's approximations, where there are any: errors of about 2^-22, relative but for log2_fast near 1.
NCMI_INLINE float exp2_fast(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}
NCMI_INLINE float log2_fast(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return log2f(x);
#endif
}
NCMI_INLINE float reciprocal_fast(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}

// ---------------------------------------------------------------------------------------------------------
// Activations: an unnormalised probability, its logarithm, and the slope that multiplies its gradient.
//
// The logarithm of NSF is taken of 2 a, so that f = 0 has logarithm 0: with features of length one f is near 0, and
// everything is made of differences of these logarithms, where a constant drops out but its rounding would not.
// ---------------------------------------------------------------------------------------------------------

template <class T>
struct Activation {
  T value;        // a, with p = a / sum a
  T log;          // log a, or log 2 a for NSF
  T slope;        // d log a / d f: 1 - sigma for NSF, 1 for softmax
  T value_slope;  // a * slope
};

// NSF: a = sigma(f). sigma and log sigma come from the same rounded u = 1 + e^-|f|, so that they are an exact
// pair of a slightly moved f: KL divergences between nearby distributions are of second order in log p - log q,
// and an inconsistent pair would enter them in first order.
template <class T>
NCMI_INLINE Activation<T> nsf(T f) {
  const T e = exp_minus(absolute(f));
  const T u = T(1) + e;
  const T r = reciprocal(u);
  const T er = e * r;
  const bool negative = f < T(0);
  return {negative ? er : r, (negative ? f : T(0)) - log_half(u), negative ? r : er, er * r};
}

// NSF for inputs of 16 bits, whose own rounding is far above what the approximations are off by.
NCMI_INLINE Activation<float> nsf_fast(float f) {
  const float e = exp2_fast(absolute(f) * -1.44269504f);
  const float u = 1.0f + e;
  const float r = reciprocal_fast(u);
  const float er = e * r;
  const bool negative = f < 0.0f;
  return {negative ? er : r, (negative ? f : 0.0f) - log2_fast(0.5f * u) * 0.693147181f, negative ? r : er, er * r};
}

// NSF near the centre of the sigmoid, from y = f / 2: neither exponential nor division. With t = tanh y,
// 2 sigma = 1 + t and log 2 sigma = y - log cosh y, both from polynomials in y^2, minimax with relative errors under
// 7e-9. Both results are small with small errors, so the pair is consistent without being made so, and sums can take
// t in place of sigma. Features of length one are here: they are about M^-1/2.
struct NearActivation {
  float excess;  // t = 2 sigma - 1
  float log;     // log 2 sigma
};

// |f| <= 1
NCMI_INLINE NearActivation nsf_near(float y) {
  const float w = y * y;
  float t = -6.61897360e-3f;
  t = t * w + 2.12782250e-2f;
  t = t * w - 5.38941997e-2f;
  t = t * w + 1.33329091e-1f;
  t = t * w - 3.33333244e-1f;
  float c = 1.78481136e-3f;
  c = c * w - 6.66228858e-3f;
  c = c * w + 2.22149416e-2f;
  c = c * w - 8.33331100e-2f;
  c = c * w + 0.5f;
  return {t * (y * w) + y, y - c * w};
}

// |f| <= 1/4. What log cosh y is off by, divergences are as well, however small beside log 2 sigma: it is of their order,
// y^2. So its 1/2 is exact, and the rest relative to y^2 off by 1e-9.
NCMI_INLINE float log_cosh_nearest(float w) {
  const float c = 2.20763310e-2f * w - 8.33326280e-2f;
  return (c * w + 0.5f) * w;
}
NCMI_INLINE NearActivation nsf_nearest(float y) {
  const float w = y * y;
  const float t = 1.32077663e-1f * w - 3.33325995e-1f;
  return {t * (y * w) + y, y - log_cosh_nearest(w)};
}

// What their gradients need: log 2 sigma, and 1 - t^2 = sech^2 y, for which t itself is not needed where y is small.
struct NearSlope {
  float slope;
  float log;
};
NCMI_INLINE NearSlope nsf_near_slope(float y) {
  const NearActivation a = nsf_near(y);
  return {1.0f - a.excess * a.excess, a.log};
}
NCMI_INLINE NearSlope nsf_nearest_slope(float y) {
  const float w = y * y;
  return {(0.660809714f * w + -0.999988603f) * w + 1.0f, y - log_cosh_nearest(w)};
}

// log(1 + s) for s in [0, e^-2]: s + s^2 R(s), R minimax, relative error 2e-9.
NCMI_INLINE float log_one_plus(float s) {
  float r = -0.120730922f;
  r = r * s + 0.1937401f;
  r = r * s + -0.249600187f;
  r = r * s + 0.333322108f;
  r = r * s + -0.499999911f;
  return r * (s * s) + s;
}
NCMI_INLINE double log_one_plus(double s) { return log1p(s); }

// (shift - x) * scale for x <= shift, the largest x of a row: exactly 0 there, which max(f) - f is not where the
// product f = x * scale is contracted into the subtraction; and finite, as 0 times it has to be 0.
template <class T>
NCMI_INLINE T below_largest(T x, T scale, T shift) {
  const T below = absolute((shift - x) * scale);  // zero without a sign, for exp_minus
  return below < kLargest<T> ? below : kLargest<T>;
}

// NSF of a row in which every f <= kShifted: sigma(f) e^-max(f) / 2, and the logarithm of twice that. Far below zero
// log 2 sigma lies on a grid that is coarse beside that of sigma, where it rounds alike in all columns, and at last
// sigma underflows. The logarithms of here are small, and a is formed from what they are rounded to.
constexpr double kShifted = -2.0;

template <class T>
NCMI_INLINE Activation<T> nsf_shifted(T x, T scale, T shift) {
  const T e = exp_minus(absolute(x * scale));
  const T minus_log = below_largest(x, scale, shift) + log_one_plus(e);
  const T value = T(0.5) * exp_minus(minus_log), slope = reciprocal(T(1) + e);
  return {value, -minus_log, slope, value * slope};
}

// Whether rows of that kind can be among those with this sum of sigma over `columns` of them: only where it is under
// sigma(kShifted), and a little more for rounding, times columns.
NCMI_INLINE bool may_be_shifted(double sum, int64_t columns) { return !(sum > 0.1193 * double(columns)); }

// Softmax, the ablation: a = e^(f - max f).
template <class T>
NCMI_INLINE Activation<T> softmax(T x, T scale, T shift) {
  const T below = below_largest(x, scale, shift);
  const T value = exp_minus(below);
  return {value, -below, T(1), value};
}

// ---------------------------------------------------------------------------------------------------------
// Loss: from the concentration A_i and the separation G_i of a row, and from their weighted means.
// ---------------------------------------------------------------------------------------------------------

// Divergences are not negative; their rounding may be. NaN stays.
NCMI_INLINE double not_negative(double divergence) { return divergence < 0 ? 0 : divergence; }

struct RatioOptions {
  double eps;
  double sharpness;  // of the soft margin; 0: none
};

struct Ratio {
  double value;            // r = A / (G + eps), or log(1 + r^sharpness) / sharpness
  double d_concentration;  // d value / d A
  double d_separation;     // d value / d G
};

// Of which a logarithm is taken. A sample with less is on its centroid: a sharpness under 1 would make a pull of what
// rounding leaves of its gradient.
constexpr double kSmallestRatio = 1e-100;

NCMI_INLINE Ratio ratio(double concentration, double separation, const RatioOptions& by) {
  const double inverse = 1.0 / (separation + by.eps);
  const double value = concentration * inverse;
  if (by.sharpness == 0) return {value, inverse, -value * inverse};
  const double r = value < kSmallestRatio ? kSmallestRatio : value;
  const double u = by.sharpness * ::log(r), e = ::exp(-fabs(u));
  // r^sharpness / (1 + r^sharpness)
  const double share = value < kSmallestRatio ? 0.0 : (u < 0 ? e : 1.0) / (1.0 + e);
  return {((u > 0 ? u : 0.0) + ::log1p(e)) / by.sharpness + (u - u), share * inverse / r, -share * inverse};
}

// ---------------------------------------------------------------------------------------------------------
// Gradients with respect to f_j, before the upstream gradient and the chain rule of scaling, by the Coefficients of a
// row (layout.h) times the same factor.
// ---------------------------------------------------------------------------------------------------------

// Sample to centroid: (1 - sigma_j) p_j [own (log a_j - log a_j(xi_y)) + other (log a_j - reference_j) - constant].
// Written with all_j = log a_j - reference_j and gap_j = reference_j - log a_j(xi_y) it takes own + other, which near a
// minimum is small beside either: it is formed once, in double. The gap has no rounding of log a.
template <class T>
NCMI_INLINE T sample_gradient(T slope_p, T all, T gap, T own_and_other, T own, T constant) {
  return slope_p * (own_and_other * all + (own * gap - constant));
}

// Centroid to sample: (1 - sigma_j) {p_j [own (log a_j - log a_j(xi_y)) - constant] + other (p_j - q_j) +
// share (q_yj - p_j)}, where q is the mean of the centroids, or a mixture of them.
template <class T>
NCMI_INLINE T centroid_gradient(T slope, T p, T gap, T q, T q_own, T own, T constant, T other, T share) {
  return slope * (p * (own * gap - constant) + (other * (p - q) + share * (q_own - p)));
}

}  // namespace ncmi
