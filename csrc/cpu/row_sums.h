// One row against its own centroid and against all of them.
#pragma once

#include "activation.h"
#include "load.h"

namespace ncmi::cpu {
namespace {

// The pointers of one row, or of a stretch of it.
template <class T>
struct Row {
  const T* x;               // z - center
  const T* own_log;         // log a(xi_y)
  const T* own_activation;  // a(xi_y); centroid_to_sample only
  const T* reference;       // what log a is compared with, for all classes at once
  const T* q_mean;          // mean of q over classes; centroid_to_sample only
  double reference_sum;     // AllStats

  Row from(int64_t k) const {
    return {x + k, own_log + k, own_activation ? own_activation + k : nullptr, reference + k, q_mean + k,
            reference_sum};
  }
};

// Own-class rows of the tables. Those that a few numbers tell (ClassStats) are written out here, in cache, rather than
// read from a table that may not be; of one such row after another only the columns that differ change.
template <class T>
class OwnRows {
 public:
  OwnRows(const Centroids<T>& q, T* scratch) : q_(q), log_(scratch), activation_(scratch + q.columns) {}

  Row<T> with(const T* x, int64_t y) {
    const ClassStats& of = q_.of[y];
    const int64_t lone = int64_t(of.lone);
    const bool both = q_.centroid_to_sample;
    if (lone < 0)
      return row(x, q_.log_activation + y * q_.columns, both ? q_.activation + y * q_.columns : nullptr);
    if (lone_ < 0 || of.other_log != other_log_) {
      for (int64_t k = 0; k < q_.columns; ++k) log_[k] = T(of.other_log);
      if (both)
        for (int64_t k = 0; k < q_.columns; ++k) activation_[k] = T(of.other_activation);
    } else {
      log_[lone_] = T(of.other_log);
      if (both) activation_[lone_] = T(of.other_activation);
    }
    log_[lone] = T(of.lone_log);
    if (both) activation_[lone] = T(of.lone_activation);
    lone_ = lone;
    other_log_ = of.other_log;
    return row(x, log_, both ? activation_ : nullptr);
  }

 private:
  Row<T> row(const T* x, const T* log, const T* activation) const {
    return {x, log, activation, q_.reference, q_.reference + q_.columns, q_.all().reference_sum};
  }

  const Centroids<T>& q_;
  T* log_;
  T* activation_;
  int64_t lone_ = -1;  // the column that differs in what is written out, once something is
  double other_log_ = 0;
};

// The last columns of a row, fewer than a vector, padded to one with copies of the last element. A scalar loop over
// them would cost as much as several vectors.
template <class T>
struct Tail {
  T x[kLanes<T>], own_log[kLanes<T>], own_activation[kLanes<T>], reference[kLanes<T>], q_mean[kLanes<T>];
  T mask[kLanes<T>];

  Tail(const Row<T>& row, int64_t begin, int64_t n) {
    for (int64_t k = 0; k < kLanes<T>; ++k) {
      const int64_t from = min(begin + k, n - 1);
      x[k] = row.x[from];
      own_log[k] = row.own_log[from];
      own_activation[k] = row.own_activation ? row.own_activation[from] : T(0);
      reference[k] = row.reference[from];
      q_mean[k] = row.q_mean[from];
      mask[k] = begin + k < n ? T(1) : T(0);
    }
  }
  Row<T> row() const { return {x, own_log, own_activation, reference, q_mean, 0}; }
};

template <Kind kind, bool centroid_to_sample, class T>
struct RowLanes {
  Lanes<double> norm;       // but near: of the excess, below
  Lanes<T> excess;          // of 2 sigma - 1, small, so its sum need not be double
  Lanes<T> own, all, own_cross;  // near: all without what AllStats has of `reference`

