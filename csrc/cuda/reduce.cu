// The rows' sums to their terms, to the loss, and to the coefficients of their gradients.
#include "rows.cuh"

namespace ncmi::cuda {

namespace {

constexpr int kThreads = 1024;
constexpr int64_t kRowsOfOneStep = 8192;  // up to here every block forms the sums over all rows for itself

// Of a row that counts.
template <class T, class Loss>
NCMI_DEVICE RowTerms terms_at(const ReduceArgs<T, Loss>& args, int64_t i, int64_t y) {
  if (!args.terms) return terms_of(args.centroids, y, args.sums[i]);
  const RowStats& stats = args.stats[i];
  return {stats.inverse_norm, stats.own_mean, stats.all_mean, args.terms[i], args.terms[args.rows + i]};
}

// One row's part in the sums over all: [weight, A, G, and for the ratio by sample that].
template <class T, class Loss>
NCMI_DEVICE void add_row(const ReduceArgs<T, Loss>& args, int64_t i, double (&sums)[kReduceSums]) {
  const int64_t target = args.target[i];
  if (target == args.target.ignore_index) return;
  const int64_t y = class_of(target, args.centroids.classes);
  const RowTerms t = terms_at(args, i, y);
  const double w = weight_of(args.weights, y);
  sums[0] += w;
  sums[1] += w * t.concentration;
  sums[2] += w * t.separation;
  if (!args.batch_ratio) sums[3] += w * ratio(t.concentration, t.separation, args.eps).value;
}

NCMI_DEVICE void sum_of_block(Group& group, double (&sums)[kReduceSums]) {
#pragma unroll
  for (int j = 0; j < kReduceSums; ++j) sums[j] = warp_sum(sums[j]);
  group.sum_warps(sums);
}

template <class T, class Loss>
__global__ void __launch_bounds__(kThreads, 1) reduce_partials_kernel(const ReduceArgs<T, Loss> args) {
  Group group = group_of_thread(shared_storage<GroupStorage>());
  double sums[kReduceSums] = {};
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < args.rows; i += int64_t(gridDim.x) * blockDim.x)
    add_row(args, i, sums);
  sum_of_block(group, sums);
  if (group.first())
    for (int j = 0; j < kReduceSums; ++j) args.partials[blockIdx.x * kReduceSums + j] = sums[j];
}

// Every block forms the same sums in the same order; the first writes the loss, and each its share of the rows.
template <class T, class Loss>
__global__ void __launch_bounds__(kThreads, 1) reduce_kernel(const ReduceArgs<T, Loss> args, int64_t partials) {
  Group group = group_of_thread(shared_storage<GroupStorage>());
  double sums[kReduceSums] = {};
  if (args.totals) {
    if (group.first())
#pragma unroll
      for (int j = 0; j < kReduceSums; ++j) sums[j] = args.totals[j];
  } else if (partials) {
    for (int64_t p = threadIdx.x; p < partials; p += blockDim.x)
#pragma unroll
      for (int j = 0; j < kReduceSums; ++j) sums[j] += args.partials[p * kReduceSums + j];
  } else {
    for (int64_t i = threadIdx.x; i < args.rows; i += blockDim.x) add_row(args, i, sums);
  }
  sum_of_block(group, sums);
  double weight_sum = args.mean ? sums[0] : 1.0;
  if (args.weights.total) weight_sum = *args.weights.total;
  const Ratio of_batch = ratio(sums[1] / weight_sum, sums[2] / weight_sum, args.eps);
  if (blockIdx.x == 0 && group.first()) {
    // No sample that counts: 0 / 0, as cross_entropy.
    if (args.loss) *args.loss = Loss(args.batch_ratio ? of_batch.value : sums[3] / weight_sum);
    args.means[0] = sums[1] / sums[0];
    args.means[1] = sums[2] / sums[0];
    if (args.over_rows)
      for (int j = 0; j < kReduceSums; ++j) args.over_rows[j] = sums[j];
  }

  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < args.rows;
       i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t target = args.target[i];
    if (target == args.target.ignore_index) {  // its statistics are zeros already
      if (args.coefficients) args.coefficients[i] = {};
      if (args.row_loss) args.row_loss[i] = 0;
      continue;
    }
    const int64_t y = class_of(target, args.centroids.classes);
    const RowTerms t = terms_at(args, i, y);
    const Ratio r = args.batch_ratio ? of_batch : ratio(t.concentration, t.separation, args.eps);
    double w = weight_of(args.weights, y);
    if (args.mean) w /= weight_sum;
    if (!args.terms) complete(args.stats[i], t);
    if (args.coefficients)
      args.coefficients[i] =
          coefficients_of(args.stats[i], w * r.d_concentration, w * r.d_separation, args.centroids.all().classes,
                          args.centroids.centroid_to_sample, args.focus);
    if (args.row_loss) args.row_loss[i] = Loss(w * r.value);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) finish_terms_kernel(const FinishTermsArgs<T> args) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= args.rows) return;
  const int64_t target = args.target[i];
  if (target == args.target.ignore_index) {
    args.terms[i] = args.terms[args.rows + i] = 0;
    return;
  }
  const RowTerms t = terms_of(args.centroids, class_of(target, args.centroids.classes), args.sums[i]);
  args.terms[i] = t.concentration;
  args.terms[args.rows + i] = t.separation;
  complete(args.stats[i], t);
}

