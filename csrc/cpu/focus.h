// What lies between the matrix products of separation_focus: the factors of the products, and in place on a tile of
// their result the weights of the other classes.
#pragma once

#include "activation.h"
#include "load.h"

namespace ncmi::cpu {
namespace {

// Calls f(k, n) over stretches [k, k + n) of [0, size), n <= kWide.
template <class F>
NCMI_INLINE void for_wide(int64_t size, const F& f) {
  for (int64_t k = 0; k < size; k += kWide) f(k, min(kWide, size - k));
}

// A row of the table as it meets the rows of features: log q less what the classes share, and its sum over the columns;
// for centroid_to_sample also q less its mean, and the sum of the products of q with the former. The sums are of what is
// not rounded: columns that are equal round alike.
template <class T>
void focus_table(const FocusTableArgs<T>& args, int64_t class_begin, int64_t class_end) {
  const Centroids<T>& q = args.centroids;
  const int64_t n = q.columns;
  const T* __restrict reference = q.reference;
  for (int64_t c = class_begin; c < class_end; ++c) {
    const T* __restrict log = q.log_activation + c * n;
    T* __restrict relative = args.relative + c * n;
    const double above_mean = q.of[c].log_norm - q.all().weighted_log_norm;
    Lanes<double> sum;
    if (q.centroid_to_sample) {
      const T* __restrict activation = q.activation + c * n;
      const T* __restrict q_mean = q.reference + n;
      T* __restrict distribution = args.distribution + c * n;
      const double inverse_norm = exp(-q.of[c].log_norm);
      for_wide(n, [&](int64_t first, int64_t m) __attribute__((always_inline)) {
        NCMI_SIMD()
        for (int64_t j = 0; j < m; ++j) {
          const int64_t k = first + j;
          const double value = (double(log[k]) - double(reference[k])) - above_mean;
          const double share = double(activation[k]) * inverse_norm;
          relative[k] = T(value);
          distribution[k] = T(share - double(q_mean[k]));
          sum.lane[j] += share * value;
        }
      });
    } else {
      for_wide(n, [&](int64_t first, int64_t m) __attribute__((always_inline)) {
        NCMI_SIMD()
        for (int64_t j = 0; j < m; ++j) {
          const int64_t k = first + j;
          const double value = (double(log[k]) - double(reference[k])) - above_mean;
          relative[k] = T(value);
          sum.lane[j] += value;
        }
      });
    }
    args.level[c] = sum.total();
    args.level[q.classes + c] = q.of[c].prior;
  }
}

template <bool centroid_to_sample, class T>
struct ProductRow {
  const T* __restrict x;
  const T* __restrict reference;
  int64_t n;
  const RowStats& row;
  double log_norm;  // of a, less what the classes share
  T* __restrict out;

