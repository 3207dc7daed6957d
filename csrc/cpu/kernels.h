// What the CPU operators (ops_cpu.cpp) call: loops over a range of rows, classes or columns, on raw pointers.
//
// The loops in kernels_impl.h are compiled once for each instruction set and reached through a table, so that one
// binary runs everywhere. This header and kernels_impl.h include no C++ library template: an inline function
// instantiated under AVX-512 flags could otherwise be the copy that the linker keeps for every caller.
#pragma once

#include <stdint.h>

namespace ncmi::cpu {

enum class Dtype { kFloat32, kFloat64, kBFloat16, kFloat16 };

// A [rows, columns] matrix of any strides, read-only.
struct Matrix {
  const void* data;
  Dtype dtype;
  int64_t row_stride;
  int64_t column_stride;
};

struct Targets {
  const int64_t* data;
  int64_t stride;
  int64_t ignore_index;
  int64_t operator[](int64_t i) const { return data[i * stride]; }
};

// How a row of features becomes a row of probabilities.
struct Features {
  double temperature;
  bool l2_normalize;
  bool softmax;
};

// What the rows need to know of the centroids. T is the type of the arithmetic, float or double.
template <class T>
struct Centroids {
  int64_t classes;          // C
  int64_t columns;          // M
  bool centroid_to_sample;  // the separation
  const T* log_activation;  // [C, M] log a(xi), shifted
  const T* activation;      // [C, M] a(xi), shifted; centroid_to_sample only
  const T* reference;       // [2, M] see centroid_columns
  const double* log_norm;   // [C] log sum_k a(xi_c)_k, shifted
  const double* shift;      // [C] what log a(xi_c) was shifted by; 0 but for softmax and rows that underflow
  const double* kind;       // [C] how the centroid was activated (kernels_impl.h)
  double weight_sum;         // sum_k q_mean_k as rounded (1 for sample_to_centroid)
  double weighted_log_norm;  // the mean log_norm, weighted as `reference` is, less what rounding that lost
};

// What the forward pass leaves of a row for the backward passes.
struct RowStats {
  double scale;             // f = (z - center) * scale
  double inverse_length;    // 1 / ||z - center||, or 0 where its chain rule does not apply
  double kind;              // how the row was activated (kernels_impl.h)
  double shift;             // what its log a was shifted by
  double inverse_norm;      // 1 / sum_k a_k
  double own_mean;          // mean under p of log a - log a(xi_y)
  double all_mean;          // mean under p of log a - reference
  double by_concentration;  // d loss / d A, but for the upstream gradient
  double by_separation;     // d loss / d G, likewise
};
constexpr int64_t kRowStats = sizeof(RowStats) / sizeof(double);

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
  // For the gradient of sum_i row_weight_i A_i / (G_i + eps) in the same pass, while a row is in cache.
  const double* row_weight;  // [B]
  double eps;
  T* grad;                 // [B, M] contiguous, or null
};

template <class T>
struct InputGradArgs {
  Matrix input;                      // [B, M]
  Targets target;                    // [B]
  const T* center;                   // [M] or null
  Centroids<T> centroids;
  const RowStats* rows;              // [B]
  const double* concentration_grad;  // [B] d loss / d A_i
  const double* separation_grad;     // [B] d loss / d G_i
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
  double* log_norm;       // [C]
  double* shift;          // [C]
  double* kind;           // [C]
  T* reference;           // [2, M]
  int64_t classes_per_chunk;  // of the sums over classes: a function of C alone, so that their order is one too
  double* chunk_sums;         // [chunks, chunk_sums(), M] workspace
  double* residual;           // [M] workspace: what rounding `reference` lost
  double* weighted_log_norm;  // [M] workspace: q_mean_k times the mean log_norm under it; centroid_to_sample only
};

// The sums over the rows of a class that have no columns, and what its sums by column hold.
struct ClassSums {
  double own_factor;
  double separation_grad;  // beta
  double excess_base;      // sum over near rows of own_factor / 2 S
  bool has_rows;
  bool all_near;           // then they hold the excess alone (kernels_impl.h, ColumnSums)
};

template <class T>
struct CentroidGradArgs {
  Matrix input;                      // [B, M]
  const T* center;                   // [M] or null
  Centroids<T> centroids;
  Matrix logits;                     // [C, M] xi
  const RowStats* rows;              // [B]
  const double* own_factor;          // [B] what multiplies p_i - q_y: alpha, or for sample_to_centroid alpha - beta / C
  const double* separation_grad;     // [B] beta = d loss / d G_i
  const int64_t* order;              // rows by class, ignored rows left out
  const int64_t* class_begin;        // [C + 1] into order
  const ClassSums* class_sums;       // [C]
  T* grad;                           // [C, M]
  T* own_separation;                 // [C, M] workspace; centroid_to_sample only
  double* totals;                    // [M] workspace
  double separation_grad_sum;        // sum_i d loss / d G_i
};

// `scratch` is [columns] elements, for input_grad [2, columns].
template <class T>
struct Kernels {
  void (*terms)(const TermsArgs<T>&, int64_t row_begin, int64_t row_end, T* scratch);
  void (*input_grad)(const InputGradArgs<T>&, int64_t row_begin, int64_t row_end, T* scratch);
  void (*centroid_rows)(const CentroidStatsArgs<T>&, int64_t chunk_begin, int64_t chunk_end, T* scratch);
  void (*centroid_columns)(const CentroidStatsArgs<T>&, int64_t column_begin, int64_t column_end);
  void (*class_sums)(const CentroidGradArgs<T>&, ClassSums*);
  void (*centroid_sums)(const CentroidGradArgs<T>&, int64_t column_begin, int64_t column_end);
  void (*centroid_grad)(const CentroidGradArgs<T>&, int64_t class_begin, int64_t class_end, T* scratch);
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
