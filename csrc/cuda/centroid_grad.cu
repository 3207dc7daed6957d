// The centroid gradient. First by chunks of classes and tiles of columns, each of whose owners adds the rows of a class
// in order; then by class. Sums of p and of log p are double: the gradient is their difference from q and log q, which
// may be near.
#include <array>

#include "launches.h"

namespace ncmi::cuda {

namespace {

constexpr int kWarps = 8;  // of a block of class sums: each takes every eighth row of a class
constexpr int kThreads = 256;

template <class T>
struct CentroidGradArgs {
  Matrix input;  // [B, M]
  int64_t rows;
  Targets target;   // [B]
  const T* center;  // [M] or null
  Centroids<T> centroids;
  Matrix logits;          // [C, M] xi
  const RowStats* stats;             // [B]
  const Coefficients* coefficients;  // [B]
  Upstream upstream;
  const int32_t* sorted;       // [B] targets in order, ignored rows as C
  const int64_t* order;        // [B] the rows that they are of
  int64_t* class_begin;        // [C + 1] workspace, into order
  int64_t chunks;              // grad_chunks(classes, columns, dtype)
  double* partial_totals;      // [chunks, M] workspace
  double* totals;              // [M + 1], the last one sum_i other_i: workspace, or
  bool totals_given;           // read only
  double* class_other;         // [C] workspace: sums of `other` over the rows of a class
  // The sums of the classes that have rows, [C, M], or [B, M] where each is in the place of its first row in `order`.
  bool by_first_row;
  T* own;             // workspace, or [C, M] that becomes the gradient
  T* own_separation;  // workspace; centroid_to_sample without `weighted` only
  // With a weight for every row and class, in the place of the totals times the prior:
  const ClassWeights* class_weights;  // [C], or null
  const T* weighted;                  // [C, M] sums of x of InProduct, or of log p less what the classes share

  NCMI_INLINE_MEMBER int64_t own_offset(int64_t c) const {
    return (by_first_row ? class_begin[c] : c) * centroids.columns;
  }
};

// The sums over all rows that the gradient of every centroid has.
template <class T>
struct TotalsArgs {
  Matrix input;  // [B, M]
  int64_t rows, columns;
  Targets target;   // [B]
  const T* center;  // [M] or null
  const RowStats* stats;             // [B]
  const Coefficients* coefficients;  // [B]
  Upstream upstream;
  bool centroid_to_sample;
  int64_t chunks;    // total_chunks(rows, columns)
  double* partials;  // [chunks, M + 1] workspace
  double* totals;    // [M + 1], the last one sum_i other_i
};

__global__ void __launch_bounds__(kThreads, 1)
    sort_keys_kernel(const Targets target, int64_t rows, int64_t classes, int32_t* keys) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= rows) return;
  const int64_t y = target[i];
  keys[i] = int32_t(y == target.ignore_index ? classes : class_of(y, classes));
}

// class_begin[c]: the first of the sorted rows that is of class c or later. Each is written by the one row, or the end,
// before which it lies.
__global__ void __launch_bounds__(kThreads, 1)
    class_begin_kernel(const int32_t* sorted, int64_t rows, int64_t classes, int64_t* class_begin) {
  const int64_t j = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (j > rows) return;
  const int64_t before = j == 0 ? -1 : sorted[j - 1], here = j == rows ? classes : sorted[j];
  for (int64_t c = before + 1; c <= here; ++c) class_begin[c] = j;
}

// f(v, a, log a) for each of a thread's columns of a row, a in double.
template <bool fast, class T, int width, class F>
NCMI_DEVICE void each_activation(const RowStats& stats, const T (&x)[width], const F& f) {
  const double scale = stats.scale;
  const T shift = T(stats.shift);
  with_kind<T>(kind_of(stats.kind), [&]<Kind kind>() NCMI_INLINED {
    const T s = argument_scale<kind, T>(scale);
#pragma unroll
    for (int v = 0; v < width; ++v) {
      const Activation<T> a = activate<kind, fast>(x[v], s, shift);
      f(v, wide_value<kind>(a, x[v], s), a.log);
    }
  });
}

template <int width>
struct SumStorage {
  double own[kWarps][width * kWarp];  // sums of the coefficient `own` times p
  double log[kWarps][width * kWarp];  // of `other` times log a
  double coefficients[kWarps][2];     // of `own` and of `other`
};

