// The CPU kernels. Included once for each instruction set by kernels_{default,avx2,avx512}.cpp, which define
// NCMI_KERNEL_TABLE and NCMI_KERNEL_NAME and set the compiler's target before the include.
//
// Loops marked NCMI_SIMD are vectorised by the compiler; the reductions named there may be reassociated, nothing
// else may. Long sums run in blocks of kBlock elements of T, each added to a double: the normaliser S, whose
// rounding would enter the loss in first order, is summed in double throughout.

#include "../ncmi_math.h"
#include "kernels.h"

#define NCMI_PRAGMA(x) _Pragma(#x)
#define NCMI_SIMD(...) NCMI_PRAGMA(omp simd __VA_ARGS__)

namespace ncmi::cpu {
namespace {

constexpr int64_t kBlock = 512;  // elements of a sum in T before it goes to a double
// Columns that an owner of columns works on at once: long enough stretches of a row for the prefetcher, short
// enough for the sums to stay in cache.
constexpr int64_t kColumnBlock = 2048;
constexpr double kSmallestLength = 1e-12;  // as torch.nn.functional.normalize

template <class T>
constexpr T kLargest = T(0);
template <>
constexpr float kLargest<float> = 3.4028234e38f;
template <>
constexpr double kLargest<double> = 1.7976931348623157e308;

constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

// -------------------------------------------------------------------------------------------------------------
// Reading and writing the low-precision types. Written out here because loops over them must vectorise.
// -------------------------------------------------------------------------------------------------------------

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

NCMI_INLINE float widen(float x) { return x; }
NCMI_INLINE double widen(double x) { return x; }
NCMI_INLINE float widen(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
NCMI_INLINE float widen(Float16 x) {
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  const float finite = bit_cast<float>(magnitude) * 5.192296858534828e33f;  // 2^112 moves the exponent bias
  const uint32_t special = magnitude | 0x7f800000u;                         // inf and NaN keep their mantissa
  const uint32_t bits = magnitude >= 0x0f800000u ? special : bit_cast<uint32_t>(finite);
  return bit_cast<float>(bits | (uint32_t(x.bits & 0x8000u) << 16));
}

template <class To, class T>
NCMI_INLINE To narrow(T x);
template <>
inline __attribute__((always_inline)) float narrow<float, float>(float x) {
  return x;
}
template <>
inline __attribute__((always_inline)) double narrow<double, double>(double x) {
  return x;
}
template <>
inline __attribute__((always_inline)) BFloat16 narrow<BFloat16, float>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  return {uint16_t(x != x ? 0x7fc0u : rounded)};
}
template <>
inline __attribute__((always_inline)) Float16 narrow<Float16, float>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Normal results: round the mantissa to 10 bits and move the bias. Subnormal ones: adding 0.5 lines the last bit
  // of a float up with 2^-24, the unit of a half, so the addition does the rounding.
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = half > 0x7c00u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return {uint16_t(half | ((bits >> 16) & 0x8000u))};
}

// -------------------------------------------------------------------------------------------------------------
// A stretch of one row, centred, in the arithmetic type.
// -------------------------------------------------------------------------------------------------------------

// Leaves x = z - center and returns the sum of its squares.
template <class In, class T>
double load_as(const Matrix& m, int64_t row, int64_t begin, int64_t n, const T* center, T* __restrict x) {
  const In* __restrict in = static_cast<const In*>(m.data) + row * m.row_stride + begin * m.column_stride;
  const int64_t stride = m.column_stride;
  double total = 0;
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t last = min(n, first + kBlock);
    T squares = 0;
    if (stride == 1 && center) {
      NCMI_SIMD(reduction(+ : squares))
      for (int64_t k = first; k < last; ++k) {
        x[k] = T(widen(in[k])) - center[begin + k];
        squares += x[k] * x[k];
      }
    } else if (stride == 1) {
      NCMI_SIMD(reduction(+ : squares))
      for (int64_t k = first; k < last; ++k) {
        x[k] = T(widen(in[k]));
        squares += x[k] * x[k];
      }
    } else {
      for (int64_t k = first; k < last; ++k) {
        x[k] = T(widen(in[k * stride])) - (center ? center[begin + k] : T(0));
        squares += x[k] * x[k];
      }
    }
    total += double(squares);
  }
  return total;
}

template <class T>
double load(const Matrix& m, int64_t row, int64_t begin, int64_t n, const T* center, T* x) {
  switch (m.dtype) {
    case Dtype::kFloat32: return load_as<float>(m, row, begin, n, center, x);
    case Dtype::kFloat64: return load_as<double>(m, row, begin, n, center, x);
    case Dtype::kBFloat16: return load_as<BFloat16>(m, row, begin, n, center, x);
    case Dtype::kFloat16: return load_as<Float16>(m, row, begin, n, center, x);
  }
  return 0;
}

