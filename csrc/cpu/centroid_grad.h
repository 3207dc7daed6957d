// Centroid gradient. First by column blocks, where each owner adds the rows of a class in order; then by class.
// Sums of p and of log p are double: the gradient is their difference from q and log q, which may be near.
#pragma once

#include "activation.h"
#include "load.h"

namespace ncmi::cpu {
namespace {

// The sums of one owner of columns. Rows near the centre of the sigmoid, p = (1 + t) / 2 S, are summed as t in T: t is
// small, and so is its rounding. All others are summed in double.
template <class T>
struct ColumnSums {
  T x[kColumnBlock];
  T own_excess[kColumnBlock], total_excess[kColumnBlock];
  double own[kColumnBlock], own_log[kColumnBlock], total[kColumnBlock];
};

// Adds a row's stretch: own += c.own p, total += c.other p; for centroid_to_sample own_log and total take
// c.other log a instead. Without `with_own` only total.
template <bool centroid_to_sample, bool with_own, class T>
struct AddRow {
  ColumnSums<T>& sums;
  int64_t n;
  const RowStats& row;
  const Coefficients& c;

  template <Kind kind>
  void operator()() const {
    const T* __restrict x = sums.x;
    const T s = argument_scale<kind, T>(row.scale), shift = T(row.shift);
    if constexpr (is_near(kind) && !centroid_to_sample) {
      T* __restrict own = sums.own_excess;
      T* __restrict total = sums.total_excess;
      const T own_share = T(0.5 * c.own * row.inverse_norm), total_share = T(0.5 * c.other * row.inverse_norm);
      NCMI_SIMD()
      for (int64_t k = 0; k < n; ++k) {
        const T excess = near<kind>(x[k] * s).excess;
        if constexpr (with_own) own[k] += own_share * excess;
        total[k] += total_share * excess;
      }
    } else {
      double* __restrict own = sums.own;
      double* __restrict own_log = sums.own_log;
      double* __restrict total = sums.total;
      const double own_share = c.own * row.inverse_norm, total_share = c.other * row.inverse_norm, by_log = c.other;
      NCMI_SIMD()
      for (int64_t k = 0; k < n; ++k) {
        const Activation<T> a = activate<kind>(x[k], s, shift);
        if constexpr (with_own) own[k] += own_share * wide_value<kind>(a, x[k], s);
        if constexpr (centroid_to_sample) {
          if constexpr (with_own) own_log[k] += by_log * double(a.log);
          total[k] += by_log * double(a.log);
        } else {
          total[k] += total_share * double(a.value);
        }
      }
    }
  }
};

// At the end of a class whose rows were not all near: grad = sum_i own_i (p_ik - q_ck), and for
// centroid_to_sample own_separation = sum_i other_i (log a_ik - log a_ck).
template <bool centroid_to_sample, class T>
struct FinishClass {
  const ColumnSums<T>& sums;  // with the logits of the class in x
  int64_t n;
  T shift;
  double inverse_norm;
  const RowsOfClass& of_class;
  T* __restrict grad;
  T* __restrict own_separation;