// Leaves own = sum_i own_i (p_ik - q_ck), and for centroid_to_sample own_separation = sum_i other_i (log a_ik -
// log a_ck), for the classes that have rows; and for all classes of the chunk together sum_i other_i p_ik, or
// sum_i other_i log a_ik. For `own_alone` nothing but own, which both separations have alike.
template <class In, class T, bool centroid_to_sample, bool own_alone>
__global__ void __launch_bounds__(kWarps* kWarp, 1)
    class_grad_sums_kernel(const CentroidGradArgs<T> args, int64_t tiles) {
  constexpr int width = kWidth<In>;
  constexpr bool fast = sizeof(In) == 2;
  SumStorage<width>& storage = shared_storage<SumStorage<width>>();
  const Centroids<T>& q = args.centroids;
  const int lane = threadIdx.x, warp = threadIdx.y, thread = warp * kWarp + lane;
  const int64_t chunk = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const int64_t class_first = chunk * q.classes / args.chunks, class_last = (chunk + 1) * q.classes / args.chunks;
  const int64_t first = tile * kWarp * width;
  const int k = int(first) + lane * width;
  const bool inside = k < q.columns;
  // Lanes apart, so that they write to different banks.
  const int64_t column = first + (thread % kWarp) * width + thread / kWarp;
  const bool finishes = thread < width * kWarp && column < q.columns;

  T center[width] = {};
  if (args.center && inside) load_values<width, false>(args.center + k, center);
  double total[width] = {};
  for (int64_t c = class_first; c < class_last; ++c) {
    const int64_t begin = args.class_begin[c], end = args.class_begin[c + 1];
    if (begin == end) continue;
    double own[width] = {}, own_log[width] = {}, own_sum = 0, other_sum = 0;
    for (int64_t j = begin + warp; j < end; j += kWarps) {
      const int64_t i = args.order[j];
      const RowStats& stats = args.stats[i];
      const Coefficients coefficients = args.coefficients[i] * upstream_at(args.upstream, i);
      own_sum += coefficients.own;
      other_sum += coefficients.other;
      if (!inside) continue;
      T x[width];
      load_input<In, true>(args.input, i, k, x);
#pragma unroll
      for (int v = 0; v < width; ++v) x[v] -= center[v];
      const double own_share = coefficients.own * stats.inverse_norm;
      const double total_share = centroid_to_sample ? coefficients.other : coefficients.other * stats.inverse_norm;
      each_activation<fast>(stats, x, [&](int v, double value, T log) NCMI_INLINED {
        own[v] += own_share * value;
        if constexpr (centroid_to_sample) {
          own_log[v] += total_share * double(log);
          total[v] += total_share * double(log);
        } else if constexpr (!own_alone) {
          total[v] += total_share * value;
        }
      });
    }

    const int busy = int(min(end - begin, kWarps));
    if (warp < busy) {
#pragma unroll
      for (int v = 0; v < width; ++v) {
        storage.own[warp][v * kWarp + lane] = own[v];
        if constexpr (centroid_to_sample) storage.log[warp][v * kWarp + lane] = own_log[v];
      }
      if (lane == 0) {
        storage.coefficients[warp][0] = own_sum;
        storage.coefficients[warp][1] = other_sum;
      }
    }
    __syncthreads();
    own_sum = other_sum = 0;
    for (int w = 0; w < busy; ++w) {
      own_sum += storage.coefficients[w][0];
      other_sum += storage.coefficients[w][1];
    }
    if (finishes) {
      const int64_t at = args.own_offset(c) + column;
      double p_sum = 0, log_sum = 0;
      for (int w = 0; w < busy; ++w) {
        p_sum += storage.own[w][thread];
        if constexpr (centroid_to_sample) log_sum += storage.log[w][thread];
      }
      const T xi = load_any<T>(args.logits, c * args.logits.row_stride + column * args.logits.column_stride);
      const double inverse_norm = ::exp(-q.of[c].log_norm);
      with_kind<T>(kind_of(q.of[c].kind), [&]<Kind kind>() NCMI_INLINED {
        const T s = argument_scale<kind, T>(1.0);
        const Activation<T> a = activate<kind, false>(xi, s, T(q.of[c].shift));
        args.own[at] = T(p_sum - own_sum * (wide_value<kind>(a, xi, s) * inverse_norm));
        if constexpr (centroid_to_sample) args.own_separation[at] = T(log_sum - other_sum * double(a.log));
      });
    }
    if (tile == 0 && thread == 0) args.class_other[c] = other_sum;
    __syncthreads();
  }
  if constexpr (!own_alone) {
#pragma unroll
    for (int v = 0; v < width; ++v) storage.own[warp][v * kWarp + lane] = total[v];
    __syncthreads();
    if (finishes) {
      double sum = 0;
      for (int w = 0; w < kWarps; ++w) sum += storage.own[w][thread];
      args.partial_totals[chunk * q.columns + column] = sum;
    }
  }
}