// ||x||_2 from the plain sum of squares, which is redone, scaled by the largest element, only where it overflowed;
// where it underflows the caller's kSmallestLength hides it. An inf or a NaN in the row makes it NaN.
template <class T>
double norm(const T* x, int64_t n, double squares) {
  if (squares < double(kLargest<T>)) return sqrt(squares);
  T largest = 0;
  for (int64_t k = 0; k < n; ++k) largest = absolute(x[k]) > largest ? absolute(x[k]) : largest;
  double total = 0;
  for (int64_t k = 0; k < n; ++k) {
    const double ratio = double(x[k]) / double(largest);
    total += ratio * ratio;
  }
  return double(largest) * sqrt(total);
}

// -------------------------------------------------------------------------------------------------------------
// Row activation: which of the formulas, with the shift of the row where it needs one.
// -------------------------------------------------------------------------------------------------------------

enum class Kind { kNsf, kNsfShifted, kSoftmax };

template <Kind kind, class T>
NCMI_INLINE Activation<T> activate(T f, T shift) {
  if constexpr (kind == Kind::kNsf) return nsf(f);
  if constexpr (kind == Kind::kNsfShifted) return nsf_shifted(f, shift);
  if constexpr (kind == Kind::kSoftmax) return softmax(f, shift);
}

template <class T>
T scaled_max(const T* x, int64_t n, T scale) {
  T largest = x[0];
  NCMI_SIMD(reduction(max : largest))
  for (int64_t k = 0; k < n; ++k) largest = x[k] > largest ? x[k] : largest;
  return largest * scale;  // scale > 0
}

// Zero, or NaN where an element is NaN or infinite: added to a row's normaliser it carries them to the loss, which
// the saturating sigmoid would hide. A finite sum of squares tells that there is none.
template <class T>
T poison(const T* x, int64_t n, double squares) {
  T sum = 0;
  if (squares < double(kLargest<T>)) return sum;
  NCMI_SIMD(reduction(+ : sum))
  for (int64_t k = 0; k < n; ++k) sum += x[k] * T(0);
  return sum;
}

// -------------------------------------------------------------------------------------------------------------
// Terms: A_i, G_i and their directions d A_i / d z_i, d G_i / d z_i.
// -------------------------------------------------------------------------------------------------------------

struct RowSums {
  double norm;       // S = sum a
  double own;        // sum a (log a - log a(xi_y))
  double all;        // sum a (log a - reference), or sum q_mean (log a - reference)
  double own_cross;  // sum a(xi_y) (log a - log a(xi_y)); centroid_to_sample only
  // Weighted with x * slope, for the chain rule of the length; sample_to_centroid only.
  double x_norm;     // sum x a slope
  double x_own;      // sum x a slope (log a - log a(xi_y))
  double x_all;      // sum x a slope (log a - reference)
};

// What the pass over a row leaves beside its sums.
enum class Keep { kNothing, kAll, kAllAndDots };

// The pointers of one row, or of a stretch of it.
template <class T>
struct Row {
  const T* x;               // z - center
  const T* own_log;         // log a(xi_y)
  const T* own_activation;  // a(xi_y); centroid_to_sample only
  const T* reference;       // what log a is compared with, for all classes at once
  const T* q_mean;          // mean of q over classes; centroid_to_sample only
  T* value;                 // out: a * slope; a for centroid_to_sample
  T* slope;                 // out; centroid_to_sample only
  T* log;                   // out: log a
};

// The one pass over a row that needs exponentials, over `n` elements. A tail shorter than a vector comes padded to
// one, with a `mask` of ones and zeros.
template <Kind kind, bool centroid_to_sample, Keep keep, bool masked, class T>
NCMI_INLINE void sum_stretch(const Row<T>& row, int64_t n, const T* mask, T scale, T shift, RowSums& sums) {
  const T* __restrict x = row.x;
  const T* __restrict own_log = row.own_log;
  const T* __restrict own_activation = row.own_activation;
  const T* __restrict reference = row.reference;
  const T* __restrict q_mean = row.q_mean;
  T* __restrict value = row.value;
  T* __restrict slope = row.slope;
  T* __restrict log = row.log;
  double norm = 0;
  T own = 0, all = 0, own_cross = 0, x_norm = 0, x_own = 0, x_all = 0;
  NCMI_SIMD(reduction(+ : norm, own, all, own_cross, x_norm, x_own, x_all))
  for (int64_t k = 0; k < n; ++k) {
    const Activation<T> a = activate<kind>(x[k] * scale, shift);
    const T weight = masked ? a.value * mask[k] : a.value;
    const T d_own = a.log - own_log[k];
    const T d_all = a.log - reference[k];
    norm += double(weight);
    own += weight * d_own;
    if constexpr (centroid_to_sample) {
      all += (masked ? q_mean[k] * mask[k] : q_mean[k]) * d_all;
      own_cross += (masked ? own_activation[k] * mask[k] : own_activation[k]) * d_own;
    } else {
      all += weight * d_all;
    }
    if constexpr (keep == Keep::kAllAndDots && !centroid_to_sample) {
      const T x_slope = (masked ? x[k] * mask[k] : x[k]) * a.value_slope;
      x_norm += x_slope;
      x_own += x_slope * d_own;
      x_all += x_slope * d_all;
    }
    if constexpr (keep != Keep::kNothing) {
      value[k] = centroid_to_sample ? a.value : a.value_slope;
      if constexpr (centroid_to_sample) slope[k] = a.slope;
      log[k] = a.log;
    }
  }
  sums.norm += norm;
  sums.own += double(own);
  sums.all += double(all);
  sums.own_cross += double(own_cross);
  sums.x_norm += double(x_norm);
  sums.x_own += double(x_own);
  sums.x_all += double(x_all);
}