  template <Kind kind>
  void operator()() const {
    const T* __restrict x = sums.x;
    const T* __restrict own_excess = sums.own_excess;
    const double* __restrict own = sums.own;
    const double* __restrict own_log = sums.own_log;
    const double excess_base = of_class.excess_base, own_sum = of_class.own, other_sum = of_class.other;
    for_logits<kind>(x, n, [&]<Kind as>(int64_t begin, int64_t m) __attribute__((always_inline)) {
      const T s = argument_scale<as, T>(1.0);
      NCMI_SIMD()
      for (int64_t k = begin; k < begin + m; ++k) {
        const Activation<T> a = activate<as>(x[k], s, shift);
        const double p_sum = own[k] + (excess_base + double(own_excess[k]));
        grad[k] = T(p_sum - own_sum * (wide_value<as>(a, x[k], s) * inverse_norm));
        if constexpr (centroid_to_sample)
          own_separation[k] = T(own_log[k] - other_sum * double(a.log));
      }
    });
  }
};

constexpr int64_t kRowsPerFlush = 64;  // rows whose excess is added in T before it goes to a double

template <class T>
void flush_totals(ColumnSums<T>& sums, int64_t n) {
  for (int64_t k = 0; k < n; ++k) {
    sums.total[k] += double(sums.total_excess[k]);
    sums.total_excess[k] = 0;
  }
}

template <bool centroid_to_sample, class T>
void centroid_sums_range(const CentroidGradArgs<T>& args, int64_t column_begin, int64_t column_end,
                         ColumnSums<T>& sums) {
  const Centroids<T>& q = args.centroids;
  for (int64_t begin = column_begin; begin < column_end; begin += kColumnBlock) {
    const int64_t n = min(kColumnBlock, column_end - begin);
    double total_base = 0;  // sum over near rows of other / 2 S, for the 1 in 1 + t
    int64_t unflushed = 0;
    for (int64_t k = 0; k < n; ++k) sums.total[k] = sums.total_excess[k] = 0;
    for (int64_t c = 0; c < q.classes; ++c) {
      const int64_t first = args.class_begin[c], last = args.class_begin[c + 1];
      if (first == last) continue;
      const RowsOfClass& of_class = args.rows_of_classes[c];
      T* own = args.own + of_class.slot * q.columns + begin;
      memset(sums.own_excess, 0, n * sizeof(T));
      if (!of_class.all_near) {
        memset(sums.own, 0, n * sizeof(double));
        memset(sums.own_log, 0, n * sizeof(double));
      }
      for (int64_t j = first; j < last; ++j) {
        const int64_t i = args.order[j];
        const RowStats& row = args.rows[i];
        load(args.input, i, begin, n, args.center, sums.x);
        with_kind<T>(kind_of(row.kind),
                     AddRow<centroid_to_sample, true, T>{sums, n, row, args.coefficients[i]});
        if (is_near(kind_of(row.kind)) && !centroid_to_sample)
          total_base += 0.5 * args.coefficients[i].other * row.inverse_norm;
        if (++unflushed == kRowsPerFlush) {
          flush_totals(sums, n);
          unflushed = 0;
        }
      }
      if (of_class.all_near) {  // left to centroid_grad: the excess is all that it needs
        memcpy(own, sums.own_excess, n * sizeof(T));
        continue;
      }
      load(args.logits, c, begin, n, static_cast<const T*>(nullptr), sums.x);
      with_kind<T>(kind_of(q.of[c].kind),
                   FinishClass<centroid_to_sample, T>{
                       sums, n, T(q.of[c].shift), exp(-q.of[c].log_norm), of_class, own,
                       centroid_to_sample ? args.own_separation + of_class.slot * q.columns + begin : nullptr});
    }
    flush_totals(sums, n);
    for (int64_t k = 0; k < n; ++k) args.totals[begin + k] = sums.total[k] + total_base;
  }
}

// The totals alone, rows in the order of the batch.
template <bool centroid_to_sample, class T>
void totals_range(const TotalsArgs<T>& args, int64_t column_begin, int64_t column_end) {
  ColumnSums<T> sums;
  for (int64_t begin = column_begin; begin < column_end; begin += kColumnBlock) {
    const int64_t n = min(kColumnBlock, column_end - begin);
    double total_base = 0;
    for (int64_t k = 0; k < n; ++k) sums.total[k] = sums.total_excess[k] = 0;
    for (int64_t i = 0; i < args.row_count; ++i) {
      if (i % kRowsPerFlush == 0) flush_totals(sums, n);
      if (args.target[i] == args.target.ignore_index) continue;
      const RowStats& row = args.rows[i];
      load(args.input, i, begin, n, args.center, sums.x);
      with_kind<T>(kind_of(row.kind), AddRow<centroid_to_sample, false, T>{sums, n, row, args.coefficients[i]});
      if (is_near(kind_of(row.kind)) && !centroid_to_sample)
        total_base += 0.5 * args.coefficients[i].other * row.inverse_norm;
    }
    flush_totals(sums, n);
    for (int64_t k = 0; k < n; ++k) args.totals[begin + k] = sums.total[k] + total_base;
  }
}

template <class T>
void totals(const TotalsArgs<T>& args, int64_t column_begin, int64_t column_end) {
  if (args.centroid_to_sample)
    totals_range<true>(args, column_begin, column_end);
  else
    totals_range<false>(args, column_begin, column_end);
}

template <class T>
void centroid_sums(const CentroidGradArgs<T>& args, int64_t column_begin, int64_t column_end) {
  ColumnSums<T> sums;
  if (args.centroids.centroid_to_sample)
    centroid_sums_range<true>(args, column_begin, column_end, sums);
  else
    centroid_sums_range<false>(args, column_begin, column_end, sums);
}

// What the classes' sums hold, decided before they are formed so that every owner of columns agrees.
template <class T>
void rows_of_classes(const CentroidGradArgs<T>& args, RowsOfClass* result) {
  int64_t used = 0;
  for (int64_t c = 0; c < args.centroids.classes; ++c) {
    const bool has_rows = args.class_begin[c] != args.class_begin[c + 1];
    RowsOfClass of_class{.slot = args.own_is_grad ? c : used,
                       .own = 0,
                       .other = 0,
                       .excess_base = 0,
                       .has_rows = has_rows,
                       .all_near = !args.centroids.centroid_to_sample};
    used += has_rows;
    for (int64_t j = args.class_begin[c]; j < args.class_begin[c + 1]; ++j) {
      const int64_t i = args.order[j];
      const bool near = is_near(kind_of(args.rows[i].kind));
      of_class.own += args.coefficients[i].own;
      of_class.other += args.coefficients[i].other;
      if (near && !args.centroids.centroid_to_sample)
        of_class.excess_base += 0.5 * args.coefficients[i].own * args.rows[i].inverse_norm;
      of_class.all_near = of_class.all_near && near;
    }
    result[c] = of_class;
  }
}

// sample_to_centroid: slope (-own - prior sum_i other_i (p_ik - q_ck)), own = sum over the rows of the class of
// own_i (p_ik - q_ck).
enum class Own { kNothing, kExcess, kFinished };

template <class T>
struct GradFromSample {
  const T* __restrict x;
  int64_t n;
  T shift;
  double inverse_norm, other_mean;
  const RowsOfClass& of_class;
  const T* own;  // of the class; not read where it has no rows; may be grad
  double level;
  const T* __restrict variation;
  T by;  // times variation
  T* grad;

