// The CUDA implementations: tensors to pointers, checks, workspace. Nothing waits for the device.
//
// Every output element has one owner and every sum one order: the same bits each run.
//
// A library of its own, beside the one with the CPU implementations and the operators' declarations: where it cannot be
// loaded, those stay.

#include <array>
#include <optional>
#include <tuple>

#include "../tensors.h"
#include "device.h"
#include "kernels.h"

namespace ncmi::cuda {

namespace {

constexpr int64_t kMostColumns = int64_t(1) << 30;  // within a row, columns are counted in 32 bits

Tensor empty(const Device& device, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  try {
    return empty_on(device.type(), device.index(), sizes, dtype);
  } catch (const OutOfMemory&) {
    check_device_works();
    throw;
  }
}

// What passes between kernels, in one allocation: each costs about as much as a launch does.
class Workspace {
 public:
  Workspace(const Device& device, int64_t doubles)
      : memory_(empty(device, {doubles}, ScalarType::Double)), next_(output<double>(memory_)) {}

  template <class T = double>
  T* take(int64_t doubles) {
    T* taken = reinterpret_cast<T*>(next_);
    next_ += doubles;
    return taken;
  }

 private:
  Tensor memory_;  // the caching allocator hands it out again only to what the stream does next
  double* next_;
};

constexpr int64_t kRowSums = sizeof(RowSums) / sizeof(double);

// A kernel cannot check where its pointers lead.
void check_device(const Tensor& t, const char* name, const Tensor& input) {
  STD_TORCH_CHECK(t.is_cuda() == input.is_cuda() && t.get_device_index() == input.get_device_index(), "ncmi_kernels: ",
                  name, " must be on the device of the other arguments");
}

template <class T>
const T* data_on(const Tensor& t, const char* name, std::initializer_list<int64_t> sizes, const Tensor& input) {
  check_device(t, name, input);
  return data<T>(t, name, sizes);
}

template <class T>
const T* data_on(const std::optional<Tensor>& t, const char* name, std::initializer_list<int64_t> sizes,
                 const Tensor& input) {
  return t ? data_on<T>(*t, name, sizes, input) : nullptr;
}

// Targets, which the kernels check to be classes or ignore_index.
Targets targets(const Tensor& t, const Tensor& input, int64_t ignore_index) {
  check_device(t, "target", input);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long, "ncmi_kernels: target must be int64");
  check_shape(t, "target", {input.size(0)});
  return {.data = static_cast<const int64_t*>(memory_of(t, "target")),
          .stride = t.stride(0),
          .ignore_index = ignore_index};
}

const ClassStats* class_stats_on(const Tensor& norms, int64_t classes, const Tensor& input) {
  return reinterpret_cast<const ClassStats*>(data_on<double>(norms, "norms", {classes + 1, kClassStats}, input));
}

template <class T>
Centroids<T> centroids(const Tensor& log_activation, const Tensor& activation, const Tensor& reference,
                       const Tensor& norms, bool centroid_to_sample, const Tensor& input) {
  STD_TORCH_CHECK(log_activation.dim() == 2, "ncmi_kernels: log_activation must have 2 dimensions");
  const int64_t classes = log_activation.size(0), columns = log_activation.size(1);
  STD_TORCH_CHECK(columns > 0, "ncmi_kernels: log_activation must have columns");
  return {.classes = classes,
          .columns = columns,
          .centroid_to_sample = centroid_to_sample,
          .log_activation = data_on<T>(log_activation, "log_activation", {classes, columns}, input),
          .activation = data_on<T>(activation, "activation", {centroid_to_sample ? classes : 0, columns}, input),
          .reference = data_on<T>(reference, "reference", {2, columns}, input),
          .of = class_stats_on(norms, classes, input)};
}

template <class T>
Matrix rows_of(const Tensor& input, int64_t columns) {
  const Matrix z = matrix(input, "input");
  check_shape(input, "input", {input.size(0), columns});
  STD_TORCH_CHECK(columns <= kMostColumns, "ncmi_kernels: more columns than 2^30");
  STD_TORCH_CHECK(z.dtype != Dtype::kFloat64 || kIsDouble<T>,
                  "ncmi_kernels: float64 input needs float64 centroid_logits");
  return z;
}

const RowStats* stats_on(const Tensor& rows, const Tensor& input) {
  check_device(rows, "rows", input);
  return row_stats_of(rows, input.size(0));
}

const Coefficients* coefficients_on(const Tensor& t, const Tensor& input) {
  check_device(t, "coefficients", input);
  return coefficients_in(t, input.size(0));
}

Upstream upstream_of(const std::optional<Tensor>& t, const Tensor& input) {
  if (!t) return {};
  check_device(*t, "upstream", input);
  const bool by_row = t->dim() == 1;
  STD_TORCH_CHECK(by_row ? t->size(0) == input.size(0) : t->dim() == 0,
                  "ncmi_kernels: upstream must be a scalar or [B]");
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float || t->scalar_type() == ScalarType::Double,
                  "ncmi_kernels: upstream must be float32 or float64");
  return {.data = memory_of(*t, "upstream"),
          .is_double = t->scalar_type() == ScalarType::Double,
          .stride = by_row ? t->stride(0) : 0};
}

