// Backward by row.
#include "host.h"
#include "rows.cuh"

namespace ncmi::cuda {

namespace {

template <class T>
struct InputGradArgs {
  Matrix input;  // [B, M]
  int64_t rows;
  Targets target;   // [B]
  const T* center;  // [M] or null
  Centroids<T> centroids;
  const T* reference;        // [M] what all rows are compared with, or [B, M] for each its own
  int64_t reference_stride;  // from row to row: 0, or M
  const T* row_own;          // [B, M] in the place of log a of the own centroids, or null
  const RowStats* stats;             // [B]
  const Coefficients* coefficients;  // [B]
  Upstream upstream;
  void* grad;  // [B, M] contiguous, in the dtype of input
};

template <class In, class T, int kept, bool centroid_to_sample>
__global__ void __maxnreg__((kRegisters<In, T, kept>)) input_grad_kernel(const InputGradArgs<T> args) {
  constexpr bool fast = sizeof(In) == 2;
  const int64_t i = row_of_thread();
  if (i >= args.rows) return;
  Group group = group_of_thread(shared_storage<GroupStorage>());
  const Centroids<T>& q = args.centroids;
  const int64_t target = args.target[i];
  if (target == args.target.ignore_index) return zero_row<In, T>(group, args.input, i, q.columns, args.grad);
  const int64_t y = class_of(target, q.classes);
  Row<In, T, kept> row(args.input, i, args.center, q.columns, group);
  Own<T> of = own_of<centroid_to_sample>(q, y);
  (centroid_to_sample ? of.q_mean : of.reference) = args.reference + i * args.reference_stride;
  if (args.row_own) of.log = args.row_own + i * q.columns;
  const RowStats stats = args.stats[i];
  const Coefficients coefficients = args.coefficients[i] * upstream_at(args.upstream, i);
  grad_of_row<centroid_to_sample, fast>(row, of, stats, coefficients, args.grad);
}

template <class T>
void launch_input_grad(const InputGradArgs<T>& args, Stream stream) {
  const int64_t columns = args.centroids.columns;
  const bool can_be_wide = aligned(args.centroids) && aligned(args.center) && aligned(args.reference) &&
                           aligned(args.row_own) && aligned(args.grad);
  with_row_kernel<T>(args.input, columns, can_be_wide, [&](auto in, auto kept) {
    using In = typename decltype(in)::type;
    constexpr int k = decltype(kept)::value;
    if (args.centroids.centroid_to_sample)
      launch_rows<In, k>(input_grad_kernel<In, T, k, true>, args, columns, stream);
    else
      launch_rows<In, k>(input_grad_kernel<In, T, k, false>, args, columns, stream);
  });
}

Tensor input_grad(const Tensor& input, const Tensor& target, const std::optional<Tensor>& center,
                  const Tensor& log_activation, const Tensor& activation, const Tensor& reference,
                  const Tensor& norms, const Tensor& row_stats, const Tensor& coefficients,
                  const std::optional<Tensor>& upstream, bool centroid_to_sample, int64_t ignore_index,
                  const std::optional<Tensor>& row_reference, const std::optional<Tensor>& row_own) {
  const Device device(input);
  return with_arithmetic_type(log_activation.scalar_type(), "log_activation", [&]<class T>() {
    const Centroids<T> q = centroids_on<T>(log_activation, activation, reference, norms, centroid_to_sample, input);
    const Matrix z = rows_of<T>(input, q.columns);
    STD_TORCH_CHECK((z.dtype == Dtype::kFloat64) == kIsDouble<T>,
                    "ncmi_kernels: float64 input and float64 centroid_logits go together");
    const int64_t rows = input.size(0);
    const T* shared_reference = q.reference + (centroid_to_sample ? q.columns : 0);
    const T* of_rows = data_on<T>(row_reference, "row_reference", {rows, q.columns}, input);
    Tensor grad = empty(device, {rows, q.columns}, input.scalar_type());
    launch_input_grad<T>({.input = z,
                          .rows = rows,
                          .target = targets(target, input, ignore_index),
                          .center = data_on<T>(center, "center", {q.columns}, input),
                          .centroids = q,
                          .reference = row_reference ? of_rows : shared_reference,
                          .reference_stride = row_reference ? q.columns : 0,
                          .row_own = data_on<T>(row_own, "row_own", {rows, q.columns}, input),
                          .stats = stats_on(row_stats, input),
                          .coefficients = coefficients_on(coefficients, input),
                          .upstream = upstream_of(upstream, input),
                          .grad = grad.data_ptr()},
                         device.stream());
    return grad;
  });
}

}  // namespace
}  // namespace ncmi::cuda

STABLE_TORCH_LIBRARY_IMPL(ncmi_kernels, CUDA, m) {
  m.impl("input_grad", TORCH_BOX(&ncmi::cuda::input_grad));
}