  template <Kind kind, Own sums>
  void loop() const {
    // own + all = (excess_base + own_excess) - own_sum q + (level + variation) - other_mean q; with own finished,
    // without own.
    const double own_sum = sums == Own::kExcess ? of_class.own : 0;
    const double base = level + (sums == Own::kExcess ? of_class.excess_base : 0);
    const double q_factor = (own_sum + other_mean) * inverse_norm;
    // Near the centre q = (1 + t) / 2 S: what cancels is constant along the row, and the rest, small with a small
    // error, need not be double.
    const T near_base = T(base - 0.5 * q_factor), near_factor = T(0.5 * q_factor);
    for_logits<kind>(x, n, [&]<Kind as>(int64_t begin, int64_t m) __attribute__((always_inline)) {
      const T s = argument_scale<as, T>(1.0);
      NCMI_SIMD()
      for (int64_t k = begin; k < begin + m; ++k) {
        const T other = by * variation[k], rest = sums == Own::kNothing ? other : other + own[k];
        if constexpr (is_near(as)) {
          const T t = near<as>(x[k] * s).excess;
          grad[k] = (T(0.5) * t - T(0.5)) * ((near_base + rest) - near_factor * t);
        } else {
          const Activation<T> a = activate<as>(x[k], s, shift);
          grad[k] = -a.slope * T((base + double(rest)) - q_factor * double(a.value));
        }
      }
    });
  }

  template <Kind kind>
  void operator()() const {
    if (!of_class.has_rows) return loop<kind, Own::kNothing>();
    if (of_class.all_near) return loop<kind, Own::kExcess>();
    loop<kind, Own::kFinished>();
  }
};

// centroid_to_sample: slope (-own + prior q (s - sum_k q s)), s_ck = sum over rows of other classes of
// other_i (log q_ck - log p_ik), up to what is constant along the row.
template <class T>
struct GradFromCentroid {
  const T* __restrict x;
  int64_t n;
  T shift;
  double inverse_norm, prior, other_sum;
  const double* __restrict totals;
  const T* __restrict weighted;   // in the place of totals, with
  const T* __restrict reference;  // what its logarithms are less, and
  double by;                      // its factor; else null
  const T* own;  // of the class, and may be grad; null where it has no rows, as own_separation is
  const T* __restrict own_separation;
  T* grad;

