// The running centre: column sums over the rows that are not ignored, and the move to their mean.
#include "launches.h"

namespace ncmi::cuda {

namespace {

constexpr int kWarps = 8;             // of a block of column sums: each takes every eighth row of the split
constexpr int kRowsAtOnce = 4;        // whose loads are on their way together
constexpr int kRowsPerFlush = 16;     // rows added in T before they go to a double
constexpr int64_t kRowsPerSplit = 64;  // at least
constexpr int kFinishThreads = 1024;
constexpr int64_t kOneBlock = 65536;  // sums that one block adds up; beyond, blocks share them and need one more launch
constexpr int64_t kColumnsPerBlock = 256;

// The mean of the rows, and what the rows weigh together: in two steps, over splits of the rows and then over splits.
template <class T>
struct CenterArgs {
  Matrix input;  // [B, M]
  int64_t rows, columns;
  Targets target;
  int64_t classes;
  int64_t splits;  // center_splits(rows, columns)
  double* sums;    // [splits, columns] workspace
  double* counts;  // [splits, 2] workspace: rows that count, what they weigh
  const T* class_weight;  // [C] or null
  double* weight_total;   // [1] or null
  double momentum;
  T* center;               // [M], or null for the weights alone
  int64_t* batches;        // []
  T* moved;                // [M]
  int32_t* finite;         // [center_blocks(splits, columns)] workspace
};

template <int width>
struct ColumnStorage {
  double sums[kWarps][width * kWarp];
  double counts[kWarps][2];
};

// A block for each split of the rows and each tile of columns.
template <class In, class T>
__global__ void __launch_bounds__(kWarps* kWarp, 2) column_sums_kernel(const CenterArgs<T> args, int64_t tiles) {
  constexpr int width = kWidth<In>;
  ColumnStorage<width>& storage = shared_storage<ColumnStorage<width>>();
  const int lane = threadIdx.x, warp = threadIdx.y;
  const int64_t split = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const int64_t begin = split * args.rows / args.splits, end = (split + 1) * args.rows / args.splits;
  const int64_t first = tile * kWarp * width;
  const int k = int(first) + lane * width;
  const bool inside = k < args.columns;

  double total[width] = {}, count = 0, weight = 0;
  T partial[width] = {};
  int unflushed = 0;
  for (int64_t i = begin + warp; i < end; i += kWarps * kRowsAtOnce) {
    T x[kRowsAtOnce][width];
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      const int64_t row = i + r * kWarps;
      const int64_t target = row < end ? args.target[row] : args.target.ignore_index;
      const bool counts = row < end && target != args.target.ignore_index;
#pragma unroll
      for (int v = 0; v < width; ++v) x[r][v] = 0;
      if (counts && inside) load_input<In, false>(args.input, row, k, x[r]);
      if (counts) {
        const int64_t y = class_of(target, args.classes);
        count += 1;
        weight += args.class_weight ? double(args.class_weight[y]) : 1.0;
      }
    }
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r)
#pragma unroll
      for (int v = 0; v < width; ++v) partial[v] += x[r][v];
    unflushed += kRowsAtOnce;
    if (unflushed == kRowsPerFlush || i + kWarps * kRowsAtOnce >= end) {
      unflushed = 0;
#pragma unroll
      for (int v = 0; v < width; ++v) {
        total[v] += double(partial[v]);
        partial[v] = 0;
      }
    }
  }

  // Lanes apart, so that they write to different banks.
#pragma unroll
  for (int v = 0; v < width; ++v) storage.sums[warp][v * kWarp + lane] = total[v];
  if (lane == 0) {
    storage.counts[warp][0] = count;
    storage.counts[warp][1] = weight;
  }
  __syncthreads();
  const int thread = warp * kWarp + lane;
  if (thread < width * kWarp) {
    const int64_t column = first + (thread % kWarp) * width + thread / kWarp;
    if (column < args.columns) {
      double sum = 0;
      for (int w = 0; w < kWarps; ++w) sum += storage.sums[w][thread];
      args.sums[split * args.columns + column] = sum;
    }
  }
  if (tile == 0 && thread < 2) {
    double sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += storage.counts[w][thread];
    args.counts[split * 2 + thread] = sum;
  }
}

