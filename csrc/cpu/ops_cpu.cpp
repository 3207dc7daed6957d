// The CPU implementations of the operators (ncmi_kernels/_schema.py declares them): tensors to pointers, checks, work
// shared out over threads.
//
// Only LibTorch's stable ABI is used, and no part of the CPython API: one binary serves every torch from 2.12 on
// and every Python that those run on. The library is loaded with torch.ops.load_library.
//
// Every output element has one owner and every sum one order, whatever the number of threads: the same bits each
// run, on one thread or many.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <exception>
#include <limits>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../tensors.h"
#include "kernels.h"

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

// -------------------------------------------------------------------------------------------------------------
// Tensors
// -------------------------------------------------------------------------------------------------------------

Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return empty_on(aoti_torch_device_type_cpu(), 0, sizes, dtype);
}

// A vector of numbers. Vector(n) leaves them uninitialised.
template <class T>
struct Allocator {
  using value_type = T;
  Allocator() = default;
  template <class U>
  Allocator(const Allocator<U>&) {}
  T* allocate(size_t n) {
    void* memory = ::operator new(n * sizeof(T), std::nothrow);
    if (!memory) throw OutOfMemory(static_cast<int64_t>(n * sizeof(T)));
    return static_cast<T*>(memory);
  }
  void deallocate(T* memory, size_t) { ::operator delete(memory); }
  template <class U>
  void construct(U* p) {
    ::new (static_cast<void*>(p)) U;
  }
  friend bool operator==(const Allocator&, const Allocator&) { return true; }
};
template <class T>
using Vector = std::vector<T, Allocator<T>>;

// Targets of the rows of input [B, M], each checked to be a class or ignore_index, and so that rows may follow what the
// statistics say of its centroid.
Targets targets(const Tensor& t, int64_t rows, int64_t ignore_index, int64_t classes, const ClassStats* of = nullptr,
                int64_t columns = 0) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long, "ncmi_kernels: target must be int64");
  check_shape(t, "target", {rows});
  const Targets target{.data = static_cast<const int64_t*>(memory_of(t, "target")),
                       .stride = t.stride(0),
                       .ignore_index = ignore_index};
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t y = target[i];
    if (y == ignore_index) continue;
    if (y < 0 || y >= classes)  // surfaces as an IndexError, as in cross_entropy
      throw std::out_of_range("target: value " + std::to_string(y) + " at row " + std::to_string(i) +
                              " is out of range, expected a class in [0, " + std::to_string(classes) +
                              ") or ignore_index (" + std::to_string(ignore_index) + ")");
    STD_TORCH_CHECK(!of || (of[y].lone >= -1 && of[y].lone < double(columns)),
                    "ncmi_kernels: norms are not those of centroid_stats");
  }
  return target;
}

template <class T>
const Kernels<T>& kernels_for() {
  if constexpr (std::is_same_v<T, float>) {
    return kernels().f32;
  } else {
    return kernels().f64;
  }
}

// -------------------------------------------------------------------------------------------------------------
// Threads
// -------------------------------------------------------------------------------------------------------------

constexpr int64_t kElementsPerThread = 8192;  // about 10 us of work: below that a second thread does not pay

