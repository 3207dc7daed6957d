// Between the matrix products of separation_focus: their factors, and in place on a tile of their result the weights of
// the other classes.
#include "../focus.h"
#include "launches.h"

namespace ncmi::cuda {

namespace {

constexpr int kRowThreads = 512;  // that a row of the table or of the products has at most
constexpr int kSumWarps = 32;     // of a block of sums: each takes every 32nd row of a chunk
constexpr int64_t kRowsPerChunk = 256;  // at least, where there are several chunks

// Over chunks of the rows.
template <class T>
struct ChunkedSumsArgs {
  FocusSumsArgs<T> of;
  int64_t chunks;          // sum_chunks(rows, classes)
  ClassWeights* partials;  // [chunks, C] workspace; not of a single chunk
};

template <class T>
__global__ void __launch_bounds__(kRowThreads, 1) focus_table_kernel(const FocusTableArgs<T> args) {
  const Centroids<T>& q = args.centroids;
  const int64_t c = row_of_thread();
  if (c >= q.classes) return;
  Group group = group_of_thread(shared_storage<GroupStorage>());
  const double log_norm = q.of[c].log_norm, above_mean = log_norm - q.all().weighted_log_norm;
  const double inverse_norm = ::exp(-log_norm);
  double sum = 0;
  for (int64_t k = group.thread; k < q.columns; k += group.threads) {
    const int64_t at = c * q.columns + k;
    const double relative = (double(q.log_activation[at]) - double(q.reference[k])) - above_mean;
    args.relative[at] = T(relative);
    double share = 1;
    if (q.centroid_to_sample) {
      share = double(q.activation[at]) * inverse_norm;
      args.distribution[at] = T(share - double(q.reference[q.columns + k]));
    }
    sum += share * relative;  // not of what is rounded: columns that are equal round alike
  }
  sum = group.sum(sum);
  if (group.first()) {
    args.level[c] = sum;
    args.level[q.classes + c] = q.of[c].prior;
  }
}

template <class In, class T, bool centroid_to_sample>
__global__ void __maxnreg__((kRegisters<In, T, 0>)) focus_rows_kernel(const FocusRowsArgs<T> args) {
  using Out = std::conditional_t<kSame<In, Any>, Any, float>;
  using R = Row<In, T, 0>;
  constexpr bool fast = sizeof(In) == 2;
  const int64_t i = row_of_thread();
  if (i >= args.rows) return;
  Group group = group_of_thread(shared_storage<GroupStorage>());
  const Centroids<T>& q = args.centroids;
  const int64_t first = i * q.columns, target = args.target[i];
  if (target == args.target.ignore_index) {
    for (int64_t k = group.thread; k < q.columns; k += group.threads) args.out[first + k] = 0;
    return;
  }
  class_of(target, q.classes);
  R row(args.input, i, args.center, q.columns, group);
  const RowStats stats = args.stats[i];
  with_kind<T>(kind_of(stats.kind), [&]<Kind kind>() NCMI_INLINED {
    const T s = argument_scale<kind, T>(stats.scale), shift = T(stats.shift);
    const T log_norm = centroid_to_sample ? T(relative_log_norm(q.all(), stats)) : T(0);
    row.each([&](int k, const T* x) NCMI_INLINED {
      [[maybe_unused]] T reference[R::part];
      T out[R::part];
      if constexpr (centroid_to_sample) load_values<R::part, false>(q.reference + k, reference);
#pragma unroll
      for (int v = 0; v < R::part; ++v) {
        if constexpr (centroid_to_sample) {
          out[v] = (activate<kind, fast>(x[v], s, shift).log - reference[v]) - log_norm;
        } else {
          out[v] = x_in_product<kind, fast>(x[v], s, shift);
        }
      }
      store_output<Out, R::part>(args.out, Dtype::kFloat32, first + k, out);
    });
  });
}

// The centroids c of which a thread has a part in a row's sums, and what they count for: f(c, prior), and 0 in the place
// of the prior of those of the own class.
template <class T>
struct OtherClasses {
  const FocusProducts<T>& of;
  const Group& group;
  int y;

