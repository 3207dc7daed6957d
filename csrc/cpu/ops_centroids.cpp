// The CPU implementations of the operators by class: statistics of the centroids, their gradient, a step by it.

#include <cmath>
#include <limits>
#include <numeric>

#include "host.h"

namespace ncmi::cpu {
namespace {

// The outputs of centroid_stats, with the workspace of the kernels that fill them in for logits [C, M].
template <class T>
class StatsOf {
 public:
  StatsOf(const Matrix& logits, int64_t classes, int64_t columns, bool softmax, bool centroid_to_sample,
          T* log_activation, T* activation, T* reference, ClassStats* of)
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
    double weight_sum = 0, lost = 0, constant = 0, reference_sum = 0;
    if (args_.centroid_to_sample) {
      for (int64_t k = 0; k < columns; ++k) {
        weight_sum += double(q_mean[k]);
        lost += double(q_mean[k]) * args_.residual[k];
        constant += args_.weighted_log_norm[k];
        reference_sum += double(q_mean[k]) * double(compared[k]);
      }
    } else {
      const double largest = double(*std::max_element(compared, compared + columns));
      double total = 0;
      for (int64_t k = 0; k < columns; ++k) {
        const double w = std::exp(double(compared[k]) - largest);
        total += w;
        lost += w * args_.residual[k];
        reference_sum += double(compared[k]);
      }
      weight_sum = 1;
      lost /= total;
      constant = std::accumulate(args_.of, args_.of + args_.classes, 0.0,
                                 [](double sum, const ClassStats& c) { return sum + c.prior * c.log_norm; });
    }
    *reinterpret_cast<AllStats*>(args_.of + args_.classes) = {
        .weight_sum = weight_sum,
        .weighted_log_norm = constant - lost,
        .reference_sum = reference_sum,
        .unused = {}};
  }