template <class T>
Row<T> advance(const Row<T>& row, int64_t k) {
  return {row.x + k,         row.own_log + k,         row.own_activation ? row.own_activation + k : nullptr,
          row.reference + k, row.q_mean + k,          row.value + k,
          row.slope + k,     row.log + k};
}

template <Kind kind, bool centroid_to_sample, Keep keep, class T>
__attribute__((noinline)) RowSums sum_row(const Row<T>& row, int64_t n, T scale, T shift) {
  constexpr int64_t kLanes = 64 / sizeof(T);
  RowSums sums{};
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t begin = 0; begin < whole; begin += kBlock)
    sum_stretch<kind, centroid_to_sample, keep, false>(advance(row, begin), min(whole - begin, kBlock),
                                                       static_cast<const T*>(nullptr), scale, shift, sums);
  if (whole == n) return sums;

  // A scalar loop over the tail would cost as much as several vectors: run it as one more vector, padded with
  // copies of the last element, which the mask leaves out of the sums.
  T x[kLanes], own_log[kLanes], own_activation[kLanes], reference[kLanes], q_mean[kLanes], mask[kLanes];
  T value[kLanes], slope[kLanes], log[kLanes];
  for (int64_t k = 0; k < kLanes; ++k) {
    const int64_t from = min(whole + k, n - 1);
    x[k] = row.x[from];
    own_log[k] = row.own_log[from];
    reference[k] = row.reference[from];
    if (centroid_to_sample) {
      own_activation[k] = row.own_activation[from];
      q_mean[k] = row.q_mean[from];
    }
    mask[k] = whole + k < n ? T(1) : T(0);
  }
  sum_stretch<kind, centroid_to_sample, keep, true>(
      Row<T>{x, own_log, own_activation, reference, q_mean, value, slope, log}, kLanes, mask, scale, shift, sums);
  if (keep != Keep::kNothing) {
    for (int64_t k = whole; k < n; ++k) {
      row.value[k] = value[k - whole];
      if (centroid_to_sample) row.slope[k] = slope[k - whole];
      row.log[k] = log[k - whole];
    }
  }
  return sums;
}

// Sums of the row under the activation that it needs. `shift` is what its log a was shifted by.
template <bool centroid_to_sample, Keep keep, class T>
RowSums sum_row_stable(const Row<T>& row, int64_t n, T scale, bool is_softmax, T* shift) {
  *shift = T(0);
  if (is_softmax) {
    *shift = scaled_max(row.x, n, scale);
    return sum_row<Kind::kSoftmax, centroid_to_sample, keep>(row, n, scale, *shift);
  }
  const RowSums sums = sum_row<Kind::kNsf, centroid_to_sample, keep>(row, n, scale, T(0));
  if (sums.norm > double(smallest_plain_sum<T>())) return sums;
  *shift = scaled_max(row.x, n, scale);
  return sum_row<Kind::kNsfShifted, centroid_to_sample, keep>(row, n, scale, *shift);
}

template <class T>
struct Gradients {
  T first, second;  // d A / d f and d G / d f; or d (A / (G + eps)) / d f and nothing
};

// The gradients of one row, element by element.
template <bool centroid_to_sample, bool combined, class T>
struct RowGradient {
  const T* __restrict own_log;
  const T* __restrict own_activation;
  const T* __restrict reference;
  const T* __restrict q_mean;
  const T* __restrict value;
  const T* __restrict slope;
  const T* __restrict log;
  T inverse_norm, own_inverse_norm, own_mean, all_mean, inverse_classes, d_concentration, d_separation;

  static RowGradient make(const Row<T>& row, const RowSums& sums, double own_norm, T inverse_classes,
                               const Ratio& r) {
    return {row.own_log, row.own_activation, row.reference, row.q_mean, row.value, row.slope, row.log,
            T(1.0 / sums.norm), T(1.0 / own_norm), T(sums.own / sums.norm), T(sums.all / sums.norm),
            inverse_classes, T(r.d_concentration), T(r.d_separation)};
  }

