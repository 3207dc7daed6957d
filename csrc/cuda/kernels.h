// What the CUDA operators (ops_cuda.cpp) call: each function launches kernels on a stream and returns.
//
// Nothing here waits for the device or reads its memory on the host, so that all of it can be captured in a graph.
// All pointers are to device memory. T is the type of the arithmetic, float or double.
#pragma once

#include "../rows.h"

namespace ncmi::cuda {

using Stream = void*;  // cudaStream_t

// A gradient times the upstream gradient: a scalar (stride 0) or [B], or none.
struct Upstream {
  const void* data;
  bool is_double;
  int64_t stride;
};

// What the rows weigh: class weights [C] or null.
template <class T>
struct Weights {
  const T* by_class;
  const double* total;  // the sum over the rows, by which each is divided; null for a sum
};

template <class T>
struct TermsArgs {
  Matrix input;  // [B, M]
  int64_t rows;
  Targets target;   // [B]
  const T* center;  // [M] or null
  Features features;
  Centroids<T> centroids;
  RowSums* sums;    // [B]
  RowStats* stats;  // [B]: scale, inverse_length, kind and shift, and zeros
  // For the gradient of sum_i w_i A_i / (G_i + eps) while a row is on chip.
  Weights<T> weights;
  double eps;
  T* grad;                     // [B, M] contiguous, or null
  Coefficients* coefficients;  // [B], of grad
};

template <class T>
struct InputGradArgs {
  Matrix input;  // [B, M]
  int64_t rows;
  Targets target;   // [B]
  const T* center;  // [M] or null
  Centroids<T> centroids;
  const T* reference;        // [M] what all rows are compared with, or [B, M] for each its own
  int64_t reference_stride;  // from row to row: 0, or M
  const RowStats* stats;             // [B]
  const Coefficients* coefficients;  // [B]
  Upstream upstream;
  void* grad;  // [B, M] contiguous, in the dtype of input
};

// The rows' sums to their terms, and to the rest of their statistics.
template <class T>
struct FinishTermsArgs {
  int64_t rows;
  Targets target;
  Centroids<T> centroids;
  const RowSums* sums;  // [B]
  RowStats* stats;      // [B]
  double* terms;        // [2, B]
};

// The terms, or the rows' sums, to the loss. Loss is its type.
template <class T, class Loss>
struct ReduceArgs {
  int64_t rows;
  Targets target;
  Centroids<T> centroids;  // but for their columns
  const double* terms;     // [2, B], or null: formed from the sums
  const RowSums* sums;     // [B], or null: terms are given
  RowStats* stats;         // [B], completed where terms are formed
  Weights<T> weights;      // total null: formed here where `mean`
  const double* totals;    // [kReduceSums] in the place of the sums over the rows, or null
  bool focus;
  bool batch_ratio;
  bool mean;
  double eps;
  Loss* loss;                  // scalar
  Loss* row_loss;              // [B], or null: reduction none
  Coefficients* coefficients;  // [B], or null: those that the gradient was made of stand
  double* means;               // [2] of A and G over the rows, weighted
  double* over_rows;           // [kReduceSums] the sums over the rows, or null
  double* partials;            // [reduce_partials(rows), kReduceSums] workspace
};
constexpr int64_t kReduceSums = 4;
int64_t reduce_partials(int64_t rows);

// The mean of the rows, and what the rows weigh together: in two steps, over splits of the rows and then over splits.
template <class T>
struct CenterArgs {
  Matrix input;  // [B, M]
  int64_t rows, columns;
  Targets target;
  int64_t classes;
  int64_t splits;  // center_splits(rows, columns)
  double* sums;    // [splits, columns] workspace
  double* counts;  // [splits, 2] workspace: rows that count, what they weigh
  const T* class_weight;  // [C] or null
  double* weight_total;   // [1] or null
  double momentum;
  T* center;               // [M], or null for the weights alone
  int64_t* batches;        // []
  T* moved;                // [M]
  int32_t* finite;         // [center_blocks(splits, columns)] workspace
};
int64_t center_splits(int64_t rows, int64_t columns);
int64_t center_blocks(int64_t splits, int64_t columns);

template <class T>
struct CentroidStatsArgs {
  Matrix logits;  // [C, M] xi
  int64_t classes, columns;
  bool softmax;
  bool centroid_to_sample;
  T* log_activation;  // [C, M]
  T* activation;      // [C, M] or null
  T* reference;       // [2, M]
  ClassStats* of;     // [C], and then AllStats
  int64_t chunks;     // class_chunks(classes, columns)
  double* sums;       // [chunks, kClassSums, M] workspace
  double* lost;       // [2, M] workspace: what rounding `reference` lost; q_mean_k times the mean log_norm under it
};
constexpr int64_t kClassSums = 3;  // log a; or q, q log a and q log_norm
int64_t class_chunks(int64_t classes, int64_t columns);

template <class T>
struct CentroidGradArgs {
  Matrix input;  // [B, M]
  int64_t rows;
  Targets target;   // [B]
  const T* center;  // [M] or null
  Centroids<T> centroids;
  Matrix logits;          // [C, M] xi
  const RowStats* stats;             // [B]
  const Coefficients* coefficients;  // [B]
  Upstream upstream;
  const int32_t* sorted;       // [B] targets in order, ignored rows as C
  const int64_t* order;        // [B] the rows that they are of
  int64_t* class_begin;        // [C + 1] workspace, into order
  int64_t chunks;              // grad_chunks(classes, columns, dtype)
  double* partial_totals;      // [chunks, M] workspace
  double* totals;              // [M + 1], the last one sum_i other_i: workspace, or
  bool totals_given;           // read only
  double* class_other;         // [C] workspace: sums of `other` over the rows of a class
  // The sums of the classes that have rows, [C, M], or [B, M] where each is in the place of its first row in `order`.
  bool by_first_row;
  T* own;             // workspace, or [C, M] that becomes the gradient
  T* own_separation;  // workspace; centroid_to_sample only

