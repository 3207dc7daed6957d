// Reading and writing the low-precision types. Written out because the CPU's loops over them must vectorise; a GPU has
// an instruction for each.
#pragma once

#include "ncmi_math.h"

namespace ncmi {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

NCMI_INLINE float widen(float x) { return x; }
NCMI_INLINE double widen(double x) { return x; }
NCMI_INLINE float widen(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
NCMI_INLINE float widen(Float16 x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
  return result;
#else
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  const float finite = bit_cast<float>(magnitude) * 5.192296858534828e33f;  // 2^112 moves the exponent bias
  const uint32_t special = magnitude | 0x7f800000u;                         // inf and NaN keep their mantissa
  const uint32_t bits = magnitude >= 0x0f800000u ? special : bit_cast<uint32_t>(finite);
  return bit_cast<float>(bits | (uint32_t(x.bits & 0x8000u) << 16));
#endif
}

template <class To, class T>
NCMI_INLINE To narrow(T x);
template <>
NCMI_INLINE_MEMBER float narrow<float, float>(float x) {
  return x;
}
template <>
NCMI_INLINE_MEMBER double narrow<double, double>(double x) {
  return x;
}
template <>
NCMI_INLINE_MEMBER BFloat16 narrow<BFloat16, float>(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  BFloat16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
  return result;
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  return {uint16_t(x != x ? 0x7fc0u : rounded)};
#endif
}
template <>
NCMI_INLINE_MEMBER Float16 narrow<Float16, float>(float x) {
#if defined(__CUDA_ARCH__)
  Float16 result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
  return result;
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Normal results: round the mantissa to 10 bits and move the bias. Subnormal ones: adding 0.5 lines the last bit
  // of a float up with 2^-24, the unit of a half, so the addition does the rounding.
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = half > 0x7c00u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return {uint16_t(half | ((bits >> 16) & 0x8000u))};
#endif
}

}  // namespace ncmi
