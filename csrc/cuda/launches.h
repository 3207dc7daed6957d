// What operators of other files launch too. Outputs and workspace are allocated before.
#pragma once

#include "host.h"
#include "rows.cuh"

namespace ncmi::cuda {

constexpr int64_t kRowSums = sizeof(RowSums) / sizeof(double);

template <class T>
struct TermsArgs {
  Matrix input;  // [B, M]
  int64_t rows;
  Targets target;   // [B]
  const T* center;  // [M] or null
  Features features;
  Centroids<T> centroids;
  RowSums* sums;    // [B]
  RowStats* stats;  // [B]: scale, inverse_length, kind, shift and own_prior, and zeros
  // For the gradient of sum_i w_i A_i / (G_i + eps) while a row is on chip.
  Weights<T> weights;
  RatioOptions ratio;
  T* grad;                     // [B, M] contiguous, or null
  Coefficients* coefficients;  // [B], of grad
};

template <class T>
void launch_terms(const TermsArgs<T>&, Stream);

// A running centre, which may be none.
struct RunningCenter {
  const std::optional<Tensor>& center;   // [M]
  const std::optional<Tensor>& batches;  // [] how often it was moved
  double momentum;
};

int64_t column_sums_workspace(int64_t rows, int64_t columns);  // in doubles

// Moves a running centre and leaves what the rows weigh together, each where it is asked for. Returns the copy of the
// new centre, [0] without one.
template <class T>
Tensor column_sums(const Device&, Workspace&, const Tensor& input, const Targets&, int64_t classes,
                   const RunningCenter&, const T* class_weight, double* weight_total);

int64_t stats_workspace(int64_t classes, int64_t columns);  // in doubles

// What the classes count for in the separation: [C], or null where all count alike.
struct Priors {
  const double* data;
  int64_t stride;
};

// What the operator centroid_stats gives of the logits [C, M], to where it belongs. The priors may lie there already.
template <class T>
void write_stats(const Device&, Workspace&, const Matrix& logits, const Priors&, bool softmax, const Centroids<T>& to);

}  // namespace ncmi::cuda