  inline __attribute__((always_inline)) Gradients<T> operator()(int64_t k) const {
    const T own = log[k] - own_log[k];
    T a, g;
    if constexpr (centroid_to_sample) {
      const T p = value[k] * inverse_norm;
      a = concentration_gradient(slope[k] * p, own, own_mean);
      g = separation_gradient_centroid(slope[k], p, q_mean[k], own_activation[k] * own_inverse_norm,
                                       inverse_classes);
    } else {
      const T slope_p = value[k] * inverse_norm;
      a = concentration_gradient(slope_p, own, own_mean);
      g = separation_gradient_sample(slope_p, log[k] - reference[k], all_mean, own, own_mean, inverse_classes);
    }
    if constexpr (combined) return {d_concentration * a + d_separation * g, T(0)};
    return {a, g};
  }
};

// Writes a row's directions: its gradients through the scaling and, where `length` > 0, through the division by
// ||x||: scale (g - x (x . g) / ||x||^2).
template <bool centroid_to_sample, bool combined, class T>
void directions(const Row<T>& row, int64_t n, const RowSums& sums, double own_norm, T inverse_classes, T scale,
                double length, const Ratio& r, T* __restrict first, T* __restrict second) {
  const auto gradient =
      RowGradient<centroid_to_sample, combined, T>::make(row, sums, own_norm, inverse_classes, r);
  if (!(length > 0)) {
    NCMI_SIMD()
    for (int64_t k = 0; k < n; ++k) {
      const Gradients<T> g = gradient(k);
      first[k] = scale * g.first;
      if constexpr (!combined) second[k] = scale * g.second;
    }
    return;
  }

  const T* __restrict x = row.x;
  double first_dot = 0, second_dot = 0;
  if constexpr (centroid_to_sample) {
    for (int64_t begin = 0; begin < n; begin += kBlock) {
      const int64_t end = min(n, begin + kBlock);
      T u = 0, v = 0;
      NCMI_SIMD(reduction(+ : u, v))
      for (int64_t k = begin; k < end; ++k) {
        const Gradients<T> g = gradient(k);
        u += x[k] * g.first;
        v += x[k] * g.second;
      }
      first_dot += double(u);
      second_dot += double(v);
    }
  } else {
    // The same sums, from those that the pass over the row took along.
    const double a = (sums.x_own - sums.x_norm * (sums.own / sums.norm)) / sums.norm;
    const double g =
        (sums.x_all - sums.x_norm * (sums.all / sums.norm)) / sums.norm - double(inverse_classes) * a;
    first_dot = combined ? r.d_concentration * a + r.d_separation * g : a;
    second_dot = g;
  }
  const T first_share = T(first_dot / length / length), second_share = T(second_dot / length / length);
  NCMI_SIMD()
  for (int64_t k = 0; k < n; ++k) {
    const Gradients<T> g = gradient(k);
    first[k] = scale * (g.first - x[k] * first_share);
    if constexpr (!combined) second[k] = scale * (g.second - x[k] * second_share);
  }
}

template <bool centroid_to_sample, class T>
void terms_range(const TermsArgs<T>& args, int64_t row_begin, int64_t row_end, T* scratch) {
  const Centroids<T>& q = args.centroids;
  const int64_t n = q.columns;
  const bool keep = args.direction != nullptr;
  for (int64_t i = row_begin; i < row_end; ++i) {
    const int64_t y = args.target[i];
    T* direction = args.direction ? args.direction + i * n : nullptr;
    T* separation_direction = args.separation_direction ? args.separation_direction + i * n : nullptr;
    if (y == args.target.ignore_index) {
      args.concentration[i] = args.separation[i] = 0;
      args.row_scale[i] = args.row_log_norm[i] = args.row_shift[i] = 0;
      if (direction) memset(direction, 0, n * sizeof(T));
      if (separation_direction) memset(separation_direction, 0, n * sizeof(T));
      continue;
    }

    T* x = scratch;
    const double squares = load(args.input, i, 0, n, args.center, x);
    double scale = 1.0 / args.features.temperature, length = 0;  // a length of 0: no chain rule for it
    if (args.features.l2_normalize) {
      length = norm(x, n, squares);
      if (length < kSmallestLength) {
        scale /= kSmallestLength;
        length = 0;
      } else {
        scale /= length;
      }
    }

    const Row<T> row{x,
                     q.log_activation + y * n,
                     centroid_to_sample ? q.activation + y * n : nullptr,
                     q.reference,
                     q.reference + n,
                     scratch + n,
                     scratch + 2 * n,
                     scratch + 3 * n};
    T shift;
    const bool is_softmax = args.features.softmax;
    RowSums sums =
        !keep        ? sum_row_stable<centroid_to_sample, Keep::kNothing>(row, n, T(scale), is_softmax, &shift)
        : length > 0 ? sum_row_stable<centroid_to_sample, Keep::kAllAndDots>(row, n, T(scale), is_softmax, &shift)
                     : sum_row_stable<centroid_to_sample, Keep::kAll>(row, n, T(scale), is_softmax, &shift);
    sums.norm += double(poison(x, n, squares));

    // KL divergences as differences of logarithms, then of log-normalisers: each difference apart.
    const double log_norm = ::log(sums.norm);
    const double own_gap = log_norm - q.log_norm[y];
    const double concentration = sums.own / sums.norm - own_gap;
    double separation;
    if (centroid_to_sample) {
      const double own_norm = exp(q.log_norm[y]);
      separation = (q.weight_sum * log_norm - q.weighted_log_norm) - sums.all +
                   (sums.own_cross / own_norm - own_gap) / double(q.classes);
    } else {
      separation = sums.all / sums.norm - (log_norm - q.weighted_log_norm) - concentration / double(q.classes);
    }
    args.concentration[i] = concentration;
    args.separation[i] = separation;
    args.row_scale[i] = scale;
    args.row_log_norm[i] = log_norm;
    args.row_shift[i] = double(shift);
    if (!keep) continue;
    const double own_norm = exp(q.log_norm[y]);
    const T inverse_classes = T(1.0 / double(q.classes));
    const Ratio r = ratio(concentration, separation, args.eps);
    if (separation_direction)
      directions<centroid_to_sample, false>(row, n, sums, own_norm, inverse_classes, T(scale), length, r, direction,
                                            separation_direction);
    else
      directions<centroid_to_sample, true>(row, n, sums, own_norm, inverse_classes, T(scale), length, r, direction,
                                           separation_direction);
  }
}