  Vector<double> workspace_;
  const int64_t classes_per_chunk_, chunks_;
  Vector<double> sums_;
  Vector<T> scratch_;
  const CentroidStatsArgs<T> args_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> centroid_stats(const Tensor& logits, bool softmax,
                                                          bool centroid_to_sample,
                                                          const std::optional<Tensor>& prior) {
  const Matrix xi = matrix(logits, "centroid_logits");
  const int64_t classes = logits.size(0), columns = logits.size(1);
  STD_TORCH_CHECK(classes > 0 && columns > 0, "ncmi_kernels: centroid_logits must not be empty");
  return with_arithmetic_type(logits.scalar_type(), "centroid_logits", [&]<class T>() {
    Tensor log_activation = empty({classes, columns}, kScalarType<T>);
    Tensor activation = empty({centroid_to_sample ? classes : 0, columns}, kScalarType<T>);
    Tensor reference = empty({2, columns}, kScalarType<T>);
    Tensor norms = empty({classes + 1, kClassStats}, ScalarType::Double);
    ClassStats* of = output<ClassStats>(norms);
    const double* given = data<double>(prior, "prior", {classes});
    for (int64_t c = 0; c < classes; ++c) of[c].prior = given ? given[c] : 1.0 / double(classes);
    StatsOf<T> stats(xi, classes, columns, softmax, centroid_to_sample, output<T>(log_activation),
                     output<T>(activation), output<T>(reference), of);
    stats.compute([](const CentroidStatsArgs<T>& args, int64_t begin, int64_t end, T* scratch) {
      kernels_for<T>().centroid_rows(args, begin, end, scratch);
    });
    return std::make_tuple(log_activation, activation, reference, norms);
  });
}

// What a batch says of the centroids: its rows by class, and their sums by column.
template <class T>
class BatchSums {
 public:
  // `own_grad`: the gradient [C, M], where the sums of the classes are kept in it; else they get their own memory.
  BatchSums(const Tensor& input, const Tensor& target, const std::optional<Tensor>& center, const Tensor& logits,
            const Centroids<T>& q, const Tensor& row_stats, const Tensor& coefficients,
            const std::optional<Tensor>& upstream, int64_t ignore_index, const std::optional<Tensor>& given_totals,
            const std::optional<Tensor>& class_weights, const std::optional<Tensor>& weighted, T* own_grad)
      : coefficients_(coefficients, upstream, rows_of(input)),
        class_begin_(q.classes + 1, 0),
        order_(rows_of(input)),
        totals_(q.columns),
        rows_of_classes_(q.classes) {
    const Matrix z = matrix(input, "input"), xi = matrix(logits, "centroid_logits");
    const int64_t rows = input.size(0);
    const Targets y = targets(target, rows, ignore_index, q.classes);
    check_shape(input, "input", {rows, q.columns});
    check_shape(logits, "centroid_logits", {q.classes, q.columns});

    // Rows by class, in the order of the batch.
    for (int64_t i = 0; i < rows; ++i)
      if (y[i] != ignore_index) ++class_begin_[y[i] + 1];
    std::partial_sum(class_begin_.begin(), class_begin_.end(), class_begin_.begin());
    Vector<int64_t> next(class_begin_.begin(), class_begin_.end() - 1);
    for (int64_t i = 0; i < rows; ++i)
      if (y[i] != ignore_index) order_[next[y[i]]++] = i;
    double other_sum = 0;
    for (int64_t i = 0; i < rows; ++i)
      if (y[i] != ignore_index) other_sum += coefficients_.data()[i].other;

    const double* given = data<double>(given_totals, "totals", {q.columns + 1});
    const int64_t present = own_grad ? q.classes : std::min(rows, q.classes);
    if (!own_grad) own_.resize(present * q.columns);
    if (q.centroid_to_sample) own_separation_.resize(present * q.columns);
    args_ = {.input = z,
             .center = data<T>(center, "center", {q.columns}),
             .centroids = q,
             .logits = xi,
             .rows = row_stats_of(row_stats, rows),
             .coefficients = coefficients_.data(),
             .order = order_.data(),
             .class_begin = class_begin_.data(),
             .rows_of_classes = rows_of_classes_.data(),
             .own = own_grad ? own_grad : own_.data(),
             .own_separation = own_separation_.data(),
             .own_is_grad = own_grad != nullptr,
             .totals = totals_.data(),
             .other_sum = given ? given[q.columns] : other_sum,
             .level = 0,
             .variation = nullptr,
             .class_weights = reinterpret_cast<const ClassWeights*>(
                 data<double>(class_weights, "class_weights", {q.classes, kClassWeights})),
             .weighted = data<T>(weighted, "weighted", {q.classes, q.columns}),
             .weighted_by = 1};
    STD_TORCH_CHECK(!args_.class_weights == !args_.weighted, "ncmi_kernels: pass both class_weights and weighted");
    if (args_.weighted && upstream) args_.weighted_by = double(*data<T>(*upstream, "upstream", {}));
    kernels_for<T>().rows_of_classes(args_, rows_of_classes_.data());
    parallel_columns<kWide>(q.columns, rows,
                            [&](int64_t begin, int64_t end) { kernels_for<T>().centroid_sums(args_, begin, end); });
    if (given) std::copy(given, given + q.columns, totals_.begin());
    if (q.centroid_to_sample) return;
    args_.level = args_.other_sum / double(q.columns);
    variation_.resize(q.columns);
    for (int64_t k = 0; k < q.columns; ++k) variation_[k] = T(totals_[k] - args_.level);
    args_.variation = variation_.data();
  }
  BatchSums(const BatchSums&) = delete;  // args_ points into it

  const CentroidGradArgs<T>& args() const { return args_; }
  bool has_rows() const { return class_begin_.back() > 0; }

