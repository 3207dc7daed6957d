// What the CPU operators are made of: memory, checked targets and tables, work shared out over threads. Not for the
// kernels, which are compiled for each instruction set (kernels.h).
#pragma once

#include <algorithm>
#include <atomic>
#include <exception>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../tensors.h"
#include "kernels.h"

namespace ncmi::cpu {

// -------------------------------------------------------------------------------------------------------------
// Tensors
// -------------------------------------------------------------------------------------------------------------

inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return empty_on(aoti_torch_device_type_cpu(), 0, sizes, dtype);
}

// A vector of numbers. Vector(n) leaves them uninitialised.
template <class T>
struct Allocator {
  using value_type = T;
  Allocator() = default;
  template <class U>
  Allocator(const Allocator<U>&) {}
  T* allocate(size_t n) {
    void* memory = ::operator new(n * sizeof(T), std::nothrow);
    if (!memory) throw OutOfMemory(static_cast<int64_t>(n * sizeof(T)));
    return static_cast<T*>(memory);
  }
  void deallocate(T* memory, size_t) { ::operator delete(memory); }
  template <class U>
  void construct(U* p) {
    ::new (static_cast<void*>(p)) U;
  }
  friend bool operator==(const Allocator&, const Allocator&) { return true; }
};
template <class T>
using Vector = std::vector<T, Allocator<T>>;

// Targets of the rows of input [B, M], each checked to be a class or ignore_index, and so that rows may follow what the
// statistics say of its centroid.
inline Targets targets(const Tensor& t, int64_t rows, int64_t ignore_index, int64_t classes,
                       const ClassStats* of = nullptr, int64_t columns = 0) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long, "ncmi_kernels: target must be int64");
  check_shape(t, "target", {rows});
  const Targets target{.data = static_cast<const int64_t*>(memory_of(t, "target")),
                       .stride = t.stride(0),
                       .ignore_index = ignore_index};
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t y = target[i];
    if (y == ignore_index) continue;
    if (y < 0 || y >= classes)  // surfaces as an IndexError, as in cross_entropy
      throw std::out_of_range("target: value " + std::to_string(y) + " at row " + std::to_string(i) +
                              " is out of range, expected a class in [0, " + std::to_string(classes) +
                              ") or ignore_index (" + std::to_string(ignore_index) + ")");
    STD_TORCH_CHECK(!of || (of[y].lone >= -1 && of[y].lone < double(columns)),
                    "ncmi_kernels: norms are not those of centroid_stats");
  }
  return target;
}

template <class T>
const Kernels<T>& kernels_for() {
  if constexpr (std::is_same_v<T, float>) {
    return kernels().f32;
  } else {
    return kernels().f64;
  }
}

// -------------------------------------------------------------------------------------------------------------
// Threads
// -------------------------------------------------------------------------------------------------------------

constexpr int64_t kElementsPerThread = 8192;  // about 10 us of work: below that a second thread does not pay

// Calls f(begin, end) for parts of [0, size). What it throws keeps its type, which torch's own would not leave it.
template <class F>
void parallel(int64_t size, int64_t grain, const F& f) {
  std::exception_ptr error;
  std::atomic_flag failed;
  torch::stable::parallel_for(0, size, grain, [&](int64_t begin, int64_t end) {
    try {
      f(begin, end);
    } catch (...) {
      if (!failed.test_and_set()) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

template <class F>
void parallel_rows(int64_t rows, int64_t columns, const F& f) {
  parallel(rows, std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, columns)), f);
}

// Over columns, in units of a cache line of floats so that no two threads write to one.
template <int64_t unit = 16, class F>
void parallel_columns(int64_t columns, int64_t rows, const F& f) {
  const int64_t units = ceil_div(columns, unit);
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / (unit * std::max<int64_t>(1, rows)));
  parallel(units, grain, [&](int64_t begin, int64_t end) { f(begin * unit, std::min(columns, end * unit)); });
}

inline int64_t rows_of(const Tensor& input) {
  STD_TORCH_CHECK(input.dim() == 2, "ncmi_kernels: input must have 2 dimensions");
  return input.size(0);
}

// The coefficients [B] times the upstream gradient (a scalar or [B], or none).
class ScaledCoefficients {
 public:
  ScaledCoefficients(const Tensor& coefficients, const std::optional<Tensor>& upstream, int64_t rows)
      : data_(coefficients_in(coefficients, rows)) {
    if (!upstream) return;
    const bool by_row = upstream->dim() == 1;
    STD_TORCH_CHECK(by_row ? upstream->size(0) == rows : upstream->dim() == 0,
                    "ncmi_kernels: upstream must be a scalar or [B]");
    const int64_t stride = by_row ? upstream->stride(0) : 0;
    scaled_.resize(rows);
    with_arithmetic_type(upstream->scalar_type(), "upstream", [&]<class T>() {
      const T* factor = static_cast<const T*>(memory_of(*upstream, "upstream"));
      for (int64_t i = 0; i < rows; ++i) {
        const double by = double(factor[i * stride]);
        const Coefficients& c = data_[i];
        scaled_[i] = {by * c.own, by * c.other, by * c.share, by * c.constant};
      }
    });
    data_ = scaled_.data();
  }
  ScaledCoefficients(const ScaledCoefficients&) = delete;  // data_ may point into it

  const Coefficients* data() const { return data_; }

 private:
  Vector<Coefficients> scaled_;
  const Coefficients* data_;
};

}  // namespace ncmi::cpu