template <class T>
void terms(const TermsArgs<T>& args, int64_t row_begin, int64_t row_end, T* scratch) {
  if (args.centroids.centroid_to_sample)
    terms_range<true>(args, row_begin, row_end, scratch);
  else
    terms_range<false>(args, row_begin, row_end, scratch);
}

// -------------------------------------------------------------------------------------------------------------
// Input gradient: d loss / d z_i from the directions and d loss / d A_i, d loss / d G_i.
// -------------------------------------------------------------------------------------------------------------

template <class Out, class T>
void input_grad_as(const InputGradArgs<T>& args, int64_t row_begin, int64_t row_end) {
  const int64_t n = args.columns;
  for (int64_t i = row_begin; i < row_end; ++i) {
    Out* out = static_cast<Out*>(args.grad) + i * n;
    const T* u = args.direction + i * n;
    const T a = T(args.factor[i]);
    if (args.separation_direction) {
      const T* v = args.separation_direction + i * n;
      const T g = T(args.separation_factor[i]);
      if (a == T(0) && g == T(0)) {
        memset(static_cast<void*>(out), 0, n * sizeof(Out));
        continue;
      }
      NCMI_SIMD()
      for (int64_t k = 0; k < n; ++k) out[k] = narrow<Out>(a * u[k] + g * v[k]);
    } else if (a == T(0)) {
      memset(static_cast<void*>(out), 0, n * sizeof(Out));
    } else {
      NCMI_SIMD()
      for (int64_t k = 0; k < n; ++k) out[k] = narrow<Out>(a * u[k]);
    }
  }
}

void input_grad(const InputGradArgs<float>& args, int64_t row_begin, int64_t row_end) {
  switch (args.grad_dtype) {
    case Dtype::kBFloat16: return input_grad_as<BFloat16>(args, row_begin, row_end);
    case Dtype::kFloat16: return input_grad_as<Float16>(args, row_begin, row_end);
    default: return input_grad_as<float>(args, row_begin, row_end);
  }
}
void input_grad(const InputGradArgs<double>& args, int64_t row_begin, int64_t row_end) {
  input_grad_as<double>(args, row_begin, row_end);
}

// -------------------------------------------------------------------------------------------------------------
// Centroids: log a(xi), a(xi), their normalisers, and the sums over classes that stand in for the loop over them.
// -------------------------------------------------------------------------------------------------------------

template <Kind kind, class T>
double activate_row(const T* __restrict x, int64_t n, T shift, T* __restrict value, T* __restrict log) {
  double norm = 0;
  if (value) {
    NCMI_SIMD(reduction(+ : norm))
    for (int64_t k = 0; k < n; ++k) {
      const Activation<T> a = activate<kind>(x[k], shift);
      norm += double(a.value);
      value[k] = a.value;
      log[k] = a.log;
    }
  } else {
    NCMI_SIMD(reduction(+ : norm))
    for (int64_t k = 0; k < n; ++k) {
      const Activation<T> a = activate<kind>(x[k], shift);
      norm += double(a.value);
      log[k] = a.log;
    }
  }
  return norm;
}