// In doubles, for write_stats.
int64_t stats_workspace(int64_t classes, int64_t columns) {
  return class_chunks(classes, columns) * kClassSums * columns + 2 * columns;
}

// What centroid_stats gives of the logits xi [C, M], to where it belongs.
template <class T>
void write_stats(const Device& device, Workspace& workspace, const Matrix& xi, int64_t classes, int64_t columns,
                 bool softmax, bool centroid_to_sample, T* log_activation, T* activation, T* reference,
                 ClassStats* of) {
  const int64_t chunks = class_chunks(classes, columns);
  const int64_t sums = chunks * kClassSums * columns, lost = 2 * columns;
  launch_centroid_stats<T>({.logits = xi,
                            .classes = classes,
                            .columns = columns,
                            .softmax = softmax,
                            .centroid_to_sample = centroid_to_sample,
                            .log_activation = log_activation,
                            .activation = centroid_to_sample ? activation : nullptr,
                            .reference = reference,
                            .of = of,
                            .chunks = chunks,
                            .sums = workspace.take(sums),
                            .lost = workspace.take(lost)},
                           device.stream());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> centroid_stats(const Tensor& logits, bool softmax,
                                                          bool centroid_to_sample) {
  const Matrix xi = matrix(logits, "centroid_logits");
  const int64_t classes = logits.size(0), columns = logits.size(1);
  STD_TORCH_CHECK(classes > 0 && columns > 0, "ncmi_kernels: centroid_logits must not be empty");
  STD_TORCH_CHECK(columns <= kMostColumns, "ncmi_kernels: more columns than 2^30");
  const Device device(logits);
  return with_arithmetic_type(logits.scalar_type(), "centroid_logits", [&]<class T>() {
    const ScalarType dtype = logits.scalar_type();
    Tensor log_activation = empty(device, {classes, columns}, dtype);
    Tensor activation = empty(device, {centroid_to_sample ? classes : 0, columns}, dtype);
    Tensor reference = empty(device, {2, columns}, dtype);
    Tensor norms = empty(device, {classes + 1, kClassStats}, ScalarType::Double);
    Workspace workspace(device, stats_workspace(classes, columns));
    write_stats<T>(device, workspace, xi, classes, columns, softmax, centroid_to_sample, output<T>(log_activation),
                   output<T>(activation), output<T>(reference), output<ClassStats>(norms));
    return std::make_tuple(log_activation, activation, reference, norms);
  });
}

std::tuple<Tensor, Tensor> terms(const Tensor& input, const Tensor& target, const std::optional<Tensor>& center,
                                 const Tensor& log_activation, const Tensor& activation, const Tensor& reference,
                                 const Tensor& norms, double temperature, bool l2_normalize, bool softmax,
                                 bool centroid_to_sample, int64_t ignore_index) {
  const Device device(input);
  return with_arithmetic_type(log_activation.scalar_type(), "log_activation", [&]<class T>() {
    const Centroids<T> q = centroids<T>(log_activation, activation, reference, norms, centroid_to_sample, input);
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
                     .eps = 0,
                     .grad = nullptr,
                     .coefficients = nullptr},
                    device.stream());
    launch_finish_terms<T>({.rows = rows,
                            .target = y,
                            .centroids = q,
                            .sums = sums,
                            .stats = output<RowStats>(stats),
                            .terms = output<double>(result)},
                           device.stream());
    return std::make_tuple(result, stats);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> reduce(const Tensor& terms, const Tensor& row_stats, const Tensor& target,
                                                  const Tensor& norms, const std::optional<Tensor>& weight,
                                                  const std::optional<Tensor>& totals, bool centroid_to_sample,
                                                  bool focus, bool batch_ratio, int64_t reduction, double eps,
                                                  int64_t ignore_index) {
  check_reduction(batch_ratio, reduction);
  const Device device(row_stats);
  STD_TORCH_CHECK(row_stats.dim() == 2 && norms.dim() == 2, "ncmi_kernels: rows and norms must have 2 dimensions");
  const int64_t rows = row_stats.size(0), classes = norms.size(0) - 1;
  STD_TORCH_CHECK(classes >= 0, "ncmi_kernels: norms must not be empty");
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
         .centroids = {.classes = classes,
                       .centroid_to_sample = centroid_to_sample,
                       .of = class_stats_on(norms, classes, row_stats)},
         .terms = data_on<double>(terms, "terms", {2, rows}, row_stats),
         .stats = const_cast<RowStats*>(stats_on(row_stats, row_stats)),
         .weights = {.by_class = data_on<T>(weight, "weight", {classes}, row_stats), .total = nullptr},
         .totals = data_on<double>(totals, "totals", {kReduceSums}, row_stats),
         .focus = focus,
         .batch_ratio = batch_ratio,
         .mean = reduction == kMean,
         .eps = eps,
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

// In doubles, for column_sums.
int64_t column_sums_workspace(int64_t rows, int64_t columns) {
  const int64_t splits = center_splits(rows, columns);
  return splits * (columns + 2) + center_blocks(splits, columns);
}

// Moves a running centre and leaves what the rows weigh together, each where it is asked for. Returns the copy of the
// new centre, [0] without one.
template <class T>
Tensor column_sums(const Device& device, Workspace& workspace, const Tensor& input, const Targets& target,
                   int64_t classes, const std::optional<Tensor>& center,
                   const std::optional<Tensor>& num_batches_tracked, double momentum, const T* class_weight,
                   double* weight_total) {
  const int64_t rows = input.size(0), columns = center ? input.size(1) : 0;
  const Matrix z = rows_of<T>(input, input.size(1));
  const int64_t splits = center_splits(rows, columns);
  Tensor moved = empty(device, {columns}, kScalarType<T>);
  T* c = const_cast<T*>(data_on<T>(center, "center", {columns}, input));
  int64_t* batches =
      const_cast<int64_t*>(data_on<int64_t>(num_batches_tracked, "num_batches_tracked", {}, input));
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
                           .momentum = momentum,
                           .center = c,
                           .batches = batches,
                           .moved = output<T>(moved),
                           .finite = workspace.take<int32_t>(center_blocks(splits, columns))},
                          device.stream());
  return moved;
}

Tensor update_center_(const Tensor& center, const Tensor& num_batches_tracked, const Tensor& input,
                      const Tensor& target, double momentum, int64_t num_classes, int64_t ignore_index) {
  const Device device(input);
  STD_TORCH_CHECK(input.dim() == 2, "ncmi_kernels: input must have 2 dimensions");
  const Targets y = targets(target, input, ignore_index);
  return with_arithmetic_type(center.scalar_type(), "center", [&]<class T>() {
    Workspace workspace(device, column_sums_workspace(input.size(0), input.size(1)));
    return column_sums<T>(device, workspace, input, y, num_classes, center, num_batches_tracked, momentum, nullptr,
                          nullptr);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> loss(
    const Tensor& input, const Tensor& target, const std::optional<Tensor>& center,
    const std::optional<Tensor>& running_center, const std::optional<Tensor>& num_batches_tracked, double momentum,
    const Tensor& log_activation, const Tensor& activation, const Tensor& reference, const Tensor& norms,
    const std::optional<Tensor>& weight, double temperature, bool l2_normalize, bool softmax, bool centroid_to_sample,
    bool batch_ratio, int64_t reduction, double eps, int64_t ignore_index, bool with_grad) {
  check_loss_arguments(input, center, running_center, num_batches_tracked, log_activation, batch_ratio, reduction,
                       with_grad);
  const Device device(input);
  return with_arithmetic_type(log_activation.scalar_type(), "log_activation", [&]<class T>() {
    const Centroids<T> q = centroids<T>(log_activation, activation, reference, norms, centroid_to_sample, input);
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
    Tensor moved = summed ? column_sums<T>(device, workspace, input, y, q.classes, running_center,
                                           num_batches_tracked, momentum, class_weight, weight_total)
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
                     .eps = eps,
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
                         .eps = eps,
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

Tensor input_grad(const Tensor& input, const Tensor& target, const std::optional<Tensor>& center,
                  const Tensor& log_activation, const Tensor& activation, const Tensor& reference,
                  const Tensor& norms, const Tensor& row_stats, const Tensor& coefficients,
                  const std::optional<Tensor>& upstream, bool centroid_to_sample, int64_t ignore_index,
                  const std::optional<Tensor>& row_reference) {
  const Device device(input);
  return with_arithmetic_type(log_activation.scalar_type(), "log_activation", [&]<class T>() {
    const Centroids<T> q = centroids<T>(log_activation, activation, reference, norms, centroid_to_sample, input);
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
                          .stats = stats_on(row_stats, input),
                          .coefficients = coefficients_on(coefficients, input),
                          .upstream = upstream_of(upstream, input),
                          .grad = grad.data_ptr()},
                         device.stream());
    return grad;
  });
}

// Sorted keys, and where each was; rows of one class stay in the order of the batch.
std::tuple<Tensor, Tensor> stable_sort(const Tensor& keys) {
  std::array<StableIValue, 4> stack{torch::stable::detail::from(keys),
                                    torch::stable::detail::from(std::optional<bool>(true)),
                                    torch::stable::detail::from(int64_t(0)), torch::stable::detail::from(false)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

// The gradient to `grad` [C, M], or else a step by it.
template <class T>
void by_class(const Device& device, const Tensor& input, const Tensor& target, const std::optional<Tensor>& center,
              const Tensor& centroid_logits, const Centroids<T>& q, const Tensor& row_stats,
              const Tensor& coefficients, const std::optional<Tensor>& upstream, int64_t ignore_index,
              const std::optional<Tensor>& totals, T* grad, const StepArgs<T>* step) {
  const Matrix z = rows_of<T>(input, q.columns), xi = matrix(centroid_logits, "centroid_logits");
  check_device(centroid_logits, "centroid_logits", input);
  check_shape(centroid_logits, "centroid_logits", {q.classes, q.columns});
  STD_TORCH_CHECK(q.classes < 0x7fffffff, "ncmi_kernels: more classes than 2^31");
  const int64_t rows = input.size(0), chunks = grad_chunks(q.classes, q.columns);
  const Targets y = targets(target, input, ignore_index);
  Tensor keys = empty(device, {rows}, ScalarType::Int);
  launch_sort_keys(y, rows, q.classes, output<int32_t>(keys), device.stream());
  auto [sorted, order] = stable_sort(keys);
  double* given = const_cast<double*>(data_on<double>(totals, "totals", {q.columns + 1}, input));
  const bool by_first_row = step && rows < q.classes;
  const int64_t sums = ((by_first_row ? rows : q.classes) * q.columns * sizeof(T) + 7) / sizeof(double);
  const int64_t own = step ? sums : 0, own_separation = q.centroid_to_sample ? sums : 0;
  Workspace workspace(device,
                      (q.classes + 1) + chunks * q.columns + (q.columns + 1) + q.classes + own + own_separation);
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
                                 .partial_totals = workspace.take(chunks * q.columns),
                                 .totals = given ? given : workspace.take(q.columns + 1),
                                 .totals_given = given != nullptr,
                                 .class_other = workspace.take(q.classes),
                                 .by_first_row = by_first_row,
                                 .own = step ? workspace.take<T>(own) : grad,
                                 .own_separation = workspace.take<T>(own_separation)};
  if (step)
    launch_centroid_step(args, *step, device.stream());
  else
    launch_centroid_grad(args, device.stream());
}

Tensor centroid_grad(const Tensor& input, const Tensor& target, const std::optional<Tensor>& center,
                     const Tensor& centroid_logits, const Tensor& log_activation, const Tensor& activation,
                     const Tensor& reference, const Tensor& norms, const Tensor& row_stats,
                     const Tensor& coefficients, const std::optional<Tensor>& upstream, bool centroid_to_sample,
                     int64_t ignore_index, const std::optional<Tensor>& totals) {
  const Device device(input);
  return with_arithmetic_type(centroid_logits.scalar_type(), "centroid_logits", [&]<class T>() {
    const Centroids<T> q = centroids<T>(log_activation, activation, reference, norms, centroid_to_sample, input);
    Tensor grad = empty(device, {q.classes, q.columns}, kScalarType<T>);
    by_class<T>(device, input, target, center, centroid_logits, q, row_stats, coefficients, upstream, ignore_index,
                totals, output<T>(grad), nullptr);
    return grad;
  });
}

void centroid_step_(const Tensor& input, const Tensor& target, const std::optional<Tensor>& center,
                    const Tensor& centroid_logits, const std::optional<Tensor>& momentum_buffer,
                    const Tensor& log_activation, const Tensor& activation, const Tensor& reference,
                    const Tensor& norms, const Tensor& row_stats, const Tensor& coefficients, bool softmax,
                    bool centroid_to_sample, int64_t ignore_index, double lr, double momentum, double weight_decay,
                    bool nesterov) {
  const Device device(input);
  with_arithmetic_type(centroid_logits.scalar_type(), "centroid_logits", [&]<class T>() {
    const Centroids<T> q = centroids<T>(log_activation, activation, reference, norms, centroid_to_sample, input);
    const StepArgs<T> step{
        .logits = const_cast<T*>(data_on<T>(centroid_logits, "centroid_logits", {q.classes, q.columns}, input)),
        .momentum_buffer =
            const_cast<T*>(data_on<T>(momentum_buffer, "momentum_buffer", {q.classes, q.columns}, input)),
        .lr = lr,
        .momentum = momentum,
        .weight_decay = weight_decay,
        .nesterov = nesterov};
    Workspace workspace(device, stats_workspace(q.classes, q.columns));  // before anything moves
    by_class<T>(device, input, target, center, centroid_logits, q, row_stats, coefficients, std::nullopt, ignore_index,
                std::nullopt, nullptr, &step);
    write_stats<T>(device, workspace, matrix(centroid_logits, "centroid_logits"), q.classes, q.columns, softmax,
                   centroid_to_sample, const_cast<T*>(q.log_activation), const_cast<T*>(q.activation),
                   const_cast<T*>(q.reference), const_cast<ClassStats*>(q.of));
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
  m.impl("centroid_stats", TORCH_BOX(&ncmi::cuda::centroid_stats));
  m.impl("terms", TORCH_BOX(&ncmi::cuda::terms));
  m.impl("reduce", TORCH_BOX(&ncmi::cuda::reduce));
  m.impl("loss", TORCH_BOX(&ncmi::cuda::loss));
  m.impl("scale_", TORCH_BOX(&ncmi::cuda::scale_));
  m.impl("input_grad", TORCH_BOX(&ncmi::cuda::input_grad));
  m.impl("centroid_grad", TORCH_BOX(&ncmi::cuda::centroid_grad));
  m.impl("centroid_step_", TORCH_BOX(&ncmi::cuda::centroid_step_));
  m.impl("class_totals", TORCH_BOX(&ncmi::cuda::class_totals));
  m.impl("update_center_", TORCH_BOX(&ncmi::cuda::update_center_));
}
