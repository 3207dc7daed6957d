// CUDA's execution model on one CPU thread, for tests: included before each file of csrc/cuda, so that the host compiler
// makes a library in which the kernels themselves run, on CPU tensors, without a GPU.
//
// Each thread of a block is a fiber. A shuffle or a barrier hands over to the next one; lanes that meet at different
// shuffles, or never meet, are an error, as is a target out of range. Blocks run one after the other, each on shared
// memory full of NaN. What this does not show: races between blocks, memory limits, the device's approximations.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#include <torch/csrc/stable/library.h>

#include <functional>
#include <string>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __maxnreg__(...)
#define NCMI_DEVICE inline
#define NCMI_DEVICE_ASSERT(condition) \
  do {                                \
    if (!(condition)) emulation::device_assert(#condition); \
  } while (0)

// The operators under a name of their own, for CPU tensors.
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(name, key, m) _STABLE_TORCH_LIBRARY_IMPL(ncmi_emulated, CPU, m, C10_UID)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr int kSharedMemory = 48 * 1024;  // what a block may have without asking for more
extern unsigned char shared_memory[kSharedMemory];

void run(int64_t blocks, dim3 threads, const std::function<void()>& kernel);
void device_assert(const char* condition);
// All threads of the block, or lanes of the warp, are here; returns the number of the meeting.
unsigned meet_block(bool& all);
unsigned meet_warp(int tag);
void* slot(unsigned meeting, int lane);  // of the warp, for 8 bytes
int lane();

}  // namespace emulation

inline void __syncthreads() {
  bool all = true;
  emulation::meet_block(all);
}

inline int __syncthreads_and(int predicate) {
  bool all = predicate != 0;
  emulation::meet_block(all);
  return all;
}

namespace emulation {
unsigned next_meeting();  // of the warp
}

template <class V>
V __shfl_xor_sync(unsigned, V value, int offset) {
  static_assert(sizeof(V) <= 8);
  memcpy(emulation::slot(emulation::next_meeting(), emulation::lane()), &value, sizeof(V));
  const unsigned meeting = emulation::meet_warp(offset);
  V result;
  memcpy(&result, emulation::slot(meeting, emulation::lane() ^ offset), sizeof(V));
  return result;
}

namespace ncmi::cuda {

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, dim3 threads, void*, const Arguments&... arguments) {
  emulation::run(blocks, threads, [&] { kernel(arguments...); });
}

template <class Storage>
Storage& shared_storage() {
  static_assert(sizeof(Storage) <= emulation::kSharedMemory);
  return *reinterpret_cast<Storage*>(emulation::shared_memory);
}

}  // namespace ncmi::cuda