NCMI_DEVICE bool is_finite(float x) { return magnitude_bits(x) < 0x7f800000u; }
NCMI_DEVICE bool is_finite(double x) { return magnitude_bits(x) < 0x7ff0000000000000u; }

// A batch without rows says nothing, and one NaN, or a mean beyond T, must not stay in the centre for good.
template <class T>
NCMI_DEVICE void commit(const CenterArgs<T>& args, bool finite, int64_t begin, int64_t end) {
  for (int64_t k = begin + threadIdx.x; k < end; k += blockDim.x) {
    if (finite)
      args.center[k] = args.moved[k];
    else
      args.moved[k] = args.center[k];
  }
  if (finite && blockIdx.x == 0 && threadIdx.x == 0) *args.batches = next_batch(*args.batches);
}

// Adds the splits up and moves the centre, in one block all of it, or each block its columns of the copy.
template <class T>
__global__ void __launch_bounds__(kFinishThreads, 1) move_center_kernel(const CenterArgs<T> args) {
  struct Storage {
    double sums[kFinishThreads];
    double counts[2];
  };
  Storage& storage = shared_storage<Storage>();
  const int thread = threadIdx.x;
  if (thread < kWarp) {
    double count = 0, weight = 0;
    for (int64_t s = thread; s < args.splits; s += kWarp) {
      count += args.counts[s * 2];
      weight += args.counts[s * 2 + 1];
    }
    count = warp_sum(count);
    weight = warp_sum(weight);
    if (thread == 0) {
      storage.counts[0] = count;
      if (args.weight_total && blockIdx.x == 0) *args.weight_total = weight;
    }
  }
  if (!args.center) return;
  const bool one_block = gridDim.x == 1;
  const int64_t begin = one_block ? 0 : blockIdx.x * kColumnsPerBlock;
  const int64_t end = one_block ? args.columns : min(args.columns, begin + kColumnsPerBlock);
  const double keep = *args.batches == 0 ? 0.0 : args.momentum;
  // Few columns leave threads over, which share the splits of a column.
  const int across = int(min(blockDim.x, ceil_div(end - begin, kWarp) * kWarp)), sharing = int(blockDim.x) / across;
  const int column_of_thread = thread % across, share = thread / across;
  bool finite = true;
  for (int64_t from = begin; from < end; from += across) {
    const int64_t k = from + column_of_thread;
    double sum = 0;
    if (k < end && share < sharing) {
#pragma unroll 4
      for (int64_t s = share; s < args.splits; s += sharing) sum += args.sums[s * args.columns + k];
    }
    storage.sums[thread] = sum;
    __syncthreads();
    if (k < end && share == 0) {
      for (int j = 1; j < sharing; ++j) sum += storage.sums[j * across + column_of_thread];
      const double mean = sum / storage.counts[0];  // NaN without rows
      const T moved = T(keep == 0 ? mean : keep * double(args.center[k]) + (1 - keep) * mean);
      args.moved[k] = moved;
      finite = finite && is_finite(moved);
    }
    __syncthreads();
  }
  finite = __syncthreads_and(finite);
  if (one_block)
    commit(args, finite, begin, end);
  else if (thread == 0)
    args.finite[blockIdx.x] = finite;
}

template <class T>
__global__ void __launch_bounds__(kColumnsPerBlock, 1) commit_center_kernel(const CenterArgs<T> args) {
  bool finite = true;
  for (int64_t b = threadIdx.x; b < gridDim.x; b += blockDim.x) finite = finite && args.finite[b];
  finite = __syncthreads_and(finite);
  const int64_t begin = blockIdx.x * kColumnsPerBlock;
  commit(args, finite, begin, min(args.columns, begin + kColumnsPerBlock));
}

