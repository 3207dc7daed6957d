// How a row is activated, and the terms that its sums give: what the loops of the CPU and of CUDA have in common.
#pragma once

#include "layout.h"

namespace ncmi {

// kNsfNear, kNsfNearest: a row with every |f| <= 1, <= 1/4, float only. kNsfShifted: one with every f <= kShifted.
// kNsfMostlyNear: no row, but a stretch of one (cpu/activation.h).
enum class Kind { kNsf, kNsfNear, kNsfNearest, kNsfShifted, kSoftmax, kNsfMostlyNear };

// As the statistics hold it; any kind for what is none.
NCMI_INLINE Kind kind_of(double kind) {
  return kind >= 0 && kind <= double(Kind::kSoftmax) ? Kind(int(kind)) : Kind::kNsf;
}

constexpr double kNear = 1.0, kNearest = 0.25;

template <class T>
NCMI_INLINE bool is_small(T f) {
  return absolute(f) <= T(kNear);
}

NCMI_INLINE constexpr bool is_near(Kind kind) { return kind == Kind::kNsfNear || kind == Kind::kNsfNearest; }

template <class T>
inline constexpr bool kHasNear = sizeof(T) == sizeof(float);  // double has no near form

// The factor that takes x to the argument of the functions below.
template <Kind kind, class T>
NCMI_INLINE T argument_scale(double scale) {
  return T(is_near(kind) ? 0.5 * scale : scale);
}

template <Kind kind>
NCMI_INLINE NearActivation near(float y) {
  return kind == Kind::kNsfNear ? nsf_near(y) : nsf_nearest(y);
}

template <Kind kind>
NCMI_INLINE NearSlope near_slope(float y) {
  return kind == Kind::kNsfNear ? nsf_near_slope(y) : nsf_nearest_slope(y);
}

// `scale` is that of argument_scale. `fast`: for inputs of 16 bits, on a GPU.
template <Kind kind, bool fast = false, class T>
NCMI_INLINE Activation<T> activate(T x, T scale, T shift) {
  if constexpr (is_near(kind)) {
    const NearActivation a = near<kind>(x * scale);
    return {T(0.5) + T(0.5) * a.excess, a.log, T(0.5) - T(0.5) * a.excess, T(0.25) * (T(1) - a.excess * a.excess)};
  } else if constexpr (kind == Kind::kNsfMostlyNear) {
    const Activation<T> a = nsf(x * scale), b = activate<Kind::kNsfNear>(x, T(0.5) * scale, shift);
    const bool small = is_small(x * scale);
    return {small ? b.value : a.value, small ? b.log : a.log, small ? b.slope : a.slope,
            small ? b.value_slope : a.value_slope};
  } else if constexpr (kind == Kind::kNsfShifted) {
    return nsf_shifted(x, scale, shift);
  } else if constexpr (kind == Kind::kSoftmax) {
    return softmax(x, scale, shift);
  } else if constexpr (fast) {
    return nsf_fast(x * scale);
  } else {
    return nsf(x * scale);
  }
}

// a, of that activation at x, in double: near, with the rounding of what is small in it.
template <Kind kind, class T>
NCMI_INLINE double wide_value(const Activation<T>& a, [[maybe_unused]] T x, [[maybe_unused]] T scale) {
  if constexpr (is_near(kind)) return 0.5 + 0.5 * double(near<kind>(x * scale).excess);
  return double(a.value);
}

// Calls f with the kind as a template argument.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable  // f may be of the device alone
#endif
template <class T, class F>
NCMI_INLINE auto with_kind(Kind kind, const F& f) {
  if (kind == Kind::kNsf) return f.template operator()<Kind::kNsf>();
  if constexpr (kHasNear<T>) {
    if (kind == Kind::kNsfNearest) return f.template operator()<Kind::kNsfNearest>();
    if (kind == Kind::kNsfNear) return f.template operator()<Kind::kNsfNear>();
  }
  if (kind == Kind::kNsfShifted) return f.template operator()<Kind::kNsfShifted>();
  return f.template operator()<Kind::kSoftmax>();
}

// The kind to try for a row with |f| up to `reach`; kNsf becomes kNsfShifted where no f is above kShifted.
template <class T, class R>
NCMI_INLINE Kind first_kind(bool is_softmax, R reach) {
  if (is_softmax) return Kind::kSoftmax;
  if (!kHasNear<T> || !(reach <= R(kNear))) return Kind::kNsf;
  return reach <= R(kNearest) ? Kind::kNsfNearest : Kind::kNsfNear;
}

// Of a row: the sum of its squares, and its largest magnitude.
template <class T>
struct Size {
  double squares;
  T largest;
};

// The sums of a row from which its terms and what the backward passes need are formed.
struct RowSums {
  double norm;       // S = sum a
  double own;        // sum a (log a - log a(xi_y))
  double all;        // sum a (log a - reference), or sum q_mean (log a - reference)
  double own_cross;  // sum a(xi_y) (log a - log a(xi_y)); centroid_to_sample only
};

struct RowTerms {
  double inverse_norm, own_mean, all_mean;
  double concentration, separation;
};

// KL divergences as differences of logarithms, then of log-normalisers: each difference apart.
template <class T>
NCMI_INLINE RowTerms terms_of(const Centroids<T>& q, int64_t y, const RowSums& sums) {
  const double log_norm = ::log(sums.norm), inverse_norm = 1.0 / sums.norm;
  const double own_mean = sums.own * inverse_norm, all_mean = sums.all * inverse_norm;
  const double own_gap = log_norm - q.of[y].log_norm;
  const double concentration = own_mean - own_gap;
  const double prior = q.of[y].prior;
  const double separation =
      q.centroid_to_sample ? (q.all().weight_sum * log_norm - q.all().weighted_log_norm) - sums.all +
                                 (sums.own_cross * ::exp(-q.of[y].log_norm) - own_gap) * prior
                           : all_mean - (log_norm - q.all().weighted_log_norm) - concentration * prior;
  return {inverse_norm, own_mean, all_mean, not_negative(concentration), not_negative(separation)};
}

// The coefficients of a row from the derivatives of the loss by its terms. `focus`: its separation is that from a
// reference of its own, in which the own class has no part.
NCMI_INLINE Coefficients coefficients_of(const RowStats& row, double by_concentration, double by_separation,
                                         bool centroid_to_sample, bool focus) {
  const double own_share = focus ? 0.0 : by_separation * row.own_prior;
  const double other = focus ? by_separation * (1.0 - row.own_prior) : by_separation;
  if (centroid_to_sample) return {by_concentration, other, own_share, by_concentration * row.own_mean};
  const double own = by_concentration - own_share;
  return {own, other, 0.0, own * row.own_mean + other * row.all_mean};
}

// The gradient of a row by z, but for what the chain rule of its length takes away.
template <bool centroid_to_sample, Kind kind, class T>
struct RowGradient {
  T s, shift, own, constant;
  T own_and_other;                                 // sample_to_centroid
  T other, share, inverse_norm, own_inverse_norm;  // centroid_to_sample