  template <class F>
  NCMI_DEVICE void each(const F& f) const {
    const double* priors = of.class_level + of.centroids;
    const int classes = int(of.classes), step = group.threads % classes;
    int of_class = group.thread % classes;
    for (int64_t c = group.thread; c < of.centroids; c += group.threads) {
      f(c, of_class == y ? 0.0 : priors[c]);
      of_class += of_class + step < classes ? step : step - classes;
    }
  }
};

// The least of a row's divergences D from the centroids of other classes that have a prior: never NaN, and the largest
// number where there is none. `in_place` D comes where the products were.
template <bool in_place, class T>
NCMI_DEVICE T nearest_of(const OtherClasses<T>& others, const Divergence& divergence, T* values, Group& group) {
  // The least of what is not negative has the least bits, those of NaN apart; a group knows the largest.
  using Bits = decltype(magnitude_bits(T()));
  Bits complement = ~magnitude_bits(kLargest<T>);
  others.each([&](int64_t c, double prior) NCMI_INLINED {
    if (!(prior > 0)) return;
    const T d = divergence(others.of.class_level[c], values[c]);
    if constexpr (in_place) values[c] = d;
    const Bits bits = ~magnitude_bits(d);
    complement = bits > complement ? bits : complement;
  });
  return bit_cast<T>(Bits(~group.maximum(complement)));
}

template <class T>
__global__ void __launch_bounds__(kRowThreads, 1) focus_nearest_kernel(const FocusNearestArgs<T> args) {
  const FocusProducts<T>& of = args.products;
  const int64_t i = row_of_thread();
  if (i >= of.rows) return;
  Group group = group_of_thread(shared_storage<GroupStorage>());
  const int64_t target = of.target[i];
  if (target == of.target.ignore_index) {
    if (group.first()) args.nearest[i] = 0;
    return;
  }
  const RowStats stats = of.stats[i];
  const double log_norm = relative_log_norm(*of.all, stats);
  const Divergence divergence = divergence_of(stats, *of.all, log_norm, of.centroid_to_sample);
  const OtherClasses<T> others{of, group, int(class_of(target, of.classes))};
  const T nearest = nearest_of<false>(others, divergence, of.values + i * of.centroids, group);
  if (group.first()) args.nearest[i] = double(nearest);
}

// Of the products of a row with the centroids: its divergences D from those of other classes that have a prior, and in
// their place the weights softmax(log prior - focus D / min D).
template <class T>
__global__ void __launch_bounds__(kRowThreads, 1) focus_weights_kernel(const FocusWeightsArgs<T> args) {
  const FocusProducts<T>& of = args.products;
  const int64_t i = row_of_thread();
  if (i >= of.rows) return;
  Group group = group_of_thread(shared_storage<GroupStorage>());
  T* values = of.values + i * of.centroids;
  const int64_t target = of.target[i];
  if (target == of.target.ignore_index) {
    for (int64_t c = group.thread; c < of.centroids; c += group.threads) values[c] = 0;
    if (group.first() && args.shared)
      args.shared[of.rows + i] = args.shared[2 * of.rows + i] = 0;
    else if (group.first())
      args.separation[i] = 0;
    return;
  }
  const int y = int(class_of(target, of.classes));
  const OtherClasses<T> others{of, group, y};
  const RowStats stats = of.stats[i];
  const double log_norm = relative_log_norm(*of.all, stats);
  const Divergence divergence = divergence_of(stats, *of.all, log_norm, of.centroid_to_sample);
  T nearest = nearest_of<true>(others, divergence, values, group);
  if (args.shared) nearest = T(args.shared[i]);

  const double by = args.focus / double(nearest);
  const T by_distance = by < double(kLargest<T>) ? T(by) : kLargest<T>;
  double sums[2] = {};  // of e, and of e (D - min D)
  others.each([&](int64_t c, double prior) NCMI_INLINED {
    T weight = 0;
    if (prior > 0) {
      const T farther = values[c] - nearest;
      const double e = prior * double(exp_minus(absolute(by_distance * farther)));
      weight = T(e);
      sums[0] += e;
      sums[1] += e * double(farther);
    }
    values[c] = weight;
  });
  for (double& sum : sums) sum = warp_sum(sum);
  group.sum_warps(sums);
  if (args.shared) {
    if (!group.first()) return;
    args.shared[of.rows + i] = sums[0];
    args.shared[2 * of.rows + i] = sums[1];
    return;
  }
  const bool alone = sums[0] == 0 && sums[1] == 0;  // no other class has a prior; of NaN the second sum is none
  const double inverse = alone ? 0.0 : 1.0 / sums[0];
  for (int64_t c = group.thread; c < of.centroids; c += group.threads) values[c] = T(double(values[c]) * inverse);
  if (group.first()) {
    const double mean = alone ? 0.0 : double(nearest) + sums[1] * inverse;
    double own_prior = 0;
    for (int64_t c = y; c < of.centroids; c += of.classes) own_prior += of.class_level[of.centroids + c];
    of.stats[i].all_mean = mean + log_norm;
    of.stats[i].own_prior = own_prior;
    args.separation[i] = mean * (1.0 - own_prior);
  }
}

// In place: the weights times what the rows' gradients have of their separation; and the sums over a chunk of rows.
template <class T>
__global__ void __launch_bounds__(kSumWarps* kWarp, 1)
    focus_sums_kernel(const ChunkedSumsArgs<T> chunked, int64_t tiles) {
  struct Storage {
    ClassWeights sums[kSumWarps][kWarp];
  };
  Storage& storage = shared_storage<Storage>();
  const FocusSumsArgs<T>& args = chunked.of;
  const int lane = threadIdx.x, warp = threadIdx.y;
  const int64_t chunk = blockIdx.x / tiles, c = blockIdx.x % tiles * kWarp + lane;
  const int64_t begin = chunk * args.rows / chunked.chunks, end = (chunk + 1) * args.rows / chunked.chunks;
  ClassWeights sum{};
  for (int64_t i = begin + warp; i < end; i += kSumWarps) {
    const int64_t target = args.target[i];
    if (target == args.target.ignore_index) continue;
    class_of(target, args.classes);
    if (c >= args.classes) continue;
    const InProduct p = in_product(args.stats[i], args.centroid_to_sample);
    const double other = args.coefficients[i].other;
    T& weight = args.weights[i * args.classes + c];
    sum.other += other * double(weight);
    sum.base += other * p.share * p.base * double(weight);
    weight *= T(other * p.share);
  }
  storage.sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || c >= args.classes) return;
  for (int w = 1; w < kSumWarps; ++w) {
    sum.other += storage.sums[w][lane].other;
    sum.base += storage.sums[w][lane].base;
  }
  if (chunked.chunks == 1)
    args.sums[c] = {args.sums[c].other + sum.other, args.sums[c].base + sum.base};
  else
    chunked.partials[chunk * args.classes + c] = sum;
}

// A warp for each class.
__global__ void __launch_bounds__(kRowsPerBlock* kWarp, 1)
    fold_focus_sums_kernel(const ClassWeights* partials, int64_t chunks, int64_t classes, ClassWeights* sums) {
  const int64_t c = row_of_thread();
  if (c >= classes) return;
  ClassWeights sum{};
#pragma unroll 4
  for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += kWarp) {
    sum.other += partials[chunk * classes + c].other;
    sum.base += partials[chunk * classes + c].base;
  }
  sum = {warp_sum(sum.other), warp_sum(sum.base)};
  if (threadIdx.x == 0) sums[c] = {sums[c].other + sum.other, sums[c].base + sum.base};
}

