// Which stretches of a centroid's logits take which formula, and what the choice looks at.
#pragma once

#include "lanes.h"

namespace ncmi::cpu {
namespace {

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