 private:
  ScaledCoefficients coefficients_;
  Vector<int64_t> class_begin_, order_;
  Vector<double> totals_;
  Vector<RowsOfClass> rows_of_classes_;
  Vector<T> own_, own_separation_, variation_;
  CentroidGradArgs<T> args_;
};

Tensor centroid_grad(const Tensor& input, const Tensor& target, const std::optional<Tensor>& center,
                     const Tensor& centroid_logits, const Tensor& log_activation, const Tensor& activation,
                     const Tensor& reference, const Tensor& norms, const Tensor& row_stats,
                     const Tensor& coefficients, const std::optional<Tensor>& upstream, bool centroid_to_sample,
                     int64_t ignore_index, const std::optional<Tensor>& totals,
                     const std::optional<Tensor>& class_weights, const std::optional<Tensor>& weighted) {
  return with_arithmetic_type(centroid_logits.scalar_type(), "centroid_logits", [&]<class T>() {
    const Centroids<T> q = centroids<T>(log_activation, activation, reference, norms, centroid_to_sample);
    Tensor grad = empty({q.classes, q.columns}, kScalarType<T>);
    const BatchSums<T> sums(input, target, center, centroid_logits, q, row_stats, coefficients, upstream,
                            ignore_index, totals, class_weights, weighted, output<T>(grad));
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
                    const Tensor& norms, const Tensor& row_stats, const Tensor& coefficients, bool softmax,
                    bool centroid_to_sample, int64_t ignore_index, double lr, double momentum, double weight_decay,
                    bool nesterov, const std::optional<Tensor>& class_weights,
                    const std::optional<Tensor>& weighted) {
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
    const BatchSums<T> sums(input, target, center, centroid_logits, q, row_stats, coefficients, std::nullopt,
                            ignore_index, std::nullopt, class_weights, weighted, nullptr);
    // A row whose terms are not finite has derivatives that are not: such a batch moves nothing, for good, as the
    // centre; nor does one without rows, whose loss is 0 / 0.
    if (!sums.has_rows() || !std::isfinite(sums.args().other_sum)) return;
    // In place: what a class's gradient needs of its own statistics is read before they are overwritten, and it needs
    // none of other classes; the priors do not change.
    StatsOf<T> stats(matrix(centroid_logits, "centroid_logits"), q.classes, columns, softmax, centroid_to_sample,
                     const_cast<T*>(q.log_activation), const_cast<T*>(q.activation), const_cast<T*>(q.reference),
                     const_cast<ClassStats*>(q.of));
    stats.compute([&](const CentroidStatsArgs<T>& args, int64_t begin, int64_t end, T* scratch) {
      kernels_for<T>().centroid_step(sums.args(), step, args, begin, end, scratch);
    });
  });
}

Tensor class_totals(const Tensor& input, const Tensor& target, const std::optional<Tensor>& center,
                    const Tensor& row_stats, const Tensor& coefficients, const std::optional<Tensor>& upstream,
                    bool centroid_to_sample, int64_t ignore_index) {
  const Matrix z = matrix(input, "input");
  const int64_t rows = input.size(0), columns = input.size(1);
  const Targets y = targets(target, rows, ignore_index, std::numeric_limits<int64_t>::max());
  const ScaledCoefficients scaled(coefficients, upstream, rows);
  Tensor result = empty({columns + 1}, ScalarType::Double);
  double* totals = output<double>(result);
  totals[columns] = 0;
  for (int64_t i = 0; i < rows; ++i)
    if (y[i] != ignore_index) totals[columns] += scaled.data()[i].other;
  const auto sum = [&]<class T>() {
    const TotalsArgs<T> args{.input = z,
                             .target = y,
                             .center = data<T>(center, "center", {columns}),
                             .row_count = rows,
                             .rows = row_stats_of(row_stats, rows),
                             .coefficients = scaled.data(),
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

}  // namespace
}  // namespace ncmi::cpu

STABLE_TORCH_LIBRARY_IMPL(ncmi_kernels, CPU, m) {
  m.impl("centroid_stats", TORCH_BOX(&ncmi::cpu::centroid_stats));
  m.impl("centroid_grad", TORCH_BOX(&ncmi::cpu::centroid_grad));
  m.impl("centroid_step_", TORCH_BOX(&ncmi::cpu::centroid_step_));
  m.impl("class_totals", TORCH_BOX(&ncmi::cpu::class_totals));
}
