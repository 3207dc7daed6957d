// Input gradient. Reads a row again and forms p again: with the sums of the row known that is one pass, and cheaper
// than what storing and reading it would cost.
#pragma once

#include "row_sums.h"

namespace ncmi::cpu {
namespace {

// The gradient of a row by z, but for what the chain rule of its length takes away.
template <bool centroid_to_sample, class T>
struct GradRow {
  const RowStats& stats;
  const Coefficients& c;
  double own_inverse_norm;  // centroid_to_sample only

  // Of `n` <= kWide columns, into grad; adds its product with x to dot.
  template <Kind kind>
  NCMI_INLINE_MEMBER void stretch(const Row<T>& row, int64_t n, T* __restrict grad, Lanes<T>& dot) const {
    const T* __restrict x = row.x;
    const T* __restrict own_log = row.own_log;
    const T* __restrict own_activation = row.own_activation;
    const T* __restrict reference = centroid_to_sample ? row.q_mean : row.reference;
    const RowGradient<centroid_to_sample, kind, T> gradient(stats, c, own_inverse_norm);
    NCMI_SIMD()
    for (int64_t k = 0; k < n; ++k) {
      const T g = gradient.at(x[k], own_log[k], centroid_to_sample ? own_activation[k] : T(0), reference[k]);
      grad[k] = g;
      dot.lane[k] += x[k] * g;
    }
  }

  // Of the whole row; returns its product with x.
  template <Kind kind>
  double whole_row(const Row<T>& row, int64_t n, T* grad, const Ahead& ahead) const {
    double total = 0;
    const int64_t whole = n / kLanes<T> * kLanes<T>;
    for (int64_t first = 0; first < whole; first += kBlock) {
      const int64_t last = min(whole, first + kBlock);
      Lanes<T> dot;
      for_stretches<kLanes<T>>(first, last, [&](int64_t k, int64_t m) __attribute__((always_inline)) {
        ahead.fetch(k, m);
        stretch<kind>(row.from(k), m, grad + k, dot);
      });
      total += dot.total();
    }
    if (whole < n) {
      const Tail<T> tail(row, whole, n);
      T end[kLanes<T>];
      Lanes<T> unused;
      stretch<kind>(tail.row(), kLanes<T>, end, unused);
      for (int64_t k = whole; k < n; ++k) {
        grad[k] = end[k - whole];
        total += double(row.x[k]) * double(grad[k]);
      }
    }
    return total;
  }
};

// d loss / d z of a row of class y, from its centred features x.
template <bool centroid_to_sample, class Out, class T>
NCMI_INLINE void grad_of_row(const Centroids<T>& q, const Row<T>& row, const RowStats& stats,
                             const Coefficients& coefficients, int64_t y, Ahead ahead, T* __restrict grad,
                             Out* __restrict out) {
  ahead.add(out, sizeof(Out));
  const int64_t n = q.columns;
  const GradRow<centroid_to_sample, T> of_row{stats, coefficients, centroid_to_sample ? exp(-q.of[y].log_norm) : 1.0};
  const T* __restrict x = row.x;
  const double dot = with_kind<T>(kind_of(stats.kind), [&]<Kind kind>() {
    return of_row.template whole_row<kind>(row, n, grad, ahead);
  });
  // Where the length counts, through x / ||x|| as well: g - x (x . g) / ||x||^2. The square may underflow, x . g be
  // infinite where no length counts.
  const T inverse_length = T(stats.inverse_length);
  const T share = inverse_length == T(0) ? T(0) : T(dot * stats.inverse_length);
  NCMI_SIMD()
  for (int64_t k = 0; k < n; ++k) out[k] = narrow<Out>(grad[k] - (x[k] * inverse_length) * share);
}

template <bool centroid_to_sample, class Out, class T>
void input_grad_range(const InputGradArgs<T>& args, int64_t row_begin, int64_t row_end, T* scratch) {
  const Centroids<T>& q = args.centroids;
  const int64_t n = q.columns;
  T* __restrict x = scratch;
  T* __restrict grad = scratch + n;
  OwnRows<T> own_rows(q, scratch + 2 * n);
  for (int64_t i = row_begin; i < row_end; ++i) {
    Out* __restrict out = static_cast<Out*>(args.grad) + i * n;
    const int64_t y = args.target[i];
    if (y == args.target.ignore_index) {
      memset(static_cast<void*>(out), 0, n * sizeof(Out));
      continue;
    }
    const RowStats& stats = args.rows[i];
    load(args.input, i, 0, n, args.center, x);
    Ahead ahead;
    if (i + 1 < row_end) fetch_row(args.input, args.target, i + 1, q, ahead);
    Row<T> row = own_rows.with(x, y);
    if (args.row_reference) (centroid_to_sample ? row.q_mean : row.reference) = args.row_reference + i * n;
    if (args.row_own) row.own_log = args.row_own + i * n;
    grad_of_row<centroid_to_sample>(q, row, stats, args.coefficients[i], y, ahead, grad, out);
  }
}

template <class Out, class T>
void input_grad_as(const InputGradArgs<T>& args, int64_t row_begin, int64_t row_end, T* scratch) {
  if (args.centroids.centroid_to_sample)
    input_grad_range<true, Out>(args, row_begin, row_end, scratch);
  else
    input_grad_range<false, Out>(args, row_begin, row_end, scratch);
}

void input_grad(const InputGradArgs<float>& args, int64_t row_begin, int64_t row_end, float* scratch) {
  switch (args.grad_dtype) {
    case Dtype::kBFloat16: return input_grad_as<BFloat16>(args, row_begin, row_end, scratch);
    case Dtype::kFloat16: return input_grad_as<Float16>(args, row_begin, row_end, scratch);
    default: return input_grad_as<float>(args, row_begin, row_end, scratch);
  }
}
void input_grad(const InputGradArgs<double>& args, int64_t row_begin, int64_t row_end, double* scratch) {
  input_grad_as<double>(args, row_begin, row_end, scratch);
}

}  // namespace
}  // namespace ncmi::cpu