template <class T>
void centroid_rows(const CentroidStatsArgs<T>& args, int64_t class_begin, int64_t class_end, T* x) {
  const int64_t n = args.columns;
  for (int64_t c = class_begin; c < class_end; ++c) {
    T* value = args.activation ? args.activation + c * n : nullptr;
    T* log = args.log_activation + c * n;
    const double squares = load(args.logits, c, 0, n, static_cast<const T*>(nullptr), x);
    double norm;
    T shift = T(0);
    if (args.softmax) {
      shift = scaled_max(x, n, T(1));
      norm = activate_row<Kind::kSoftmax>(x, n, shift, value, log);
    } else {
      norm = activate_row<Kind::kNsf>(x, n, shift, value, log);
      if (!(norm > double(smallest_plain_sum<T>()))) {
        shift = scaled_max(x, n, T(1));
        norm = activate_row<Kind::kNsfShifted>(x, n, shift, value, log);
      }
    }
    args.log_norm[c] = ::log(norm + double(poison(x, n, squares)));
    args.shift[c] = double(shift);
  }
}

// reference [2, M]: row 0 what log a is compared with, row 1 the mean q over classes (centroid_to_sample).
//   sample_to_centroid: the mean over classes of log a(xi);
//   centroid_to_sample: its mean weighted with q.
// What rounding `reference` to T loses goes, weighted, to `residual` [M], for the caller to add to a constant.
template <class T>
void centroid_columns(const CentroidStatsArgs<T>& args, int64_t column_begin, int64_t column_end) {
  double log_mean[kColumnBlock], q_mean[kColumnBlock], norm_mean[kColumnBlock];
  const double inverse_classes = 1.0 / double(args.classes);
  for (int64_t begin = column_begin; begin < column_end; begin += kColumnBlock) {
    const int64_t n = min(kColumnBlock, column_end - begin);
    for (int64_t k = 0; k < n; ++k) log_mean[k] = q_mean[k] = norm_mean[k] = 0;
    for (int64_t c = 0; c < args.classes; ++c) {
      const T* __restrict log = args.log_activation + c * args.columns + begin;
      if (args.centroid_to_sample) {
        const T* __restrict value = args.activation + c * args.columns + begin;
        const double inverse_norm = exp(-args.log_norm[c]), log_norm = args.log_norm[c];
        NCMI_SIMD()
        for (int64_t k = 0; k < n; ++k) {
          const double q = double(value[k]) * inverse_norm;
          q_mean[k] += q;
          log_mean[k] += q * double(log[k]);
          norm_mean[k] += q * log_norm;
        }
      } else {
        NCMI_SIMD()
        for (int64_t k = 0; k < n; ++k) log_mean[k] += double(log[k]);
      }
    }
    for (int64_t k = 0; k < n; ++k) {
      const double reference =
          args.centroid_to_sample ? (q_mean[k] > 0 ? log_mean[k] / q_mean[k] : 0) : log_mean[k] * inverse_classes;
      const T rounded = T(reference), weight = T(q_mean[k] * inverse_classes);
      args.reference[begin + k] = rounded;
      args.reference[args.columns + begin + k] = weight;
      args.residual[begin + k] = reference - double(rounded);
      args.weighted_log_norm[begin + k] = q_mean[k] > 0 ? double(weight) * (norm_mean[k] / q_mean[k]) : 0;
    }
  }
}

// -------------------------------------------------------------------------------------------------------------
// Centroid gradient. First by column blocks, where each owner adds the rows of a class in order; then by class.
// Sums of p and of log p are double: the gradient is their difference from q and log q, which may be near.
// -------------------------------------------------------------------------------------------------------------

Kind kind_of(bool is_softmax, double shift) {
  return is_softmax ? Kind::kSoftmax : shift != 0 ? Kind::kNsfShifted : Kind::kNsf;
}

// Calls f with the activation kind as a template argument.
template <class F>
NCMI_INLINE void with_kind(Kind kind, const F& f) {
  if (kind == Kind::kNsf) return f.template operator()<Kind::kNsf>();
  if (kind == Kind::kNsfShifted) return f.template operator()<Kind::kNsfShifted>();
  return f.template operator()<Kind::kSoftmax>();
}

// own += own_factor * a, total += total_factor * a over a stretch; for centroid_to_sample the totals and a third
// sum take log a instead.
template <bool centroid_to_sample, class T>
struct AddRow {
  const T* __restrict x;
  int64_t n;
  T scale, shift;
  double inverse_norm, own_factor, separation_factor;
  double* __restrict own;
  double* __restrict own_log;
  double* __restrict total;

  template <Kind kind>
  void operator()() const {
    const double factor = own_factor * inverse_norm;
    const double total_factor = centroid_to_sample ? separation_factor : separation_factor * inverse_norm;
    NCMI_SIMD()
    for (int64_t k = 0; k < n; ++k) {
      const Activation<T> a = activate<kind>(x[k] * scale, shift);
      const double value = double(a.value);
      own[k] += factor * value;
      if constexpr (centroid_to_sample) {
        own_log[k] += total_factor * double(a.log);
        total[k] += total_factor * double(a.log);
      } else {
        total[k] += total_factor * value;
      }
    }
  }
};

