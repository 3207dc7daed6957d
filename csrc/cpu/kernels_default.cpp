// The kernels for the instruction set that the compiler targets by default (SSE2 on x86-64, NEON on Arm).
#define NCMI_KERNEL_TABLE kDefaultKernels
#define NCMI_KERNEL_NAME "default"
#include "kernels_impl.h"
