// What the kernels share: launching, sums over the threads of a row, loads and stores of 16 bytes.
#pragma once

#if defined(__CUDACC__)
#undef NDEBUG  // a target out of range must stop the kernel in every build
#include <cassert>
#include <cuda_runtime.h>
#include <stdexcept>
#include <string>
#endif

#include "../rows.h"

namespace ncmi::cuda {

using Stream = void*;  // cudaStream_t

// A gradient times the upstream gradient: a scalar (stride 0) or [B], or none.
struct Upstream {
  const void* data;
  bool is_double;
  int64_t stride;
};

#if defined(__CUDACC__)
#define NCMI_DEVICE __device__ __forceinline__
#define NCMI_DEVICE_ASSERT(condition) assert(condition)

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, dim3 threads, Stream stream, const Arguments&... arguments) {
  if (blocks == 0) return;
  if (blocks > 0x7fffffff) throw std::runtime_error("ncmi_kernels: too many rows for one launch");
  kernel<<<dim3(static_cast<unsigned>(blocks)), threads, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("ncmi_kernels: a kernel could not be launched: ") + cudaGetErrorString(error));
}

// One for a block, of whatever type: a kernel uses it once.
template <class Storage>
NCMI_DEVICE Storage& shared_storage() {
  __shared__ __align__(16) unsigned char storage[sizeof(Storage)];
  return *reinterpret_cast<Storage*>(storage);
}
#endif

// Of a lambda: a call would take the address of what it captures, and so put it into memory.
#define NCMI_INLINED __attribute__((always_inline))

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

template <class A, class B>
constexpr bool kSame = false;
template <class A>
inline constexpr bool kSame<A, A> = true;

// -------------------------------------------------------------------------------------------------------------
// Sums over the threads of a warp, a row or a block, always in one order.
// -------------------------------------------------------------------------------------------------------------

template <class V>
NCMI_DEVICE V warp_sum(V value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
NCMI_DEVICE uint32_t warp_max(uint32_t value) { return __reduce_max_sync(kAllLanes, value); }
#endif

template <class V>
NCMI_DEVICE V warp_max(V value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const V other = __shfl_xor_sync(kAllLanes, value, offset);
    value = other > value ? other : value;
  }
  return value;
}

// The threads that share a row: one warp, or all of a block.
constexpr int kMostSums = 4;
struct GroupStorage {
  double value[2][kMostSums * kWarp];
};

struct Group {
  int thread, threads;
  GroupStorage* storage;
  int turn = 0;  // storage alternates, so that one barrier a sum is enough

  NCMI_DEVICE bool first() const { return thread == 0; }

  // Over warps, of what each of them has already summed: every thread gets the totals.
  template <int n>
  NCMI_DEVICE void sum_warps(double (&value)[n]) {
    static_assert(n <= kMostSums);
    if (threads == kWarp) return;
    double* buffer = storage->value[turn];
    turn ^= 1;
    const int lane = thread % kWarp, warps = threads / kWarp;
    if (lane == 0)
      for (int j = 0; j < n; ++j) buffer[j * kWarp + thread / kWarp] = value[j];
    __syncthreads();
#pragma unroll
    for (int j = 0; j < n; ++j) value[j] = warp_sum(lane < warps ? buffer[j * kWarp + lane] : 0.0);
  }

  template <class V>
  NCMI_DEVICE V max_warps(V value) {
    if (threads == kWarp) return value;
    V* buffer = reinterpret_cast<V*>(storage->value[turn]);
    turn ^= 1;
    const int lane = thread % kWarp, warps = threads / kWarp;
    if (lane == 0) buffer[thread / kWarp] = value;
    __syncthreads();
    return warp_max(buffer[lane < warps ? lane : 0]);
  }

  template <class V>
  NCMI_DEVICE double sum(V value) {
    double total[1] = {double(warp_sum(value))};
    sum_warps(total);
    return total[0];
  }

  template <class V>
  NCMI_DEVICE V maximum(V value) {
    return max_warps(warp_max(value));
  }
};

// -------------------------------------------------------------------------------------------------------------
// Memory
// -------------------------------------------------------------------------------------------------------------

struct alignas(16) Bytes16 {
  uint32_t word[4];
};

// Of what is read once: it should not push out of the L1 cache what the rows of a block share.
NCMI_DEVICE Bytes16 load_once(const void* address) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  Bytes16 b;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(b.word[0]), "=r"(b.word[1]), "=r"(b.word[2]), "=r"(b.word[3])
      : "l"(address));
  return b;
#else
  return *static_cast<const Bytes16*>(address);
#endif
}

// An element of a type that is known only when the kernel runs.
struct Any {};

