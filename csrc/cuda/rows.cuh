// One row against its own centroid and against all of them: sums, terms, gradient.
//
// A row belongs to a warp, or to a block. Up to 8192 columns its features stay in registers between the passes over
// them; longer rows, and those that cannot be read in 16 bytes, are read again by each pass, mostly from the L1 cache.
#pragma once

#include "common.cuh"

namespace ncmi::cuda {

constexpr int kKept = 16;              // elements of a row that a thread keeps in registers
constexpr int kElementsPerThread = 8;  // what a thread gets at least of a row that is read again
constexpr int kRowsPerBlock = 4;       // that a warp each takes
// Threads of a block: what they need of registers leaves room for no more. (The 1 in __launch_bounds__ has ptxas give
// them what they need; without it, it spills a few to fit more blocks.)
template <class In, class T, int kept>
constexpr int kMostThreads = kept || sizeof(In) == 2 || kSame<T, double> ? 512 : 1024;
template <class In, class T, int kept>
constexpr int kRegisters = kept || sizeof(In) == 2 || kSame<T, double> ? 96 : 64;
template <class In, class T, int kept, bool centroid_to_sample>  // sm_80 would spill two
constexpr int kTermsRegisters = kRegisters<In, T, kept> + (kept && centroid_to_sample && sizeof(In) == 2 ? 8 : 0);

struct RowShape {
  int threads, rows_per_block;
};

inline RowShape row_shape(int64_t columns, int64_t elements_per_thread, int most_threads) {
  const int64_t warps = ceil_div(ceil_div(columns, elements_per_thread), kWarp);
  const int threads = int(min(warps * kWarp, most_threads));
  return {threads, threads == kWarp ? kRowsPerBlock : 1};
}

// The row of this thread, and the threads it shares it with. Threads of a block that share a row run the same way
// through all that follows, barriers included, as everything they branch on is the same for all of them.
NCMI_DEVICE int64_t row_of_thread() { return int64_t(blockIdx.x) * blockDim.y + threadIdx.y; }
NCMI_DEVICE Group group_of_thread(GroupStorage& storage) {
  return {int(threadIdx.x), int(blockDim.x), &storage};
}

// A row of features less the centre. `kept` elements a thread are in registers, for 0 none.
template <class In, class T, int kept>
struct Row {
  static constexpr int width = kWidth<In>;          // elements that a thread loads at once
  static constexpr int part = width > 4 ? 4 : width;  // and those that it works on at once
  static constexpr bool streamed = kept == 0;

  const Matrix& input;
  int64_t i;
  const T* center;
  int columns;
  Group& group;
  T x[streamed ? 1 : kept];

  NCMI_DEVICE Row(const Matrix& input, int64_t i, const T* center, int64_t columns, Group& group)
      : input(input), i(i), center(center), columns(int(columns)), group(group) {
    if constexpr (!streamed) {
#pragma unroll
      for (int j = 0; j < kept / width; ++j)
        if (column(j) < this->columns) load_input<In, true>(input, i, column(j), x + j * width);
      if (center) {
#pragma unroll
        for (int j = 0; j < kept / width; ++j)
          if (column(j) < this->columns) subtract_center(column(j), x + j * width);
      }
    }
  }

  NCMI_DEVICE int column(int j) const { return (j * group.threads + group.thread) * width; }

  NCMI_DEVICE void subtract_center(int k, T* value) const {
    T c[width];
    load_values<width, false>(center + k, c);
#pragma unroll
    for (int v = 0; v < width; ++v) value[v] -= c[v];
  }

  // f(k, x) for each `part` of the thread's columns, the first of which is k.
  template <class F>
  NCMI_DEVICE void each(const F& f) {
    each_stretch([&](int, int k, const T* value) NCMI_INLINED {
#pragma unroll
      for (int v = 0; v < width; v += part) f(k + v, value + v);
    });
  }