  template <Kind kind, bool has_rows, bool by_class>
  void loop() const {
    // Copies, which a loop that writes numbers of their type does not read again.
    const T row_shift = shift;
    const double q_factor = inverse_norm, by_log = other_sum;
    const T share = T(prior * inverse_norm);
    const auto s_at = [&](int64_t k, T log) __attribute__((always_inline)) {
      if constexpr (by_class) return by_log * double(log - reference[k]) - by * double(weighted[k]);
      const double s = by_log * double(log) - totals[k];
      if constexpr (has_rows) return s + double(own_separation[k]);
      return s;
    };
    Lanes<double> sum;
    for_logits<kind>(x, n, [&]<Kind as>(int64_t begin, int64_t m) __attribute__((always_inline)) {
      const T argument = argument_scale<as, T>(1.0);
      NCMI_SIMD()
      for (int64_t j = 0; j < m; ++j) {
        const Activation<T> a = activate<as>(x[begin + j], argument, row_shift);
        sum.lane[j] += double(a.value) * q_factor * s_at(begin + j, a.log);
      }
    });
    const double mean = sum.total();
    for_logits<kind>(x, n, [&]<Kind as>(int64_t begin, int64_t m) __attribute__((always_inline)) {
      const T argument = argument_scale<as, T>(1.0);
      NCMI_SIMD()
      for (int64_t k = begin; k < begin + m; ++k) {
        const Activation<T> a = activate<as>(x[k], argument, row_shift);
        // What is to cancel has done so: the rest in T.
        const T by_separation = share * a.value * T(s_at(k, a.log) - mean);
        if constexpr (has_rows)
          grad[k] = a.slope * (by_separation - own[k]);
        else
          grad[k] = a.slope * by_separation;
      }
    });
  }

  template <Kind kind>
  void operator()() const {
    if (weighted) return own ? loop<kind, true, true>() : loop<kind, false, true>();
    own ? loop<kind, true, false>() : loop<kind, false, false>();
  }
};

// The gradient of a class by its logits x.
template <class T>
void grad_of_class(const CentroidGradArgs<T>& args, int64_t c, const T* x, T* grad) {
  const Centroids<T>& q = args.centroids;
  const int64_t n = q.columns;
  const RowsOfClass& of_class = args.rows_of_classes[c];
  const Kind kind = kind_of(q.of[c].kind);
  const T shift = T(q.of[c].shift);
  const double inverse_norm = exp(-q.of[c].log_norm);
  const T* own = of_class.has_rows ? args.own + of_class.slot * n : nullptr;
  const T* weighted = args.class_weights ? args.weighted + c * n : nullptr;
  // What all rows say of the class is summed for it alone, or for all classes alike.
  const double by = weighted ? args.weighted_by : q.of[c].prior;
  if (q.centroid_to_sample)
    with_kind<T>(kind, GradFromCentroid<T>{.x = x,
                                           .n = n,
                                           .shift = shift,
                                           .inverse_norm = inverse_norm,
                                           .prior = weighted ? 1.0 : by,
                                           .other_sum = weighted ? by * args.class_weights[c].other : args.other_sum,
                                           .totals = args.totals,
                                           .weighted = weighted,
                                           .reference = q.reference,
                                           .by = by,
                                           .own = own,
                                           .own_separation = own ? args.own_separation + of_class.slot * n : nullptr,
                                           .grad = grad});
  else
    with_kind<T>(kind, GradFromSample<T>{
                           .x = x,
                           .n = n,
                           .shift = shift,
                           .inverse_norm = inverse_norm,
                           .other_mean = by * (weighted ? args.class_weights[c].other : args.other_sum),
                           .of_class = of_class,
                           .own = own,
                           .level = by * (weighted ? args.class_weights[c].base : args.level),
                           .variation = weighted ? weighted : args.variation,
                           .by = T(by),
                           .grad = grad});
}

template <class T>
void centroid_grad(const CentroidGradArgs<T>& args, int64_t class_begin, int64_t class_end, T* grad, T* x) {
  const int64_t n = args.centroids.columns;
  for (int64_t c = class_begin; c < class_end; ++c) {
    load(args.logits, c, 0, n, static_cast<const T*>(nullptr), x);
    grad_of_class(args, c, x, grad + c * n);
  }
}

}  // namespace
}  // namespace ncmi::cpu