  template <Kind kind>
  void operator()() const {
    const T s = argument_scale<kind, T>(row.scale), shift = T(row.shift), above = T(-log_norm);
    NCMI_SIMD()
    for (int64_t k = 0; k < n; ++k) {
      if constexpr (centroid_to_sample) {
        out[k] = (activate<kind>(x[k], s, shift).log - reference[k]) + above;
      } else {
        out[k] = x_in_product<kind>(x[k], s, shift);
      }
    }
  }
};

template <class T>
void focus_rows(const FocusRowsArgs<T>& args, int64_t row_begin, int64_t row_end, T* x) {
  const Centroids<T>& q = args.centroids;
  const int64_t n = q.columns;
  for (int64_t i = row_begin; i < row_end; ++i) {
    T* out = args.out + i * n;
    if (args.target[i] == args.target.ignore_index) {
      memset(out, 0, n * sizeof(T));
      continue;
    }
    const RowStats& row = args.stats[i];
    load(args.input, i, 0, n, args.center, x);
    const double log_norm = relative_log_norm(q.all(), row);
    if (q.centroid_to_sample)
      with_kind<T>(kind_of(row.kind), ProductRow<true, T>{x, q.reference, n, row, log_norm, out});
    else
      with_kind<T>(kind_of(row.kind), ProductRow<false, T>{x, q.reference, n, row, log_norm, out});
  }
}

// The least of a row's divergences D from the centroids of other classes that have a prior: never NaN, and the largest
// number where there is none. `in_place` D comes where the products were.
template <bool in_place, class T>
T nearest_of(const FocusProducts<T>& of, int64_t y, Divergence divergence, T* __restrict values) {
  const int64_t centroids = of.centroids, classes = of.classes;
  const double* __restrict level = of.class_level;
  const double* __restrict prior = of.class_level + centroids;
  T nearest = kLargest<T>;
  for (int64_t first = 0; first < centroids; first += classes) {
    NCMI_SIMD(reduction(min : nearest))
    for (int64_t j = 0; j < classes; ++j) {
      const int64_t c = first + j;
      const T d = divergence(level[c], values[c]);
      if constexpr (in_place) values[c] = d;
      const T other = j == y || prior[c] == 0 ? kLargest<T> : d;
      nearest = other < nearest ? other : nearest;
    }
  }
  return nearest;
}

// Sums over centroids; where D is NaN, the first may be 0 but not the second.
struct WeightSums {
  double weight, farther;  // of e, and of e (D - nearest)
};

// Where a row's divergences D were, e = prior exp(-focus D / nearest) of the other classes, up to what all have.
template <class T>
WeightSums weigh(const FocusProducts<T>& of, int64_t y, double focus, T nearest, T* __restrict values) {
  const int64_t centroids = of.centroids, classes = of.classes;
  const double* __restrict prior = of.class_level + centroids;
  const double by = focus / double(nearest);
  const T by_distance = by < double(kLargest<T>) ? T(by) : kLargest<T>;
  Lanes<double> sum, weighted;
  for (int64_t first = 0; first < centroids; first += classes) {
    for_wide(classes, [&](int64_t k, int64_t n) __attribute__((always_inline)) {
      NCMI_SIMD()
      for (int64_t j = 0; j < n; ++j) {
        const int64_t c = first + k + j;
        const bool counts = k + j != y && prior[c] != 0;
        const T farther = counts ? values[c] - nearest : T(0);
        const T e = exp_minus(absolute(by_distance * farther)) * T(counts ? prior[c] : 0.0);
        values[c] = e;
        sum.lane[j] += double(e);
        weighted.lane[j] += double(e) * double(farther);
      }
    });
  }
  return {sum.total(), weighted.total()};
}

template <class T>
void focus_nearest(const FocusNearestArgs<T>& args, int64_t row_begin, int64_t row_end) {
  const FocusProducts<T>& of = args.products;
  for (int64_t i = row_begin; i < row_end; ++i) {
    args.nearest[i] = 0;
    const int64_t y = of.target[i];
    if (y == of.target.ignore_index) continue;
    const RowStats& row = of.stats[i];
    const double log_norm = relative_log_norm(*of.all, row);
    const Divergence divergence = divergence_of(row, *of.all, log_norm, of.centroid_to_sample);
    args.nearest[i] = double(nearest_of<false>(of, y, divergence, of.values + i * of.centroids));
  }
}

template <class T>
void focus_weights(const FocusWeightsArgs<T>& args, int64_t row_begin, int64_t row_end) {
  const FocusProducts<T>& of = args.products;
  const auto share = [&](int64_t i, WeightSums sums) {
    args.shared[of.rows + i] = sums.weight;
    args.shared[2 * of.rows + i] = sums.farther;
  };
  for (int64_t i = row_begin; i < row_end; ++i) {
    T* __restrict values = of.values + i * of.centroids;
    const int64_t y = of.target[i];
    if (y == of.target.ignore_index) {
      memset(values, 0, of.centroids * sizeof(T));
      if (args.shared)
        share(i, {});
      else
        args.separation[i] = 0;
      continue;
    }
    RowStats& row = of.stats[i];
    const double log_norm = relative_log_norm(*of.all, row);
    T nearest = nearest_of<true>(of, y, divergence_of(row, *of.all, log_norm, of.centroid_to_sample), values);
    if (args.shared) nearest = T(args.shared[i]);
    const WeightSums sums = weigh(of, y, args.focus, nearest, values);
    if (args.shared) {
      share(i, sums);
      continue;
    }
    double mean = 0;  // where no other class counts
    if (sums.weight != 0 || sums.farther != 0) {
      const T inverse = T(1.0 / sums.weight);
      NCMI_SIMD()
      for (int64_t c = 0; c < of.centroids; ++c) values[c] *= inverse;
      mean = double(nearest) + sums.farther / sums.weight;
    }
    row.all_mean = mean + log_norm;
    row.own_prior = 0;
    for (int64_t c = y; c < of.centroids; c += of.classes) row.own_prior += of.class_level[of.centroids + c];
    args.separation[i] = mean * (1.0 - row.own_prior);
  }
}

// In place: the weights times what the rows' gradients have of their separation; and the sums over the rows.
template <class T>
void focus_sums(const FocusSumsArgs<T>& args, int64_t class_begin, int64_t class_end) {
  for (int64_t i = 0; i < args.rows; ++i) {
    if (args.target[i] == args.target.ignore_index) continue;
    const InProduct p = in_product(args.stats[i], args.centroid_to_sample);
    const double other = args.coefficients[i].other, by_base = other * p.share * p.base;
    const T by = T(other * p.share);
    T* __restrict weights = args.weights + i * args.classes;
    ClassWeights* __restrict sums = args.sums;
    NCMI_SIMD()
    for (int64_t c = class_begin; c < class_end; ++c) {
      sums[c].other += other * double(weights[c]);
      sums[c].base += by_base * double(weights[c]);
      weights[c] *= by;
    }
  }
}

}  // namespace
}  // namespace ncmi::cpu