// At the end of a class: grad = sum_i own_factor_i (p_ik - q_ck), and for centroid_to_sample
// own_separation = sum_i beta_i (log a_ik - log a_ck).
template <class T>
struct FinishClass {
  const T* __restrict x;
  int64_t n;
  T shift;
  double inverse_norm, own_factor_sum, separation_grad_sum;
  const double* __restrict own;
  const double* __restrict own_log;
  T* __restrict grad;
  T* __restrict own_separation;

  template <Kind kind>
  void operator()() const {
    NCMI_SIMD()
    for (int64_t k = 0; k < n; ++k) {
      const Activation<T> a = activate<kind>(x[k], shift);
      grad[k] = T(own[k] - own_factor_sum * (double(a.value) * inverse_norm));
    }
    if (own_separation) {
      NCMI_SIMD()
      for (int64_t k = 0; k < n; ++k)
        own_separation[k] = T(own_log[k] - separation_grad_sum * double(activate<kind>(x[k], shift).log));
    }
  }
};

template <bool centroid_to_sample, class T>
void centroid_sums_range(const CentroidGradArgs<T>& args, int64_t column_begin, int64_t column_end) {
  const Centroids<T>& q = args.centroids;
  const double inverse_classes = 1.0 / double(q.classes);
  T x[kColumnBlock];
  double own[kColumnBlock], own_log[kColumnBlock], total[kColumnBlock];
  for (int64_t begin = column_begin; begin < column_end; begin += kColumnBlock) {
    const int64_t n = min(kColumnBlock, column_end - begin);
    for (int64_t k = 0; k < n; ++k) total[k] = 0;
    for (int64_t c = 0; c < q.classes; ++c) {
      if (args.class_begin[c] == args.class_begin[c + 1]) continue;
      for (int64_t k = 0; k < n; ++k) own[k] = own_log[k] = 0;
      double own_factor_sum = 0, separation_grad_sum = 0;
      for (int64_t j = args.class_begin[c]; j < args.class_begin[c + 1]; ++j) {
        const int64_t i = args.order[j];
        // sample_to_centroid: the own class enters the separation too, as what its mean leaves out.
        const double own_factor = centroid_to_sample
                                      ? args.concentration_grad[i]
                                      : args.concentration_grad[i] - inverse_classes * args.separation_grad[i];
        load(args.input, i, begin, n, args.center, x);
        with_kind(kind_of(args.softmax, args.row_shift[i]),
                  AddRow<centroid_to_sample, T>{x, n, T(args.row_scale[i]), T(args.row_shift[i]),
                                                exp(-args.row_log_norm[i]), own_factor, args.separation_grad[i], own,
                                                own_log, total});
        own_factor_sum += own_factor;
        separation_grad_sum += args.separation_grad[i];
      }
      load(args.logits, c, begin, n, static_cast<const T*>(nullptr), x);
      with_kind(kind_of(args.softmax, q.shift[c]),
                FinishClass<T>{x, n, T(q.shift[c]), exp(-q.log_norm[c]), own_factor_sum, separation_grad_sum, own,
                               own_log, args.grad + c * q.columns + begin,
                               centroid_to_sample ? args.own_separation + c * q.columns + begin : nullptr});
    }
    for (int64_t k = 0; k < n; ++k) args.totals[begin + k] = total[k];
  }
}

template <class T>
void centroid_sums(const CentroidGradArgs<T>& args, int64_t column_begin, int64_t column_end) {
  if (args.centroids.centroid_to_sample)
    centroid_sums_range<true>(args, column_begin, column_end);
  else
    centroid_sums_range<false>(args, column_begin, column_end);
}

// sample_to_centroid: slope (-own - (1/C) sum_i beta_i (p_ik - q_ck)).
template <class T>
struct GradFromSample {
  const T* __restrict x;
  int64_t n;
  T shift;
  double inverse_norm, inverse_classes, separation_grad_sum;
  const double* __restrict totals;
  bool has_rows;
  T* __restrict grad;

  template <Kind kind>
  void operator()() const {
    const double q_factor = separation_grad_sum * inverse_norm;
    if (has_rows) {
      NCMI_SIMD()
      for (int64_t k = 0; k < n; ++k) {
        const Activation<T> a = activate<kind>(x[k], shift);
        const T all = T(inverse_classes * (totals[k] - q_factor * double(a.value)));
        grad[k] = a.slope * (-grad[k] - all);
      }
    } else {
      NCMI_SIMD()
      for (int64_t k = 0; k < n; ++k) {
        const Activation<T> a = activate<kind>(x[k], shift);
        grad[k] = -a.slope * T(inverse_classes * (totals[k] - q_factor * double(a.value)));
      }
    }
  }
};