  // f(j, k, x) for each of the thread's stretches of `width` columns: the j-th, from column k.
  template <class F>
  NCMI_DEVICE void each_stretch(const F& f) {
    if constexpr (streamed) {
#pragma unroll 1
      for (int j = 0, k = column(0); k < columns; ++j, k += group.threads * width) {
        T value[width];
        load_input<In, false>(input, i, k, value);
        if (center) subtract_center(k, value);
        f(j, k, value);
      }
    } else {
#pragma unroll
      for (int j = 0; j < kept / width; ++j)
        if (column(j) < columns) f(j, column(j), x + j * width);
    }
  }
};

// A sum of a thread: of a few elements in T, or of many of them in double.
template <class R, class T>
struct ThreadSum;
template <class In, class T, int kept>
struct ThreadSum<Row<In, T, kept>, T> {
  T value = 0;
};
template <class In, class T>
struct ThreadSum<Row<In, T, 0>, T> {
  double value = 0;
};

template <class T, class R>
NCMI_DEVICE Size<T> size_of(R& row) {
  ThreadSum<R, T> squares;
  decltype(magnitude_bits(T())) largest = 0;
  row.each([&](int, const T* x) NCMI_INLINED {
    T sum = 0;
#pragma unroll
    for (int v = 0; v < R::part; ++v) {
      const auto bits = magnitude_bits(x[v]);
      sum += x[v] * x[v];
      largest = bits > largest ? bits : largest;
    }
    squares.value += sum;
  });
  return {row.group.sum(squares.value), bit_cast<T>(row.group.maximum(largest))};
}

// ||x||_2 from the plain sum of squares, which is redone of smaller numbers only where it overflowed; where it
// underflows the caller's kSmallestLength hides it.
template <class T, class R>
NCMI_DEVICE double norm_of(R& row, const Size<T>& size) {
  if (size.squares < double(kLargest<T>)) return double(sqrt(T(size.squares)));
  // A power of two: small enough for any number of squares, and what it lets underflow is nothing beside the largest.
  constexpr T factor = kSame<T, float> ? T(0x1p-96) : T(0x1p-600);
  ThreadSum<R, T> squares;
  row.each([&](int, const T* x) NCMI_INLINED {
    T sum = 0;
#pragma unroll
    for (int v = 0; v < R::part; ++v) sum += (x[v] * factor) * (x[v] * factor);
    squares.value += sum;
  });
  return sqrt(row.group.sum(squares.value)) * (kSame<T, float> ? 0x1p96 : 0x1p600);
}

template <class T, class R>
NCMI_DEVICE T largest_of(R& row) {
  T largest = -kLargest<T>;
  row.each([&](int, const T* x) NCMI_INLINED {
#pragma unroll
    for (int v = 0; v < R::part; ++v) largest = x[v] > largest ? x[v] : largest;
  });
  return row.group.maximum(largest);
}

// Zero, or NaN where an element is NaN or infinite: added to a row's normaliser it carries them to the loss, which
// the saturating sigmoid would hide. A finite sum of squares tells that there is none.
template <class T, class R>
NCMI_DEVICE double poison(R& row, double squares) {
  if (squares < double(kLargest<T>)) return 0;
  T sum = 0;
  row.each([&](int, const T* x) NCMI_INLINED {
#pragma unroll
    for (int v = 0; v < R::part; ++v) sum += x[v] * T(0);
  });
  return row.group.sum(sum);
}

// -------------------------------------------------------------------------------------------------------------
// Sums
// -------------------------------------------------------------------------------------------------------------

// What one row is compared with.
template <class T>
struct Own {
  const T* log;         // log a(xi_y)
  const T* activation;  // a(xi_y); centroid_to_sample only
  const T* reference;   // what log a is compared with, for all classes at once
  const T* q_mean;      // mean of q over classes; centroid_to_sample only
  double log_norm;      // of a(xi_y)
  const AllStats* all;  // not a number of it, which would take registers through all the sums
};

template <bool centroid_to_sample, class T>
NCMI_DEVICE Own<T> own_of(const Centroids<T>& q, int64_t y) {
  return {q.log_activation + y * q.columns, centroid_to_sample ? q.activation + y * q.columns : nullptr, q.reference,
          q.reference + q.columns, q.of[y].log_norm, &q.all()};
}

template <Kind kind, bool centroid_to_sample, bool fast, class T, class R>
NCMI_DEVICE RowSums sum_row(R& row, const Own<T>& of, double scale, T shift) {
  // S has sums of double, as its rounding would enter the loss in first order; near, of the excess of sigma over 1/2,
  // it is small, and so is its rounding.
  constexpr bool norm_in_double = !is_near(kind) && !fast;
  ThreadSum<R, T> excess, own, all, own_cross;
  double norm = 0;
  const T s = argument_scale<kind, T>(scale);
  row.each([&](int k, const T* x) NCMI_INLINED {
    T own_log[R::part], reference[R::part], own_activation[R::part], q_mean[R::part];
    load_values<R::part, true>(of.log + k, own_log);
    load_values<R::part, false>(of.reference + k, reference);
    if constexpr (centroid_to_sample) {
      load_values<R::part, true>(of.activation + k, own_activation);
      load_values<R::part, false>(of.q_mean + k, q_mean);
    }
    T sum_excess = 0, sum_own = 0, sum_all = 0, sum_cross = 0;
#pragma unroll
    for (int v = 0; v < R::part; ++v) {
      T weight, log, t;  // near: twice a, and t = 2 a - 1
      if constexpr (is_near(kind)) {
        const NearActivation a = near<kind>(x[v] * s);
        t = a.excess;
        sum_excess += t;
        weight = T(1) + t;
        log = a.log;
      } else {
        const Activation<T> a = activate<kind, fast>(x[v], s, shift);
        if constexpr (norm_in_double)
          norm += double(a.value);
        else
          sum_excess += a.value;
        weight = a.value;
        log = a.log;
      }
      const T d_own = log - own_log[v];
      // A reference of nearly one number in all columns, taken from logarithms of one size, would round alike in all.
      const T d_all = is_near(kind) ? log : log - reference[v];
      sum_own += weight * d_own;
      if constexpr (centroid_to_sample) {
        sum_all += q_mean[v] * d_all;
        sum_cross += own_activation[v] * d_own;
      } else {
        sum_all += weight * d_all;
        if constexpr (is_near(kind)) sum_all -= t * reference[v];
      }
    }
    excess.value += sum_excess;
    own.value += sum_own;
    all.value += sum_all;
    own_cross.value += sum_cross;
  });
  // So have the others over threads, but near: where every logarithm is about -1.5, say, they are large, and what is
  // made of them is not.
  const auto over_warp = [](auto sum) NCMI_INLINED {
    if constexpr (norm_in_double)
      return warp_sum(double(sum));
    else
      return double(warp_sum(sum));
  };
  double total[4] = {norm_in_double ? warp_sum(norm) : double(warp_sum(excess.value)), over_warp(own.value),
                     over_warp(all.value), centroid_to_sample ? over_warp(own_cross.value) : 0.0};
  if constexpr (centroid_to_sample) {
    row.group.sum_warps(total);
  } else {
    double three[3] = {total[0], total[1], total[2]};
    row.group.sum_warps(three);
    for (int j = 0; j < 3; ++j) total[j] = three[j];
  }
  if constexpr (is_near(kind))  // sigma = (1 + excess) / 2
    return {0.5 * (double(row.columns) + total[0]), 0.5 * total[1],
            (centroid_to_sample ? 1.0 : 0.5) * (total[2] - of.all->reference_sum), total[3]};
  return {total[0], total[1], total[2], total[3]};
}

// How a row is scaled and activated, and its sums so.
template <class T>
struct Summed {
  double scale, inverse_length;
  Kind kind;
  T shift;
  RowSums sums;
};

template <bool centroid_to_sample, bool fast, class T, class R>
NCMI_DEVICE Summed<T> sum_row_stable(R& row, const Own<T>& of, const Features& features) {
  const Size<T> size = size_of<T>(row);
  Summed<T> result;
  result.scale = features.inverse_temperature;
  result.inverse_length = 0;
  if (features.l2_normalize) {
    const double length = norm_of(row, size);
    const bool floored = length < kSmallestLength;
    double inverse;
    if (kSame<T, float> && length < double(kLargest<float>))
      inverse = double(1.0f / float(floored ? kSmallestLength : length));
    else
      inverse = 1.0 / (floored ? kSmallestLength : length);
    result.scale *= inverse;
    result.inverse_length = floored ? 0 : inverse;
  }
  result.kind = first_kind<T>(features.softmax, size.largest * T(result.scale));
  result.shift = features.softmax ? largest_of<T>(row) : T(0);
  const auto sum_as = [&]<Kind kind>() NCMI_INLINED {
    result.sums = sum_row<kind, centroid_to_sample, fast>(row, of, result.scale, result.shift);
  };
  if constexpr (kHasNear<T>) {
    if (result.kind == Kind::kNsfNearest) sum_as.template operator()<Kind::kNsfNearest>();
    if (result.kind == Kind::kNsfNear) sum_as.template operator()<Kind::kNsfNear>();
  }
  if (result.kind == Kind::kNsf) {
    sum_as.template operator()<Kind::kNsf>();
    if (may_be_shifted(result.sums.norm, row.columns)) {
      const T largest = largest_of<T>(row);
      if (largest * T(result.scale) <= T(kShifted)) {
        result.kind = Kind::kNsfShifted;
        result.shift = largest;
      }
    }
  }
  if (result.kind == Kind::kNsfShifted) sum_as.template operator()<Kind::kNsfShifted>();
  if (result.kind == Kind::kSoftmax) sum_as.template operator()<Kind::kSoftmax>();
  result.sums.norm += poison<T>(row, size.squares);
  return result;
}

// What the sums of a row add to its statistics.
NCMI_DEVICE void complete(RowStats& stats, const RowTerms& terms) {
  stats.inverse_norm = terms.inverse_norm;
  stats.own_mean = terms.own_mean;
  stats.all_mean = terms.all_mean;
}

// Rounded before it is added to anything: a gradient is then the same, formed here or from what is left in memory.
NCMI_DEVICE double product(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

// What the rows weigh: class weights [C] or null.
template <class T>
struct Weights {
  const T* by_class;
  const double* total;  // the sum over the rows, by which each is divided; null for a sum
};

template <class T>
NCMI_DEVICE double weight_of(const Weights<T>& weights, int64_t y) {
  return weights.by_class ? double(weights.by_class[y]) : 1.0;
}

// -------------------------------------------------------------------------------------------------------------
// Gradient. Forms p again: with the sums of the row known that is one pass.
// -------------------------------------------------------------------------------------------------------------

// Of `width` columns from k, which x are of.
template <int width, bool centroid_to_sample, bool fast, Kind kind, class T>
NCMI_DEVICE void gradient_at(const RowGradient<centroid_to_sample, kind, T>& gradient, const Own<T>& of, int k,
                             const T* x, T* grad) {
  T own_log[width], own_activation[width] = {}, reference[width];
  load_values<width, true>(of.log + k, own_log);
  if constexpr (centroid_to_sample) load_values<width, true>(of.activation + k, own_activation);
  load_values<width, false>((centroid_to_sample ? of.q_mean : of.reference) + k, reference);
#pragma unroll
  for (int v = 0; v < width; ++v)
    grad[v] = gradient.template at<fast>(x[v], own_log[v], own_activation[v], reference[v]);
}

// d loss / d z of a row. Where the length counts, through x / ||x|| as well: g - x (x . g) / ||x||^2, where the square
// may underflow.
template <bool centroid_to_sample, bool fast, class In, class T, int kept>
NCMI_DEVICE void grad_of_row(Row<In, T, kept>& row, const Own<T>& of, const RowStats& stats,
                             const Coefficients& coefficients, void* out) {
  using R = Row<In, T, kept>;
  const int64_t offset = row.i * row.columns;
  const double own_inverse_norm = centroid_to_sample ? ::exp(-of.log_norm) : 1.0;
  with_kind<T>(kind_of(stats.kind), [&]<Kind kind>() NCMI_INLINED {
    const RowGradient<centroid_to_sample, kind, T> gradient(stats, coefficients, own_inverse_norm);
    T grad[R::streamed ? 1 : kept];
    ThreadSum<R, T> dot;
    if (!R::streamed || stats.inverse_length != 0) {
      row.each_stretch([&](int j, int k, const T* x) NCMI_INLINED {
        T stretch[R::width];
        T* g = R::streamed ? stretch : grad + j * R::width;
#pragma unroll
        for (int v = 0; v < R::width; v += R::part)
          gradient_at<R::part, centroid_to_sample, fast>(gradient, of, k + v, x + v, g + v);
        T sum = 0;
#pragma unroll
        for (int v = 0; v < R::width; ++v) sum += x[v] * g[v];
        dot.value += sum;
      });
    }
    const T inverse_length = T(stats.inverse_length);
    T share = 0;
    if (stats.inverse_length != 0) share = T(row.group.sum(dot.value) * stats.inverse_length);
    row.each_stretch([&](int j, int k, const T* x) NCMI_INLINED {
      T g[R::width];
      if constexpr (R::streamed) {
#pragma unroll
        for (int v = 0; v < R::width; v += R::part)
          gradient_at<R::part, centroid_to_sample, fast>(gradient, of, k + v, x + v, g + v);
      } else {
#pragma unroll
        for (int v = 0; v < R::width; ++v) g[v] = grad[j * R::width + v];
      }
#pragma unroll
      for (int v = 0; v < R::width; ++v) g[v] -= (x[v] * inverse_length) * share;
      store_output<In, R::width>(out, row.input.dtype, offset + k, g);
    });
  });
}

// What an ignored row gets.
template <class In, class T>
NCMI_DEVICE void zero_row(const Group& group, const Matrix& input, int64_t i, int64_t columns, void* out) {
  constexpr int width = kWidth<In>;
  const T zero[width] = {};
  for (int k = group.thread * width; k < columns; k += group.threads * width)
    store_output<In, width>(out, input.dtype, i * columns + k, zero);
}

// -------------------------------------------------------------------------------------------------------------
// Which of them
// -------------------------------------------------------------------------------------------------------------

template <class In>
struct InputTag {
  using type = In;
};
template <int kept>
struct KeptTag {
  static constexpr int value = kept;
};

// Calls f with the input type and what a thread keeps of a row: in registers, if it fits and can be read in 16 bytes.
template <class T, class F>
void with_row_kernel(const Matrix& input, int64_t columns, bool can_be_wide, const F& f) {
  if constexpr (kSame<T, float>) {
    if (can_be_wide && aligned(input, columns)) {
      const auto with_kept = [&](auto in) {
        if (columns <= kKept * kMostThreads<float, T, kKept>)
          f(in, KeptTag<kKept>());
        else
          f(in, KeptTag<0>());
      };
      if (input.dtype == Dtype::kFloat32) return with_kept(InputTag<float>());
      if (input.dtype == Dtype::kBFloat16) return with_kept(InputTag<BFloat16>());
      return with_kept(InputTag<Float16>());
    }
  }
  f(InputTag<Any>(), KeptTag<0>());
}

template <class In, int kept, template <class> class Args, class T>
void launch_rows(void (*kernel)(Args<T>), const Args<T>& args, int64_t columns, Stream stream) {
  const RowShape shape =
      row_shape(columns, kept ? kept : kElementsPerThread * kWidth<In>, kMostThreads<In, T, kept>);
  launch(kernel, ceil_div(args.rows, shape.rows_per_block), dim3(shape.threads, shape.rows_per_block), stream, args);
}

template <class T>
bool aligned(const Centroids<T>& q) {
  return aligned(q.log_activation) && aligned(q.activation) && aligned(q.reference);
}

}  // namespace ncmi::cuda