// The totals by column; the last block instead adds up `other`.
template <class T>
__global__ void __launch_bounds__(kThreads, 1) totals_kernel(const CentroidGradArgs<T> args) {
  const Centroids<T>& q = args.centroids;
  if (blockIdx.x + 1 == gridDim.x) {
    Group group = group_of_thread(shared_storage<GroupStorage>());
    double sum = 0;
    for (int64_t c = threadIdx.x; c < q.classes; c += blockDim.x)
      if (args.class_begin[c] != args.class_begin[c + 1]) sum += args.class_other[c];
    sum = group.sum(sum);
    if (group.first()) args.totals[q.columns] = sum;
    return;
  }
  const int64_t k = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (k >= q.columns) return;
  double sum = 0;
#pragma unroll 4
  for (int64_t chunk = 0; chunk < args.chunks; ++chunk) sum += args.partial_totals[chunk * q.columns + k];
  args.totals[k] = sum;
}

// The totals alone: a block for each chunk of rows and each tile of columns.
template <class In, class T, bool centroid_to_sample>
__global__ void __launch_bounds__(kWarps* kWarp, 1) row_totals_kernel(const TotalsArgs<T> args, int64_t tiles) {
  constexpr int width = kWidth<In>;
  struct Storage {
    double sums[kWarps][width * kWarp];
    double other[kWarps];
  };
  Storage& storage = shared_storage<Storage>();
  const int lane = threadIdx.x, warp = threadIdx.y, thread = warp * kWarp + lane;
  const int64_t chunk = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const int64_t begin = chunk * args.rows / args.chunks, end = (chunk + 1) * args.rows / args.chunks;
  const int64_t first = tile * kWarp * width;
  const int k = int(first) + lane * width;
  T center[width] = {};
  if (args.center && k < args.columns) load_values<width, false>(args.center + k, center);
  double total[width] = {}, other_sum = 0;
  for (int64_t i = begin + warp; i < end; i += kWarps) {
    if (args.target[i] == args.target.ignore_index) continue;
    const RowStats& stats = args.stats[i];
    const double other = args.coefficients[i].other * upstream_at(args.upstream, i);
    other_sum += other;
    if (k >= args.columns) continue;
    T x[width];
    load_input<In, true>(args.input, i, k, x);
#pragma unroll
    for (int v = 0; v < width; ++v) x[v] -= center[v];
    const double share = centroid_to_sample ? other : other * stats.inverse_norm;
    each_activation<sizeof(In) == 2>(stats, x, [&](int v, double value, T log) NCMI_INLINED {
      total[v] += share * (centroid_to_sample ? double(log) : value);
    });
  }
  // Lanes apart, so that they write to different banks.
#pragma unroll
  for (int v = 0; v < width; ++v) storage.sums[warp][v * kWarp + lane] = total[v];
  if (lane == 0) storage.other[warp] = other_sum;
  __syncthreads();
  double* partials = args.partials + chunk * (args.columns + 1);
  const int64_t column = first + (thread % kWarp) * width + thread / kWarp;
  if (thread < width * kWarp && column < args.columns) {
    double sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += storage.sums[w][thread];
    partials[column] = sum;
  }
  if (tile == 0 && thread == 0) {
    double sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += storage.other[w];
    partials[args.columns] = sum;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) fold_totals_kernel(const TotalsArgs<T> args) {
  const int64_t k = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (k > args.columns) return;
  double sum = 0;
#pragma unroll 4
  for (int64_t chunk = 0; chunk < args.chunks; ++chunk) sum += args.partials[chunk * (args.columns + 1) + k];
  args.totals[k] = sum;
}

// By class: the gradient in the place of `own`, or for `with_step` none, but the step of SGD by it.
//   sample_to_centroid: slope (-own - prior sum_i other_i (p_ik - q_ck)), own = sum over the rows of the class of
//   own_i (p_ik - q_ck);
//   centroid_to_sample: slope (-own + prior q (s - sum_k q s)), s_ck = sum over rows of other classes of
//   other_i (log q_ck - log p_ik), up to what is constant along the row.
// For `by_weight` the sums over all rows have a weight for each class, 0 in rows of that, in the place of its prior.
template <class T, bool centroid_to_sample, bool by_weight, bool with_step>
__global__ void __launch_bounds__(kThreads, 1)
    class_grad_kernel(const CentroidGradArgs<T> args, const StepArgs<T> step) {
  const Centroids<T>& q = args.centroids;
  const int64_t c = blockIdx.x;
  Group group = group_of_thread(shared_storage<GroupStorage>());
  const bool has_rows = args.class_begin[c] != args.class_begin[c + 1];
  const double inverse_norm = ::exp(-q.of[c].log_norm), prior = by_weight ? 1.0 : q.of[c].prior;
  double other_sum = 0;
  if constexpr (with_step || !by_weight) other_sum = args.totals[q.columns];
  // A row whose terms are not finite has coefficients that are not: such a batch moves nothing, nor does one without
  // rows.
  if (with_step && (!(other_sum - other_sum == 0) || args.class_begin[q.classes] == 0)) return;
  const T shift = T(q.of[c].shift);
  [[maybe_unused]] double by = 1, base = 0;
  if constexpr (by_weight) {
    by = upstream_at(args.upstream, 0);
    other_sum = by * args.class_weights[c].other;
    if constexpr (!centroid_to_sample) base = by * args.class_weights[c].base;
  }
  T* own_sums = args.own + args.own_offset(c);
  const T* own_separation = centroid_to_sample && !by_weight ? args.own_separation + args.own_offset(c) : nullptr;
  with_kind<T>(kind_of(q.of[c].kind), [&]<Kind kind>() NCMI_INLINED {
    const auto logit_at = [&](int64_t k) NCMI_INLINED {
      return load_any<T>(args.logits, c * args.logits.row_stride + k * args.logits.column_stride);
    };
    const auto activation_of = [&](T xi) NCMI_INLINED {
      return activate<kind, false>(xi, argument_scale<kind, T>(1.0), shift);
    };
    const auto total_at = [&](int64_t k) NCMI_INLINED {
      if constexpr (by_weight)
        return base + by * double(args.weighted[c * q.columns + k]);
      else
        return args.totals[k];
    };
    const auto separation_at = [&](int64_t k, const Activation<T>& a) NCMI_INLINED {
      if constexpr (by_weight)
        return other_sum * (double(a.log) - double(q.reference[k])) - total_at(k);
      else
        return other_sum * double(a.log) - total_at(k) + (has_rows ? double(own_separation[k]) : 0.0);
    };
    [[maybe_unused]] double mean = 0;
    if constexpr (centroid_to_sample) {
      for (int64_t k = threadIdx.x; k < q.columns; k += blockDim.x) {
        const Activation<T> a = activation_of(logit_at(k));
        mean += double(a.value) * inverse_norm * separation_at(k, a);
      }
      mean = group.sum(mean);
    }
    for (int64_t k = threadIdx.x; k < q.columns; k += blockDim.x) {
      const T xi = logit_at(k);
      const Activation<T> a = activation_of(xi);
      const double own = has_rows ? double(own_sums[k]) : 0.0, share = double(a.value) * inverse_norm;
      T grad;
      if constexpr (centroid_to_sample)
        grad = T(double(a.slope) * (prior * share * (separation_at(k, a) - mean) - own));
      else
        grad = T(-double(a.slope) * (own + prior * (total_at(k) - other_sum * share)));
      if constexpr (!with_step) {
        own_sums[k] = grad;
      } else {  // in place: this thread alone reads column k, and for the last time
        const int64_t at = c * q.columns + k;
        T moves_by = grad + T(step.weight_decay) * xi;
        if (step.momentum_buffer) {
          const T average = T(step.momentum) * step.momentum_buffer[at] + moves_by;
          step.momentum_buffer[at] = average;
          moves_by = step.nesterov ? moves_by + T(step.momentum) * average : average;
        }
        step.logits[at] = xi - T(step.lr) * moves_by;
      }
    }
  });
}

// A function of the shape alone, so that the order of the sums is one too.
int64_t grad_chunks(int64_t classes, int64_t columns) {
  return max(1, min(classes, 1024 / max(1, ceil_div(columns, 128))));
}

void launch_sort_keys(const Targets& target, int64_t rows, int64_t classes, int32_t* keys, Stream stream) {
  launch(sort_keys_kernel, ceil_div(rows, kThreads), dim3(kThreads), stream, target, rows, classes, keys);
}

template <bool by_weight, bool with_step, class T>
void launch_by_class(const CentroidGradArgs<T>& args, const StepArgs<T>& step, Stream stream) {
  const Centroids<T>& q = args.centroids;
  launch(class_begin_kernel, ceil_div(args.rows + 1, kThreads), dim3(kThreads), stream, args.sorted, args.rows,
         q.classes, args.class_begin);
  with_row_kernel<T>(args.input, q.columns, aligned(args.center), [&](auto in, auto) {
    using In = typename decltype(in)::type;
    const int64_t tiles = ceil_div(q.columns, kWarp * kWidth<In>), blocks = tiles * args.chunks;
    if constexpr (by_weight)
      launch(class_grad_sums_kernel<In, T, false, true>, blocks, dim3(kWarp, kWarps), stream, args, tiles);
    else if (q.centroid_to_sample)
      launch(class_grad_sums_kernel<In, T, true, false>, blocks, dim3(kWarp, kWarps), stream, args, tiles);
    else
      launch(class_grad_sums_kernel<In, T, false, false>, blocks, dim3(kWarp, kWarps), stream, args, tiles);
  });
  const int64_t total_columns = by_weight ? 0 : ceil_div(q.columns, kThreads);
  // By weight only a step asks for sum_i other_i: whether it is finite.
  if (by_weight ? with_step : !args.totals_given)
    launch(totals_kernel<T>, total_columns + 1, dim3(kThreads), stream, args);
  if (q.centroid_to_sample)
    launch(class_grad_kernel<T, true, by_weight, with_step>, q.classes, dim3(kThreads), stream, args, step);
  else
    launch(class_grad_kernel<T, false, by_weight, with_step>, q.classes, dim3(kThreads), stream, args, step);
}

int64_t total_chunks(int64_t rows, int64_t columns) {
  return max(1, min(ceil_div(rows, kThreads), 1024 / max(1, ceil_div(columns, 128))));
}

template <class T>
void launch_class_totals(const TotalsArgs<T>& args, Stream stream) {
  with_row_kernel<T>(args.input, args.columns, aligned(args.center), [&](auto in, auto) {
    using In = typename decltype(in)::type;
    const int64_t tiles = ceil_div(args.columns, kWarp * kWidth<In>);
    if (args.centroid_to_sample)
      launch(row_totals_kernel<In, T, true>, tiles * args.chunks, dim3(kWarp, kWarps), stream, args, tiles);
    else
      launch(row_totals_kernel<In, T, false>, tiles * args.chunks, dim3(kWarp, kWarps), stream, args, tiles);
  });
  launch(fold_totals_kernel<T>, ceil_div(args.columns + 1, kThreads), dim3(kThreads), stream, args);
}

// Sorted keys, and where each was; rows of one class stay in the order of the batch.
std::tuple<Tensor, Tensor> stable_sort(const Tensor& keys) {
  std::array<StableIValue, 4> stack{torch::stable::detail::from(keys),
                                    torch::stable::detail::from(std::optional<bool>(true)),
                                    torch::stable::detail::from(int64_t(0)), torch::stable::detail::from(false)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

// The rows, and what a backward pass has of them.
struct Batch {
  const Tensor& input;
  const Tensor& target;
  const std::optional<Tensor>& center;
  const Tensor& row_stats;
  const Tensor& coefficients;
  const std::optional<Tensor>& upstream;
  int64_t ignore_index;
};

// What the gradients of all centroids have of the rows, where it is given.
struct OfAllRows {
  const std::optional<Tensor>& totals;         // [M + 1], or
  const std::optional<Tensor>& class_weights;  // [C, 2] and
  const std::optional<Tensor>& weighted;       // [C, M]
};

// The gradient to `grad` [C, M], or else a step by it.
template <class T>
void by_class(const Device& device, const Batch& batch, const Tensor& centroid_logits, const Centroids<T>& q,
              const OfAllRows& given, T* grad, const StepArgs<T>* step) {
  const auto& [input, target, center, row_stats, coefficients, upstream, ignore_index] = batch;
  const Matrix z = rows_of<T>(input, q.columns), xi = matrix(centroid_logits, "centroid_logits");
  check_device(centroid_logits, "centroid_logits", input);
  check_shape(centroid_logits, "centroid_logits", {q.classes, q.columns});
  STD_TORCH_CHECK(q.classes < 0x7fffffff, "ncmi_kernels: more classes than 2^31");
  const int64_t rows = input.size(0), chunks = grad_chunks(q.classes, q.columns);
  const Targets y = targets(target, input, ignore_index);
  Tensor keys = empty(device, {rows}, ScalarType::Int);
  launch_sort_keys(y, rows, q.classes, output<int32_t>(keys), device.stream());
  auto [sorted, order] = stable_sort(keys);
  double* totals = const_cast<double*>(data_on<double>(given.totals, "totals", {q.columns + 1}, input));
  STD_TORCH_CHECK(given.class_weights.has_value() == given.weighted.has_value(),
                  "ncmi_kernels: pass both class_weights and weighted");
  const bool by_weight = given.weighted.has_value(), by_first_row = step && rows < q.classes;
  STD_TORCH_CHECK(!by_weight || !upstream || upstream->dim() == 0,
                  "ncmi_kernels: upstream must be a scalar beside class_weights");
  const int64_t sums = ((by_first_row ? rows : q.classes) * q.columns * sizeof(T) + 7) / sizeof(double);
  const int64_t own = step ? sums : 0, own_separation = q.centroid_to_sample && !by_weight ? sums : 0;
  const int64_t partial_totals = by_weight ? 0 : chunks * q.columns;
  Workspace workspace(device,
                      (q.classes + 1) + partial_totals + (q.columns + 1) + q.classes + own + own_separation);
  const CentroidGradArgs<T> args{.input = z,
                                 .rows = rows,
                                 .target = y,
                                 .center = data_on<T>(center, "center", {q.columns}, input),
                                 .centroids = q,
                                 .logits = xi,
                                 .stats = stats_on(row_stats, input),
                                 .coefficients = coefficients_on(coefficients, input),
                                 .upstream = upstream_of(upstream, input),
                                 .sorted = output<int32_t>(sorted),
                                 .order = output<int64_t>(order),
                                 .class_begin = workspace.take<int64_t>(q.classes + 1),
                                 .chunks = chunks,
                                 .partial_totals = workspace.take(partial_totals),
                                 .totals = totals ? totals : workspace.take(q.columns + 1),
                                 .totals_given = totals != nullptr,
                                 .class_other = workspace.take(q.classes),
                                 .by_first_row = by_first_row,
                                 .own = step ? workspace.take<T>(own) : grad,
                                 .own_separation = workspace.take<T>(own_separation),
                                 .class_weights = reinterpret_cast<const ClassWeights*>(data_on<double>(
                                     given.class_weights, "class_weights", {q.classes, kClassWeights}, input)),
                                 .weighted = data_on<T>(given.weighted, "weighted", {q.classes, q.columns}, input)};
  const auto launch_as = [&]<bool weights>() {
    if (step)
      launch_by_class<weights, true>(args, *step, device.stream());
    else
      launch_by_class<weights, false>(args, StepArgs<T>{}, device.stream());
  };
  by_weight ? launch_as.template operator()<true>() : launch_as.template operator()<false>();
}

Tensor centroid_grad(const Tensor& input, const Tensor& target, const std::optional<Tensor>& center,
                     const Tensor& centroid_logits, const Tensor& log_activation, const Tensor& activation,
                     const Tensor& reference, const Tensor& norms, const Tensor& row_stats,
                     const Tensor& coefficients, const std::optional<Tensor>& upstream, bool centroid_to_sample,
                     int64_t ignore_index, const std::optional<Tensor>& totals,
                     const std::optional<Tensor>& class_weights, const std::optional<Tensor>& weighted) {
  const Device device(input);
  return with_arithmetic_type(centroid_logits.scalar_type(), "centroid_logits", [&]<class T>() {
    const Centroids<T> q = centroids_on<T>(log_activation, activation, reference, norms, centroid_to_sample, input);
    Tensor grad = empty(device, {q.classes, q.columns}, kScalarType<T>);
    by_class<T>(device, {input, target, center, row_stats, coefficients, upstream, ignore_index}, centroid_logits, q,
                {totals, class_weights, weighted}, output<T>(grad), nullptr);
    return grad;
  });
}

void centroid_step_(const Tensor& input, const Tensor& target, const std::optional<Tensor>& center,
                    const Tensor& centroid_logits, const std::optional<Tensor>& momentum_buffer,
                    const Tensor& log_activation, const Tensor& activation, const Tensor& reference,
                    const Tensor& norms, const Tensor& row_stats, const Tensor& coefficients, bool softmax,
                    bool centroid_to_sample, int64_t ignore_index, double lr, double momentum, double weight_decay,
                    bool nesterov, const std::optional<Tensor>& class_weights,
                    const std::optional<Tensor>& weighted) {
  const Device device(input);
  with_arithmetic_type(centroid_logits.scalar_type(), "centroid_logits", [&]<class T>() {
    const Centroids<T> q = centroids_on<T>(log_activation, activation, reference, norms, centroid_to_sample, input);
    const StepArgs<T> step{
        .logits = const_cast<T*>(data_on<T>(centroid_logits, "centroid_logits", {q.classes, q.columns}, input)),
        .momentum_buffer =
            const_cast<T*>(data_on<T>(momentum_buffer, "momentum_buffer", {q.classes, q.columns}, input)),
        .lr = lr,
        .momentum = momentum,
        .weight_decay = weight_decay,
        .nesterov = nesterov};
    Workspace workspace(device, stats_workspace(q.classes, q.columns));  // before anything moves
    by_class<T>(device, {input, target, center, row_stats, coefficients, std::nullopt, ignore_index}, centroid_logits,
                q, {std::nullopt, class_weights, weighted}, nullptr, &step);
    write_stats<T>(device, workspace, matrix(centroid_logits, "centroid_logits"),
                   {.data = &q.of->prior, .stride = kClassStats}, softmax, q);
  });
}

Tensor class_totals(const Tensor& input, const Tensor& target, const std::optional<Tensor>& center,
                    const Tensor& row_stats, const Tensor& coefficients, const std::optional<Tensor>& upstream,
                    bool centroid_to_sample, int64_t ignore_index) {
  const Device device(input);
  STD_TORCH_CHECK(input.dim() == 2, "ncmi_kernels: input must have 2 dimensions");
  const int64_t rows = input.size(0), columns = input.size(1), chunks = total_chunks(rows, columns);
  Workspace workspace(device, chunks * (columns + 1));
  Tensor totals = empty(device, {columns + 1}, ScalarType::Double);
  const auto launch_as = [&]<class T>() {
    launch_class_totals<T>({.input = rows_of<T>(input, columns),
                            .rows = rows,
                            .columns = columns,
                            .target = targets(target, input, ignore_index),
                            .center = data_on<T>(center, "center", {columns}, input),
                            .stats = stats_on(row_stats, input),
                            .coefficients = coefficients_on(coefficients, input),
                            .upstream = upstream_of(upstream, input),
                            .centroid_to_sample = centroid_to_sample,
                            .chunks = chunks,
                            .partials = workspace.take(chunks * (columns + 1)),
                            .totals = output<double>(totals)},
                           device.stream());
  };
  if (input.scalar_type() == ScalarType::Double)
    launch_as.template operator()<double>();
  else
    launch_as.template operator()<float>();
  return totals;
}

}  // namespace
}  // namespace ncmi::cuda

STABLE_TORCH_LIBRARY_IMPL(ncmi_kernels, CUDA, m) {
  m.impl("centroid_grad", TORCH_BOX(&ncmi::cuda::centroid_grad));
  m.impl("centroid_step_", TORCH_BOX(&ncmi::cuda::centroid_step_));
  m.impl("class_totals", TORCH_BOX(&ncmi::cuda::class_totals));
}
