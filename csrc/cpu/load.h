// A stretch of one row, centred, in the arithmetic type.
#pragma once

#include "lanes.h"

namespace ncmi::cpu {
namespace {

// Leaves x = z - center, and returns its size where that is `measured`.
template <bool centered, bool measured, class In, class T>
Size<T> load_as(const In* __restrict in, int64_t stride, int64_t n, const T* __restrict center, T* __restrict x) {
  using Bits = decltype(magnitude_bits(T()));
  Size<T> size{};
  Lanes<Bits> largest;
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t last = min(n, first + kBlock);
    Lanes<T> squares;
    const auto take = [&](int64_t k, int64_t j, T z) __attribute__((always_inline)) {
      const T value = centered ? z - center[k] : z;
      x[k] = value;
      if constexpr (measured) {
        const Bits bits = magnitude_bits(value);
        squares.lane[j] += value * value;
        largest.lane[j] = bits > largest.lane[j] ? bits : largest.lane[j];
      }
    };
    if (stride == 1) {
      const int64_t whole = first + (last - first) / kLanes<T> * kLanes<T>;
      for_stretches<kLanes<T>>(first, whole, [&](int64_t k, int64_t m) __attribute__((always_inline)) {
        NCMI_SIMD()
        for (int64_t j = 0; j < m; ++j) take(k + j, j, T(widen(in[k + j])));
      });
      for (int64_t k = whole; k < last; ++k) take(k, k - whole, T(widen(in[k])));
    } else {
      for (int64_t k = first; k < last; ++k) take(k, k % kWide, T(widen(in[k * stride])));
    }
    if constexpr (measured) size.squares += squares.total();
  }
  if constexpr (measured) size.largest = bit_cast<T>(largest.maximum());
  return size;
}

template <bool measured, class In, class T>
Size<T> load_stretch(const Matrix& m, int64_t row, int64_t begin, int64_t n, const T* center, T* x) {
  const In* in = static_cast<const In*>(m.data) + row * m.row_stride + begin * m.column_stride;
  return center ? load_as<true, measured>(in, m.column_stride, n, center + begin, x)
                : load_as<false, measured>(in, m.column_stride, n, center, x);
}

// Leaves the stretch in x, less the centre. Its size only where it is `measured`.
template <bool measured = false, class T>
Size<T> load(const Matrix& m, int64_t row, int64_t begin, int64_t n, const T* center, T* x) {
  switch (m.dtype) {
    case Dtype::kFloat32: return load_stretch<measured, float>(m, row, begin, n, center, x);
    case Dtype::kFloat64: return load_stretch<measured, double>(m, row, begin, n, center, x);
    case Dtype::kBFloat16: return load_stretch<measured, BFloat16>(m, row, begin, n, center, x);
    default: return load_stretch<measured, Float16>(m, row, begin, n, center, x);
  }
}

// Memory to have in cache soon, asked for piece by piece between the arithmetic on a row: the hardware's own
// prefetching does not get going in the short bursts in which rows are read, and a whole row asked for at once would
// fill the processor's queue of outstanding lines and hold up what comes after it.
class Ahead {
 public:
  void row(const Matrix& m, int64_t row) {
    const int64_t width = m.dtype == Dtype::kFloat64 ? 8 : m.dtype == Dtype::kFloat32 ? 4 : 2;
    if (m.column_stride == 1) add(static_cast<const char*>(m.data) + row * m.row_stride * width, width);
  }
  void add(const void* memory, int64_t width) { streams_[count_++] = {static_cast<const char*>(memory), width}; }

  // With columns [k, k + n) of the current row.
  NCMI_INLINE_MEMBER void fetch(int64_t k, int64_t n) const {
    for (int s = 0; s < count_; ++s)
      for (int64_t byte = 0; byte < n * streams_[s].width; byte += 64)
        __builtin_prefetch(streams_[s].memory + k * streams_[s].width + byte, 0, 2);
  }

 private:
  struct Stream {
    const char* memory;
    int64_t width;
  } streams_[3];
  int count_ = 0;
};

// What the next row needs.
template <class T>
void fetch_row(const Matrix& m, const Targets& target, int64_t row, const Centroids<T>& q, Ahead& ahead) {
  const int64_t y = target[row];
  if (y == target.ignore_index) return;
  ahead.row(m, row);
  __builtin_prefetch(q.of + y);
  if (q.of[y].lone < 0) ahead.add(q.log_activation + y * q.columns, sizeof(T));
}

// ||x||_2 from the plain sum of squares, which is redone, scaled by the largest element, only where it overflowed;
// where it underflows the caller's kSmallestLength hides it. An inf or a NaN in the row makes it NaN.
template <class T>
double norm(const T* x, int64_t n, const Size<T>& size) {
  if (size.squares < double(kLargest<T>)) return sqrt(size.squares);
  double total = 0;
  for (int64_t k = 0; k < n; ++k) {
    const double ratio = double(x[k]) / double(size.largest);
    total += ratio * ratio;
  }
  return double(size.largest) * sqrt(total);
}

}  // namespace
}  // namespace ncmi::cpu
