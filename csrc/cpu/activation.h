// Row activation: which of the formulas, with the shift of the row where it needs one.
#pragma once

#include "lanes.h"

namespace ncmi::cpu {
namespace {

// kNsfNear, kNsfNearest: a row with every |f| <= 1, <= 1/4. kNsfShifted: one with every f <= kShifted.
// kNsfMostlyNear: no row, but a stretch of one (for_logits).
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

constexpr bool is_near(Kind kind) { return kind == Kind::kNsfNear || kind == Kind::kNsfNearest; }

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

// `scale` is that of argument_scale.
template <Kind kind, class T>
NCMI_INLINE Activation<T> activate(T x, T scale, T shift) {
  if constexpr (kind == Kind::kNsf) return nsf(x * scale);
  if constexpr (kind == Kind::kNsfShifted) return nsf_shifted(x, scale, shift);
  if constexpr (kind == Kind::kSoftmax) return softmax(x, scale, shift);
  if constexpr (is_near(kind)) {
    const NearActivation a = near<kind>(x * scale);
    return {T(0.5) + T(0.5) * a.excess, a.log, T(0.5) - T(0.5) * a.excess, T(0.25) * (T(1) - a.excess * a.excess)};
  }
  if constexpr (kind == Kind::kNsfMostlyNear) {
    const Activation<T> a = nsf(x * scale), b = activate<Kind::kNsfNear>(x, T(0.5) * scale, shift);
    const bool small = is_small(x * scale);
    return {small ? b.value : a.value, small ? b.log : a.log, small ? b.slope : a.slope,
            small ? b.value_slope : a.value_slope};
  }
}

// Calls f with the activation kind as a template argument.
template <class T, class F>
NCMI_INLINE auto with_kind(Kind kind, const F& f) {
  if constexpr (sizeof(T) == sizeof(float)) {  // double has no near form
    if (kind == Kind::kNsfNear) return f.template operator()<Kind::kNsfNear>();
    if (kind == Kind::kNsfNearest) return f.template operator()<Kind::kNsfNearest>();
  }
  if (kind == Kind::kNsfShifted) return f.template operator()<Kind::kNsfShifted>();
  if (kind == Kind::kSoftmax) return f.template operator()<Kind::kSoftmax>();
  return f.template operator()<Kind::kNsf>();
}

// How many are not small, NaN among them.
template <class T>
NCMI_INLINE int64_t count_large(const T* x, int64_t n) {
  int large = 0;
  NCMI_SIMD(reduction(+ : large))
  for (int64_t k = 0; k < n; ++k) large += is_small(x[k]) ? 0 : 1;
  return large;
}

// Calls f<as>(k, m) over stretches [k, k + m) of a centroid's logits, m <= kWide. Stretches of a kNsf row in which
// every |f| <= 1 are taken as kNsfNear, which means the same numbers and costs a third: logits that began one-hot are
// small in all columns but one. The vector of that one is taken as kNsfMostlyNear, each element by its size: in columns
// that are equal roundings are equal too, and add up, so they should be those of small numbers. m is a multiple of a
// vector but for the last stretch. Who calls it for a part of the columns starts at a multiple of kWide, for the same
// stretches as others.
template <Kind kind, class T, class F>
NCMI_INLINE void for_logits(const T* x, int64_t n, const F& f) {
  const auto stretch = [&](int64_t k, int64_t m) __attribute__((always_inline)) {
    if constexpr (kind == Kind::kNsf && sizeof(T) == sizeof(float)) {
      const int64_t large = count_large(x + k, m);
      if (large == 0) return f.template operator()<Kind::kNsfNear>(k, m);
      if (large == 1) {
        const int64_t part = m == kWide ? kLanes<T> : m;
        for (int64_t j = k; j < k + m; j += part) {
          if (count_large(x + j, part))
            f.template operator()<Kind::kNsfMostlyNear>(j, part);
          else
            f.template operator()<Kind::kNsfNear>(j, part);
        }
        return;
      }
    }
    f.template operator()<kind>(k, m);
  };
  const int64_t whole = n / kLanes<T> * kLanes<T>;
  for_stretches<kLanes<T>>(0, whole, stretch);
  if (whole < n) stretch(whole, n - whole);
}

// The kind to try for a row with |f| up to `reach`; kNsf becomes kNsfShifted where no f is above kShifted.
Kind first_kind(bool is_softmax, double reach, size_t size_of_type) {
  if (is_softmax) return Kind::kSoftmax;
  if (size_of_type > sizeof(float) || !(reach <= kNear)) return Kind::kNsf;
  return reach <= kNearest ? Kind::kNsfNearest : Kind::kNsfNear;
}

template <class T>
T largest_of(const T* x, int64_t n) {
  T largest = x[0];
  NCMI_SIMD(reduction(max : largest))
  for (int64_t k = 0; k < n; ++k) largest = x[k] > largest ? x[k] : largest;
  return largest;
}

// Zero, or NaN where an element is NaN or infinite: added to a row's normaliser it carries them to the loss, which
// the saturating sigmoid would hide. A finite sum of squares tells that there is none.
template <class T>
T poison(const T* x, int64_t n, double squares) {
  T sum = 0;
  if (squares < double(kLargest<T>)) return sum;
  NCMI_SIMD(reduction(+ : sum))
  for (int64_t k = 0; k < n; ++k) sum += x[k] * T(0);
  return sum;
}

}  // namespace
}  // namespace ncmi::cpu
