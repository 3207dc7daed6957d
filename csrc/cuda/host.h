// What the CUDA operators are made of: the device, memory, checked pointers. Not for the kernels.
//
// Nothing waits for the device or reads its memory on the host, so that all of it can be captured in a graph.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <optional>
#include <tuple>

#include "../tensors.h"
#include "common.cuh"

namespace ncmi::cuda {

// The device of an operator's tensors, made the current one, and its current stream.
class Device {
 public:
  explicit Device(const Tensor& t) : index_(t.get_device_index()), guard_(index_) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream_));
  }
  int32_t type() const { return aoti_torch_device_type_cuda(); }
  int32_t index() const { return index_; }
  Stream stream() const { return stream_; }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  Stream stream_ = nullptr;
};

// Throws what an earlier kernel left behind, if it was an error after which the device does nothing more.
inline void check_device_works() {
#if defined(__CUDACC__)
  const cudaError_t error = cudaPeekAtLastError();
  if (error != cudaSuccess && error != cudaErrorMemoryAllocation)
    throw std::runtime_error(std::string("ncmi_kernels: the device stopped working: ") + cudaGetErrorString(error));
#endif
}

constexpr int64_t kMostColumns = int64_t(1) << 30;  // within a row, columns are counted in 32 bits

inline Tensor empty(const Device& device, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  try {
    return empty_on(device.type(), device.index(), sizes, dtype);
  } catch (const OutOfMemory&) {
    check_device_works();
    throw;
  }
}

// What passes between kernels, in one allocation: each costs about as much as a launch does.
class Workspace {
 public:
  Workspace(const Device& device, int64_t doubles)
      : memory_(empty(device, {doubles}, ScalarType::Double)), next_(output<double>(memory_)) {}

  template <class T = double>
  T* take(int64_t doubles) {
    T* taken = reinterpret_cast<T*>(next_);
    next_ += doubles;
    return taken;
  }

 private:
  Tensor memory_;  // the caching allocator hands it out again only to what the stream does next
  double* next_;
};

// A kernel cannot check where its pointers lead.
inline void check_device(const Tensor& t, const char* name, const Tensor& input) {
  STD_TORCH_CHECK(t.is_cuda() == input.is_cuda() && t.get_device_index() == input.get_device_index(), "ncmi_kernels: ",
                  name, " must be on the device of the other arguments");
}

template <class T>
const T* data_on(const Tensor& t, const char* name, std::initializer_list<int64_t> sizes, const Tensor& input) {
  check_device(t, name, input);
  return data<T>(t, name, sizes);
}

template <class T>
const T* data_on(const std::optional<Tensor>& t, const char* name, std::initializer_list<int64_t> sizes,
                 const Tensor& input) {
  return t ? data_on<T>(*t, name, sizes, input) : nullptr;
}

// Targets, which the kernels check to be classes or ignore_index.
inline Targets targets(const Tensor& t, const Tensor& input, int64_t ignore_index) {
  check_device(t, "target", input);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long, "ncmi_kernels: target must be int64");
  check_shape(t, "target", {input.size(0)});
  return {.data = static_cast<const int64_t*>(memory_of(t, "target")),
          .stride = t.stride(0),
          .ignore_index = ignore_index};
}

inline const ClassStats* class_stats_on(const Tensor& norms, int64_t classes, const Tensor& input) {
  check_device(norms, "norms", input);
  return class_stats_of(norms, classes);
}

template <class T>
Centroids<T> centroids_on(const Tensor& log_activation, const Tensor& activation, const Tensor& reference,
                          const Tensor& norms, bool centroid_to_sample, const Tensor& input) {
  check_device(log_activation, "log_activation", input);
  check_device(activation, "activation", input);
  check_device(reference, "reference", input);
  check_device(norms, "norms", input);
  return centroids<T>(log_activation, activation, reference, norms, centroid_to_sample);
}

template <class T>
Matrix rows_of(const Tensor& input, int64_t columns) {
  const Matrix z = matrix(input, "input");
  check_shape(input, "input", {input.size(0), columns});
  STD_TORCH_CHECK(columns <= kMostColumns, "ncmi_kernels: more columns than 2^30");
  STD_TORCH_CHECK(z.dtype != Dtype::kFloat64 || kIsDouble<T>,
                  "ncmi_kernels: float64 input needs float64 centroid_logits");
  return z;
}

inline const RowStats* stats_on(const Tensor& rows, const Tensor& input) {
  check_device(rows, "rows", input);
  return row_stats_of(rows, input.size(0));
}

inline const Coefficients* coefficients_on(const Tensor& t, const Tensor& input) {
  check_device(t, "coefficients", input);
  return coefficients_in(t, input.size(0));
}

inline Upstream upstream_of(const std::optional<Tensor>& t, const Tensor& input) {
  if (!t) return {};
  check_device(*t, "upstream", input);
  const bool by_row = t->dim() == 1;
  STD_TORCH_CHECK(by_row ? t->size(0) == input.size(0) : t->dim() == 0,
                  "ncmi_kernels: upstream must be a scalar or [B]");
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float || t->scalar_type() == ScalarType::Double,
                  "ncmi_kernels: upstream must be float32 or float64");
  return {.data = memory_of(*t, "upstream"),
          .is_double = t->scalar_type() == ScalarType::Double,
          .stride = by_row ? t->stride(0) : 0};
}

}  // namespace ncmi::cuda
