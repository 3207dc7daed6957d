// What the operators of both C++ backends hand to their kernels, and rows as the forward pass leaves them.
#pragma once

#include <stdint.h>

#include "low_precision.h"

namespace ncmi {

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
  NCMI_INLINE_MEMBER int64_t operator[](int64_t i) const { return data[i * stride]; }
};

// How a row of features becomes a row of probabilities.
struct Features {
  double inverse_temperature;
  bool l2_normalize;
  bool softmax;
};

// What the forward pass leaves of a row for the backward passes.
struct RowStats {
  double scale;           // f = (z - center) * scale
  double inverse_length;  // 1 / ||z - center||, or 0 where its chain rule does not apply
  double kind;            // how the row was activated (the backend's Kind)
  double shift;           // the largest z - center, where log a is relative to that; else 0
  double inverse_norm;    // 1 / sum_k a_k
  double own_mean;        // mean under p of log a - log a(xi_y)
  double all_mean;        // mean under p of log a - reference
  double own_prior;       // what its class counts for in the separation, of all the classes' 1
};
constexpr int64_t kRowStats = sizeof(RowStats) / sizeof(double);

// What the gradient of a row is made of (sample_gradient and centroid_gradient, ncmi_math.h), but for the upstream
// gradient, which multiplies all four.
struct Coefficients {
  double own;       // of what the row has with its own class
  double other;     // of what it has with all classes, or with its own reference
  double share;     // of the own class in `other`; centroid_to_sample only
  double constant;  // the mean under p of what `own` and `other` multiply, for centroid_to_sample of `own` alone
};
constexpr int64_t kCoefficients = sizeof(Coefficients) / sizeof(double);

// What there is to know of a centroid but for its columns.
struct ClassStats {
  double log_norm;  // log sum_k a(xi_c)_k, shifted
  double shift;     // the largest logit, where log a(xi_c) is relative to that; else 0
  double kind;      // how the centroid was activated (the backend's Kind)
  // Where one column differs and all others are equal, as in one-hot centroids: which, and log a and a in it and in the
  // others. -1 for other centroids; what only some backends look at.
  double lone;
  double lone_log, other_log;
  double lone_activation, other_activation;  // centroid_to_sample only
  double prior;                              // what it counts for in the separation, of all the classes' 1
};
constexpr int64_t kClassStats = sizeof(ClassStats) / sizeof(double);

// The record after those of the classes.
struct AllStats {
  double weight_sum;         // sum_k q_mean_k as rounded (1 for sample_to_centroid)
  double weighted_log_norm;  // the mean log_norm, weighted as `reference` is, less what rounding that lost
  double reference_sum;      // sum_k reference_k, for centroid_to_sample of q_mean_k reference_k, as rounded
  double unused[6];
};
static_assert(sizeof(AllStats) == sizeof(ClassStats), "one tensor holds both");

// What the rows need to know of the centroids. T is the type of the arithmetic, float or double.
template <class T>
struct Centroids {
  int64_t classes;          // C, of the table, which may be some of all
  int64_t columns;          // M
  bool centroid_to_sample;  // the separation
  const T* log_activation;  // [C, M] log a(xi), shifted
  const T* activation;      // [C, M] a(xi), shifted; centroid_to_sample only
  const T* reference;       // [2, M] what log a is compared with for all classes at once; the mean of q over classes
  const ClassStats* of;     // [C], and then AllStats

  NCMI_INLINE_MEMBER const AllStats& all() const { return *reinterpret_cast<const AllStats*>(of + classes); }
};

// What a class has of all rows in the gradient of its centroid, but for the sums by column: sums over the rows of their
// coefficient `other` times the weight of the class.
struct ClassWeights {
  double other;
  double base;  // the same by what p has in every column (InProduct, rows.h): share base
};
constexpr int64_t kClassWeights = sizeof(ClassWeights) / sizeof(double);

// One batch more, of a count that a checkpoint may have set to anything.
NCMI_INLINE int64_t next_batch(int64_t batches) { return batches < INT64_MAX ? batches + 1 : batches; }

// A step of torch.optim.SGD.
template <class T>
struct StepArgs {
  T* logits;           // [C, M] contiguous
  T* momentum_buffer;  // [C, M] contiguous, or null without momentum
  double lr;
  double momentum;
  double weight_decay;
  bool nesterov;
};

}  // namespace ncmi