// Calls f(begin, end) for parts of [0, size). What it throws keeps its type, which torch's own would not leave it.
template <class F>
void parallel(int64_t size, int64_t grain, const F& f) {
  std::exception_ptr error;
  std::atomic_flag failed;
  torch::stable::parallel_for(0, size, grain, [&](int64_t begin, int64_t end) {
    try {
      f(begin, end);
    } catch (...) {
      if (!failed.test_and_set()) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

template <class F>
void parallel_rows(int64_t rows, int64_t columns, const F& f) {
  parallel(rows, std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, columns)), f);
}

// Over columns, in units of a cache line of floats so that no two threads write to one.
template <int64_t unit = 16, class F>
void parallel_columns(int64_t columns, int64_t rows, const F& f) {
  const int64_t units = ceil_div(columns, unit);
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / (unit * std::max<int64_t>(1, rows)));
  parallel(units, grain, [&](int64_t begin, int64_t end) { f(begin * unit, std::min(columns, end * unit)); });
}

// -------------------------------------------------------------------------------------------------------------
// Operators
// -------------------------------------------------------------------------------------------------------------

int64_t rows_of(const Tensor& input) {
  STD_TORCH_CHECK(input.dim() == 2, "ncmi_kernels: input must have 2 dimensions");
  return input.size(0);
}

template <class T>
Centroids<T> centroids(const Tensor& log_activation, const Tensor& activation, const Tensor& reference,
                       const Tensor& norms, bool centroid_to_sample) {
  STD_TORCH_CHECK(log_activation.dim() == 2, "ncmi_kernels: log_activation must have 2 dimensions");
  const int64_t classes = log_activation.size(0), columns = log_activation.size(1);
  STD_TORCH_CHECK(columns > 0, "ncmi_kernels: log_activation must have columns");
  return {.classes = classes,
          .columns = columns,
          .centroid_to_sample = centroid_to_sample,
          .log_activation = data<T>(log_activation, "log_activation", {classes, columns}),
          .activation = data<T>(activation, "activation", {centroid_to_sample ? classes : 0, columns}),
          .reference = data<T>(reference, "reference", {2, columns}),
          .of = reinterpret_cast<const ClassStats*>(data<double>(norms, "norms", {classes + 1, kClassStats}))};
}

// The outputs of centroid_stats, with the workspace of the kernels that fill them in for logits [C, M].
template <class T>
class StatsOf {
 public:
  StatsOf(const Matrix& logits, int64_t classes, int64_t columns, bool softmax, bool centroid_to_sample, T* log_activation,
          T* activation, T* reference, ClassStats* of)
      : workspace_(2 * columns),
        // At most 64 chunks, so that their sums stay small beside [C, M], and none too small to be worth a thread.
        classes_per_chunk_(std::max<int64_t>(32, ceil_div(classes, 64))),
        chunks_(ceil_div(classes, classes_per_chunk_)),
        sums_(chunks_ * chunk_sums(centroid_to_sample) * columns),
        scratch_(chunks_ * columns),
        args_{.logits = logits,
              .classes = classes,
              .columns = columns,
              .softmax = softmax,
              .centroid_to_sample = centroid_to_sample,
              .log_activation = log_activation,
              .activation = centroid_to_sample ? activation : nullptr,
              .of = of,
              .reference = reference,
              .classes_per_chunk = classes_per_chunk_,
              .chunk_sums = sums_.data(),
              .residual = workspace_.data(),
              .weighted_log_norm = workspace_.data() + columns} {}

  // `rows` fills in what belongs to the classes of some chunks: f(args, chunk_begin, chunk_end, scratch). Nothing here
  // needs memory that the constructor has not got: a step must not end in the middle.
  template <class F>
  void compute(const F& rows) {
    parallel_rows(chunks_, classes_per_chunk_ * args_.columns, [&](int64_t begin, int64_t end) {
      rows(args_, begin, end, scratch_.data() + begin * args_.columns);
    });
    parallel_columns(args_.columns, chunks_, [&](int64_t begin, int64_t end) {
      kernels_for<T>().centroid_columns(args_, begin, end);
    });
    finish();
  }

 private:
  // `reference` was rounded to T. What that lost enters the mean under p; taken under the mean centroid instead
  // it goes into a constant. The two differ where p is far from the centroids, and there the terms are large.
  void finish() {
    const int64_t columns = args_.columns;
    const T* compared = args_.reference;
    const T* q_mean = compared + columns;
    double weight_sum = 0, lost = 0, constant = 0;
    if (args_.centroid_to_sample) {
      for (int64_t k = 0; k < columns; ++k) {
        weight_sum += double(q_mean[k]);
        lost += double(q_mean[k]) * args_.residual[k];
        constant += args_.weighted_log_norm[k];
      }
    } else {
      const double largest = double(*std::max_element(compared, compared + columns));
      double total = 0;
      for (int64_t k = 0; k < columns; ++k) {
        const double w = std::exp(double(compared[k]) - largest);
        total += w;
        lost += w * args_.residual[k];
      }
      weight_sum = 1;
      lost /= total;
      constant = std::accumulate(args_.of, args_.of + args_.classes, 0.0,
                                 [](double sum, const ClassStats& c) { return sum + c.log_norm; }) /
                 double(args_.classes);
    }
    *reinterpret_cast<AllStats*>(args_.of + args_.classes) = {
        .weight_sum = weight_sum, .weighted_log_norm = constant - lost, .classes = double(args_.classes), .unused = {}};
  }

  Vector<double> workspace_;
  const int64_t classes_per_chunk_, chunks_;
  Vector<double> sums_;
  Vector<T> scratch_;
  const CentroidStatsArgs<T> args_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> centroid_stats(const Tensor& logits, bool softmax,
                                                          bool centroid_to_sample) {
  const Matrix xi = matrix(logits, "centroid_logits");
  const int64_t classes = logits.size(0), columns = logits.size(1);
  STD_TORCH_CHECK(classes > 0 && columns > 0, "ncmi_kernels: centroid_logits must not be empty");
  return with_arithmetic_type(logits.scalar_type(), "centroid_logits", [&]<class T>() {
    Tensor log_activation = empty({classes, columns}, kScalarType<T>);
    Tensor activation = empty({centroid_to_sample ? classes : 0, columns}, kScalarType<T>);
    Tensor reference = empty({2, columns}, kScalarType<T>);
    Tensor norms = empty({classes + 1, kClassStats}, ScalarType::Double);
    StatsOf<T> stats(xi, classes, columns, softmax, centroid_to_sample, output<T>(log_activation), output<T>(activation),
                     output<T>(reference), output<ClassStats>(norms));
    stats.compute([](const CentroidStatsArgs<T>& args, int64_t begin, int64_t end, T* scratch) {
      kernels_for<T>().centroid_rows(args, begin, end, scratch);
    });
    return std::make_tuple(log_activation, activation, reference, norms);
  });
}

// Concentration and separation of every row [2, B], and the rows' statistics [B, kRowStats].
template <class T>
std::tuple<Vector<double>, Tensor> compute_terms(const Tensor& input, const Targets& target,
                                                      const std::optional<Tensor>& center, const Centroids<T>& q,
                                                      const Features& features, const double* row_weight = nullptr,
                                                      double eps = 0, T* grad = nullptr) {
  const Matrix z = matrix(input, "input");
  const int64_t rows = input.size(0), columns = q.columns;
  check_shape(input, "input", {rows, columns});
  STD_TORCH_CHECK(z.dtype != Dtype::kFloat64 || kIsDouble<T>,
                  "ncmi_kernels: float64 input needs float64 centroid_logits");
  Vector<double> values(2 * rows);
  Tensor stats = empty({rows, kRowStats}, ScalarType::Double);
  const TermsArgs<T> args{.input = z,
                          .target = target,
                          .center = data<T>(center, "center", {columns}),
                          .features = features,
                          .centroids = q,
                          .concentration = values.data(),
                          .separation = values.data() + rows,
                          .rows = output<RowStats>(stats),
                          .row_weight = row_weight,
                          .eps = eps,
                          .grad = grad};
  parallel_rows(rows, columns, [&](int64_t begin, int64_t end) {
    Vector<T> scratch(4 * columns);
    kernels_for<T>().terms(args, begin, end, scratch.data());
  });
  return {std::move(values), stats};
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
    const auto [values, stats] = compute_terms<T>(input, y, center, q, features);
    Tensor result = empty({2, rows}, kScalarType<T>);
    std::transform(values.begin(), values.end(), output<T>(result), [](double v) { return T(v); });
    return std::make_tuple(result, stats);
  });
}