  // Adds `n` <= kWide columns. With `masked`, those where `mask` is 0 count for nothing.
  template <bool masked>
  NCMI_INLINE_MEMBER void add(const Row<T>& row, int64_t n, const T* mask, T s, T shift) {
    const T* __restrict x = row.x;
    const T* __restrict own_log = row.own_log;
    const T* __restrict own_activation = row.own_activation;
    const T* __restrict reference = row.reference;
    const T* __restrict q_mean = row.q_mean;
    NCMI_SIMD()
    for (int64_t k = 0; k < n; ++k) {
      T weight, log, t;  // near: twice a, and t = 2 a - 1
      if constexpr (is_near(kind)) {
        const NearActivation a = near<kind>(x[k] * s);
        t = masked ? a.excess * mask[k] : a.excess;
        excess.lane[k] += t;
        weight = T(1) + a.excess;
        log = a.log;
      } else {
        const Activation<T> a = activate<kind>(x[k], s, shift);
        norm.lane[k] += double(masked ? a.value * mask[k] : a.value);
        weight = a.value;
        log = a.log;
      }
      if constexpr (masked) weight *= mask[k];
      const T d_own = log - own_log[k];
      // A reference of nearly one number in all columns, taken from logarithms of one size, would round alike in all.
      const T d_all = is_near(kind) ? log : log - reference[k];
      own.lane[k] += weight * d_own;
      if constexpr (centroid_to_sample) {
        all.lane[k] += (masked ? q_mean[k] * mask[k] : q_mean[k]) * d_all;
        own_cross.lane[k] += (masked ? own_activation[k] * mask[k] : own_activation[k]) * d_own;
      } else {
        all.lane[k] += weight * d_all;
        if constexpr (is_near(kind)) all.lane[k] -= t * reference[k];
      }
    }
  }

  void add_to(RowSums& sums) {
    constexpr double kHalf = is_near(kind) ? 0.5 : 1.0;
    if constexpr (is_near(kind))
      sums.norm += 0.5 * excess.total();
    else
      sums.norm += norm.total();
    // In double: where every logarithm is about -1.5, say, these are large, and what is made of them is not.
    sums.own += kHalf * own.template total<double>();
    sums.all += (centroid_to_sample ? 1.0 : kHalf) * all.template total<double>();
    if constexpr (centroid_to_sample) sums.own_cross += own_cross.template total<double>();
  }
};

template <Kind kind, bool centroid_to_sample, class T>
__attribute__((noinline)) RowSums sum_row(const Row<T>& row, int64_t n, double scale, T shift, const Ahead& ahead) {
  RowSums sums{};
  if (is_near(kind)) {
    sums.norm = 0.5 * double(n);  // sigma = (1 + excess) / 2
    sums.all = (centroid_to_sample ? -1.0 : -0.5) * row.reference_sum;
  }
  const T s = argument_scale<kind, T>(scale);
  const int64_t whole = n / kLanes<T> * kLanes<T>;
  for (int64_t first = 0; first < n; first += kBlock) {
    RowLanes<kind, centroid_to_sample, T> lanes;
    const int64_t last = min(whole, first + kBlock);
    for_stretches<kLanes<T>>(first, last, [&](int64_t k, int64_t m) __attribute__((always_inline)) {
      ahead.fetch(k, m);
      lanes.template add<false>(row.from(k), m, nullptr, s, shift);
    });
    if (whole < n && first + kBlock >= n) {
      const Tail<T> tail(row, whole, n);
      lanes.template add<true>(tail.row(), kLanes<T>, tail.mask, s, shift);
    }
    lanes.add_to(sums);
  }
  return sums;
}

// The activation that the row needs, and its sums under it.
template <bool centroid_to_sample, class T>
RowSums sum_row_stable(const Row<T>& row, int64_t n, double scale, T largest, bool is_softmax, const Ahead& ahead,
                       Kind* kind, T* shift) {
  *kind = first_kind<T>(is_softmax, double(largest) * scale);
  *shift = is_softmax ? largest_of(row.x, n) : T(0);
  const auto sum_as = [&]<Kind as>() { return sum_row<as, centroid_to_sample>(row, n, scale, *shift, ahead); };
  const RowSums sums = with_kind<T>(*kind, sum_as);
  if (*kind != Kind::kNsf || !may_be_shifted(sums.norm, n)) return sums;
  const T most = largest_of(row.x, n);
  if (!(most * T(scale) <= T(kShifted))) return sums;
  *kind = Kind::kNsfShifted;
  *shift = most;
  return with_kind<T>(*kind, sum_as);
}

}  // namespace
}  // namespace ncmi::cpu
