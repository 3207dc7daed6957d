// Loops over columns, and sums over them.
//
// Loops marked NCMI_SIMD are vectorised by the compiler. Sums run in Lanes, kWide partial sums side by side: the
// order of every addition is written down, the same for each instruction set, and no loop ends in a serial chain.
// Every kBlock elements the lanes of T go to a double; the normaliser S, whose rounding would enter the loss in
// first order, has lanes of double.
#pragma once

#include "kernels.h"

#define NCMI_PRAGMA(x) _Pragma(#x)
#define NCMI_SIMD(...) NCMI_PRAGMA(omp simd __VA_ARGS__)

namespace ncmi::cpu {
namespace {

constexpr int64_t kBlock = 4096;  // elements of a sum in T before it goes to a double
// Columns that an owner of columns works on at once: long enough stretches of a row for the prefetcher, short
// enough for the sums to stay in cache.
constexpr int64_t kColumnBlock = 2048;

// Columns that loops are laid out in: a vector of the widest instruction set.
template <class T>
constexpr int64_t kLanes = 64 / sizeof(T);

// Calls f(k, n) over stretches [k, k + n) of [begin, end), end - begin a multiple of `unit`; n is kWide or `unit`, a
// constant where f is inlined, so that its loop over the stretch needs no prologue and no remainder.
template <int64_t unit, class F>
NCMI_INLINE void for_stretches(int64_t begin, int64_t end, const F& f) {
  for (; begin + kWide <= end; begin += kWide) f(begin, kWide);
  for (; begin < end; begin += unit) f(begin, unit);
}

// kWide partial sums.
template <class T>
struct alignas(64) Lanes {
  T lane[kWide] = {};

  // The sum over the lanes, added up in F.
  template <class F = T>
  double total() const {
    F sum[32];
    NCMI_SIMD()
    for (int j = 0; j < 32; ++j) sum[j] = F(lane[j]) + F(lane[j + 32]);
    NCMI_SIMD()
    for (int j = 0; j < 16; ++j) sum[j] += sum[j + 16];
    NCMI_SIMD()
    for (int j = 0; j < 8; ++j) sum[j] += sum[j + 8];
    NCMI_SIMD()
    for (int j = 0; j < 4; ++j) sum[j] += sum[j + 4];
    return double((sum[0] + sum[2]) + (sum[1] + sum[3]));
  }

  T maximum() const {
    T largest[16];
    NCMI_SIMD()
    for (int j = 0; j < 16; ++j) {
      const T a = lane[j] > lane[j + 16] ? lane[j] : lane[j + 16];
      const T b = lane[j + 32] > lane[j + 48] ? lane[j + 32] : lane[j + 48];
      largest[j] = a > b ? a : b;
    }
    T result = largest[0];
    for (int j = 1; j < 16; ++j) result = largest[j] > result ? largest[j] : result;
    return result;
  }
};
static_assert(kWide == 64, "Lanes::total folds 64 lanes");

}  // namespace
}  // namespace ncmi::cpu