// What is 0, as the gradient of an ignored row, stays 0 times anything.
template <class T>
NCMI_DEVICE T scaled(T grad, T by) {
  return grad == T(0) ? T(0) : grad * by;
}

// In place: a gradient of the loss to one of what comes after it. Reads the factor itself, and stops where it is 1.
template <class T>
__global__ void __launch_bounds__(kThreads, 1) scale_kernel(T* grad, int64_t elements, const T* factor) {
  constexpr int width = 16 / int(sizeof(T));
  const T by = *factor;
  if (by == T(1)) return;  // loss.backward()
  const int64_t first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, step = int64_t(gridDim.x) * blockDim.x;
  struct alignas(16) Stretch {
    T value[width];
  };
  Stretch* stretches = reinterpret_cast<Stretch*>(grad);
  for (int64_t j = first; j < elements / width; j += step) {
    Stretch s = stretches[j];
#pragma unroll
    for (int v = 0; v < width; ++v) s.value[v] = scaled(s.value[v], by);
    stretches[j] = s;
  }
  const int64_t k = elements / width * width + first;
  if (k < elements) grad[k] = scaled(grad[k], by);
}

int block_threads(int64_t items) { return int(min(ceil_div(max(items, 1), kWarp) * kWarp, kThreads)); }

}  // namespace

void check_device_works() {
#if defined(__CUDACC__)
  const cudaError_t error = cudaPeekAtLastError();
  if (error != cudaSuccess && error != cudaErrorMemoryAllocation)
    throw std::runtime_error(std::string("ncmi_kernels: the device stopped working: ") + cudaGetErrorString(error));
#endif
}

int64_t reduce_partials(int64_t rows) { return rows <= kRowsOfOneStep ? 0 : min(ceil_div(rows, kThreads), kThreads); }

template <class T, class Loss>
void launch_reduce(const ReduceArgs<T, Loss>& args, Stream stream) {
  const int64_t partials = args.totals ? 0 : reduce_partials(args.rows);
  if (partials) launch(reduce_partials_kernel<T, Loss>, partials, dim3(kThreads), stream, args);
  const int threads = block_threads(args.rows);
  launch(reduce_kernel<T, Loss>, max(1, ceil_div(args.rows, threads)), dim3(threads), stream, args, partials);
}

template <class T>
void launch_finish_terms(const FinishTermsArgs<T>& args, Stream stream) {
  const int threads = int(min(block_threads(args.rows), 256));
  launch(finish_terms_kernel<T>, ceil_div(args.rows, threads), dim3(threads), stream, args);
}

template <class T>
void launch_scale(T* grad, int64_t elements, const T* factor, Stream stream) {
  constexpr int64_t width = 16 / int64_t(sizeof(T)), threads = 256;
  if (elements == 0) return;
  launch(scale_kernel<T>, max(1, min(ceil_div(elements / width, threads), 4096)), dim3(threads), stream, grad, elements,
         factor);
}

template void launch_reduce(const ReduceArgs<float, float>&, Stream);
template void launch_reduce(const ReduceArgs<float, double>&, Stream);
template void launch_reduce(const ReduceArgs<double, double>&, Stream);
template void launch_finish_terms(const FinishTermsArgs<float>&, Stream);
template void launch_finish_terms(const FinishTermsArgs<double>&, Stream);
template void launch_scale(float*, int64_t, const float*, Stream);
template void launch_scale(double*, int64_t, const double*, Stream);

}  // namespace ncmi::cuda
