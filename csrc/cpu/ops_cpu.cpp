// The CPU implementations of the operators (ncmi_kernels/_schema.py declares them), those by row: tensors to pointers,
// checks, work shared out over threads. ops_centroids.cpp has the others.
//
// Only LibTorch's stable ABI is used, and no part of the CPython API: one binary serves every torch from 2.12 on
// and every Python that those run on. The library is loaded with torch.ops.load_library.
//
// Every output element has one owner and every sum one order, whatever the number of threads: the same bits each
// run, on one thread or many.

#include <cmath>
#include <cstdlib>
#include <limits>

#include "host.h"

namespace ncmi::cpu {

const KernelTable& kernels() {
  static const KernelTable& chosen = []() -> const KernelTable& {
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
    const bool avx2 = false, avx512 = false;
#endif
    const char* asked = std::getenv("NCMI_CPU_CAPABILITY");
    const std::string name = asked ? asked : avx512 ? "avx512" : avx2 ? "avx2" : "default";
    if (name == "default") return kDefaultKernels;
#if defined(__x86_64__)
    if (name == "avx2" && avx2) return kAvx2Kernels;
    if (name == "avx512" && avx512) return kAvx512Kernels;
#endif
    throw std::runtime_error("NCMI_CPU_CAPABILITY is '" + name +
                             "', expected 'default', 'avx2' or 'avx512', and one that this processor has");
  }();
  return chosen;
}

namespace {

// The gradient of the ratio by sample, where it is made with the terms.
template <class T>
struct WithGrad {
  const double* row_weight = nullptr;  // [B]
  double weight_sum = 1;
  RatioOptions ratio = {};
  T* grad = nullptr;                     // [B, M]
  Coefficients* coefficients = nullptr;  // [B]
};

// Concentration and separation of every row, to values [2, B]; returns the rows' statistics [B, kRowStats].
template <class T>
Tensor compute_terms(const Tensor& input, const Targets& target, const std::optional<Tensor>& center,
                     const Centroids<T>& q, const Features& features, double* values,
                     const WithGrad<T>& with_grad = {}) {
  const Matrix z = matrix(input, "input");
  const int64_t rows = input.size(0), columns = q.columns;
  check_shape(input, "input", {rows, columns});
  STD_TORCH_CHECK(z.dtype != Dtype::kFloat64 || kIsDouble<T>,
                  "ncmi_kernels: float64 input needs float64 centroid_logits");
  Tensor stats = empty({rows, kRowStats}, ScalarType::Double);
  const TermsArgs<T> args{.input = z,
                          .target = target,
                          .center = data<T>(center, "center", {columns}),
                          .features = features,
                          .centroids = q,
                          .concentration = values,
                          .separation = values + rows,
                          .rows = output<RowStats>(stats),
                          .row_weight = with_grad.row_weight,
                          .weight_sum = with_grad.weight_sum,
                          .ratio = with_grad.ratio,
                          .grad = with_grad.grad,
                          .coefficients = with_grad.coefficients};
  parallel_rows(rows, columns, [&](int64_t begin, int64_t end) {
    Vector<T> scratch(4 * columns);
    kernels_for<T>().terms(args, begin, end, scratch.data());
  });
  return stats;
}

std::tuple<Tensor, Tensor> terms(const Tensor& input, const Tensor& target, const std::optional<Tensor>& center,
                                 const Tensor& log_activation, const Tensor& activation, const Tensor& reference,
                                 const Tensor& norms, double temperature, bool l2_normalize, bool softmax,
                                 bool centroid_to_sample, int64_t ignore_index) {
  return with_arithmetic_type(log_activation.scalar_type(), "log_activation", [&]<class T>() {
    const Centroids<T> q = centroids<T>(log_activation, activation, reference, norms, centroid_to_sample);
    const int64_t rows = rows_of(input);
    const Targets y = targets(target, rows, ignore_index, q.classes, q.of, q.columns);
    const Features features{.inverse_temperature = 1.0 / temperature, .l2_normalize = l2_normalize, .softmax = softmax};
    Tensor values = empty({2, rows}, ScalarType::Double);
    const Tensor stats = compute_terms<T>(input, y, center, q, features, output<double>(values));
    return std::make_tuple(values, stats);
  });
}

// How terms become a loss.
struct Reducing {
  bool batch_ratio;
  int64_t reduction;
  RatioOptions ratio;
  bool centroid_to_sample, focus;
};

// What the rows weigh [B], 0 where ignored, and together.
struct RowWeights {
  Vector<double> of;
  double sum = 0;

