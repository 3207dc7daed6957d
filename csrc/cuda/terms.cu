// Forward by row: the sums along each, and the terms that are made of them.
#include "launches.h"

namespace ncmi::cuda {

namespace {

constexpr int kFinishThreads = 256;

// The rows' sums to their terms, and to the rest of their statistics.
template <class T>
struct FinishTermsArgs {
  int64_t rows;
  Targets target;
  Centroids<T> centroids;
  const RowSums* sums;  // [B]
  RowStats* stats;      // [B]
  double* terms;        // [2, B]
};

template <class In, class T, int kept, bool centroid_to_sample, bool with_grad>
__global__ void __maxnreg__((kTermsRegisters<In, T, kept, centroid_to_sample>)) terms_kernel(const TermsArgs<T> args) {
  constexpr bool fast = sizeof(In) == 2;
  const int64_t i = row_of_thread();
  if (i >= args.rows) return;
  Group group = group_of_thread(shared_storage<GroupStorage>());
  const Centroids<T>& q = args.centroids;
  const int64_t target = args.target[i];
  if (target == args.target.ignore_index) {
    if (group.first()) {
      args.sums[i] = {};
      args.stats[i] = {};
    }
    if constexpr (with_grad) {
      if (group.first()) args.coefficients[i] = {};
      zero_row<In, T>(group, args.input, i, q.columns, args.grad);
    }
    return;
  }
  const int64_t y = class_of(target, q.classes);
  Row<In, T, kept> row(args.input, i, args.center, q.columns, group);
  const Own<T> of = own_of<centroid_to_sample>(q, y);
  const Summed<T> summed = sum_row_stable<centroid_to_sample, fast>(row, of, args.features);
  RowStats stats{.scale = summed.scale,
                 .inverse_length = summed.inverse_length,
                 .kind = double(summed.kind),
                 .shift = double(summed.shift),
                 .own_prior = q.of[y].prior};
  if (group.first()) {
    args.sums[i] = summed.sums;
    args.stats[i] = stats;
  }
  if constexpr (with_grad) {
    const RowTerms terms = terms_of(q, y, summed.sums);
    const Ratio r = ratio(terms.concentration, terms.separation, args.ratio);
    double w = weight_of(args.weights, y);
    if (args.weights.total) w /= *args.weights.total;
    complete(stats, terms);
    const Coefficients coefficients = coefficients_of(stats, product(w, r.d_concentration),
                                                      product(w, r.d_separation), centroid_to_sample, false);
    if (group.first()) args.coefficients[i] = coefficients;
    grad_of_row<centroid_to_sample, fast>(row, of, stats, coefficients, args.grad);
  }
}

template <class T>
__global__ void __launch_bounds__(1024, 1) finish_terms_kernel(const FinishTermsArgs<T> args) {
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

}  // namespace

template <class T>
void launch_terms(const TermsArgs<T>& args, Stream stream) {
  const int64_t columns = args.centroids.columns;
  const bool can_be_wide = aligned(args.centroids) && aligned(args.center) && aligned(args.grad);
  with_row_kernel<T>(args.input, columns, can_be_wide, [&](auto in, auto kept) {
    using In = typename decltype(in)::type;
    constexpr int k = decltype(kept)::value;
    if (args.grad) {
      if constexpr (sizeof(In) != 2) {  // the gradient of a half-precision input waits for the upstream gradient
        if (args.centroids.centroid_to_sample)
          launch_rows<In, k>(terms_kernel<In, T, k, true, true>, args, columns, stream);
        else
          launch_rows<In, k>(terms_kernel<In, T, k, false, true>, args, columns, stream);
      }
    } else if (args.centroids.centroid_to_sample) {
      launch_rows<In, k>(terms_kernel<In, T, k, true, false>, args, columns, stream);
    } else {
      launch_rows<In, k>(terms_kernel<In, T, k, false, false>, args, columns, stream);
    }
  });
}

template void launch_terms(const TermsArgs<float>&, Stream);
template void launch_terms(const TermsArgs<double>&, Stream);

namespace {

std::tuple<Tensor, Tensor> terms(const Tensor& input, const Tensor& target, const std::optional<Tensor>& center,
                                 const Tensor& log_activation, const Tensor& activation, const Tensor& reference,
                                 const Tensor& norms, double temperature, bool l2_normalize, bool softmax,
                                 bool centroid_to_sample, int64_t ignore_index) {
  const Device device(input);
  return with_arithmetic_type(log_activation.scalar_type(), "log_activation", [&]<class T>() {
    const Centroids<T> q = centroids_on<T>(log_activation, activation, reference, norms, centroid_to_sample, input);
    const Matrix z = rows_of<T>(input, q.columns);
    const int64_t rows = input.size(0);
    const Targets y = targets(target, input, ignore_index);
    Tensor stats = empty(device, {rows, kRowStats}, ScalarType::Double);
    Workspace workspace(device, rows * kRowSums);
    RowSums* sums = workspace.take<RowSums>(rows * kRowSums);
    Tensor result = empty(device, {2, rows}, ScalarType::Double);
    launch_terms<T>({.input = z,
                     .rows = rows,
                     .target = y,
                     .center = data_on<T>(center, "center", {q.columns}, input),
                     .features = {.inverse_temperature = 1.0 / temperature,
                                  .l2_normalize = l2_normalize,
                                  .softmax = softmax},
                     .centroids = q,
                     .sums = sums,
                     .stats = output<RowStats>(stats),
                     .weights = {},
                     .ratio = {},
                     .grad = nullptr,
                     .coefficients = nullptr},
                    device.stream());
    const int64_t threads = min(ceil_div(max(rows, 1), kWarp) * kWarp, kFinishThreads);
    const FinishTermsArgs<T> finish{.rows = rows,
                                    .target = y,
                                    .centroids = q,
                                    .sums = sums,
                                    .stats = output<RowStats>(stats),
                                    .terms = output<double>(result)};
    launch(finish_terms_kernel<T>, ceil_div(rows, threads), dim3(unsigned(threads)), device.stream(), finish);
    return std::make_tuple(result, stats);
  });
}

}  // namespace
}  // namespace ncmi::cuda

STABLE_TORCH_LIBRARY_IMPL(ncmi_kernels, CUDA, m) {
  m.impl("terms", TORCH_BOX(&ncmi::cuda::terms));
}
