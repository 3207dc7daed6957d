// The kernels for AVX2 with FMA.
#if defined(__x86_64__)
// The C headers are read before the target changes: their inline functions stay baseline code.
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define NCMI_KERNEL_TABLE kAvx2Kernels
#define NCMI_KERNEL_NAME "avx2"
#include "kernels_impl.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
