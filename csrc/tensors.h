// From tensors to pointers, with the checks: what the operators of every compiled backend share.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <new>
#include <optional>
#include <string>
#include <type_traits>

#include "layout.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // its name before torch 2.13
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace ncmi {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
constexpr ScalarType kScalarType = ScalarType::Undefined;
template <>
inline constexpr ScalarType kScalarType<float> = ScalarType::Float;
template <>
inline constexpr ScalarType kScalarType<double> = ScalarType::Double;
template <>
inline constexpr ScalarType kScalarType<int64_t> = ScalarType::Long;

template <class T>
constexpr bool kIsDouble = std::is_same_v<T, double>;

// In Python a MemoryError.
class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(int64_t bytes)
      : message_("ncmi_kernels: can't allocate memory: you tried to allocate " + std::to_string(bytes) + " bytes") {}
  const char* what() const noexcept override { return message_.c_str(); }

 private:
  std::string message_;
};

// Uninitialised and contiguous, straight from the allocator: no trip through the dispatcher.
inline Tensor empty_on(int32_t device_type, int32_t device_index, std::initializer_list<int64_t> sizes,
                       ScalarType dtype) {
  int64_t strides[3], stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(1, sizes.begin()[d]);
  }
  AtenTensorHandle handle;
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  // With sizes of tensors that exist nothing else fails, but for a device after an error that stays.
  if (aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides, code, device_type,
                               device_index, &handle) != TORCH_SUCCESS)
    throw OutOfMemory(stride * int64_t(aoti_torch_dtype_element_size(code)));
  return Tensor(handle);
}

inline void check_shape(const Tensor& t, const char* name, std::initializer_list<int64_t> sizes) {
  const auto actual = t.sizes();
  STD_TORCH_CHECK(actual.size() == sizes.size() && std::equal(sizes.begin(), sizes.end(), actual.begin()),
                  "ncmi_kernels: ", name, " has an unexpected shape");
}

// Null only without elements: not of a tensor whose storage was freed.
inline void* memory_of(const Tensor& t, const char* name) {
  void* memory = t.data_ptr();
  STD_TORCH_CHECK(memory || t.numel() == 0, "ncmi_kernels: ", name, " has no memory");
  return memory;
}

template <class T>
const T* data(const Tensor& t, const char* name, std::initializer_list<int64_t> sizes) {
  STD_TORCH_CHECK(t.scalar_type() == kScalarType<T>, "ncmi_kernels: ", name, " has an unexpected dtype");
  STD_TORCH_CHECK(t.is_contiguous(), "ncmi_kernels: ", name, " must be contiguous");
  check_shape(t, name, sizes);
  return static_cast<const T*>(memory_of(t, name));
}

template <class T>
const T* data(const std::optional<Tensor>& t, const char* name, std::initializer_list<int64_t> sizes) {
  return t ? data<T>(*t, name, sizes) : nullptr;
}

template <class T>
T* output(Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

inline Dtype dtype_of(ScalarType dtype, const char* name) {
  switch (dtype) {
    case ScalarType::Float: return Dtype::kFloat32;
    case ScalarType::Double: return Dtype::kFloat64;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kFloat16;
    default: STD_TORCH_CHECK(false, "ncmi_kernels: ", name, " must be float32, float64, bfloat16 or float16");
  }
}

inline Matrix matrix(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2, "ncmi_kernels: ", name, " must have 2 dimensions");
  return {.data = memory_of(t, name),
          .dtype = dtype_of(t.scalar_type(), name),
          .row_stride = t.stride(0),
          .column_stride = t.stride(1)};
}

// Calls f<T>() with the arithmetic type, which `name` must have.
template <class F>
auto with_arithmetic_type(ScalarType dtype, const char* name, const F& f) {
  if (dtype == ScalarType::Double) return f.template operator()<double>();
  STD_TORCH_CHECK(dtype == ScalarType::Float, "ncmi_kernels: ", name, " must be float32 or float64");
  return f.template operator()<float>();
}

inline const ClassStats* class_stats_of(const Tensor& norms, int64_t classes) {
  return reinterpret_cast<const ClassStats*>(data<double>(norms, "norms", {classes + 1, kClassStats}));
}

template <class T>
Centroids<T> centroids(const Tensor& log_activation, const Tensor& activation, const Tensor& reference,
                       const Tensor& norms, bool centroid_to_sample) {
  STD_TORCH_CHECK(log_activation.dim() == 2, "ncmi_kernels: log_activation must have 2 dimensions");
  const int64_t classes = log_activation.size(0), columns = log_activation.size(1);
  STD_TORCH_CHECK(columns > 0, "ncmi_kernels: log_activation must have columns");
  return {.classes = classes,
          .columns = columns,
          .centroid_to_sample = centroid_to_sample,
          .log_activation = data<T>(log_activation, "log_activation", {classes, columns}),
          .activation = data<T>(activation, "activation", {centroid_to_sample ? classes : 0, columns}),
          .reference = data<T>(reference, "reference", {2, columns}),
          .of = class_stats_of(norms, classes)};
}

inline const RowStats* row_stats_of(const Tensor& t, int64_t rows) {
  return reinterpret_cast<const RowStats*>(data<double>(t, "rows", {rows, kRowStats}));
}

inline const Coefficients* coefficients_in(const Tensor& t, int64_t rows) {
  return reinterpret_cast<const Coefficients*>(data<double>(t, "coefficients", {rows, kCoefficients}));
}

// How many classes there are of centroids [R], K to each.
inline int64_t classes_of(int64_t centroids, int64_t centroids_per_class) {
  STD_TORCH_CHECK(centroids_per_class > 0 && centroids % centroids_per_class == 0,
                  "ncmi_kernels: centroids_per_class does not divide the number of centroids");
  return centroids / centroids_per_class;
}

enum Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

inline void check_reduction(bool batch_ratio, int64_t reduction, double sharpness) {
  STD_TORCH_CHECK(reduction == kNone || reduction == kMean || reduction == kSum, "ncmi_kernels: unknown reduction");
  STD_TORCH_CHECK(!batch_ratio || reduction == kMean, "ncmi_kernels: ratio over the batch needs reduction mean");
  STD_TORCH_CHECK(batch_ratio ? sharpness == 0 : sharpness >= 0,
                  "ncmi_kernels: sharpness must be >= 0, and 0 for the ratio over the batch");
}

// Of the operator loss: what no combination of its arguments may break.
inline void check_loss_arguments(const Tensor& input, const std::optional<Tensor>& center,
                                 const std::optional<Tensor>& running_center,
                                 const std::optional<Tensor>& num_batches_tracked, const Tensor& log_activation,
                                 bool batch_ratio, int64_t reduction, double sharpness, bool with_grad) {
  check_reduction(batch_ratio, reduction, sharpness);
  STD_TORCH_CHECK(running_center.has_value() == num_batches_tracked.has_value() && !(center && running_center),
                  "ncmi_kernels: pass center, or running_center with num_batches_tracked");
  STD_TORCH_CHECK(
      !with_grad || (!batch_ratio && reduction != kNone && input.scalar_type() == log_activation.scalar_type()),
      "ncmi_kernels: with_grad needs ratio by sample, a scalar loss, and input in the arithmetic type");
}

}  // namespace ncmi
