// Terms: A_i and G_i, and where asked for the gradient of their ratio.
#pragma once

#include "input_grad.h"

namespace ncmi::cpu {
namespace {

template <bool centroid_to_sample, class T>
void terms_range(const TermsArgs<T>& args, int64_t row_begin, int64_t row_end, T* x) {
  const Centroids<T>& q = args.centroids;
  const int64_t n = q.columns;
  const double inverse_temperature = 1.0 / args.features.temperature, inverse_classes = 1.0 / q.of_all.classes;
  OwnRows<T> own_rows(q, x + 2 * n);
  for (int64_t i = row_begin; i < row_end; ++i) {
    const int64_t y = args.target[i];
    T* out = args.grad ? args.grad + i * n : nullptr;
    if (y == args.target.ignore_index) {
      args.concentration[i] = args.separation[i] = 0;
      args.rows[i] = {};
      if (out) memset(out, 0, n * sizeof(T));
      continue;
    }

    const Size<T> size = load<true>(args.input, i, 0, n, args.center, x);
    double scale = inverse_temperature, inverse_length = 0;
    if (args.features.l2_normalize) {
      const double length = norm(x, n, size);
      const bool floored = length < kSmallestLength;
      const double inverse = 1.0 / (floored ? kSmallestLength : length);
      scale *= inverse;
      inverse_length = floored ? 0 : inverse;
    }
    Ahead ahead;
    if (i + 1 < row_end) fetch_row(args.input, args.target, i + 1, q, ahead);

    Kind kind;
    T shift;
    const Row<T> row = own_rows.with(x, y);
    RowSums sums =
        sum_row_stable<centroid_to_sample>(row, n, scale, size.largest, args.features.softmax, ahead, &kind, &shift);
    sums.norm += double(poison(x, n, size.squares));

    // KL divergences as differences of logarithms, then of log-normalisers: each difference apart.
    const double log_norm = ::log(sums.norm), inverse_norm = 1.0 / sums.norm;
    const double own_mean = sums.own * inverse_norm, all_mean = sums.all * inverse_norm;
    const double own_gap = log_norm - q.of[y].log_norm;
    const double concentration = own_mean - own_gap;
    args.concentration[i] = not_negative(concentration);
    args.separation[i] = not_negative(
        centroid_to_sample ? (q.of_all.weight_sum * log_norm - q.of_all.weighted_log_norm) - sums.all +
                                 (sums.own_cross * exp(-q.of[y].log_norm) - own_gap) * inverse_classes
                           : all_mean - (log_norm - q.of_all.weighted_log_norm) - concentration * inverse_classes);
    args.rows[i] = {.scale = scale,
                    .inverse_length = inverse_length,
                    .kind = double(kind),
                    .shift = double(shift),
                    .inverse_norm = inverse_norm,
                    .own_mean = own_mean,
                    .all_mean = all_mean,
                    .by_concentration = 0,
                    .by_separation = 0};
    if (out) {
      const Ratio r = ratio(args.concentration[i], args.separation[i], args.eps);
      const double w = args.row_weight[i];
      grad_of_row<centroid_to_sample>(q, row, args.rows[i], y, w * r.d_concentration, w * r.d_separation, Ahead(),
                                      x + n, out);
    }
  }
}

template <class T>
void terms(const TermsArgs<T>& args, int64_t row_begin, int64_t row_end, T* scratch) {
  if (args.centroids.centroid_to_sample)
    terms_range<true>(args, row_begin, row_end, scratch);
  else
    terms_range<false>(args, row_begin, row_end, scratch);
}

}  // namespace
}  // namespace ncmi::cpu
