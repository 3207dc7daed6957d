// Terms: A_i and G_i, and where asked for the gradient of their ratio.
#pragma once

#include "input_grad.h"

namespace ncmi::cpu {
namespace {

template <bool centroid_to_sample, class T>
void terms_range(const TermsArgs<T>& args, int64_t row_begin, int64_t row_end, T* x) {
  const Centroids<T>& q = args.centroids;
  const int64_t n = q.columns;
  OwnRows<T> own_rows(q, x + 2 * n);
  for (int64_t i = row_begin; i < row_end; ++i) {
    const int64_t y = args.target[i];
    T* out = args.grad ? args.grad + i * n : nullptr;
    if (y == args.target.ignore_index) {
      args.concentration[i] = args.separation[i] = 0;
      args.rows[i] = {};
      if (out) {
        memset(out, 0, n * sizeof(T));
        args.coefficients[i] = {};
      }
      continue;
    }

    const Size<T> size = load<true>(args.input, i, 0, n, args.center, x);
    double scale = args.features.inverse_temperature, inverse_length = 0;
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

    const RowTerms of_row = terms_of(q, y, sums);
    args.concentration[i] = of_row.concentration;
    args.separation[i] = of_row.separation;
    args.rows[i] = {.scale = scale,
                    .inverse_length = inverse_length,
                    .kind = double(kind),
                    .shift = double(shift),
                    .inverse_norm = of_row.inverse_norm,
                    .own_mean = of_row.own_mean,
                    .all_mean = of_row.all_mean,
                    .own_prior = q.of[y].prior};
    if (out) {
      const Ratio r = ratio(of_row.concentration, of_row.separation, args.ratio);
      const double w = args.row_weight[i] / args.weight_sum;
      // Kept: formed elsewhere they may be rounded otherwise, and a second backward pass has the bits of the first.
      args.coefficients[i] = coefficients_of(args.rows[i], w * r.d_concentration, w * r.d_separation,
                                             centroid_to_sample, false);
      grad_of_row<centroid_to_sample>(q, row, args.rows[i], args.coefficients[i], y, Ahead(), x + n, out);
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
