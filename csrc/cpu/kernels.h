// What the CPU operators (ops_cpu.cpp) call: loops over a range of rows, classes or columns, on raw pointers.
//
// The loops in the headers beside this one are compiled once for each instruction set (kernels_impl.h) and reached
// through a table, so that one binary runs everywhere. But for host.h, no header of csrc/cpu includes a C++ library
// template: an inline function instantiated under AVX-512 flags could be the copy that the linker keeps for all.
#pragma once

#include <stdint.h>

#include "../focus.h"

namespace ncmi::cpu {

constexpr int64_t kWide = 64;  // columns that loops take side by side

template <class T>
struct TermsArgs {
  Matrix input;            // [B, M]
  Targets target;          // [B]
  const T* center;         // [M] or null
  Features features;
  Centroids<T> centroids;
  double* concentration;   // [B] A
  double* separation;      // [B] G
  RowStats* rows;          // [B]
  // For the gradient of sum_i row_weight_i A_i / (G_i + eps) / weight_sum in the same pass, while a row is in cache.
  const double* row_weight;  // [B]
  double weight_sum;
  RatioOptions ratio;
  T* grad;                      // [B, M] contiguous, or null
  Coefficients* coefficients;   // [B], of grad
};

template <class T>
struct InputGradArgs {
  Matrix input;                      // [B, M]
  Targets target;                    // [B]
  const T* center;                   // [M] or null
  Centroids<T> centroids;
  const RowStats* rows;              // [B]
  const Coefficients* coefficients;  // [B]
  const T* row_reference;            // [B, M], in the place of the centroids' reference or mean; or null
  const T* row_own;                  // [B, M], in the place of log a of a row's centroid; or null
  void* grad;                        // [B, M] contiguous
  Dtype grad_dtype;
};

// Sums over classes that a chunk of them keeps for each column.
constexpr int64_t chunk_sums(bool centroid_to_sample) { return centroid_to_sample ? 3 : 1; }

template <class T>
struct CentroidStatsArgs {
  Matrix logits;          // [C, M] xi
  int64_t classes;
  int64_t columns;
  bool softmax;
  bool centroid_to_sample;
  T* log_activation;      // [C, M]
  T* activation;          // [C, M] or null
  ClassStats* of;         // [C], whose prior is there before
  T* reference;           // [2, M]
  int64_t classes_per_chunk;  // of the sums over classes: a function of C alone, so that their order is one too
  double* chunk_sums;         // [chunks, chunk_sums(), M] workspace
  double* residual;           // [M] workspace: what rounding `reference` lost
  double* weighted_log_norm;  // [M] workspace: q_mean_k times the mean log_norm under it; centroid_to_sample only
};

// The sums over the rows of a class that have no columns, and what its sums by column hold.
struct RowsOfClass {
  int64_t slot;        // the row of CentroidGradArgs::own that holds the sums by column
  double own, other;   // sums of these coefficients
  double excess_base;  // sum over near rows of own / 2 S
  bool has_rows;
  bool all_near;       // then they hold the excess alone (centroid_grad.h, ColumnSums)
};

template <class T>
struct CentroidGradArgs {
  Matrix input;                      // [B, M]
  const T* center;                   // [M] or null
  Centroids<T> centroids;
  Matrix logits;                     // [C, M] xi
  const RowStats* rows;              // [B]
  const Coefficients* coefficients;  // [B]
  const int64_t* order;              // rows by class, ignored rows left out
  const int64_t* class_begin;        // [C + 1] into order
  const RowsOfClass* rows_of_classes;  // [C]
  T* own;                            // [S, M] workspace, a row for each class that has rows
  T* own_separation;                 // [S, M] likewise; centroid_to_sample only
  bool own_is_grad;                  // S = C: a row for every class, that of the gradient itself
  double* totals;                    // [M] workspace
  double other_sum;                  // sum_i other_i
  // totals of sample_to_centroid, as level + variation: sum_i other_i p_ik hardly depends on k, nor does what it is
  // compared with, so that in T their difference would be mostly rounding.
  double level;
  const T* variation;                // [M]
  // With a weight for every row and class, in the place of prior times other_sum, level and variation or totals:
  const ClassWeights* class_weights;  // [C], or null
  const T* weighted;                  // [C, M] sums of x of InProduct, or of log p less what the classes share
  double weighted_by;                 // what both are multiplied by
};

// The sums over all rows that the gradient of every centroid has.
template <class T>
struct TotalsArgs {
  Matrix input;                      // [B, M]
  Targets target;                    // [B]
  const T* center;                   // [M] or null
  int64_t row_count;                 // B
  const RowStats* rows;              // [B]
  const Coefficients* coefficients;  // [B]
  bool centroid_to_sample;
  double* totals;                    // [M]
};

// `scratch` is [columns] elements, for terms and input_grad [4, columns]. centroid_sums begins at a multiple of kWide.
template <class T>
struct Kernels {
  void (*terms)(const TermsArgs<T>&, int64_t row_begin, int64_t row_end, T* scratch);
  void (*input_grad)(const InputGradArgs<T>&, int64_t row_begin, int64_t row_end, T* scratch);
  void (*centroid_rows)(const CentroidStatsArgs<T>&, int64_t chunk_begin, int64_t chunk_end, T* scratch);
  void (*centroid_columns)(const CentroidStatsArgs<T>&, int64_t column_begin, int64_t column_end);
  void (*rows_of_classes)(const CentroidGradArgs<T>&, RowsOfClass*);
  void (*centroid_sums)(const CentroidGradArgs<T>&, int64_t column_begin, int64_t column_end);
  void (*centroid_grad)(const CentroidGradArgs<T>&, int64_t class_begin, int64_t class_end, T* grad, T* scratch);
  void (*centroid_step)(const CentroidGradArgs<T>&, const StepArgs<T>&, const CentroidStatsArgs<T>&,
                        int64_t chunk_begin, int64_t chunk_end, T* scratch);
  void (*totals)(const TotalsArgs<T>&, int64_t column_begin, int64_t column_end);
  void (*focus_table)(const FocusTableArgs<T>&, int64_t class_begin, int64_t class_end);
  void (*focus_rows)(const FocusRowsArgs<T>&, int64_t row_begin, int64_t row_end, T* scratch);
  void (*focus_nearest)(const FocusNearestArgs<T>&, int64_t row_begin, int64_t row_end);
  void (*focus_weights)(const FocusWeightsArgs<T>&, int64_t row_begin, int64_t row_end);
  void (*focus_sums)(const FocusSumsArgs<T>&, int64_t class_begin, int64_t class_end);
  void (*column_sums)(const Matrix&, const Targets&, int64_t rows, int64_t column_begin, int64_t column_end,
                      double* sums);
};

struct KernelTable {
  const char* name;
  Kernels<float> f32;
  Kernels<double> f64;
};

extern const KernelTable kDefaultKernels;
#if defined(__x86_64__)
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;
#endif

// The best table for this processor, or the one named by NCMI_CPU_CAPABILITY (default, avx2, avx512).
const KernelTable& kernels();

}  // namespace ncmi::cpu
