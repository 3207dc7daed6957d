#include "emulation.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <ucontext.h>

#include <stdexcept>

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

unsigned char shared_memory[kSharedMemory] __attribute__((aligned(16)));

namespace {

constexpr int kWarp = 32, kMostThreads = 1024;
constexpr size_t kStack = 256 * 1024;

// Where threads wait for each other.
struct Barrier {
  unsigned meeting = 0;
  int arrived = 0, tag = 0;
  bool all[2] = {true, true};
};

struct Warp {
  Barrier barrier;
  uint64_t slot[2][kWarp];
};

// Started once as a context of its own; from then on jumps, which unlike swapcontext need no system call, take it from
// one block's kernel to the next's.
struct Fiber {
  jmp_buf here;
  bool started;
  bool alive;
  dim3 index;
  const Barrier* waits_for;
  unsigned meeting;  // and for the end of which
};

Fiber fibers[kMostThreads];
Warp warps[kMostThreads / kWarp];
Barrier block;
jmp_buf scheduler;
int current, block_threads;
const std::function<void()>* body;
std::string error;
int64_t launches = 0;

void leave(Fiber& f) {
  if (!_setjmp(f.here)) _longjmp(scheduler, 1);
}

void entry() {
  Fiber& f = fibers[current];
  for (;;) {
    (*body)();
    f.alive = false;
    leave(f);
  }
}

void start(Fiber& f, unsigned char* stack) {
  f.started = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
  setcontext(&context);
}

unsigned meet(Barrier& barrier, int threads, int tag, bool& all) {
  const unsigned meeting = barrier.meeting;
  if (barrier.arrived == 0)
    barrier.tag = tag;
  else if (barrier.tag != tag && error.empty())
    error = "threads meet at different shuffles";
  bool& together = barrier.all[meeting % 2];
  together = together && all;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    barrier.all[(meeting + 1) % 2] = true;
    ++barrier.meeting;
  } else {
    Fiber& self = fibers[current];
    self.waits_for = &barrier;
    self.meeting = meeting;
    leave(self);
    self.waits_for = nullptr;
  }
  all = barrier.all[meeting % 2];
  return meeting;
}

void run_block() {
  memset(shared_memory, 0xff, sizeof(shared_memory));
  block = {};
  for (int w = 0; w * kWarp < block_threads; ++w) {
    warps[w].barrier = {};
    memset(warps[w].slot, 0xff, sizeof(warps[w].slot));
  }
  static unsigned char* const stacks = static_cast<unsigned char*>(mmap(
      nullptr, kStack * kMostThreads, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  for (int t = 0; t < block_threads; ++t) {
    Fiber& f = fibers[t];
    if (f.alive) f.started = false;  // left in the middle of a kernel that failed
    f.index = dim3(t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y));
    f.alive = true;
    f.waits_for = nullptr;
  }
  static bool any, moved;  // not in registers, which a jump may leave as they were
  for (any = true; any;) {
    any = moved = false;
    for (current = 0; current < block_threads; ++current) {
      if (!fibers[current].alive) continue;
      any = true;
      if (fibers[current].waits_for && fibers[current].waits_for->meeting == fibers[current].meeting) continue;
      threadIdx = fibers[current].index;
      moved = true;
      if (!_setjmp(scheduler)) {
        if (fibers[current].started)
          _longjmp(fibers[current].here, 1);
        else
          start(fibers[current], stacks + current * kStack);
      }
    }
    if (any && !moved) throw std::runtime_error("emulation: threads wait for others that never come");
  }
}

}  // namespace

void device_assert(const char* condition) {
  if (error.empty()) error = std::string("device-side assertion failed: ") + condition;
}

int lane() { return current % kWarp; }
void* slot(unsigned meeting, int lane) { return &warps[current / kWarp].slot[meeting % 2][lane]; }
unsigned next_meeting() { return warps[current / kWarp].barrier.meeting; }
unsigned meet_warp(int tag) {
  bool all = true;
  return meet(warps[current / kWarp].barrier, kWarp, tag, all);
}
unsigned meet_block(bool& all) { return meet(block, block_threads, 0, all); }

void run(int64_t blocks, dim3 threads, const std::function<void()>& kernel) {
  if (blocks == 0) return;
  ++launches;
  block_threads = int(threads.x * threads.y * threads.z);
  if (block_threads > kMostThreads || block_threads % kWarp != 0 || blocks > 0x7fffffff)
    throw std::runtime_error("emulation: a launch with " + std::to_string(blocks) + " blocks of " +
                             std::to_string(block_threads) + " threads");
  body = &kernel;
  error.clear();
  gridDim = dim3(unsigned(blocks));
  blockDim = threads;
  for (blockIdx = dim3(0, 0, 0); blockIdx.x < unsigned(blocks); ++blockIdx.x) {
    run_block();
    if (!error.empty()) throw std::runtime_error("emulation: " + error);
  }
}

}  // namespace emulation

// Kernels launched so far, for tests of how many an operator needs.
extern "C" __attribute__((visibility("default"))) int64_t emulation_launches() { return emulation::launches; }

// The device is the CPU, and there is no stream.
extern "C" {
int32_t aoti_torch_device_type_cuda() { return aoti_torch_device_type_cpu(); }
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return 0;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return 0; }
}
