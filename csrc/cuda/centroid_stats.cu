// Centroids: log a(xi), a(xi), their normalisers, and the sums over classes that stand in for the loop over them.
#include "launches.h"

namespace ncmi::cuda {

namespace {

constexpr int64_t kSumsOverClasses = 3;  // log a; or q, q log a and q log_norm; each times the prior
constexpr int kWarps = 8;
constexpr int kFinishThreads = 1024;
constexpr int64_t kOneBlock = 65536;  // sums that one block adds up; beyond, blocks share them and need one more launch
constexpr int64_t kColumnsPerBlock = 256;
constexpr int64_t kClassesPerChunk = 32;  // at least

template <class T>
struct CentroidStatsArgs {
  Matrix logits;  // [C, M] xi
  Priors priors;
  int64_t classes, columns;
  bool softmax;
  bool centroid_to_sample;
  T* log_activation;  // [C, M]
  T* activation;      // [C, M] or null
  T* reference;       // [2, M]
  ClassStats* of;     // [C], and then AllStats
  int64_t chunks;     // class_chunks(classes, columns)
  double* sums;       // [chunks, kSumsOverClasses, M] workspace
  double* lost;       // [2, M] workspace: what rounding `reference` lost; q_mean_k times the mean log_norm under it
};

// Writes log a, and a where it is wanted, of `count` elements: all, or for `by_size` those whose |f| <= 1 as kNsfNear
// has it or has it not. Returns their part of S.
template <Kind kind, bool by_size = false, class T, class R>
NCMI_DEVICE double activate_row(R& row, double count, T shift, T* log, T* value) {
  const T s = argument_scale<kind, T>(1.0);
  double norm = 0;  // near: of the excess
  row.each([&](int k, const T* x) NCMI_INLINED {
#pragma unroll
    for (int v = 0; v < R::part; ++v) {
      if (by_size && is_small(x[v]) != is_near(kind)) continue;
      if constexpr (is_near(kind)) {
        const NearActivation a = near<kind>(x[v] * s);
        norm += double(a.excess);
        log[k + v] = a.log;
        if (value) value[k + v] = T(0.5) + T(0.5) * a.excess;
      } else {
        const Activation<T> a = activate<kind, false>(x[v], s, shift);
        norm += double(a.value);
        log[k + v] = a.log;
        if (value) value[k + v] = a.value;
      }
    }
  });
  norm = row.group.sum(norm);
  return is_near(kind) ? 0.5 * (count + norm) : norm;
}

template <class In, class T, int kept>
__global__ void __maxnreg__(80) centroid_rows_kernel(const CentroidStatsArgs<T> args) {
  const int64_t c = row_of_thread();
  if (c >= args.classes) return;
  Group group = group_of_thread(shared_storage<GroupStorage>());
  Row<In, T, kept> row(args.logits, c, static_cast<const T*>(nullptr), args.columns, group);
  T* log = args.log_activation + c * args.columns;
  T* value = args.activation ? args.activation + c * args.columns : nullptr;
  const Size<T> size = size_of<T>(row);
  Kind kind = first_kind<T>(args.softmax, size.largest);
  T shift = kind == Kind::kSoftmax ? largest_of<T>(row) : T(0);
  const double columns = double(args.columns);
  double norm = 0, large = columns;  // how many elements have |f| > 1
  if constexpr (kHasNear<T>) {
    if (kind == Kind::kNsf) {
      int mine = 0;
      row.each([&](int, const T* x) NCMI_INLINED {
#pragma unroll
        for (int v = 0; v < decltype(row)::part; ++v) mine += is_small(x[v]) ? 0 : 1;
      });
      large = row.group.sum(mine);
    }
    // In columns that are equal roundings are equal too, and add up, so they should be those of small numbers.
    if (8 * large <= columns)
      norm = activate_row<Kind::kNsfNear, true>(row, columns - large, shift, log, value) +
             activate_row<Kind::kNsf, true>(row, large, shift, log, value);
  }
  if (!(8 * large <= columns))
    with_kind<T>(kind, [&]<Kind as>() NCMI_INLINED {
      norm = activate_row<as>(row, columns, shift, log, value);
    });
  if (kind == Kind::kNsf && may_be_shifted(norm, args.columns)) {
    const T largest = largest_of<T>(row);
    if (largest <= T(kShifted)) {
      kind = Kind::kNsfShifted;
      shift = largest;
      norm = activate_row<Kind::kNsfShifted>(row, columns, shift, log, value);
    }
  }
  norm += poison<T>(row, size.squares);
  if (group.first()) {
    const double prior = args.priors.data ? args.priors.data[c * args.priors.stride] : 1.0 / double(args.classes);
    // Of lone columns only the CPU makes use.
    args.of[c] = {::log(norm), double(shift), double(kind), -1, 0, 0, 0, 0, prior};
  }
}

// The sums of a chunk of classes by column: log a; or q, q log a and q log_norm; each times the prior.
template <class T>
__global__ void __launch_bounds__(kWarps* kWarp, 1)
    sums_over_classes_kernel(const CentroidStatsArgs<T> args, int64_t tiles) {
  struct Storage {
    double sums[kWarps][kSumsOverClasses][kWarp];
  };
  Storage& storage = shared_storage<Storage>();
  const int lane = threadIdx.x, warp = threadIdx.y;
  const int64_t chunk = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const int64_t begin = chunk * args.classes / args.chunks, end = (chunk + 1) * args.classes / args.chunks;
  const int64_t k = tile * kWarp + lane;
  double sums[kSumsOverClasses] = {};
  for (int64_t c = begin + warp; c < end; c += kWarps) {
    if (k >= args.columns) break;
    const double log = double(args.log_activation[c * args.columns + k]), prior = args.of[c].prior;
    if (args.centroid_to_sample) {
      const double log_norm = args.of[c].log_norm;
      const double q = double(args.activation[c * args.columns + k]) * (prior * ::exp(-log_norm));
      sums[0] += q;
      sums[1] += q * log;
      sums[2] += q * log_norm;
    } else {
      sums[0] += prior * log;
    }
  }
  for (int j = 0; j < kSumsOverClasses; ++j) storage.sums[warp][j][lane] = sums[j];
  __syncthreads();
  if (warp < kSumsOverClasses && k < args.columns) {
    double sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += storage.sums[w][warp][lane];
    args.sums[(chunk * kSumsOverClasses + warp) * args.columns + k] = sum;
  }
}

// reference [2, M]: row 0 what log a is compared with, row 1 the mean q over classes (centroid_to_sample).
//   sample_to_centroid: the mean over classes of log a(xi), by their priors;
//   centroid_to_sample: its mean weighted with q, too.
template <class T>
NCMI_DEVICE void finish_columns(const CentroidStatsArgs<T>& args, int64_t begin, int64_t end) {
  for (int64_t k = begin + threadIdx.x; k < end; k += blockDim.x) {
    double sums[kSumsOverClasses] = {};
    for (int64_t chunk = 0; chunk < args.chunks; ++chunk)
#pragma unroll
      for (int j = 0; j < kSumsOverClasses; ++j)
        sums[j] += args.sums[(chunk * kSumsOverClasses + j) * args.columns + k];
    const double q_mean = args.centroid_to_sample ? sums[0] : 0;
    const double reference = args.centroid_to_sample ? (q_mean > 0 ? sums[1] / q_mean : 0) : sums[0];
    const T rounded = T(reference), weight = T(q_mean);
    args.reference[k] = rounded;
    args.reference[args.columns + k] = weight;
    args.lost[k] = reference - double(rounded);
    args.lost[args.columns + k] = q_mean > 0 ? double(weight) * (sums[2] / q_mean) : 0;
  }
}

// `reference` was rounded to T. What that lost enters the mean under p; taken under the mean centroid instead it goes
// into a constant. The two differ where p is far from the centroids, and there the terms are large.
template <class T>
NCMI_DEVICE void finish_constants(const CentroidStatsArgs<T>& args, Group& group) {
  const T* compared = args.reference;
  const T* q_mean = compared + args.columns;
  double sums[4] = {};  // weights, what was lost, log_norm, `reference`
  if (args.centroid_to_sample) {
    for (int64_t k = threadIdx.x; k < args.columns; k += blockDim.x) {
      sums[0] += double(q_mean[k]);
      sums[1] += double(q_mean[k]) * args.lost[k];
      sums[2] += args.lost[args.columns + k];
      sums[3] += double(q_mean[k]) * double(compared[k]);
    }
  } else {
    double largest = -kLargest<double>;
    for (int64_t k = threadIdx.x; k < args.columns; k += blockDim.x) largest = fmax(largest, double(compared[k]));
    largest = group.maximum(largest);
    for (int64_t k = threadIdx.x; k < args.columns; k += blockDim.x) {
      const double w = ::exp(double(compared[k]) - largest);
      sums[0] += w;
      sums[1] += w * args.lost[k];
      sums[3] += double(compared[k]);
    }
    for (int64_t c = threadIdx.x; c < args.classes; c += blockDim.x) sums[2] += args.of[c].prior * args.of[c].log_norm;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) sums[j] = warp_sum(sums[j]);
  group.sum_warps(sums);
  if (group.first()) {
    *reinterpret_cast<AllStats*>(args.of + args.classes) = {
        args.centroid_to_sample ? sums[0] : 1.0,
        args.centroid_to_sample ? sums[2] - sums[1] : sums[2] - sums[1] / sums[0],
        sums[3],
        {}};
  }
}

template <class T>
__global__ void __launch_bounds__(kFinishThreads, 1) columns_kernel(const CentroidStatsArgs<T> args) {
  if (gridDim.x > 1) {
    const int64_t begin = blockIdx.x * kColumnsPerBlock;
    finish_columns(args, begin, min(args.columns, begin + kColumnsPerBlock));
    return;
  }
  Group group = group_of_thread(shared_storage<GroupStorage>());
  finish_columns(args, 0, args.columns);
  __syncthreads();
  finish_constants(args, group);
}

template <class T>
__global__ void __launch_bounds__(kFinishThreads, 1) constants_kernel(const CentroidStatsArgs<T> args) {
  Group group = group_of_thread(shared_storage<GroupStorage>());
  finish_constants(args, group);
}

int64_t class_chunks(int64_t classes, int64_t columns) {
  return max(1, min(ceil_div(classes, kClassesPerChunk), max(1, 1024 / ceil_div(columns, kWarp))));
}

template <class T>
void launch_centroid_stats(const CentroidStatsArgs<T>& args, Stream stream) {
  const bool can_be_wide = aligned(args.log_activation) && aligned(args.activation);
  const auto activate_rows = [&](auto in, auto kept) {
    using In = typename decltype(in)::type;
    constexpr int k = decltype(kept)::value;
    const RowShape shape = row_shape(args.columns, k ? k : kElementsPerThread * kWidth<In>, 512);
    launch(centroid_rows_kernel<In, T, k>, ceil_div(args.classes, shape.rows_per_block),
           dim3(shape.threads, shape.rows_per_block), stream, args);
  };
  with_row_kernel<T>(args.logits, args.columns, can_be_wide, [&](auto in, auto kept) {
    using In = typename decltype(in)::type;
    if constexpr (sizeof(In) != 2) activate_rows(in, kept);  // the logits are in the arithmetic type
  });
  const int64_t tiles = ceil_div(args.columns, kWarp);
  launch(sums_over_classes_kernel<T>, tiles * args.chunks, dim3(kWarp, kWarps), stream, args, tiles);
  if (args.columns * args.chunks <= kOneBlock) {
    launch(columns_kernel<T>, 1, dim3(kFinishThreads), stream, args);
  } else {
    launch(columns_kernel<T>, ceil_div(args.columns, kColumnsPerBlock), dim3(kColumnsPerBlock), stream, args);
    launch(constants_kernel<T>, 1, dim3(kFinishThreads), stream, args);
  }
}

}  // namespace

int64_t stats_workspace(int64_t classes, int64_t columns) {
  return class_chunks(classes, columns) * kSumsOverClasses * columns + 2 * columns;
}

template <class T>
void write_stats(const Device& device, Workspace& workspace, const Matrix& logits, const Priors& priors, bool softmax,
                 const Centroids<T>& to) {
  const int64_t chunks = class_chunks(to.classes, to.columns);
  launch_centroid_stats<T>({.logits = logits,
                            .priors = priors,
                            .classes = to.classes,
                            .columns = to.columns,
                            .softmax = softmax,
                            .centroid_to_sample = to.centroid_to_sample,
                            .log_activation = const_cast<T*>(to.log_activation),
                            .activation = to.centroid_to_sample ? const_cast<T*>(to.activation) : nullptr,
                            .reference = const_cast<T*>(to.reference),
                            .of = const_cast<ClassStats*>(to.of),
                            .chunks = chunks,
                            .sums = workspace.take(chunks * kSumsOverClasses * to.columns),
                            .lost = workspace.take(2 * to.columns)},
                           device.stream());
}

template void write_stats(const Device&, Workspace&, const Matrix&, const Priors&, bool, const Centroids<float>&);
template void write_stats(const Device&, Workspace&, const Matrix&, const Priors&, bool, const Centroids<double>&);

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> centroid_stats(const Tensor& logits, bool softmax, bool centroid_to_sample,
                                                          const std::optional<Tensor>& prior) {
  const Matrix xi = matrix(logits, "centroid_logits");
  const int64_t classes = logits.size(0), columns = logits.size(1);
  STD_TORCH_CHECK(classes > 0 && columns > 0, "ncmi_kernels: centroid_logits must not be empty");
  STD_TORCH_CHECK(columns <= kMostColumns, "ncmi_kernels: more columns than 2^30");
  const Device device(logits);
  return with_arithmetic_type(logits.scalar_type(), "centroid_logits", [&]<class T>() {
    const ScalarType dtype = logits.scalar_type();
    const Priors priors{.data = data_on<double>(prior, "prior", {classes}, logits), .stride = 1};
    Tensor log_activation = empty(device, {classes, columns}, dtype);
    Tensor activation = empty(device, {centroid_to_sample ? classes : 0, columns}, dtype);
    Tensor reference = empty(device, {2, columns}, dtype);
    Tensor norms = empty(device, {classes + 1, kClassStats}, ScalarType::Double);
    Workspace workspace(device, stats_workspace(classes, columns));
    write_stats<T>(device, workspace, xi, priors, softmax,
                   {.classes = classes,
                    .columns = columns,
                    .centroid_to_sample = centroid_to_sample,
                    .log_activation = output<T>(log_activation),
                    .activation = output<T>(activation),
                    .reference = output<T>(reference),
                    .of = output<ClassStats>(norms)});
    return std::make_tuple(log_activation, activation, reference, norms);
  });
}

}  // namespace
}  // namespace ncmi::cuda

STABLE_TORCH_LIBRARY_IMPL(ncmi_kernels, CUDA, m) {
  m.impl("centroid_stats", TORCH_BOX(&ncmi::cuda::centroid_stats));
}