template <class In>
NCMI_DEVICE void unpack(const Bytes16& b, float* x) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if constexpr (kSame<In, float>) {
      x[j] = bit_cast<float>(b.word[j]);
    } else {
      x[2 * j] = widen(In{uint16_t(b.word[j] & 0xffffu)});
      x[2 * j + 1] = widen(In{uint16_t(b.word[j] >> 16)});
    }
  }
}

template <class T>
NCMI_DEVICE T load_any(const Matrix& m, int64_t offset) {
  switch (m.dtype) {
    case Dtype::kFloat32: return T(static_cast<const float*>(m.data)[offset]);
    case Dtype::kFloat64: return T(static_cast<const double*>(m.data)[offset]);
    case Dtype::kBFloat16: return T(widen(static_cast<const BFloat16*>(m.data)[offset]));
    default: return T(widen(static_cast<const Float16*>(m.data)[offset]));
  }
}

NCMI_DEVICE Bytes16 load_again(const void* address) { return *static_cast<const Bytes16*>(address); }

// Elements from column k of a row: 16 bytes, or one of any type and stride.
template <class In, bool once, class T>
NCMI_DEVICE void load_input(const Matrix& m, int64_t row, int k, T* x) {
  if constexpr (kSame<In, Any>) {
    x[0] = load_any<T>(m, row * m.row_stride + k * m.column_stride);
  } else {
    const In* address = static_cast<const In*>(m.data) + row * m.row_stride + k;
    unpack<In>(once ? load_once(address) : load_again(address), x);
  }
}

// width elements of a row of what is in the arithmetic type and contiguous.
template <int width, bool once, class T>
NCMI_DEVICE void load_values(const T* values, T* x) {
  if constexpr (width == 1) {
    x[0] = *values;
  } else {
#pragma unroll
    for (int j = 0; j < width; j += 4) {
      const Bytes16 b = once ? load_once(values + j) : load_again(values + j);
#pragma unroll
      for (int v = 0; v < 4; ++v) x[j + v] = bit_cast<float>(b.word[v]);
    }
  }
}

template <class Out, int width, class T>
NCMI_DEVICE void store_output(void* out, Dtype dtype, int64_t offset, const T* x) {
  if constexpr (kSame<Out, Any>) {
    if constexpr (kSame<T, double>) {
      static_cast<double*>(out)[offset] = x[0];
    } else {
      if (dtype == Dtype::kBFloat16)
        static_cast<BFloat16*>(out)[offset] = narrow<BFloat16>(x[0]);
      else if (dtype == Dtype::kFloat16)
        static_cast<Float16*>(out)[offset] = narrow<Float16>(x[0]);
      else
        static_cast<float*>(out)[offset] = x[0];
    }
  } else {
    Bytes16 b;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if constexpr (kSame<Out, float>)
        b.word[j] = bit_cast<uint32_t>(x[j]);
      else
        b.word[j] = uint32_t(narrow<Out>(x[2 * j]).bits) | uint32_t(narrow<Out>(x[2 * j + 1]).bits) << 16;
    }
    *reinterpret_cast<Bytes16*>(static_cast<Out*>(out) + offset) = b;
  }
}

// Elements that a thread takes at once.
template <class In>
constexpr int kWidth = 16 / int(sizeof(In));
template <>
inline constexpr int kWidth<Any> = 1;

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

inline int64_t width_of(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2; }

// Whether rows can be read in 16 bytes. Every row of anything else with as many columns then can, too.
inline bool aligned(const Matrix& m, int64_t columns) {
  const int64_t width = width_of(m.dtype);
  return m.dtype != Dtype::kFloat64 && m.column_stride == 1 && columns * width % 16 == 0 &&
         m.row_stride * width % 16 == 0 && aligned(m.data);
}

NCMI_DEVICE double upstream_at(const Upstream& upstream, int64_t i) {
  if (!upstream.data) return 1.0;
  return upstream.is_double ? static_cast<const double*>(upstream.data)[i * upstream.stride]
                            : double(static_cast<const float*>(upstream.data)[i * upstream.stride]);
}

NCMI_DEVICE Coefficients operator*(const Coefficients& c, double factor) {
  return {c.own * factor, c.other * factor, c.share * factor, c.constant * factor};
}

// The class of a row; stops the kernel where it is none. Not for rows that are ignored.
NCMI_DEVICE int64_t class_of(int64_t y, int64_t classes) {
  NCMI_DEVICE_ASSERT(y >= 0 && y < classes && "target is out of range");
  return y < 0 ? 0 : y >= classes ? classes - 1 : y;
}

}  // namespace ncmi::cuda
