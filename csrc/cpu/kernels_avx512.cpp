// The kernels for AVX-512 (F, BW, DQ, VL), with full-width vectors.
#if defined(__x86_64__)
// The C headers are read before the target changes: their inline functions stay baseline code.
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
#endif
#define NCMI_KERNEL_TABLE kAvx512Kernels
#define NCMI_KERNEL_NAME "avx512"
#include "kernels_impl.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