// A function of the shape alone, so that the order of the sums is one too.
int64_t center_splits(int64_t rows, int64_t columns) {
  const int64_t tiles = max(1, ceil_div(columns, 128));
  return max(1, min(ceil_div(rows, kRowsPerSplit), max(1, 1024 / tiles)));
}

int64_t center_blocks(int64_t splits, int64_t columns) {
  return splits * columns <= kOneBlock ? 1 : ceil_div(columns, kColumnsPerBlock);
}

template <class T>
void launch_update_center(const CenterArgs<T>& args, Stream stream) {
  const auto sum_as = [&](auto in) {
    using In = typename decltype(in)::type;
    const int64_t tiles = max(1, ceil_div(args.columns, kWarp * kWidth<In>));
    launch(column_sums_kernel<In, T>, tiles * args.splits, dim3(kWarp, kWarps), stream, args, tiles);
  };
  with_row_kernel<T>(args.input, args.columns, true, [&](auto in, auto) { sum_as(in); });
  const int64_t blocks = args.center ? center_blocks(args.splits, args.columns) : 1;
  launch(move_center_kernel<T>, blocks, dim3(blocks == 1 ? kFinishThreads : kColumnsPerBlock), stream, args);
  if (blocks > 1) launch(commit_center_kernel<T>, blocks, dim3(kColumnsPerBlock), stream, args);
}

}  // namespace

int64_t column_sums_workspace(int64_t rows, int64_t columns) {
  const int64_t splits = center_splits(rows, columns);
  return splits * (columns + 2) + center_blocks(splits, columns);
}

template <class T>
Tensor column_sums(const Device& device, Workspace& workspace, const Tensor& input, const Targets& target,
                   int64_t classes, const RunningCenter& running, const T* class_weight, double* weight_total) {
  const int64_t rows = input.size(0), columns = running.center ? input.size(1) : 0;
  const Matrix z = rows_of<T>(input, input.size(1));
  const int64_t splits = center_splits(rows, columns);
  Tensor moved = empty(device, {columns}, kScalarType<T>);
  T* c = const_cast<T*>(data_on<T>(running.center, "center", {columns}, input));
  int64_t* batches =
      const_cast<int64_t*>(data_on<int64_t>(running.batches, "num_batches_tracked", {}, input));
  launch_update_center<T>({.input = z,
                           .rows = rows,
                           .columns = columns,
                           .target = target,
                           .classes = classes,
                           .splits = splits,
                           .sums = workspace.take(splits * columns),
                           .counts = workspace.take(splits * 2),
                           .class_weight = class_weight,
                           .weight_total = weight_total,
                           .momentum = running.momentum,
                           .center = c,
                           .batches = batches,
                           .moved = output<T>(moved),
                           .finite = workspace.take<int32_t>(center_blocks(splits, columns))},
                          device.stream());
  return moved;
}

template Tensor column_sums(const Device&, Workspace&, const Tensor&, const Targets&, int64_t, const RunningCenter&,
                            const float*, double*);
template Tensor column_sums(const Device&, Workspace&, const Tensor&, const Targets&, int64_t, const RunningCenter&,
                            const double*, double*);

namespace {

Tensor update_center_(const Tensor& center, const Tensor& num_batches_tracked, const Tensor& input,
                      const Tensor& target, double momentum, int64_t num_classes, int64_t ignore_index) {
  const Device device(input);
  STD_TORCH_CHECK(input.dim() == 2, "ncmi_kernels: input must have 2 dimensions");
  const Targets y = targets(target, input, ignore_index);
  return with_arithmetic_type(center.scalar_type(), "center", [&]<class T>() {
    Workspace workspace(device, column_sums_workspace(input.size(0), input.size(1)));
    return column_sums<T>(device, workspace, input, y, num_classes, {center, num_batches_tracked, momentum}, nullptr,
                          nullptr);
  });
}

}  // namespace
}  // namespace ncmi::cuda

STABLE_TORCH_LIBRARY_IMPL(ncmi_kernels, CUDA, m) {
  m.impl("update_center_", TORCH_BOX(&ncmi::cuda::update_center_));
}