// A warp or a block for each of the rows, of `size` elements that are read one by one.
template <class Args>
void launch_by_row(void (*kernel)(Args), const Args& args, int64_t rows, int64_t size, Stream stream) {
  const RowShape shape = row_shape(size, kElementsPerThread, kRowThreads);
  launch(kernel, ceil_div(rows, shape.rows_per_block), dim3(shape.threads, shape.rows_per_block), stream, args);
}

std::tuple<Tensor, Tensor, Tensor> focus_table(const Tensor& log_activation, const Tensor& activation,
                                               const Tensor& reference, const Tensor& norms, bool centroid_to_sample) {
  const Device device(log_activation);
  return with_arithmetic_type(log_activation.scalar_type(), "log_activation", [&]<class T>() {
    const Centroids<T> q =
        centroids_on<T>(log_activation, activation, reference, norms, centroid_to_sample, log_activation);
    Tensor relative = empty(device, {q.classes, q.columns}, kScalarType<T>);
    Tensor distribution = empty(device, {centroid_to_sample ? q.classes : 0, q.columns}, kScalarType<T>);
    Tensor level = empty(device, {2, q.classes}, ScalarType::Double);
    const FocusTableArgs<T> args{.centroids = q,
                                 .relative = output<T>(relative),
                                 .distribution = output<T>(distribution),
                                 .level = output<double>(level)};
    launch_by_row(focus_table_kernel<T>, args, q.classes, q.columns, device.stream());
    return std::make_tuple(relative, distribution, level);
  });
}