// centroid_to_sample: slope (-own + (1/C) q (s - sum_k q s)), s_ck = sum over rows of other classes of
// beta_i (log q_ck - log p_ik), up to what is constant along the row.
template <class T>
struct GradFromCentroid {
  const T* __restrict x;
  int64_t n;
  T shift;
  double inverse_norm, inverse_classes, separation_grad_sum;
  const double* __restrict totals;
  bool has_rows;
  T* __restrict grad;
  const T* __restrict own_separation;

  template <Kind kind>
  void operator()() const {
    double mean = 0;
    NCMI_SIMD(reduction(+ : mean))
    for (int64_t k = 0; k < n; ++k) {
      const Activation<T> a = activate<kind>(x[k], shift);
      const double s = separation_grad_sum * double(a.log) - totals[k] + (has_rows ? double(own_separation[k]) : 0);
      mean += double(a.value) * inverse_norm * s;
    }
    NCMI_SIMD()
    for (int64_t k = 0; k < n; ++k) {
      const Activation<T> a = activate<kind>(x[k], shift);
      const double s = separation_grad_sum * double(a.log) - totals[k] + (has_rows ? double(own_separation[k]) : 0);
      const double q = double(a.value) * inverse_norm;
      grad[k] = T(double(a.slope) * (inverse_classes * q * (s - mean) - (has_rows ? double(grad[k]) : 0)));
    }
  }
};

template <class T>
void centroid_grad(const CentroidGradArgs<T>& args, int64_t class_begin, int64_t class_end, T* x) {
  const Centroids<T>& q = args.centroids;
  const int64_t n = q.columns;
  const double inverse_classes = 1.0 / double(q.classes);
  for (int64_t c = class_begin; c < class_end; ++c) {
    const bool has_rows = args.class_begin[c] != args.class_begin[c + 1];
    const Kind kind = kind_of(args.softmax, q.shift[c]);
    T* grad = args.grad + c * n;
    load(args.logits, c, 0, n, static_cast<const T*>(nullptr), x);
    if (q.centroid_to_sample)
      with_kind(kind, GradFromCentroid<T>{x, n, T(q.shift[c]), exp(-q.log_norm[c]), inverse_classes,
                                          args.separation_grad_sum, args.totals, has_rows, grad,
                                          args.own_separation + c * n});
    else
      with_kind(kind, GradFromSample<T>{x, n, T(q.shift[c]), exp(-q.log_norm[c]), inverse_classes,
                                        args.separation_grad_sum, args.totals, has_rows, grad});
  }
}

// -------------------------------------------------------------------------------------------------------------
// Column sums over the rows that are not ignored, for the mean of the features.
// -------------------------------------------------------------------------------------------------------------

template <class In, class T>
void add_stretch(const Matrix& m, int64_t row, int64_t begin, int64_t n, T* __restrict sums) {
  const In* __restrict in = static_cast<const In*>(m.data) + row * m.row_stride + begin * m.column_stride;
  const int64_t stride = m.column_stride;
  if (stride == 1) {
    NCMI_SIMD()
    for (int64_t k = 0; k < n; ++k) sums[k] += T(widen(in[k]));
  } else {
    for (int64_t k = 0; k < n; ++k) sums[k] += T(widen(in[k * stride]));
  }
}

template <class T>
void column_sums(const Matrix& m, const Targets& target, int64_t rows, int64_t column_begin, int64_t column_end,
                 double* sums) {
  constexpr int64_t kRowsPerFlush = 16;  // rows added in T before they go to a double
  T partial[kColumnBlock];
  for (int64_t begin = column_begin; begin < column_end; begin += kColumnBlock) {
    const int64_t n = min(kColumnBlock, column_end - begin);
    for (int64_t k = 0; k < n; ++k) sums[begin + k] = 0;
    for (int64_t first = 0; first < rows; first += kRowsPerFlush) {
      for (int64_t k = 0; k < n; ++k) partial[k] = 0;
      for (int64_t i = first; i < min(first + kRowsPerFlush, rows); ++i) {
        if (target[i] == target.ignore_index) continue;
        switch (m.dtype) {
          case Dtype::kFloat32: add_stretch<float>(m, i, begin, n, partial); break;
          case Dtype::kFloat64: add_stretch<double>(m, i, begin, n, partial); break;
          case Dtype::kBFloat16: add_stretch<BFloat16>(m, i, begin, n, partial); break;
          case Dtype::kFloat16: add_stretch<Float16>(m, i, begin, n, partial); break;
        }
      }
      NCMI_SIMD()
      for (int64_t k = 0; k < n; ++k) sums[begin + k] += double(partial[k]);
    }
  }
}

template <class T>
constexpr Kernels<T> table() {
  return {terms<T>, input_grad, centroid_rows<T>, centroid_columns<T>, centroid_sums<T>, centroid_grad<T>,
          column_sums<T>};
}

}  // namespace

extern const KernelTable NCMI_KERNEL_TABLE{NCMI_KERNEL_NAME, table<float>(), table<double>()};

}  // namespace ncmi::cpu