  // `inverse_norm_of_own`: 1 / sum_k a(xi_y)_k; centroid_to_sample only.
  NCMI_INLINE_MEMBER RowGradient(const RowStats& row, const Coefficients& c, double inverse_norm_of_own)
      : s(argument_scale<kind, T>(row.scale)), shift(T(row.shift)) {
    // For sample_to_centroid it also takes a to p, and near has the 1/4 of (1 - t^2) / 4.
    const double factor = row.scale * (centroid_to_sample ? 1.0 : (is_near(kind) ? 0.25 : 1.0) * row.inverse_norm);
    own = T(factor * c.own);
    constant = T(factor * c.constant);
    if constexpr (centroid_to_sample) {
      other = T(factor * c.other);
      share = T(factor * c.share);
      inverse_norm = T(row.inverse_norm);
      own_inverse_norm = T(inverse_norm_of_own);
    } else {
      own_and_other = T(factor * (c.own + c.other));
    }
  }

  // At x of a column. `reference`: what log a is compared with there, or for centroid_to_sample p.
  template <bool fast = false>
  NCMI_INLINE_MEMBER T at(T x, T own_log, [[maybe_unused]] T own_activation, T reference) const {
    if constexpr (centroid_to_sample) {
      const Activation<T> a = activate<kind, fast>(x, s, shift);
      return centroid_gradient(a.slope, a.value * inverse_norm, a.log - own_log, reference,
                               own_activation * own_inverse_norm, own, constant, other, share);
    } else {
      T value_slope, log;
      if constexpr (is_near(kind)) {
        const NearSlope a = near_slope<kind>(x * s);
        value_slope = a.slope;
        log = a.log;
      } else {
        const Activation<T> a = activate<kind, fast>(x, s, shift);
        value_slope = a.value_slope;
        log = a.log;
      }
      return sample_gradient(value_slope, log - reference, reference - own_log, own_and_other, own, constant);
    }
  }
};

}  // namespace ncmi
