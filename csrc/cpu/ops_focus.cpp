// The CPU implementations of the operators between the matrix products of separation_focus.

#include "host.h"

namespace ncmi::cpu {
namespace {

std::tuple<Tensor, Tensor, Tensor> focus_table(const Tensor& log_activation, const Tensor& activation,
                                               const Tensor& reference, const Tensor& norms, bool centroid_to_sample) {
  return with_arithmetic_type(log_activation.scalar_type(), "log_activation", [&]<class T>() {
    const Centroids<T> q = centroids<T>(log_activation, activation, reference, norms, centroid_to_sample);
    Tensor relative = empty({q.classes, q.columns}, kScalarType<T>);
    Tensor distribution = empty({centroid_to_sample ? q.classes : 0, q.columns}, kScalarType<T>);
    Tensor level = empty({2, q.classes}, ScalarType::Double);
    const FocusTableArgs<T> args{.centroids = q,
                                 .relative = output<T>(relative),
                                 .distribution = output<T>(distribution),
                                 .level = output<double>(level)};
    parallel_rows(q.classes, q.columns,
                  [&](int64_t begin, int64_t end) { kernels_for<T>().focus_table(args, begin, end); });
    return std::make_tuple(relative, distribution, level);
  });
}

Tensor focus_rows(const Tensor& input, const Tensor& target, const std::optional<Tensor>& center,
                  const Tensor& log_activation, const Tensor& activation, const Tensor& reference,
                  const Tensor& norms, const Tensor& row_stats, bool centroid_to_sample, int64_t ignore_index) {
  const Matrix z = matrix(input, "input");
  return with_arithmetic_type(log_activation.scalar_type(), "log_activation", [&]<class T>() {
    const Centroids<T> q = centroids<T>(log_activation, activation, reference, norms, centroid_to_sample);
    const int64_t rows = input.size(0), columns = q.columns;
    check_shape(input, "input", {rows, columns});
    Tensor out = empty({rows, columns}, kScalarType<T>);
    const FocusRowsArgs<T> args{.input = z,
                                .rows = rows,
                                .target = targets(target, rows, ignore_index, q.classes),
                                .center = data<T>(center, "center", {columns}),
                                .centroids = q,
                                .stats = row_stats_of(row_stats, rows),
                                .out = output<T>(out)};
    parallel_rows(rows, columns, [&](int64_t begin, int64_t end) {
      Vector<T> scratch(columns);
      kernels_for<T>().focus_rows(args, begin, end, scratch.data());
    });
    return out;
  });
}

template <class T>
FocusProducts<T> focus_products(const Tensor& product, const Tensor& row_stats, const Tensor& target,
                                const Tensor& norms, const Tensor& class_level, bool centroid_to_sample,
                                int64_t ignore_index, int64_t centroids_per_class) {
  STD_TORCH_CHECK(product.dim() == 2, "ncmi_kernels: product must have 2 dimensions");
  const int64_t rows = product.size(0), centroids = product.size(1);
  const int64_t classes = classes_of(centroids, centroids_per_class);
  return {.rows = rows,
          .centroids = centroids,
          .classes = classes,
          .values = const_cast<T*>(data<T>(product, "product", {rows, centroids})),
          .stats = const_cast<RowStats*>(row_stats_of(row_stats, rows)),
          .target = targets(target, rows, ignore_index, classes),
          .all = reinterpret_cast<const AllStats*>(class_stats_of(norms, centroids) + centroids),
          .class_level = data<double>(class_level, "class_level", {2, centroids}),
          .centroid_to_sample = centroid_to_sample};
}

Tensor focus_nearest(const Tensor& product, const Tensor& row_stats, const Tensor& target, const Tensor& norms,
                     const Tensor& class_level, bool centroid_to_sample, int64_t ignore_index,
                     int64_t centroids_per_class) {
  return with_arithmetic_type(product.scalar_type(), "product", [&]<class T>() {
    const FocusProducts<T> products = focus_products<T>(product, row_stats, target, norms, class_level,
                                                        centroid_to_sample, ignore_index, centroids_per_class);
    Tensor nearest = empty({products.rows}, ScalarType::Double);
    const FocusNearestArgs<T> args{.products = products, .nearest = output<double>(nearest)};
    parallel_rows(products.rows, products.centroids,
                  [&](int64_t begin, int64_t end) { kernels_for<T>().focus_nearest(args, begin, end); });
    return nearest;
  });
}

void focus_weights_(const Tensor& product, const Tensor& separation, const Tensor& row_stats, const Tensor& target,
                    const Tensor& norms, const Tensor& class_level, double focus, bool centroid_to_sample,
                    int64_t ignore_index, int64_t centroids_per_class, const std::optional<Tensor>& shared) {
  with_arithmetic_type(product.scalar_type(), "product", [&]<class T>() {
    const FocusProducts<T> products = focus_products<T>(product, row_stats, target, norms, class_level,
                                                        centroid_to_sample, ignore_index, centroids_per_class);
    const FocusWeightsArgs<T> args{
        .products = products,
        .focus = focus,
        .separation = const_cast<double*>(data<double>(separation, "separation", {products.rows})),
        .shared = const_cast<double*>(data<double>(shared, "shared", {3, products.rows}))};
    parallel_rows(products.rows, products.centroids,
                  [&](int64_t begin, int64_t end) { kernels_for<T>().focus_weights(args, begin, end); });
  });
}

void focus_sums_(const Tensor& weights, const Tensor& class_weights, const Tensor& row_stats,
                 const Tensor& coefficients, const Tensor& target, bool centroid_to_sample, int64_t ignore_index) {
  STD_TORCH_CHECK(weights.dim() == 2, "ncmi_kernels: weights must have 2 dimensions");
  const int64_t rows = weights.size(0), classes = weights.size(1);
  with_arithmetic_type(weights.scalar_type(), "weights", [&]<class T>() {
    const FocusSumsArgs<T> args{
        .rows = rows,
        .classes = classes,
        .target = targets(target, rows, ignore_index, classes),
        .stats = row_stats_of(row_stats, rows),
        .coefficients = coefficients_in(coefficients, rows),
        .centroid_to_sample = centroid_to_sample,
        .weights = const_cast<T*>(data<T>(weights, "weights", {rows, classes})),
        .sums = reinterpret_cast<ClassWeights*>(
            const_cast<double*>(data<double>(class_weights, "class_weights", {classes, kClassWeights})))};
    parallel_columns(classes, rows, [&](int64_t begin, int64_t end) { kernels_for<T>().focus_sums(args, begin, end); });
  });
}

}  // namespace
}  // namespace ncmi::cpu

STABLE_TORCH_LIBRARY_IMPL(ncmi_kernels, CPU, m) {
  m.impl("focus_table", TORCH_BOX(&ncmi::cpu::focus_table));
  m.impl("focus_rows", TORCH_BOX(&ncmi::cpu::focus_rows));
  m.impl("focus_nearest", TORCH_BOX(&ncmi::cpu::focus_nearest));
  m.impl("focus_weights_", TORCH_BOX(&ncmi::cpu::focus_weights_));
  m.impl("focus_sums_", TORCH_BOX(&ncmi::cpu::focus_sums_));
}