  template <class T>
  RowWeights(const Targets& target, int64_t rows, const T* class_weight) : of(rows) {
    for (int64_t i = 0; i < rows; ++i) {
      of[i] = target[i] == target.ignore_index ? 0.0 : class_weight ? double(class_weight[target[i]]) : 1.0;
      sum += of[i];
    }
  }
};

struct Reduced {
  double loss;
  double means[2], sums[4];
};

// The rows' terms to the loss, their means, and the coefficients of their gradients. `given` sums take the place of the
// rows' own. `coefficients` are null where the terms' pass has formed them; `row_loss` [B] only for
// kNone, which has no other loss.
template <class Loss>
Reduced reduce_rows(const double* concentration, const double* separation, const RowStats* stats,
                    const RowWeights& weights, const Targets& target, const double* given, const Reducing& by,
                    Coefficients* coefficients, Loss* row_loss) {
  const int64_t rows = static_cast<int64_t>(weights.of.size());
  const auto counts = [&](int64_t i) { return target[i] != target.ignore_index; };
  Reduced result{.loss = 0, .means = {}, .sums = {weights.sum, 0, 0, 0}};
  double* sums = result.sums;
  for (int64_t i = 0; i < rows; ++i) {
    if (!counts(i)) continue;
    const double w = weights.of[i];
    sums[1] += w * concentration[i];
    sums[2] += w * separation[i];
    if (!by.batch_ratio) sums[3] += w * ratio(concentration[i], separation[i], by.ratio).value;
  }
  if (given) std::copy(given, given + 4, sums);
  result.means[0] = sums[1] / sums[0];
  result.means[1] = sums[2] / sums[0];
  const Ratio of_batch = ratio(result.means[0], result.means[1], by.ratio);
  const double total = by.reduction == kMean ? sums[0] : 1.0;  // no sample that counts: 0 / 0, as cross_entropy
  result.loss = by.batch_ratio ? of_batch.value : sums[3] / total;
  for (int64_t i = 0; i < rows; ++i) {
    double value = 0;
    if (coefficients) coefficients[i] = {};
    if (counts(i)) {
      const Ratio r = by.batch_ratio ? of_batch : ratio(concentration[i], separation[i], by.ratio);
      const double w = weights.of[i] / total;
      value = w * r.value;
      if (coefficients)
        coefficients[i] = coefficients_of(stats[i], w * r.d_concentration, w * r.d_separation,
                                          by.centroid_to_sample, by.focus);
    }
    if (by.reduction == kNone) row_loss[i] = Loss(value);
  }
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> reduce(const Tensor& terms, const Tensor& row_stats, const Tensor& target,
                                                  const std::optional<Tensor>& weight,
                                                  const std::optional<Tensor>& totals, bool centroid_to_sample,
                                                  bool focus, bool batch_ratio, int64_t reduction, double eps,
                                                  double sharpness, int64_t ignore_index) {
  check_reduction(batch_ratio, reduction, sharpness);
  STD_TORCH_CHECK(terms.dim() == 2, "ncmi_kernels: terms must have 2 dimensions");
  STD_TORCH_CHECK(!weight || weight->dim() == 1, "ncmi_kernels: weight must have 1 dimension");
  const int64_t rows = terms.size(1), classes = weight ? weight->size(0) : std::numeric_limits<int64_t>::max();
  const double* values = data<double>(terms, "terms", {2, rows});
  const Targets y = targets(target, rows, ignore_index, classes);
  const auto weights = weight && weight->scalar_type() == ScalarType::Double
                           ? RowWeights(y, rows, data<double>(weight, "weight", {classes}))
                           : RowWeights(y, rows, data<float>(weight, "weight", {classes}));
  const bool scalar = reduction != kNone;
  Tensor loss = scalar ? empty({}, ScalarType::Double) : empty({rows}, ScalarType::Double);
  Tensor coefficients = empty({rows, kCoefficients}, ScalarType::Double);
  Tensor means = empty({2}, ScalarType::Double), sums = empty({4}, ScalarType::Double);
  const Reduced reduced =
      reduce_rows(values, values + rows, row_stats_of(row_stats, rows), weights, y, data<double>(totals, "totals", {4}),
                  {.batch_ratio = batch_ratio,
                   .reduction = reduction,
                   .ratio = {.eps = eps, .sharpness = sharpness},
                   .centroid_to_sample = centroid_to_sample,
                   .focus = focus},
                  output<Coefficients>(coefficients), output<double>(loss));
  if (scalar) *output<double>(loss) = reduced.loss;
  std::copy(reduced.means, reduced.means + 2, output<double>(means));
  std::copy(reduced.sums, reduced.sums + 4, output<double>(sums));
  return {loss, coefficients, means, sums};
}

// A running centre [M] and its count of batches, which a batch of rows moves: when all that may fail is done.
template <class T>
class RunningCenter {
 public:
  RunningCenter(const Tensor& center, const Tensor& num_batches_tracked, const Tensor& input, const Targets& target,
                double momentum)
      : columns_(input.size(1)),
        center_(const_cast<T*>(data<T>(center, "center", {columns_}))),
        batches_(const_cast<int64_t*>(data<int64_t>(num_batches_tracked, "num_batches_tracked", {}))),
        moved_(empty({columns_}, kScalarType<T>)) {
    const Matrix z = matrix(input, "input");
    STD_TORCH_CHECK(z.dtype != Dtype::kFloat64 || kIsDouble<T>,
                    "ncmi_kernels: float64 input needs a float64 center");
    const int64_t rows = input.size(0);
    int64_t count = 0;
    for (int64_t i = 0; i < rows; ++i) count += target[i] != target.ignore_index;
    Vector<double> sums(columns_);
    // An addition an element: there is eight times as much of it in a thread's worth of work.
    parallel_columns(columns_, rows / 8, [&](int64_t begin, int64_t end) {
      kernels_for<T>().column_sums(z, target, rows, begin, end, sums.data());
    });
    // A batch without rows says nothing, and one NaN, or a mean beyond T, must not stay in the centre for good.
    const double keep = *batches_ == 0 ? 0.0 : momentum;
    T* moved = output<T>(moved_);
    moves_ = count > 0;
    for (int64_t k = 0; k < columns_; ++k) {
      const double mean = sums[k] / double(count);
      moved[k] = T(keep == 0 ? mean : keep * double(center_[k]) + (1 - keep) * mean);
      moves_ = moves_ && std::isfinite(moved[k]);
    }
    if (!moves_) std::copy(center_, center_ + columns_, moved);
  }

  const Tensor& moved() const { return moved_; }

  void commit() {
    if (!moves_) return;
    std::copy(output<T>(moved_), output<T>(moved_) + columns_, center_);
    *batches_ = next_batch(*batches_);
  }

 private:
  int64_t columns_;
  T* center_;
  int64_t* batches_;
  Tensor moved_;
  bool moves_;
};

Tensor update_center_(const Tensor& center, const Tensor& num_batches_tracked, const Tensor& input,
                      const Tensor& target, double momentum, int64_t num_classes, int64_t ignore_index) {
  const Targets y = targets(target, rows_of(input), ignore_index, num_classes);
  return with_arithmetic_type(center.scalar_type(), "center", [&]<class T>() {
    RunningCenter<T> running(center, num_batches_tracked, input, y, momentum);
    running.commit();
    return running.moved();
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
  return with_arithmetic_type(log_activation.scalar_type(), "log_activation", [&]<class T>() {
    const Centroids<T> q = centroids<T>(log_activation, activation, reference, norms, centroid_to_sample);
    const int64_t rows = rows_of(input);
    check_shape(input, "input", {rows, q.columns});
    const Targets y = targets(target, rows, ignore_index, q.classes, q.of, q.columns);
    std::optional<RunningCenter<T>> running;
    if (running_center) running.emplace(*running_center, *num_batches_tracked, input, y, momentum);
    const Tensor moved = running ? running->moved() : empty({0}, kScalarType<T>);
    const RowWeights weights(y, rows, data<T>(weight, "weight", {q.classes}));
    Tensor grad = with_grad ? empty({rows, q.columns}, kScalarType<T>) : empty({0}, kScalarType<T>);
    Vector<double> values(2 * rows);
    Tensor coefficients = empty({rows, kCoefficients}, ScalarType::Double);
    Tensor stats = compute_terms<T>(
        input, y, running ? std::optional<Tensor>(moved) : center, q,
        {.inverse_temperature = 1.0 / temperature, .l2_normalize = l2_normalize, .softmax = softmax}, values.data(),
        {.row_weight = weights.of.data(),
         .weight_sum = reduction == kMean ? weights.sum : 1.0,
         .ratio = {.eps = eps, .sharpness = sharpness},
         .grad = with_grad ? output<T>(grad) : nullptr,
         .coefficients = output<Coefficients>(coefficients)});
    Tensor result = reduction == kNone ? empty({rows}, kScalarType<T>) : empty({}, kScalarType<T>);
    Tensor means = empty({2}, ScalarType::Double);
    const double *concentration = values.data(), *separation = concentration + rows;
    const Reduced reduced = reduce_rows(concentration, separation, output<RowStats>(stats), weights, y, nullptr,
                                        {.batch_ratio = batch_ratio,
                                         .reduction = reduction,
                                         .ratio = {.eps = eps, .sharpness = sharpness},
                                         .centroid_to_sample = centroid_to_sample,
                                         .focus = false},
                                        with_grad ? nullptr : output<Coefficients>(coefficients), output<T>(result));
    if (reduction != kNone) *output<T>(result) = T(reduced.loss);
    std::copy(reduced.means, reduced.means + 2, output<double>(means));
    if (running) running->commit();
    return std::make_tuple(result, stats, coefficients, moved, grad, means);
  });
}

// In place: a gradient of the loss to one of what comes after it. What is 0, as that of an ignored row, stays 0 times
// anything.
void scale_(const Tensor& grad, const Tensor& upstream) {
  STD_TORCH_CHECK(grad.dim() == 2, "ncmi_kernels: grad must have 2 dimensions");
  STD_TORCH_CHECK(upstream.dim() == 0 && upstream.scalar_type() == grad.scalar_type(),
                  "ncmi_kernels: upstream must be a scalar in the dtype of grad");
  with_arithmetic_type(grad.scalar_type(), "grad", [&]<class T>() {
    const int64_t rows = grad.size(0), columns = grad.size(1);
    T* g = const_cast<T*>(data<T>(grad, "grad", {rows, columns}));
    const T factor = *data<T>(upstream, "upstream", {});
    if (factor == T(1)) return;  // loss.backward()
    parallel_rows(rows, columns, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin * columns; k < end * columns; ++k) g[k] = g[k] == T(0) ? T(0) : g[k] * factor;
    });
  });
}

Tensor input_grad(const Tensor& input, const Tensor& target, const std::optional<Tensor>& center,
                  const Tensor& log_activation, const Tensor& activation, const Tensor& reference,
                  const Tensor& norms, const Tensor& row_stats, const Tensor& coefficients,
                  const std::optional<Tensor>& upstream, bool centroid_to_sample, int64_t ignore_index,
                  const std::optional<Tensor>& row_reference, const std::optional<Tensor>& row_own) {
  const Matrix z = matrix(input, "input");
  const int64_t rows = input.size(0), columns = input.size(1);
  Tensor grad = empty({rows, columns}, input.scalar_type());
  with_arithmetic_type(log_activation.scalar_type(), "log_activation", [&]<class T>() {
    const Centroids<T> q = centroids<T>(log_activation, activation, reference, norms, centroid_to_sample);
    check_shape(input, "input", {rows, q.columns});
    STD_TORCH_CHECK((z.dtype == Dtype::kFloat64) == kIsDouble<T>,
                    "ncmi_kernels: float64 input and float64 centroid_logits go together");
    const ScaledCoefficients scaled(coefficients, upstream, rows);
    const InputGradArgs<T> args{.input = z,
                                .target = targets(target, rows, ignore_index, q.classes, q.of, q.columns),
                                .center = data<T>(center, "center", {columns}),
                                .centroids = q,
                                .rows = row_stats_of(row_stats, rows),
                                .coefficients = scaled.data(),
                                .row_reference = data<T>(row_reference, "row_reference", {rows, columns}),
                                .row_own = data<T>(row_own, "row_own", {rows, columns}),
                                .grad = grad.data_ptr(),
                                .grad_dtype = z.dtype};
    parallel_rows(rows, columns, [&](int64_t begin, int64_t end) {
      Vector<T> scratch(4 * columns);
      kernels_for<T>().input_grad(args, begin, end, scratch.data());
    });
  });
  return grad;
}

std::string cpu_capability() { return kernels().name; }

}  // namespace
}  // namespace ncmi::cpu

STABLE_TORCH_LIBRARY_IMPL(ncmi_kernels, CPU, m) {
  m.impl("terms", TORCH_BOX(&ncmi::cpu::terms));
  m.impl("reduce", TORCH_BOX(&ncmi::cpu::reduce));
  m.impl("loss", TORCH_BOX(&ncmi::cpu::loss));
  m.impl("scale_", TORCH_BOX(&ncmi::cpu::scale_));
  m.impl("input_grad", TORCH_BOX(&ncmi::cpu::input_grad));
  m.impl("update_center_", TORCH_BOX(&ncmi::cpu::update_center_));
}

// The instruction set that the kernels use: "default", "avx2" or "avx512".
STABLE_TORCH_LIBRARY_FRAGMENT(ncmi_kernels, m) { m.def("cpu_capability() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(ncmi_kernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&ncmi::cpu::cpu_capability));
}