  NCMI_INLINE_MEMBER int64_t own_offset(int64_t c) const {
    return (by_first_row ? class_begin[c] : c) * centroids.columns;
  }
};
int64_t grad_chunks(int64_t classes, int64_t columns);

// The sums over all rows that the gradient of every centroid has.
template <class T>
struct TotalsArgs {
  Matrix input;  // [B, M]
  int64_t rows, columns;
  Targets target;   // [B]
  const T* center;  // [M] or null
  const RowStats* stats;             // [B]
  const Coefficients* coefficients;  // [B]
  Upstream upstream;
  bool centroid_to_sample;
  int64_t chunks;    // total_chunks(rows, columns)
  double* partials;  // [chunks, M + 1] workspace
  double* totals;    // [M + 1], the last one sum_i other_i
};
int64_t total_chunks(int64_t rows, int64_t columns);

// Throws what an earlier kernel left behind, if it was an error after which the device does nothing more.
void check_device_works();

template <class T>
void launch_terms(const TermsArgs<T>&, Stream);
template <class T>
void launch_input_grad(const InputGradArgs<T>&, Stream);
template <class T>
void launch_finish_terms(const FinishTermsArgs<T>&, Stream);
template <class T, class Loss>
void launch_reduce(const ReduceArgs<T, Loss>&, Stream);
template <class T>
void launch_update_center(const CenterArgs<T>&, Stream);
template <class T>
void launch_centroid_stats(const CentroidStatsArgs<T>&, Stream);
// Targets as sort keys [B], ignored rows last.
void launch_sort_keys(const Targets&, int64_t rows, int64_t classes, int32_t* keys, Stream);
template <class T>
void launch_centroid_grad(const CentroidGradArgs<T>&, Stream);
// A step by the gradient, of the logits that it is of.
template <class T>
void launch_centroid_step(const CentroidGradArgs<T>&, const StepArgs<T>&, Stream);
template <class T>
void launch_class_totals(const TotalsArgs<T>&, Stream);
template <class T>
void launch_scale(T* grad, int64_t elements, const T* factor, Stream);

}  // namespace ncmi::cuda