// What each row counts for: its class weight, for kMean over the sum of all; 0 for an ignored row.
template <class T>
Vector<double> row_weights(const Targets& target, int64_t rows, const T* class_weight, int64_t reduction) {
  Vector<double> weight(rows, 0.0);
  double sum = 0;
  for (int64_t i = 0; i < rows; ++i) {
    if (target[i] == target.ignore_index) continue;
    weight[i] = class_weight ? double(class_weight[target[i]]) : 1.0;
    sum += weight[i];
  }
  if (reduction == kMean)
    for (int64_t i = 0; i < rows; ++i)
      if (target[i] != target.ignore_index) weight[i] /= sum;
  return weight;
}

// The rows' terms to the loss (one value, or [B] for kNone), its derivatives by them, and their means [2].
template <class T>
void reduce(const double* concentration, const double* separation, const Targets& target,
            const Vector<double>& weight, bool batch_ratio, int64_t reduction, double eps, T* loss,
            RowStats* stats, double* means) {
  const int64_t rows = static_cast<int64_t>(weight.size());
  const auto counts = [&](int64_t i) { return target[i] != target.ignore_index; };
  double a = 0, g = 0, weight_sum = 0, total = 0;
  bool any = false;
  for (int64_t i = 0; i < rows; ++i) {
    if (!counts(i)) continue;
    a += weight[i] * concentration[i];
    g += weight[i] * separation[i];
    weight_sum += weight[i];
    any = true;
  }
  means[0] = a / weight_sum;
  means[1] = g / weight_sum;
  const Ratio of_batch = ratio(a, g, eps);
  for (int64_t i = 0; i < rows; ++i) {
    double value = 0, by_concentration = 0, by_separation = 0;
    if (counts(i)) {
      const Ratio r = batch_ratio ? of_batch : ratio(concentration[i], separation[i], eps);
      value = weight[i] * r.value;
      by_concentration = weight[i] * r.d_concentration;
      by_separation = weight[i] * r.d_separation;
    }
    stats[i].by_concentration = by_concentration;
    stats[i].by_separation = by_separation;
    total += value;
    if (reduction == kNone) loss[i] = T(value);
  }
  if (batch_ratio) total = of_batch.value;
  // No sample that counts: 0 / 0, as cross_entropy.
  if (reduction == kMean && !any) total = std::numeric_limits<double>::quiet_NaN();
  if (reduction != kNone) *loss = T(total);
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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> loss(
    const Tensor& input, const Tensor& target, const std::optional<Tensor>& center,
    const std::optional<Tensor>& running_center, const std::optional<Tensor>& num_batches_tracked, double momentum,
    const Tensor& log_activation, const Tensor& activation, const Tensor& reference, const Tensor& norms,
    const std::optional<Tensor>& weight, double temperature, bool l2_normalize, bool softmax, bool centroid_to_sample,
    bool batch_ratio, int64_t reduction, double eps, int64_t ignore_index, bool with_grad) {
  check_loss_arguments(input, center, running_center, num_batches_tracked, log_activation, batch_ratio, reduction,
                       with_grad);
  return with_arithmetic_type(log_activation.scalar_type(), "log_activation", [&]<class T>() {
    const Centroids<T> q = centroids<T>(log_activation, activation, reference, norms, centroid_to_sample);
    const int64_t rows = rows_of(input);
    check_shape(input, "input", {rows, q.columns});
    const Targets y = targets(target, rows, ignore_index, q.classes, q.of, q.columns);
    const T* class_weight = data<T>(weight, "weight", {q.classes});
    std::optional<RunningCenter<T>> running;
    if (running_center) running.emplace(*running_center, *num_batches_tracked, input, y, momentum);
    const Tensor moved = running ? running->moved() : empty({0}, kScalarType<T>);
    const Vector<double> row_weight = row_weights(y, rows, class_weight, reduction);
    Tensor grad = with_grad ? empty({rows, q.columns}, kScalarType<T>) : empty({0}, kScalarType<T>);
    const Features features{.inverse_temperature = 1.0 / temperature, .l2_normalize = l2_normalize, .softmax = softmax};
    auto [values, stats] =
        compute_terms<T>(input, y, running ? std::optional<Tensor>(moved) : center, q, features, row_weight.data(), eps,
                         with_grad ? output<T>(grad) : nullptr);
    Tensor result = reduction == kNone ? empty({rows}, kScalarType<T>) : empty({}, kScalarType<T>);
    Tensor means = empty({2}, ScalarType::Double);
    reduce<T>(values.data(), values.data() + rows, y, row_weight, batch_ratio, reduction, eps, output<T>(result),
              output<RowStats>(stats), output<double>(means));
    if (running) running->commit();
    return std::make_tuple(result, stats, moved, grad, means);
  });
}

// The derivatives of the loss by the terms [2, B], times the upstream gradient (a scalar or [B], or none).
Vector<double> with_upstream(const RowStats* stats, const std::optional<Tensor>& upstream, int64_t rows) {
  Vector<double> result(2 * rows);
  for (int64_t i = 0; i < rows; ++i) {
    result[i] = stats[i].by_concentration;
    result[rows + i] = stats[i].by_separation;
  }
  if (!upstream) return result;
  const bool by_row = upstream->dim() == 1;
  STD_TORCH_CHECK(by_row ? upstream->size(0) == rows : upstream->dim() == 0,
                  "ncmi_kernels: upstream must be a scalar or [B]");
  const int64_t stride = by_row ? upstream->stride(0) : 0;
  with_arithmetic_type(upstream->scalar_type(), "upstream", [&]<class T>() {
    const T* up = static_cast<const T*>(memory_of(*upstream, "upstream"));
    for (int64_t i = 0; i < rows; ++i) {
      result[i] *= double(up[i * stride]);
      result[rows + i] *= double(up[i * stride]);
    }
  });
  return result;
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
                  const Tensor& norms, const Tensor& row_stats, const std::optional<Tensor>& upstream,
                  bool centroid_to_sample, int64_t ignore_index) {
  const Matrix z = matrix(input, "input");
  const int64_t rows = input.size(0), columns = input.size(1);
  Tensor grad = empty({rows, columns}, input.scalar_type());
  with_arithmetic_type(log_activation.scalar_type(), "log_activation", [&]<class T>() {
    const Centroids<T> q = centroids<T>(log_activation, activation, reference, norms, centroid_to_sample);
    check_shape(input, "input", {rows, q.columns});
    STD_TORCH_CHECK((z.dtype == Dtype::kFloat64) == kIsDouble<T>,
                    "ncmi_kernels: float64 input and float64 centroid_logits go together");
    const RowStats* stats = row_stats_of(row_stats, rows);
    const Vector<double> c = with_upstream(stats, upstream, rows);
    const InputGradArgs<T> args{.input = z,
                                .target = targets(target, rows, ignore_index, q.classes, q.of, q.columns),
                                .center = data<T>(center, "center", {columns}),
                                .centroids = q,
                                .rows = stats,
                                .concentration_grad = c.data(),
                                .separation_grad = c.data() + rows,
                                .grad = grad.data_ptr(),
                                .grad_dtype = z.dtype};
    parallel_rows(rows, columns, [&](int64_t begin, int64_t end) {
      Vector<T> scratch(4 * columns);
      kernels_for<T>().input_grad(args, begin, end, scratch.data());
    });
  });
  return grad;
}

// What a batch says of the centroids: its rows by class, and their sums by column.
template <class T>
class BatchSums {
 public:
  // `own_grad`: the gradient [C, M], where the sums of the classes are to be kept in it; else they get their own memory.
  BatchSums(const Tensor& input, const Tensor& target, const std::optional<Tensor>& center, const Tensor& logits,
            const Centroids<T>& q, const Tensor& row_stats, const std::optional<Tensor>& upstream, int64_t ignore_index,
            const std::optional<Tensor>& given_totals, T* own_grad)
      : class_begin_(q.classes + 1, 0), order_(rows_of(input)), totals_(q.columns), class_sums_(q.classes) {
    const Matrix z = matrix(input, "input"), xi = matrix(logits, "centroid_logits");
    const int64_t rows = input.size(0);
    const Targets y = targets(target, rows, ignore_index, q.classes);
    check_shape(input, "input", {rows, q.columns});
    check_shape(logits, "centroid_logits", {q.classes, q.columns});
    const RowStats* stats = row_stats_of(row_stats, rows);
    factors_ = with_upstream(stats, upstream, rows);

    // Rows by class, in the order of the batch.
    for (int64_t i = 0; i < rows; ++i)
      if (y[i] != ignore_index) ++class_begin_[y[i] + 1];
    std::partial_sum(class_begin_.begin(), class_begin_.end(), class_begin_.begin());
    Vector<int64_t> next(class_begin_.begin(), class_begin_.end() - 1);
    for (int64_t i = 0; i < rows; ++i)
      if (y[i] != ignore_index) order_[next[y[i]]++] = i;
    double separation_grad_sum = 0;
    double *own_factor = factors_.data(), *separation_grad = own_factor + rows;
    for (int64_t i = 0; i < rows; ++i) {
      if (y[i] == ignore_index) continue;
      separation_grad_sum += separation_grad[i];
      // The own class enters the mean over classes of KL(p || q_v) too, and is taken out again here.
      if (!q.centroid_to_sample) own_factor[i] -= separation_grad[i] / q.all().classes;
    }

    const double* given = data<double>(given_totals, "totals", {q.columns + 1});
    const int64_t present = own_grad ? q.classes : std::min(rows, q.classes);
    if (!own_grad) own_.resize(present * q.columns);
    if (q.centroid_to_sample) own_separation_.resize(present * q.columns);
    args_ = {.input = z,
             .center = data<T>(center, "center", {q.columns}),
             .centroids = q,
             .logits = xi,
             .rows = stats,
             .own_factor = own_factor,
             .separation_grad = separation_grad,
             .order = order_.data(),
             .class_begin = class_begin_.data(),
             .class_sums = class_sums_.data(),
             .own = own_grad ? own_grad : own_.data(),
             .own_separation = own_separation_.data(),
             .own_is_grad = own_grad != nullptr,
             .totals = totals_.data(),
             .separation_grad_sum = given ? given[q.columns] : separation_grad_sum,
             .level = 0,
             .variation = nullptr};
    kernels_for<T>().class_sums(args_, class_sums_.data());
    parallel_columns<kWide>(q.columns, rows,
                            [&](int64_t begin, int64_t end) { kernels_for<T>().centroid_sums(args_, begin, end); });
    if (given) std::copy(given, given + q.columns, totals_.begin());
    if (q.centroid_to_sample) return;
    const double inverse_classes = 1.0 / q.all().classes;
    args_.level = args_.separation_grad_sum / double(q.columns) * inverse_classes;
    variation_.resize(q.columns);
    for (int64_t k = 0; k < q.columns; ++k) variation_[k] = T(totals_[k] * inverse_classes - args_.level);
    args_.variation = variation_.data();
  }
  BatchSums(const BatchSums&) = delete;  // args_ points into it

  const CentroidGradArgs<T>& args() const { return args_; }
  bool has_rows() const { return class_begin_.back() > 0; }

 private:
  Vector<double> factors_;
  Vector<int64_t> class_begin_, order_;
  Vector<double> totals_;
  Vector<ClassSums> class_sums_;
  Vector<T> own_, own_separation_, variation_;
  CentroidGradArgs<T> args_;
};

Tensor centroid_grad(const Tensor& input, const Tensor& target, const std::optional<Tensor>& center,
                     const Tensor& centroid_logits, const Tensor& log_activation, const Tensor& activation,
                     const Tensor& reference, const Tensor& norms, const Tensor& row_stats,
                     const std::optional<Tensor>& upstream, bool centroid_to_sample, int64_t ignore_index,
                     const std::optional<Tensor>& totals) {
  return with_arithmetic_type(centroid_logits.scalar_type(), "centroid_logits", [&]<class T>() {
    const Centroids<T> q = centroids<T>(log_activation, activation, reference, norms, centroid_to_sample);
    Tensor grad = empty({q.classes, q.columns}, kScalarType<T>);
    const BatchSums<T> sums(input, target, center, centroid_logits, q, row_stats, upstream, ignore_index,
                            totals, output<T>(grad));
    parallel_rows(q.classes, q.columns, [&](int64_t begin, int64_t end) {
      Vector<T> scratch(q.columns);
      kernels_for<T>().centroid_grad(sums.args(), begin, end, output<T>(grad), scratch.data());
    });
    return grad;
  });
}

void centroid_step_(const Tensor& input, const Tensor& target, const std::optional<Tensor>& center,
                    const Tensor& centroid_logits, const std::optional<Tensor>& momentum_buffer,
                    const Tensor& log_activation, const Tensor& activation, const Tensor& reference,
                    const Tensor& norms, const Tensor& row_stats, bool softmax, bool centroid_to_sample,
                    int64_t ignore_index, double lr, double momentum, double weight_decay, bool nesterov) {
  with_arithmetic_type(centroid_logits.scalar_type(), "centroid_logits", [&]<class T>() {
    const Centroids<T> q = centroids<T>(log_activation, activation, reference, norms, centroid_to_sample);
    const int64_t columns = q.columns;
    const StepArgs<T> step{
        .logits = const_cast<T*>(data<T>(centroid_logits, "centroid_logits", {q.classes, columns})),
        .momentum_buffer = const_cast<T*>(data<T>(momentum_buffer, "momentum_buffer", {q.classes, columns})),
        .lr = lr,
        .momentum = momentum,
        .weight_decay = weight_decay,
        .nesterov = nesterov};
    const BatchSums<T> sums(input, target, center, centroid_logits, q, row_stats, std::nullopt, ignore_index,
                            std::nullopt, nullptr);
    // A row whose terms are not finite has derivatives that are not: such a batch moves nothing, for good, as the
    // centre; nor does one without rows, whose loss is 0 / 0.
    if (!sums.has_rows() || !std::isfinite(sums.args().separation_grad_sum)) return;
    // In place: what a class's gradient needs of its own statistics is read before they are overwritten, and it needs
    // none of other classes; what it needs of all of them, their number, does not change.
    StatsOf<T> stats(matrix(centroid_logits, "centroid_logits"), q.classes, columns, softmax, centroid_to_sample,
                     const_cast<T*>(q.log_activation), const_cast<T*>(q.activation), const_cast<T*>(q.reference),
                     const_cast<ClassStats*>(q.of));
    stats.compute([&](const CentroidStatsArgs<T>& args, int64_t begin, int64_t end, T* scratch) {
      kernels_for<T>().centroid_step(sums.args(), step, args, begin, end, scratch);
    });
  });
}

Tensor class_totals(const Tensor& input, const Tensor& target, const std::optional<Tensor>& center,
                    const Tensor& row_stats, const std::optional<Tensor>& upstream, bool centroid_to_sample,
                    int64_t ignore_index) {
  const Matrix z = matrix(input, "input");
  const int64_t rows = input.size(0), columns = input.size(1);
  const Targets y = targets(target, rows, ignore_index, std::numeric_limits<int64_t>::max());
  const RowStats* stats = row_stats_of(row_stats, rows);
  const Vector<double> c = with_upstream(stats, upstream, rows);
  Tensor result = empty({columns + 1}, ScalarType::Double);
  double* totals = output<double>(result);
  totals[columns] = 0;
  for (int64_t i = 0; i < rows; ++i)
    if (y[i] != ignore_index) totals[columns] += c[rows + i];
  const auto sum = [&]<class T>() {
    const TotalsArgs<T> args{.input = z,
                             .target = y,
                             .center = data<T>(center, "center", {columns}),
                             .row_count = rows,
                             .rows = stats,
                             .separation_grad = c.data() + rows,
                             .centroid_to_sample = centroid_to_sample,
                             .totals = totals};
    parallel_columns(columns, rows, [&](int64_t begin, int64_t end) { kernels_for<T>().totals(args, begin, end); });
  };
  if (z.dtype == Dtype::kFloat64)
    sum.template operator()<double>();
  else
    sum.template operator()<float>();
  return result;
}

std::string cpu_capability() { return kernels().name; }

}  // namespace
}  // namespace ncmi::cpu

STABLE_TORCH_LIBRARY_IMPL(ncmi_kernels, CPU, m) {
  m.impl("centroid_stats", TORCH_BOX(&ncmi::cpu::centroid_stats));
  m.impl("terms", TORCH_BOX(&ncmi::cpu::terms));
  m.impl("loss", TORCH_BOX(&ncmi::cpu::loss));
  m.impl("scale_", TORCH_BOX(&ncmi::cpu::scale_));
  m.impl("input_grad", TORCH_BOX(&ncmi::cpu::input_grad));
  m.impl("centroid_grad", TORCH_BOX(&ncmi::cpu::centroid_grad));
  m.impl("centroid_step_", TORCH_BOX(&ncmi::cpu::centroid_step_));
  m.impl("class_totals", TORCH_BOX(&ncmi::cpu::class_totals));
  m.impl("update_center_", TORCH_BOX(&ncmi::cpu::update_center_));
}

// The instruction set that the kernels use: "default", "avx2" or "avx512".
STABLE_TORCH_LIBRARY_FRAGMENT(ncmi_kernels, m) { m.def("cpu_capability() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(ncmi_kernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&ncmi::cpu::cpu_capability));
}
