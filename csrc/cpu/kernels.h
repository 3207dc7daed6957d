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
  double weight_sum;         // sum_k q_mean_k as rounded (1 for sample_to_centroid)
  double weighted_log_norm;  // the mean log_norm, weighted as `reference` is, less what rounding that lost
};

template <class T>
struct TermsArgs {
  Matrix input;                // [B, M]
  Targets target;              // [B]
  const T* center;             // [M] or null
  Features features;
  Centroids<T> centroids;
  double* concentration;       // [B] A
  double* separation;          // [B] G
  double* row_scale;           // [B] f = (z - center) * row_scale
  double* row_log_norm;        // [B] log sum_k a(f)_k, shifted
  double* row_shift;           // [B] what log a(f) was shifted by
  T* direction;             // [B, M] d A_i / d z_i, or null
  T* separation_direction;  // [B, M] d G_i / d z_i; where null, `direction` is d (A_i / (G_i + eps)) / d z_i
  double eps;
};

// grad_i = factor_i direction_i + separation_factor_i separation_direction_i, and zero where both factors are.
template <class T>
struct InputGradArgs {
  const T* direction;               // [B, M]
  const T* separation_direction;    // [B, M] or null
  const double* factor;             // [B]
  const double* separation_factor;  // [B] or null
  int64_t columns;
  void* grad;                       // [B, M] contiguous; may be `direction`
  Dtype grad_dtype;
};

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
  T* reference;           // [2, M]
  double* residual;           // [M] workspace: what rounding `reference` lost
  double* weighted_log_norm;  // [M] workspace: q_mean_k times the mean log_norm under it; centroid_to_sample only
};

template <class T>
struct CentroidGradArgs {
  Matrix input;                      // [B, M]
  const T* center;                   // [M] or null
  bool softmax;
  Centroids<T> centroids;
  Matrix logits;                     // [C, M] xi
  const double* row_scale;           // [B]
  const double* row_log_norm;        // [B]
  const double* row_shift;           // [B]
  const double* concentration_grad;  // [B] d loss / d A_i
  const double* separation_grad;     // [B] d loss / d G_i
  const int64_t* order;              // rows by class, ignored rows left out
  const int64_t* class_begin;        // [C + 1] into order
  T* grad;                           // [C, M]
  T* own_separation;                 // [C, M] workspace; centroid_to_sample only
  double* totals;                    // [M] workspace
  double separation_grad_sum;        // sum_i d loss / d G_i
};

constexpr int64_t kTermsScratchRows = 4;

// `scratch` is [columns] elements, for `terms` [kTermsScratchRows, columns].
template <class T>
struct Kernels {
  void (*terms)(const TermsArgs<T>&, int64_t row_begin, int64_t row_end, T* scratch);
  void (*input_grad)(const InputGradArgs<T>&, int64_t row_begin, int64_t row_end);
  void (*centroid_rows)(const CentroidStatsArgs<T>&, int64_t class_begin, int64_t class_end, T* scratch);
  void (*centroid_columns)(const CentroidStatsArgs<T>&, int64_t column_begin, int64_t column_end);
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
