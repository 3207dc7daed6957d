// The rows' terms, or their sums, to the loss and to the coefficients of their gradients; and the loss in one call.
#include "launches.h"

namespace ncmi::cuda {

namespace {

constexpr int64_t kReduceSums = 4;
constexpr int kThreads = 1024;
constexpr int64_t kRowsOfOneStep = 8192;  // up to here every block forms the sums over all rows for itself

// The terms, or the rows' sums, to the loss. Loss is its type.
template <class T, class Loss>
struct ReduceArgs {
  int64_t rows;
  Targets target;
  Centroids<T> centroids;  // but for their columns; of given terms only `classes`, centroid_to_sample
  const double* terms;     // [2, B], or null: formed from the sums
  const RowSums* sums;     // [B], or null: terms are given
  RowStats* stats;         // [B], completed where terms are formed
  Weights<T> weights;      // total null: formed here where `mean`
  const double* totals;    // [kReduceSums] in the place of the sums over the rows, or null
  bool focus;
  bool batch_ratio;
  bool mean;
  RatioOptions ratio;
  Loss* loss;                  // scalar
  Loss* row_loss;              // [B], or null: reduction none
  Coefficients* coefficients;  // [B], or null: those that the gradient was made of stand
  double* means;               // [2] of A and G over the rows, weighted
  double* over_rows;           // [kReduceSums] the sums over the rows, or null
  double* partials;            // [reduce_partials(rows), kReduceSums] workspace
};

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
  if (!args.batch_ratio) sums[3] += w * ratio(t.concentration, t.separation, args.ratio).value;
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
  const Ratio of_batch = ratio(sums[1] / weight_sum, sums[2] / weight_sum, args.ratio);
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
    const Ratio r = args.batch_ratio ? of_batch : ratio(t.concentration, t.separation, args.ratio);
    double w = weight_of(args.weights, y);
    if (args.mean) w /= weight_sum;
    if (!args.terms) complete(args.stats[i], t);
    if (args.coefficients)
      args.coefficients[i] = coefficients_of(args.stats[i], w * r.d_concentration, w * r.d_separation,
                                             args.centroids.centroid_to_sample, args.focus);
    if (args.row_loss) args.row_loss[i] = Loss(w * r.value);
  }
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

int64_t reduce_partials(int64_t rows) { return rows <= kRowsOfOneStep ? 0 : min(ceil_div(rows, kThreads), kThreads); }

template <class T, class Loss>
void launch_reduce(const ReduceArgs<T, Loss>& args, Stream stream) {
  const int64_t partials = args.totals ? 0 : reduce_partials(args.rows);
  if (partials) launch(reduce_partials_kernel<T, Loss>, partials, dim3(kThreads), stream, args);
  const int threads = block_threads(args.rows);
  launch(reduce_kernel<T, Loss>, max(1, ceil_div(args.rows, threads)), dim3(threads), stream, args, partials);
}

template <class T>
void launch_scale(T* grad, int64_t elements, const T* factor, Stream stream) {
  constexpr int64_t width = 16 / int64_t(sizeof(T)), threads = 256;
  if (elements == 0) return;
  launch(scale_kernel<T>, max(1, min(ceil_div(elements / width, threads), 4096)), dim3(threads), stream, grad, elements,
         factor);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> reduce(const Tensor& terms, const Tensor& row_stats, const Tensor& target,
                                                  const std::optional<Tensor>& weight,
                                                  const std::optional<Tensor>& totals, bool centroid_to_sample,
                                                  bool focus, bool batch_ratio, int64_t reduction, double eps,
                                                  double sharpness, int64_t ignore_index) {
  check_reduction(batch_ratio, reduction, sharpness);
  const Device device(row_stats);
  STD_TORCH_CHECK(row_stats.dim() == 2, "ncmi_kernels: rows must have 2 dimensions");
  const int64_t rows = row_stats.size(0);
  const int64_t classes = weight ? weight->numel() : INT64_MAX;  // that a target may be
  Tensor result = reduction == kNone ? empty(device, {rows}, ScalarType::Double)
                                     : empty(device, {}, ScalarType::Double);
  Tensor coefficients = empty(device, {rows, kCoefficients}, ScalarType::Double);
  Tensor means = empty(device, {2}, ScalarType::Double);
  Tensor sums = empty(device, {kReduceSums}, ScalarType::Double);
  const int64_t partials = totals ? 0 : reduce_partials(rows) * kReduceSums;
  Workspace workspace(device, partials);
  return with_arithmetic_type(weight ? weight->scalar_type() : ScalarType::Double, "weight", [&]<class T>() {
    launch_reduce<T, double>(
        {.rows = rows,
         .target = targets(target, row_stats, ignore_index),
         .centroids = {.classes = classes, .centroid_to_sample = centroid_to_sample},
         .terms = data_on<double>(terms, "terms", {2, rows}, row_stats),
         .stats = const_cast<RowStats*>(stats_on(row_stats, row_stats)),
         .weights = {.by_class = data_on<T>(weight, "weight", {classes}, row_stats), .total = nullptr},
         .totals = data_on<double>(totals, "totals", {kReduceSums}, row_stats),
         .focus = focus,
         .batch_ratio = batch_ratio,
         .mean = reduction == kMean,
         .ratio = {.eps = eps, .sharpness = sharpness},
         .loss = reduction == kNone ? nullptr : output<double>(result),
         .row_loss = reduction == kNone ? output<double>(result) : nullptr,
         .coefficients = output<Coefficients>(coefficients),
         .means = output<double>(means),
         .over_rows = output<double>(sums),
         .partials = workspace.take(partials)},
        device.stream());
    return std::make_tuple(result, coefficients, means, sums);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> loss(
    const Tensor& input, const Tensor& target, const std::optional<Tensor>& center,
    const std::optional<Tensor>& running_center, const std::optional<Tensor>& num_batches_tracked, double momentum,
    const Tensor& log_activation, const Tensor& activation, const Tensor& reference, const Tensor& norms,
    const std::optional<Tensor>& weight, double temperature, bool l2_normalize, bool softmax, bool centroid_to_sample,
    bool batch_ratio, int64_t reduction, double eps, double sharpness, int64_t ignore_index, bool with_grad) {
  check_loss_arguments(input, center, running_center, num_batches_tracked, log_activation, batch_ratio, reduction,
                       sharpness, with_grad);
  const Device device(input);
  return with_arithmetic_type(log_activation.scalar_type(), "log_activation", [&]<class T>() {
    const Centroids<T> q = centroids_on<T>(log_activation, activation, reference, norms, centroid_to_sample, input);
    const Matrix z = rows_of<T>(input, q.columns);
    const int64_t rows = input.size(0);
    const Targets y = targets(target, input, ignore_index);
    const T* class_weight = data_on<T>(weight, "weight", {q.classes}, input);
    // A gradient made with its row needs the sum of the weights first; else it is formed at the end.
    const bool weighed = with_grad && reduction == kMean, summed = running_center || weighed;
    const int64_t partials = reduce_partials(rows) * kReduceSums;
    Workspace workspace(device,
                        1 + rows * kRowSums + partials +
                            (summed ? column_sums_workspace(rows, running_center ? q.columns : 0) : 0));
    double* weight_total = workspace.take(1);
    if (!weighed) weight_total = nullptr;
    RowSums* sums = workspace.take<RowSums>(rows * kRowSums);
    double* partial_sums = workspace.take(partials);
    const T* given_center = data_on<T>(center, "center", {q.columns}, input);
    Tensor grad = with_grad ? empty(device, {rows, q.columns}, kScalarType<T>) : empty(device, {0}, kScalarType<T>);
    Tensor stats = empty(device, {rows, kRowStats}, ScalarType::Double);
    Tensor coefficients = empty(device, {rows, kCoefficients}, ScalarType::Double);
    Tensor result = reduction == kNone ? empty(device, {rows}, kScalarType<T>) : empty(device, {}, kScalarType<T>);
    Tensor means = empty(device, {2}, ScalarType::Double);
    // All that may fail is done: from here on the running centre moves.
    Tensor moved = summed ? column_sums<T>(device, workspace, input, y, q.classes,
                                           {running_center, num_batches_tracked, momentum}, class_weight, weight_total)
                          : empty(device, {0}, kScalarType<T>);
    const T* c = running_center ? output<T>(moved) : given_center;
    const Weights<T> weights{.by_class = class_weight, .total = weight_total};
    launch_terms<T>({.input = z,
                     .rows = rows,
                     .target = y,
                     .center = c,
                     .features = {.inverse_temperature = 1.0 / temperature,
                                  .l2_normalize = l2_normalize,
                                  .softmax = softmax},
                     .centroids = q,
                     .sums = sums,
                     .stats = output<RowStats>(stats),
                     .weights = weights,
                     .ratio = {.eps = eps, .sharpness = sharpness},
                     .grad = with_grad ? output<T>(grad) : nullptr,
                     .coefficients = output<Coefficients>(coefficients)},
                    device.stream());
    launch_reduce<T, T>({.rows = rows,
                         .target = y,
                         .centroids = q,
                         .sums = sums,
                         .stats = output<RowStats>(stats),
                         .weights = weights,
                         .batch_ratio = batch_ratio,
                         .mean = reduction == kMean,
                         .ratio = {.eps = eps, .sharpness = sharpness},
                         .loss = reduction == kNone ? nullptr : output<T>(result),
                         .row_loss = reduction == kNone ? output<T>(result) : nullptr,
                         .coefficients = with_grad ? nullptr : output<Coefficients>(coefficients),
                         .means = output<double>(means),
                         .partials = partial_sums},
                        device.stream());
    return std::make_tuple(result, stats, coefficients, moved, grad, means);
  });
}

void scale_(const Tensor& grad, const Tensor& upstream) {
  STD_TORCH_CHECK(grad.dim() == 2, "ncmi_kernels: grad must have 2 dimensions");
  STD_TORCH_CHECK(upstream.dim() == 0 && upstream.scalar_type() == grad.scalar_type(),
                  "ncmi_kernels: upstream must be a scalar in the dtype of grad");
  check_device(upstream, "upstream", grad);
  const Device device(grad);
  with_arithmetic_type(grad.scalar_type(), "grad", [&]<class T>() {
    const int64_t rows = grad.size(0), columns = grad.size(1);
    launch_scale(const_cast<T*>(data<T>(grad, "grad", {rows, columns})), rows * columns,
                 data<T>(upstream, "upstream", {}), device.stream());
  });
}

}  // namespace
}  // namespace ncmi::cuda

STABLE_TORCH_LIBRARY_IMPL(ncmi_kernels, CUDA, m) {
  m.impl("reduce", TORCH_BOX(&ncmi::cuda::reduce));
  m.impl("loss", TORCH_BOX(&ncmi::cuda::loss));
  m.impl("scale_", TORCH_BOX(&ncmi::cuda::scale_));
}