Tensor focus_rows(const Tensor& input, const Tensor& target, const std::optional<Tensor>& center,
                  const Tensor& log_activation, const Tensor& activation, const Tensor& reference,
                  const Tensor& norms, const Tensor& row_stats, bool centroid_to_sample, int64_t ignore_index) {
  const Device device(input);
  return with_arithmetic_type(log_activation.scalar_type(), "log_activation", [&]<class T>() {
    const Centroids<T> q = centroids_on<T>(log_activation, activation, reference, norms, centroid_to_sample, input);
    const Matrix z = rows_of<T>(input, q.columns);
    const int64_t rows = input.size(0);
    Tensor out = empty(device, {rows, q.columns}, kScalarType<T>);
    const FocusRowsArgs<T> args{.input = z,
                                .rows = rows,
                                .target = targets(target, input, ignore_index),
                                .center = data_on<T>(center, "center", {q.columns}, input),
                                .centroids = q,
                                .stats = stats_on(row_stats, input),
                                .out = output<T>(out)};
    const bool can_be_wide = aligned(q) && aligned(args.center) && aligned(args.out);
    with_row_kernel<T>(z, q.columns, can_be_wide, [&](auto in, auto) {
      using In = typename decltype(in)::type;
      if (centroid_to_sample)
        launch_rows<In, 0>(focus_rows_kernel<In, T, true>, args, q.columns, device.stream());
      else
        launch_rows<In, 0>(focus_rows_kernel<In, T, false>, args, q.columns, device.stream());
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
  STD_TORCH_CHECK(centroids <= kMostColumns, "ncmi_kernels: more centroids than 2^30");
  return {.rows = rows,
          .centroids = centroids,
          .classes = classes_of(centroids, centroids_per_class),
          .values = const_cast<T*>(data<T>(product, "product", {rows, centroids})),
          .stats = const_cast<RowStats*>(stats_on(row_stats, product)),
          .target = targets(target, product, ignore_index),
          .all = reinterpret_cast<const AllStats*>(class_stats_on(norms, centroids, product) + centroids),
          .class_level = data_on<double>(class_level, "class_level", {2, centroids}, product),
          .centroid_to_sample = centroid_to_sample};
}

Tensor focus_nearest(const Tensor& product, const Tensor& row_stats, const Tensor& target, const Tensor& norms,
                     const Tensor& class_level, bool centroid_to_sample, int64_t ignore_index,
                     int64_t centroids_per_class) {
  const Device device(product);
  return with_arithmetic_type(product.scalar_type(), "product", [&]<class T>() {
    const FocusProducts<T> products = focus_products<T>(product, row_stats, target, norms, class_level,
                                                        centroid_to_sample, ignore_index, centroids_per_class);
    Tensor nearest = empty(device, {products.rows}, ScalarType::Double);
    const FocusNearestArgs<T> args{.products = products, .nearest = output<double>(nearest)};
    launch_by_row(focus_nearest_kernel<T>, args, products.rows, products.centroids, device.stream());
    return nearest;
  });
}

void focus_weights_(const Tensor& product, const Tensor& separation, const Tensor& row_stats, const Tensor& target,
                    const Tensor& norms, const Tensor& class_level, double focus, bool centroid_to_sample,
                    int64_t ignore_index, int64_t centroids_per_class, const std::optional<Tensor>& shared) {
  const Device device(product);
  with_arithmetic_type(product.scalar_type(), "product", [&]<class T>() {
    const FocusProducts<T> products = focus_products<T>(product, row_stats, target, norms, class_level,
                                                        centroid_to_sample, ignore_index, centroids_per_class);
    const int64_t rows = products.rows;
    const FocusWeightsArgs<T> args{
        .products = products,
        .focus = focus,
        .separation = const_cast<double*>(data_on<double>(separation, "separation", {rows}, product)),
        .shared = const_cast<double*>(data_on<double>(shared, "shared", {3, rows}, product))};
    launch_by_row(focus_weights_kernel<T>, args, rows, products.centroids, device.stream());
  });
}

// A function of the shape alone, so that the order of the sums is one too.
int64_t sum_chunks(int64_t rows, int64_t classes) {
  return max(1, min(ceil_div(rows, kRowsPerChunk), 1024 / max(1, ceil_div(classes, kWarp))));
}

void focus_sums_(const Tensor& weights, const Tensor& class_weights, const Tensor& row_stats,
                 const Tensor& coefficients, const Tensor& target, bool centroid_to_sample, int64_t ignore_index) {
  STD_TORCH_CHECK(weights.dim() == 2, "ncmi_kernels: weights must have 2 dimensions");
  const Device device(weights);
  const int64_t rows = weights.size(0), classes = weights.size(1), chunks = sum_chunks(rows, classes);
  const int64_t partials = chunks == 1 ? 0 : chunks * classes * kClassWeights;
  Workspace workspace(device, partials);
  with_arithmetic_type(weights.scalar_type(), "weights", [&]<class T>() {
    auto* const sums = reinterpret_cast<ClassWeights*>(
        const_cast<double*>(data_on<double>(class_weights, "class_weights", {classes, kClassWeights}, weights)));
    const ChunkedSumsArgs<T> args{
        .of = {.rows = rows,
               .classes = classes,
               .target = targets(target, weights, ignore_index),
               .stats = stats_on(row_stats, weights),
               .coefficients = coefficients_on(coefficients, weights),
               .centroid_to_sample = centroid_to_sample,
               .weights = const_cast<T*>(data<T>(weights, "weights", {rows, classes})),
               .sums = sums},
        .chunks = chunks,
        .partials = workspace.take<ClassWeights>(partials)};
    const int64_t tiles = ceil_div(classes, kWarp);
    launch(focus_sums_kernel<T>, tiles * chunks, dim3(kWarp, kSumWarps), device.stream(), args, tiles);
    if (chunks > 1)
      launch(fold_focus_sums_kernel, ceil_div(classes, kRowsPerBlock), dim3(kWarp, kRowsPerBlock), device.stream(),
             args.partials, chunks, classes, sums);
  });
}

}  // namespace
}  // namespace ncmi::cuda

STABLE_TORCH_LIBRARY_IMPL(ncmi_kernels, CUDA, m) {
  m.impl("focus_table", TORCH_BOX(&ncmi::cuda::focus_table));
  m.impl("focus_rows", TORCH_BOX(&ncmi::cuda::focus_rows));
  m.impl("focus_nearest", TORCH_BOX(&ncmi::cuda::focus_nearest));
  m.impl("focus_weights_", TORCH_BOX(&ncmi::cuda::focus_weights_));
  m.impl("focus_sums_", TORCH_BOX(&ncmi::cuda::focus_sums_));
}
