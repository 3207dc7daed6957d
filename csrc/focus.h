// What both C++ backends do between the matrix products of separation_focus: arguments and scalar formulas.
#pragma once

#include "rows.h"

namespace ncmi {

// What matrix products take of the centroids.
template <class T>
struct FocusTableArgs {
  Centroids<T> centroids;
  T* relative;      // [C, M] log q less what the classes share
  T* distribution;  // [C, M] q less its mean over the classes; centroid_to_sample only
  double* level;    // [2, C] the sum of relative over the columns, for centroid_to_sample weighed by q, before rounding;
                    // and prior
};

// What matrix products take of the rows.
template <class T>
struct FocusRowsArgs {
  Matrix input;  // [B, M]
  int64_t rows;
  Targets target;   // [B]
  const T* center;  // [M] or null
  Centroids<T> centroids;
  const RowStats* stats;  // [B]
  T* out;                // [B, M] x of InProduct; for centroid_to_sample log p less what the classes share
};

// The products of rows with centroids.
template <class T>
struct FocusProducts {
  int64_t rows, centroids, classes;  // centroid r is one of class r modulo classes
  T* values;                         // [B, centroids]
  RowStats* stats;                   // [B]
  Targets target;                    // [B]
  const AllStats* all;
  const double* class_level;  // [2, centroids] of FocusTableArgs
  bool centroid_to_sample;
};

template <class T>
struct FocusNearestArgs {
  FocusProducts<T> products;  // only read
  double* nearest;            // [B]
};

template <class T>
struct FocusWeightsArgs {
  FocusProducts<T> products;  // values become weights; of stats all_mean that to the mixture by them, own_prior the class's
  double focus;
  double* separation;  // [B]
  double* shared;      // [3, B] where these are a part of the centroids: the nearest of all in, two sums out; else null
};

template <class T>
struct FocusSumsArgs {
  int64_t rows, classes;
  Targets target;                    // [B]
  const RowStats* stats;             // [B]
  const Coefficients* coefficients;  // [B]
  bool centroid_to_sample;
  T* weights;          // [B, C] in place times other share
  ClassWeights* sums;  // [C], added to
};

// A row in a matrix product with the centroids: p = share (base + x). Where sigma is a, x is 2 sigma - 1: only what is
// small, and its rounding, meets the product. What the base comes to is summed apart, in double. For
// centroid_to_sample x is a logarithm and stands for itself; there of q only what its mean leaves meets the product.
struct InProduct {
  double base, share;
};

NCMI_INLINE InProduct in_product(const RowStats& row, bool centroid_to_sample) {
  if (centroid_to_sample) return {0.0, 1.0};
  const Kind kind = kind_of(row.kind);
  if (kind == Kind::kNsf || is_near(kind)) return {1.0, 0.5 * row.inverse_norm};
  return {0.0, row.inverse_norm};
}

template <Kind kind, bool fast = false, class T>
NCMI_INLINE T x_in_product(T x, T scale, T shift) {
  if constexpr (is_near(kind)) {
    return near<kind>(x * scale).excess;
  } else {
    const T a = activate<kind, fast>(x, scale, shift).value;
    return kind == Kind::kNsf ? (a - T(0.5)) + (a - T(0.5)) : a;
  }
}

// log sum_k a_k less what the classes share.
NCMI_INLINE double relative_log_norm(const AllStats& all, const RowStats& row) {
  return -::log(row.inverse_norm) - all.weighted_log_norm;
}

// The divergence of a row and a class from their product.
struct Divergence {
  double level, by_class_level, by_product;

  template <class T>
  NCMI_INLINE_MEMBER T operator()(double class_level, T product) const {
    const T d = T(level + by_class_level * class_level + by_product * double(product));
    return d < T(kSmallest) ? T(kSmallest) : d;  // rounding may leave less than zero; NaN stays
  }

  static constexpr double kSmallest = 1.17549435e-38;  // that others are measured by
};

NCMI_INLINE Divergence divergence_of(const RowStats& row, const AllStats& all, double relative_log_norm,
                                     bool centroid_to_sample) {
  if (centroid_to_sample)  // of the row and the mean q; all_mean is by the sum of a
    return {all.weight_sum * relative_log_norm - row.all_mean / row.inverse_norm, 1.0, -1.0};
  const InProduct p = in_product(row, false);
  return {row.all_mean - relative_log_norm, -p.share * p.base, -p.share};
}

}  // namespace ncmi
