// Column sums over the rows that are not ignored, for the mean of the features.
#pragma once

#include "load.h"

namespace ncmi::cpu {
namespace {

template <class In, class T>
void add_stretch(const Matrix& m, int64_t row, int64_t begin, int64_t n, const Ahead& ahead, T* __restrict sums) {
  const In* __restrict in = static_cast<const In*>(m.data) + row * m.row_stride + begin * m.column_stride;
  const int64_t stride = m.column_stride;
  if (stride == 1) {
    const int64_t whole = n / kLanes<T> * kLanes<T>;
    for_stretches<kLanes<T>>(0, whole, [&](int64_t k, int64_t count) __attribute__((always_inline)) {
      ahead.fetch(begin + k, count);
      NCMI_SIMD()
      for (int64_t j = k; j < k + count; ++j) sums[j] += T(widen(in[j]));
    });
    for (int64_t k = whole; k < n; ++k) sums[k] += T(widen(in[k]));
  } else {
    for (int64_t k = 0; k < n; ++k) sums[k] += T(widen(in[k * stride]));
  }
}

template <class T>
void column_sums(const Matrix& m, const Targets& target, int64_t rows, int64_t column_begin, int64_t column_end,
                 double* sums) {
  constexpr int64_t kRowsPerFlush = 16;  // rows added in T before they go to a double
  T partial[kColumnBlock];
  for (int64_t begin = column_begin; begin < column_end; begin += kColumnBlock) {
    const int64_t n = min(kColumnBlock, column_end - begin);
    for (int64_t k = 0; k < n; ++k) sums[begin + k] = 0;
    for (int64_t first = 0; first < rows; first += kRowsPerFlush) {
      for (int64_t k = 0; k < n; ++k) partial[k] = 0;
      for (int64_t i = first; i < min(first + kRowsPerFlush, rows); ++i) {
        if (target[i] == target.ignore_index) continue;
        Ahead ahead;
        if (i + 1 < rows) ahead.row(m, i + 1);
        switch (m.dtype) {
          case Dtype::kFloat32: add_stretch<float>(m, i, begin, n, ahead, partial); break;
          case Dtype::kFloat64: add_stretch<double>(m, i, begin, n, ahead, partial); break;
          case Dtype::kBFloat16: add_stretch<BFloat16>(m, i, begin, n, ahead, partial); break;
          case Dtype::kFloat16: add_stretch<Float16>(m, i, begin, n, ahead, partial); break;
        }
      }
      NCMI_SIMD()
      for (int64_t k = 0; k < n; ++k) sums[begin + k] += double(partial[k]);
    }
  }
}

}  // namespace
}  // namespace ncmi::cpu
