// The CPU kernels. Included once for each instruction set by kernels_{default,avx2,avx512}.cpp, which define
// NCMI_KERNEL_TABLE and NCMI_KERNEL_NAME and set the compiler's target before the include.
//
// Loops marked NCMI_SIMD are vectorised by the compiler. Sums run in Lanes, kWide partial sums side by side: the
// order of every addition is written down, the same for each instruction set, and no loop ends in a serial chain.
// Every kBlock elements the lanes of T go to a double; the normaliser S, whose rounding would enter the loss in
// first order, has lanes of double.

#include "../low_precision.h"
#include "../ncmi_math.h"
#include "kernels.h"

#define NCMI_PRAGMA(x) _Pragma(#x)
#define NCMI_SIMD(...) NCMI_PRAGMA(omp simd __VA_ARGS__)
#define NCMI_MEMBER inline __attribute__((always_inline))

namespace ncmi::cpu {
namespace {

constexpr int64_t kBlock = 4096;  // elements of a sum in T before it goes to a double
// Columns that an owner of columns works on at once: long enough stretches of a row for the prefetcher, short
// enough for the sums to stay in cache.
constexpr int64_t kColumnBlock = 2048;
constexpr double kSmallestLength = 1e-12;  // as torch.nn.functional.normalize

constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

// Columns that loops are laid out in: a vector of the widest instruction set.
template <class T>
constexpr int64_t kLanes = 64 / sizeof(T);

// Calls f(k, n) over stretches [k, k + n) of [begin, end), end - begin a multiple of `unit`; n is kWide or `unit`, a
// constant where f is inlined, so that its loop over the stretch needs no prologue and no remainder.
template <int64_t unit, class F>
NCMI_INLINE void for_stretches(int64_t begin, int64_t end, const F& f) {
  for (; begin + kWide <= end; begin += kWide) f(begin, kWide);
  for (; begin < end; begin += unit) f(begin, unit);
}

// kWide partial sums.
template <class T>
struct alignas(64) Lanes {
  T lane[kWide] = {};

  // The sum over the lanes, added up in F.
  template <class F = T>
  double total() const {
    F sum[32];
    NCMI_SIMD()
    for (int j = 0; j < 32; ++j) sum[j] = F(lane[j]) + F(lane[j + 32]);
    NCMI_SIMD()
    for (int j = 0; j < 16; ++j) sum[j] += sum[j + 16];
    NCMI_SIMD()
    for (int j = 0; j < 8; ++j) sum[j] += sum[j + 8];
    NCMI_SIMD()
    for (int j = 0; j < 4; ++j) sum[j] += sum[j + 4];
    return double((sum[0] + sum[2]) + (sum[1] + sum[3]));
  }

  T maximum() const {
    T largest[16];
    NCMI_SIMD()
    for (int j = 0; j < 16; ++j) {
      const T a = lane[j] > lane[j + 16] ? lane[j] : lane[j + 16];
      const T b = lane[j + 32] > lane[j + 48] ? lane[j + 32] : lane[j + 48];
      largest[j] = a > b ? a : b;
    }
    T result = largest[0];
    for (int j = 1; j < 16; ++j) result = largest[j] > result ? largest[j] : result;
    return result;
  }
};
static_assert(kWide == 64, "Lanes::total folds 64 lanes");

// -------------------------------------------------------------------------------------------------------------
// A stretch of one row, centred, in the arithmetic type.
// -------------------------------------------------------------------------------------------------------------

// Of a stretch: the sum of its squares, and its largest magnitude.
template <class T>
struct Size {
  double squares;
  T largest;
};

NCMI_INLINE uint32_t magnitude_bits(float x) { return bit_cast<uint32_t>(x) & 0x7fffffffu; }
NCMI_INLINE uint64_t magnitude_bits(double x) { return bit_cast<uint64_t>(x) & 0x7fffffffffffffffu; }

// Leaves x = z - center. The largest magnitude is found on the bits, which order as the numbers do: that lets no NaN
// get lost.
template <bool centered, bool measured, class In, class T>
Size<T> load_as(const In* __restrict in, int64_t stride, int64_t n, const T* __restrict center, T* __restrict x) {
  using Bits = decltype(magnitude_bits(T()));
  Size<T> size{};
  Lanes<Bits> largest;
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t last = min(n, first + kBlock);
    Lanes<T> squares;
    const auto take = [&](int64_t k, int64_t j, T z) __attribute__((always_inline)) {
      const T value = centered ? z - center[k] : z;
      x[k] = value;
      if constexpr (measured) {
        const Bits bits = magnitude_bits(value);
        squares.lane[j] += value * value;
        largest.lane[j] = bits > largest.lane[j] ? bits : largest.lane[j];
      }
    };
    if (stride == 1) {
      const int64_t whole = first + (last - first) / kLanes<T> * kLanes<T>;
      for_stretches<kLanes<T>>(first, whole, [&](int64_t k, int64_t m) __attribute__((always_inline)) {
        NCMI_SIMD()
        for (int64_t j = 0; j < m; ++j) take(k + j, j, T(widen(in[k + j])));
      });
      for (int64_t k = whole; k < last; ++k) take(k, k - whole, T(widen(in[k])));
    } else {
      for (int64_t k = first; k < last; ++k) take(k, k % kWide, T(widen(in[k * stride])));
    }
    if constexpr (measured) size.squares += squares.total();
  }
  if constexpr (measured) size.largest = bit_cast<T>(largest.maximum());
  return size;
}

template <bool measured, class In, class T>
Size<T> load_stretch(const Matrix& m, int64_t row, int64_t begin, int64_t n, const T* center, T* x) {
  const In* in = static_cast<const In*>(m.data) + row * m.row_stride + begin * m.column_stride;
  return center ? load_as<true, measured>(in, m.column_stride, n, center + begin, x)
                : load_as<false, measured>(in, m.column_stride, n, center, x);
}

// Leaves the stretch in x, less the centre. Its size only where it is `measured`.
template <bool measured = false, class T>
Size<T> load(const Matrix& m, int64_t row, int64_t begin, int64_t n, const T* center, T* x) {
  switch (m.dtype) {
    case Dtype::kFloat32: return load_stretch<measured, float>(m, row, begin, n, center, x);
    case Dtype::kFloat64: return load_stretch<measured, double>(m, row, begin, n, center, x);
    case Dtype::kBFloat16: return load_stretch<measured, BFloat16>(m, row, begin, n, center, x);
    default: return load_stretch<measured, Float16>(m, row, begin, n, center, x);
  }
}

// Memory to have in cache soon, asked for piece by piece between the arithmetic on a row: the hardware's own prefetching
// does not get going in the short bursts in which rows are read, and a whole row asked for at once would fill the
// processor's queue of outstanding lines and hold up what comes after it.
class Ahead {
 public:
  void row(const Matrix& m, int64_t row) {
    const int64_t width = m.dtype == Dtype::kFloat64 ? 8 : m.dtype == Dtype::kFloat32 ? 4 : 2;
    if (m.column_stride == 1) add(static_cast<const char*>(m.data) + row * m.row_stride * width, width);
  }
  void add(const void* memory, int64_t width) { streams_[count_++] = {static_cast<const char*>(memory), width}; }

  // With columns [k, k + n) of the current row.
  NCMI_MEMBER void fetch(int64_t k, int64_t n) const {
    for (int s = 0; s < count_; ++s)
      for (int64_t byte = 0; byte < n * streams_[s].width; byte += 64)
        __builtin_prefetch(streams_[s].memory + k * streams_[s].width + byte, 0, 2);
  }

 private:
  struct Stream {
    const char* memory;
    int64_t width;
  } streams_[3];
  int count_ = 0;
};

// What the next row needs.
template <class T>
void fetch_row(const Matrix& m, const Targets& target, int64_t row, const Centroids<T>& q, Ahead& ahead) {
  const int64_t y = target[row];
  if (y == target.ignore_index) return;
  ahead.row(m, row);
  __builtin_prefetch(q.of + y);
  if (q.of[y].lone < 0) ahead.add(q.log_activation + y * q.columns, sizeof(T));
}

// ||x||_2 from the plain sum of squares, which is redone, scaled by the largest element, only where it overflowed;
// where it underflows the caller's kSmallestLength hides it. An inf or a NaN in the row makes it NaN.
template <class T>
double norm(const T* x, int64_t n, const Size<T>& size) {
  if (size.squares < double(kLargest<T>)) return sqrt(size.squares);
  double total = 0;
  for (int64_t k = 0; k < n; ++k) {
    const double ratio = double(x[k]) / double(size.largest);
    total += ratio * ratio;
  }
  return double(size.largest) * sqrt(total);
}

// -------------------------------------------------------------------------------------------------------------
// Row activation: which of the formulas, with the shift of the row where it needs one.
// -------------------------------------------------------------------------------------------------------------

// kNsfNear, kNsfNearest: a row with every |f| <= 1, <= 1/4. kNsfShifted: one with every f <= kShifted.
// kNsfMostlyNear: no row, but a stretch of one (for_logits).
enum class Kind { kNsf, kNsfNear, kNsfNearest, kNsfShifted, kSoftmax, kNsfMostlyNear };

// As the statistics hold it; any kind for what is none.
NCMI_INLINE Kind kind_of(double kind) {
  return kind >= 0 && kind <= double(Kind::kSoftmax) ? Kind(int(kind)) : Kind::kNsf;
}

constexpr double kNear = 1.0, kNearest = 0.25;

template <class T>
NCMI_INLINE bool is_small(T f) {
  return absolute(f) <= T(kNear);
}

constexpr bool is_near(Kind kind) { return kind == Kind::kNsfNear || kind == Kind::kNsfNearest; }

// The factor that takes x to the argument of the functions below.
template <Kind kind, class T>
NCMI_INLINE T argument_scale(double scale) {
  return T(is_near(kind) ? 0.5 * scale : scale);
}

template <Kind kind>
NCMI_INLINE NearActivation near(float y) {
  return kind == Kind::kNsfNear ? nsf_near(y) : nsf_nearest(y);
}

template <Kind kind>
NCMI_INLINE NearSlope near_slope(float y) {
  return kind == Kind::kNsfNear ? nsf_near_slope(y) : nsf_nearest_slope(y);
}

// `scale` is that of argument_scale.
template <Kind kind, class T>
NCMI_INLINE Activation<T> activate(T x, T scale, T shift) {
  if constexpr (kind == Kind::kNsf) return nsf(x * scale);
  if constexpr (kind == Kind::kNsfShifted) return nsf_shifted(x, scale, shift);
  if constexpr (kind == Kind::kSoftmax) return softmax(x, scale, shift);
  if constexpr (is_near(kind)) {
    const NearActivation a = near<kind>(x * scale);
    return {T(0.5) + T(0.5) * a.excess, a.log, T(0.5) - T(0.5) * a.excess, T(0.25) * (T(1) - a.excess * a.excess)};
  }
  if constexpr (kind == Kind::kNsfMostlyNear) {
    const Activation<T> a = nsf(x * scale), b = activate<Kind::kNsfNear>(x, T(0.5) * scale, shift);
    const bool small = is_small(x * scale);
    return {small ? b.value : a.value, small ? b.log : a.log, small ? b.slope : a.slope,
            small ? b.value_slope : a.value_slope};
  }
}

// Calls f with the activation kind as a template argument.
template <class T, class F>
NCMI_INLINE auto with_kind(Kind kind, const F& f) {
  if constexpr (sizeof(T) == sizeof(float)) {  // double has no near form
    if (kind == Kind::kNsfNear) return f.template operator()<Kind::kNsfNear>();
    if (kind == Kind::kNsfNearest) return f.template operator()<Kind::kNsfNearest>();
  }
  if (kind == Kind::kNsfShifted) return f.template operator()<Kind::kNsfShifted>();
  if (kind == Kind::kSoftmax) return f.template operator()<Kind::kSoftmax>();
  return f.template operator()<Kind::kNsf>();
}

// How many are not small, NaN among them.
template <class T>
NCMI_INLINE int64_t count_large(const T* x, int64_t n) {
  int large = 0;
  NCMI_SIMD(reduction(+ : large))
  for (int64_t k = 0; k < n; ++k) large += is_small(x[k]) ? 0 : 1;
  return large;
}

// Calls f<as>(k, m) over stretches [k, k + m) of a centroid's logits, m <= kWide. Stretches of a kNsf row in which
// every |f| <= 1 are taken as kNsfNear, which means the same numbers and costs a third: logits that began one-hot are
// small in all columns but one. The vector of that one is taken as kNsfMostlyNear, each element by its size: in columns
// that are equal roundings are equal too, and add up, so they should be those of small numbers. m is a multiple of a
// vector but for the last stretch. Who calls it for a part of the columns starts at a multiple of kWide, for the same
// stretches as others.
template <Kind kind, class T, class F>
NCMI_INLINE void for_logits(const T* x, int64_t n, const F& f) {
  const auto stretch = [&](int64_t k, int64_t m) __attribute__((always_inline)) {
    if constexpr (kind == Kind::kNsf && sizeof(T) == sizeof(float)) {
      const int64_t large = count_large(x + k, m);
      if (large == 0) return f.template operator()<Kind::kNsfNear>(k, m);
      if (large == 1) {
        const int64_t part = m == kWide ? kLanes<T> : m;
        for (int64_t j = k; j < k + m; j += part) {
          if (count_large(x + j, part))
            f.template operator()<Kind::kNsfMostlyNear>(j, part);
          else
            f.template operator()<Kind::kNsfNear>(j, part);
        }
        return;
      }
    }
    f.template operator()<kind>(k, m);
  };
  const int64_t whole = n / kLanes<T> * kLanes<T>;
  for_stretches<kLanes<T>>(0, whole, stretch);
  if (whole < n) stretch(whole, n - whole);
}

// The kind to try for a row with |f| up to `reach`; kNsf becomes kNsfShifted where no f is above kShifted.
Kind first_kind(bool is_softmax, double reach, size_t size_of_type) {
  if (is_softmax) return Kind::kSoftmax;
  if (size_of_type > sizeof(float) || !(reach <= kNear)) return Kind::kNsf;
  return reach <= kNearest ? Kind::kNsfNearest : Kind::kNsfNear;
}

template <class T>
T largest_of(const T* x, int64_t n) {
  T largest = x[0];
  NCMI_SIMD(reduction(max : largest))
  for (int64_t k = 0; k < n; ++k) largest = x[k] > largest ? x[k] : largest;
  return largest;
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
// One row against its own centroid and against all of them.
// -------------------------------------------------------------------------------------------------------------

// The pointers of one row, or of a stretch of it.
template <class T>
struct Row {
  const T* x;               // z - center
  const T* own_log;         // log a(xi_y)
  const T* own_activation;  // a(xi_y); centroid_to_sample only
  const T* reference;       // what log a is compared with, for all classes at once
  const T* q_mean;          // mean of q over classes; centroid_to_sample only

  Row from(int64_t k) const {
    return {x + k, own_log + k, own_activation ? own_activation + k : nullptr, reference + k, q_mean + k};
  }
};

// Own-class rows of the tables. Those that a few numbers tell (ClassStats) are written out here, in cache, rather than
// read from a table that may not be; of one such row after another only the columns that differ change.
template <class T>
class OwnRows {
 public:
  OwnRows(const Centroids<T>& q, T* scratch) : q_(q), log_(scratch), activation_(scratch + q.columns) {}

  Row<T> with(const T* x, int64_t y) {
    const ClassStats& of = q_.of[y];
    const int64_t lone = int64_t(of.lone);
    const bool both = q_.centroid_to_sample;
    if (lone < 0)
      return row(x, q_.log_activation + y * q_.columns, both ? q_.activation + y * q_.columns : nullptr);
    if (lone_ < 0 || of.other_log != other_log_) {
      for (int64_t k = 0; k < q_.columns; ++k) log_[k] = T(of.other_log);
      if (both)
        for (int64_t k = 0; k < q_.columns; ++k) activation_[k] = T(of.other_activation);
    } else {
      log_[lone_] = T(of.other_log);
      if (both) activation_[lone_] = T(of.other_activation);
    }
    log_[lone] = T(of.lone_log);
    if (both) activation_[lone] = T(of.lone_activation);
    lone_ = lone;
    other_log_ = of.other_log;
    return row(x, log_, both ? activation_ : nullptr);
  }

 private:
  Row<T> row(const T* x, const T* log, const T* activation) const {
    return {x, log, activation, q_.reference, q_.reference + q_.columns};
  }

  const Centroids<T>& q_;
  T* log_;
  T* activation_;
  int64_t lone_ = -1;  // the column that differs in what is written out, once something is
  double other_log_ = 0;
};

// The last columns of a row, fewer than a vector, padded to one with copies of the last element. A scalar loop over
// them would cost as much as several vectors.
template <class T>
struct Tail {
  T x[kLanes<T>], own_log[kLanes<T>], own_activation[kLanes<T>], reference[kLanes<T>], q_mean[kLanes<T>];
  T mask[kLanes<T>];

  Tail(const Row<T>& row, int64_t begin, int64_t n) {
    for (int64_t k = 0; k < kLanes<T>; ++k) {
      const int64_t from = min(begin + k, n - 1);
      x[k] = row.x[from];
      own_log[k] = row.own_log[from];
      own_activation[k] = row.own_activation ? row.own_activation[from] : T(0);
      reference[k] = row.reference[from];
      q_mean[k] = row.q_mean[from];
      mask[k] = begin + k < n ? T(1) : T(0);
    }
  }
  Row<T> row() const { return {x, own_log, own_activation, reference, q_mean}; }
};

struct RowSums {
  double norm;       // S = sum a
  double own;        // sum a (log a - log a(xi_y))
  double all;        // sum a (log a - reference), or sum q_mean (log a - reference)
  double own_cross;  // sum a(xi_y) (log a - log a(xi_y)); centroid_to_sample only
};

template <Kind kind, bool centroid_to_sample, class T>
struct RowLanes {
  Lanes<double> norm;       // but near: of the excess, below
  Lanes<T> excess;          // of 2 sigma - 1, small, so its sum need not be double
  Lanes<T> own, all, own_cross;

  // Adds `n` <= kWide columns. With `masked`, those where `mask` is 0 count for nothing.
  template <bool masked>
  NCMI_MEMBER void add(const Row<T>& row, int64_t n, const T* mask, T s, T shift) {
    const T* __restrict x = row.x;
    const T* __restrict own_log = row.own_log;
    const T* __restrict own_activation = row.own_activation;
    const T* __restrict reference = row.reference;
    const T* __restrict q_mean = row.q_mean;
    NCMI_SIMD()
    for (int64_t k = 0; k < n; ++k) {
      T weight, log;  // near: twice a
      if constexpr (is_near(kind)) {
        const NearActivation a = near<kind>(x[k] * s);
        excess.lane[k] += masked ? a.excess * mask[k] : a.excess;
        weight = T(1) + a.excess;
        log = a.log;
      } else {
        const Activation<T> a = activate<kind>(x[k], s, shift);
        norm.lane[k] += double(masked ? a.value * mask[k] : a.value);
        weight = a.value;
        log = a.log;
      }
      if constexpr (masked) weight *= mask[k];
      const T d_own = log - own_log[k], d_all = log - reference[k];
      own.lane[k] += weight * d_own;
      if constexpr (centroid_to_sample) {
        all.lane[k] += (masked ? q_mean[k] * mask[k] : q_mean[k]) * d_all;
        own_cross.lane[k] += (masked ? own_activation[k] * mask[k] : own_activation[k]) * d_own;
      } else {
        all.lane[k] += weight * d_all;
      }
    }
  }

  void add_to(RowSums& sums) {
    constexpr double kHalf = is_near(kind) ? 0.5 : 1.0;
    if constexpr (is_near(kind))
      sums.norm += 0.5 * excess.total();
    else
      sums.norm += norm.total();
    // In double: where every logarithm is about -1.5, say, these are large, and what is made of them is not.
    sums.own += kHalf * own.template total<double>();
    sums.all += (centroid_to_sample ? 1.0 : kHalf) * all.template total<double>();
    if constexpr (centroid_to_sample) sums.own_cross += own_cross.template total<double>();
  }
};

template <Kind kind, bool centroid_to_sample, class T>
__attribute__((noinline)) RowSums sum_row(const Row<T>& row, int64_t n, double scale, T shift, const Ahead& ahead) {
  RowSums sums{};
  if (is_near(kind)) sums.norm = 0.5 * double(n);  // sigma = (1 + excess) / 2
  const T s = argument_scale<kind, T>(scale);
  const int64_t whole = n / kLanes<T> * kLanes<T>;
  for (int64_t first = 0; first < n; first += kBlock) {
    RowLanes<kind, centroid_to_sample, T> lanes;
    const int64_t last = min(whole, first + kBlock);
    for_stretches<kLanes<T>>(first, last, [&](int64_t k, int64_t m) __attribute__((always_inline)) {
      ahead.fetch(k, m);
      lanes.template add<false>(row.from(k), m, nullptr, s, shift);
    });
    if (whole < n && first + kBlock >= n) {
      const Tail<T> tail(row, whole, n);
      lanes.template add<true>(tail.row(), kLanes<T>, tail.mask, s, shift);
    }
    lanes.add_to(sums);
  }
  return sums;
}

// The activation that the row needs, and its sums under it.
template <bool centroid_to_sample, class T>
RowSums sum_row_stable(const Row<T>& row, int64_t n, double scale, T largest, bool is_softmax, const Ahead& ahead,
                       Kind* kind, T* shift) {
  *kind = first_kind(is_softmax, double(largest) * scale, sizeof(T));
  *shift = is_softmax ? largest_of(row.x, n) : T(0);
  const auto sum_as = [&]<Kind as>() { return sum_row<as, centroid_to_sample>(row, n, scale, *shift, ahead); };
  const RowSums sums = with_kind<T>(*kind, sum_as);
  if (*kind != Kind::kNsf || !may_be_shifted(sums.norm, n)) return sums;
  const T most = largest_of(row.x, n);
  if (!(most * T(scale) <= T(kShifted))) return sums;
  *kind = Kind::kNsfShifted;
  *shift = most;
  return with_kind<T>(*kind, sum_as);
}

// -------------------------------------------------------------------------------------------------------------
// Input gradient. Reads a row again and forms p again: with the sums of the row known that is one pass, and cheaper
// than what storing and reading it would cost.
// -------------------------------------------------------------------------------------------------------------

// The gradient of a row by z, but for what the chain rule of its length takes away.
template <bool centroid_to_sample, class T>
struct GradRow {
  const RowStats& stats;
  double own_inverse_norm, inverse_classes, concentration_grad, separation_grad;

  // Of `n` <= kWide columns, into grad; adds its product with x to dot.
  template <Kind kind>
  NCMI_MEMBER void stretch(const Row<T>& row, int64_t n, T* __restrict grad, Lanes<T>& dot) const {
    const T* __restrict x = row.x;
    const T* __restrict own_log = row.own_log;
    const T* __restrict own_activation = row.own_activation;
    const T* __restrict reference = row.reference;
    const T* __restrict q_mean = row.q_mean;
    const T s = argument_scale<kind, T>(stats.scale), shift = T(stats.shift);
    if constexpr (centroid_to_sample) {
      const T inverse_norm = T(stats.inverse_norm), q_factor = T(own_inverse_norm);
      const T own_mean = T(stats.own_mean), inverse_c = T(inverse_classes);
      const T alpha = T(concentration_grad * stats.scale), beta = T(separation_grad * stats.scale);
      NCMI_SIMD()
      for (int64_t k = 0; k < n; ++k) {
        const Activation<T> a = activate<kind>(x[k], s, shift);
        const T p = a.value * inverse_norm;
        const T g = alpha * concentration_gradient(a.slope * p, a.log - own_log[k], own_mean) +
                    beta * separation_gradient_centroid(a.slope, p, q_mean[k], own_activation[k] * q_factor, inverse_c);
        grad[k] = g;
        dot.lane[k] += x[k] * g;
      }
    } else {
      const SampleGradient g = sample_gradient(concentration_grad, separation_grad, inverse_classes, stats.own_mean,
                                               stats.all_mean);
      // near: the factor 1/4 of (1 - t^2) / 4 goes into the coefficients
      const double factor = (is_near(kind) ? 0.25 : 1.0) * stats.scale * stats.inverse_norm;
      const T by_all = T(factor * g.by_all), by_gap = T(factor * g.by_gap), constant = T(factor * g.constant);
      NCMI_SIMD()
      for (int64_t k = 0; k < n; ++k) {
        T value_slope, log;
        if constexpr (is_near(kind)) {
          const NearSlope a = near_slope<kind>(x[k] * s);
          value_slope = a.slope;
          log = a.log;
        } else {
          const Activation<T> a = activate<kind>(x[k], s, shift);
          value_slope = a.value_slope;
          log = a.log;
        }
        const T at = sample_gradient_at(value_slope, log - reference[k], reference[k] - own_log[k], by_all, by_gap,
                                        constant);
        grad[k] = at;
        dot.lane[k] += x[k] * at;
      }
    }
  }

  // Of the whole row; returns its product with x.
  template <Kind kind>
  double whole_row(const Row<T>& row, int64_t n, T* grad, const Ahead& ahead) const {
    double total = 0;
    const int64_t whole = n / kLanes<T> * kLanes<T>;
    for (int64_t first = 0; first < whole; first += kBlock) {
      const int64_t last = min(whole, first + kBlock);
      Lanes<T> dot;
      for_stretches<kLanes<T>>(first, last, [&](int64_t k, int64_t m) __attribute__((always_inline)) {
        ahead.fetch(k, m);
        stretch<kind>(row.from(k), m, grad + k, dot);
      });
      total += dot.total();
    }
    if (whole < n) {
      const Tail<T> tail(row, whole, n);
      T end[kLanes<T>];
      Lanes<T> unused;
      stretch<kind>(tail.row(), kLanes<T>, end, unused);
      for (int64_t k = whole; k < n; ++k) {
        grad[k] = end[k - whole];
        total += double(row.x[k]) * double(grad[k]);
      }
    }
    return total;
  }
};

// d loss / d z of a row, from its centred features x, by the derivatives of the loss by its terms.
template <bool centroid_to_sample, class Out, class T>
NCMI_INLINE void grad_of_row(const Centroids<T>& q, const Row<T>& row, const RowStats& stats, int64_t y,
                             double concentration_grad, double separation_grad, Ahead ahead, T* __restrict grad,
                             Out* __restrict out) {
  ahead.add(out, sizeof(Out));
  const int64_t n = q.columns;
  const GradRow<centroid_to_sample, T> of_row{stats, centroid_to_sample ? exp(-q.of[y].log_norm) : 1.0,
                                              1.0 / q.of_all.classes, concentration_grad, separation_grad};
  const T* __restrict x = row.x;
  const double dot = with_kind<T>(kind_of(stats.kind), [&]<Kind kind>() {
    return of_row.template whole_row<kind>(row, n, grad, ahead);
  });
  // Where the length counts, through x / ||x|| as well: g - x (x . g) / ||x||^2. The square may underflow, x . g be
  // infinite where no length counts.
  const T inverse_length = T(stats.inverse_length);
  const T share = inverse_length == T(0) ? T(0) : T(dot * stats.inverse_length);
  NCMI_SIMD()
  for (int64_t k = 0; k < n; ++k) out[k] = narrow<Out>(grad[k] - (x[k] * inverse_length) * share);
}

template <bool centroid_to_sample, class Out, class T>
void input_grad_range(const InputGradArgs<T>& args, int64_t row_begin, int64_t row_end, T* scratch) {
  const Centroids<T>& q = args.centroids;
  const int64_t n = q.columns;
  T* __restrict x = scratch;
  T* __restrict grad = scratch + n;
  OwnRows<T> own_rows(q, scratch + 2 * n);
  for (int64_t i = row_begin; i < row_end; ++i) {
    Out* __restrict out = static_cast<Out*>(args.grad) + i * n;
    const int64_t y = args.target[i];
    if (y == args.target.ignore_index) {
      memset(static_cast<void*>(out), 0, n * sizeof(Out));
      continue;
    }
    const RowStats& stats = args.rows[i];
    load(args.input, i, 0, n, args.center, x);
    Ahead ahead;
    if (i + 1 < row_end) fetch_row(args.input, args.target, i + 1, q, ahead);
    grad_of_row<centroid_to_sample>(q, own_rows.with(x, y), stats, y, args.concentration_grad[i],
                                    args.separation_grad[i], ahead, grad, out);
  }
}

template <class Out, class T>
void input_grad_as(const InputGradArgs<T>& args, int64_t row_begin, int64_t row_end, T* scratch) {
  if (args.centroids.centroid_to_sample)
    input_grad_range<true, Out>(args, row_begin, row_end, scratch);
  else
    input_grad_range<false, Out>(args, row_begin, row_end, scratch);
}

void input_grad(const InputGradArgs<float>& args, int64_t row_begin, int64_t row_end, float* scratch) {
  switch (args.grad_dtype) {
    case Dtype::kBFloat16: return input_grad_as<BFloat16>(args, row_begin, row_end, scratch);
    case Dtype::kFloat16: return input_grad_as<Float16>(args, row_begin, row_end, scratch);
    default: return input_grad_as<float>(args, row_begin, row_end, scratch);
  }
}
void input_grad(const InputGradArgs<double>& args, int64_t row_begin, int64_t row_end, double* scratch) {
  input_grad_as<double>(args, row_begin, row_end, scratch);
}

// -------------------------------------------------------------------------------------------------------------
// Terms: A_i and G_i, and where asked for the gradient of their ratio.
// -------------------------------------------------------------------------------------------------------------

template <bool centroid_to_sample, class T>
void terms_range(const TermsArgs<T>& args, int64_t row_begin, int64_t row_end, T* x) {
  const Centroids<T>& q = args.centroids;
  const int64_t n = q.columns;
  const double inverse_temperature = 1.0 / args.features.temperature, inverse_classes = 1.0 / q.of_all.classes;
  OwnRows<T> own_rows(q, x + 2 * n);
  for (int64_t i = row_begin; i < row_end; ++i) {
    const int64_t y = args.target[i];
    T* out = args.grad ? args.grad + i * n : nullptr;
    if (y == args.target.ignore_index) {
      args.concentration[i] = args.separation[i] = 0;
      args.rows[i] = {};
      if (out) memset(out, 0, n * sizeof(T));
      continue;
    }

    const Size<T> size = load<true>(args.input, i, 0, n, args.center, x);
    double scale = inverse_temperature, inverse_length = 0;
    if (args.features.l2_normalize) {
      const double length = norm(x, n, size);
      const bool floored = length < kSmallestLength;
      const double inverse = 1.0 / (floored ? kSmallestLength : length);
      scale *= inverse;
      inverse_length = floored ? 0 : inverse;
    }
    Ahead ahead;
    if (i + 1 < row_end) fetch_row(args.input, args.target, i + 1, q, ahead);

    Kind kind;
    T shift;
    const Row<T> row = own_rows.with(x, y);
    RowSums sums =
        sum_row_stable<centroid_to_sample>(row, n, scale, size.largest, args.features.softmax, ahead, &kind, &shift);
    sums.norm += double(poison(x, n, size.squares));

    // KL divergences as differences of logarithms, then of log-normalisers: each difference apart.
    const double log_norm = ::log(sums.norm), inverse_norm = 1.0 / sums.norm;
    const double own_mean = sums.own * inverse_norm, all_mean = sums.all * inverse_norm;
    const double own_gap = log_norm - q.of[y].log_norm;
    const double concentration = own_mean - own_gap;
    args.concentration[i] = not_negative(concentration);
    args.separation[i] = not_negative(
        centroid_to_sample ? (q.of_all.weight_sum * log_norm - q.of_all.weighted_log_norm) - sums.all +
                                 (sums.own_cross * exp(-q.of[y].log_norm) - own_gap) * inverse_classes
                           : all_mean - (log_norm - q.of_all.weighted_log_norm) - concentration * inverse_classes);
    args.rows[i] = {scale, inverse_length, double(kind), double(shift), inverse_norm, own_mean, all_mean, 0, 0};
    if (out) {
      const Ratio r = ratio(args.concentration[i], args.separation[i], args.eps);
      const double w = args.row_weight[i];
      grad_of_row<centroid_to_sample>(q, row, args.rows[i], y, w * r.d_concentration, w * r.d_separation, Ahead(),
                                      x + n, out);
    }
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
// Centroids: log a(xi), a(xi), their normalisers, and the sums over classes that stand in for the loop over them.
// -------------------------------------------------------------------------------------------------------------

// With `sums`, adds log a to them.
template <Kind kind, bool with_value, bool with_sums, class T>
double activate_row(const T* __restrict x, int64_t n, T shift, T* __restrict value, T* __restrict log,
                    double* __restrict sums, const Ahead& ahead) {
  Lanes<double> norm;
  int64_t near_columns = 0;  // whose excess is summed: sigma = (1 + excess) / 2
  double excess_sum = 0;
  for (int64_t first = 0; first < n; first += kBlock) {
    Lanes<T> excess;  // small, so its sum need not be double
    for_logits<kind>(x + first, min(kBlock, n - first), [&]<Kind as>(int64_t at, int64_t m)
                                                            __attribute__((always_inline)) {
      const int64_t k = first + at;
      const T s = argument_scale<as, T>(1.0);
      if (is_near(as)) near_columns += m;
      ahead.fetch(k, m);
      NCMI_SIMD()
      for (int64_t j = 0; j < m; ++j) {
        if constexpr (is_near(as)) {
          const NearActivation a = near<as>(x[k + j] * s);
          excess.lane[j] += a.excess;
          if constexpr (with_value) value[k + j] = T(0.5) + T(0.5) * a.excess;
          log[k + j] = a.log;
          if constexpr (with_sums) sums[k + j] += double(a.log);
        } else {
          const Activation<T> a = activate<as>(x[k + j], s, shift);
          T in_norm = a.value;
          if constexpr (as == Kind::kNsfMostlyNear) {
            in_norm = is_small(x[k + j]) ? T(0.5) : a.value;
            excess.lane[j] += is_small(x[k + j]) ? near<Kind::kNsfNear>(x[k + j] * T(0.5)).excess : T(0);
          }
          norm.lane[j] += double(in_norm);
          if constexpr (with_value) value[k + j] = a.value;
          log[k + j] = a.log;
          if constexpr (with_sums) sums[k + j] += double(a.log);
        }
      }
    });
    excess_sum += excess.total();
  }
  return norm.total() + 0.5 * (double(near_columns) + excess_sum);
}

// Adds a class to the sums of its chunk, while its row is in cache: for centroid_to_sample q, q log a and q log_norm.
template <class T>
void add_class(const T* __restrict log, const T* __restrict value, int64_t n, double log_norm, double* __restrict sums) {
  double* __restrict log_sums = sums + n;
  double* __restrict norm_sums = sums + 2 * n;
  const double inverse_norm = exp(-log_norm);
  NCMI_SIMD()
  for (int64_t k = 0; k < n; ++k) {
    const double q = double(value[k]) * inverse_norm;
    sums[k] += q;
    log_sums[k] += q * double(log[k]);
    norm_sums[k] += q * log_norm;
  }
}

// The column that differs where all others are equal, any column where all are; -1 for other rows.
template <class T>
int64_t find_lone(const T* x, int64_t n) {
  if (n < 3) return -1;
  const T base = x[0] == x[1] || x[0] == x[2] ? x[0] : x[1];
  int64_t lone = 0, different = 0;
  for (int64_t begin = 0; begin < n && different <= 1; begin += kWide) {
    const int64_t end = min(n, begin + kWide);
    int in_block = 0, sum = 0;
    for (int64_t k = begin; k < end; ++k) {
      in_block += x[k] != base;
      sum += x[k] != base ? int(k - begin) : 0;
    }
    if (in_block == 1) lone = begin + sum;
    different += in_block;
  }
  return different <= 1 ? lone : -1;
}

// Whether a row of logits takes kNsfShifted. Nearly always the first element tells that it does not.
template <class T>
bool is_shifted(const T* x, int64_t n) {
  for (int64_t k = 0; k < n; ++k)
    if (!(x[k] <= T(kShifted))) return false;
  return true;
}

// The statistics of a class, from its logits x.
template <bool centroid_to_sample, class T>
void stats_of_class(const CentroidStatsArgs<T>& args, int64_t c, const T* x, const Size<T>& size, const Ahead& ahead,
                    double* sums) {
  const int64_t n = args.columns;
  T* value = centroid_to_sample ? args.activation + c * n : nullptr;
  T* log = args.log_activation + c * n;
  Kind kind = first_kind(args.softmax, double(size.largest), sizeof(T));
  if (kind == Kind::kNsf && is_shifted(x, n)) kind = Kind::kNsfShifted;
  const T shift = kind == Kind::kSoftmax || kind == Kind::kNsfShifted ? largest_of(x, n) : T(0);
  const double norm = with_kind<T>(kind, [&]<Kind as>() {
    return activate_row<as, centroid_to_sample, !centroid_to_sample>(x, n, shift, value, log, sums, ahead);
  });
  const double log_norm = ::log(norm + double(poison(x, n, size.squares)));
  const int64_t lone = find_lone(x, n), other = lone == 0 ? 1 : 0;
  args.of[c] = {log_norm, double(shift), double(kind), double(lone), 0, 0, 0, 0};
  if (lone >= 0) {
    args.of[c].lone_log = log[lone];
    args.of[c].other_log = log[other];
    if (value) {
      args.of[c].lone_activation = value[lone];
      args.of[c].other_activation = value[other];
    }
  }
  if constexpr (centroid_to_sample) add_class<T>(log, value, n, log_norm, sums);
}

// Calls f<centroid_to_sample>(c, sums) for the classes of some chunks, with the sums of their chunk.
template <class T, class F>
NCMI_INLINE void for_classes(const CentroidStatsArgs<T>& args, int64_t chunk_begin, int64_t chunk_end, const F& f) {
  for (int64_t chunk = chunk_begin; chunk < chunk_end; ++chunk) {
    const int64_t size = chunk_sums(args.centroid_to_sample) * args.columns;
    double* sums = args.chunk_sums + chunk * size;
    memset(sums, 0, size * sizeof(double));
    const int64_t first = chunk * args.classes_per_chunk, last = min(args.classes, first + args.classes_per_chunk);
    for (int64_t c = first; c < last; ++c) {
      if (args.centroid_to_sample)
        f.template operator()<true>(c, sums);
      else
        f.template operator()<false>(c, sums);
    }
  }
}

template <class T>
void centroid_rows(const CentroidStatsArgs<T>& args, int64_t chunk_begin, int64_t chunk_end, T* scratch) {
  for_classes(args, chunk_begin, chunk_end, [&]<bool centroid_to_sample>(int64_t c, double* sums) {
    const Size<T> size = load<true>(args.logits, c, 0, args.columns, static_cast<const T*>(nullptr), scratch);
    stats_of_class<centroid_to_sample>(args, c, scratch, size, Ahead(), sums);
  });
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
    const int64_t chunks = (args.classes + args.classes_per_chunk - 1) / args.classes_per_chunk;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const double* __restrict sums =
          args.chunk_sums + chunk * chunk_sums(args.centroid_to_sample) * args.columns + begin;
      if (args.centroid_to_sample) {
        NCMI_SIMD()
        for (int64_t k = 0; k < n; ++k) {
          q_mean[k] += sums[k];
          log_mean[k] += sums[k + args.columns];
          norm_mean[k] += sums[k + 2 * args.columns];
        }
      } else {
        NCMI_SIMD()
        for (int64_t k = 0; k < n; ++k) log_mean[k] += sums[k];
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

// The sums of one owner of columns. Rows near the centre of the sigmoid, p = (1 + t) / 2 S, are summed as t in T: t is
// small, and so is its rounding. All others are summed in double.
template <class T>
struct ColumnSums {
  T x[kColumnBlock];
  T own_excess[kColumnBlock], total_excess[kColumnBlock];
  double own[kColumnBlock], own_log[kColumnBlock], total[kColumnBlock];
};

// Adds a row's stretch: own += own_factor p, total += beta p; for centroid_to_sample own_log and total take
// beta log a instead. Without `with_own` only total.
template <bool centroid_to_sample, bool with_own, class T>
struct AddRow {
  ColumnSums<T>& sums;
  int64_t n;
  const RowStats& row;
  double own_factor, separation_grad;

  template <Kind kind>
  void operator()() const {
    const T* __restrict x = sums.x;
    const T s = argument_scale<kind, T>(row.scale), shift = T(row.shift);
    if constexpr (is_near(kind) && !centroid_to_sample) {
      T* __restrict own = sums.own_excess;
      T* __restrict total = sums.total_excess;
      const T own_share = T(0.5 * own_factor * row.inverse_norm), total_share = T(0.5 * separation_grad * row.inverse_norm);
      NCMI_SIMD()
      for (int64_t k = 0; k < n; ++k) {
        const T excess = near<kind>(x[k] * s).excess;
        if constexpr (with_own) own[k] += own_share * excess;
        total[k] += total_share * excess;
      }
    } else {
      double* __restrict own = sums.own;
      double* __restrict own_log = sums.own_log;
      double* __restrict total = sums.total;
      const double own_share = own_factor * row.inverse_norm, total_share = separation_grad * row.inverse_norm;
      NCMI_SIMD()
      for (int64_t k = 0; k < n; ++k) {
        const Activation<T> a = activate<kind>(x[k], s, shift);
        if constexpr (with_own) own[k] += own_share * double(a.value);
        if constexpr (centroid_to_sample) {
          if constexpr (with_own) own_log[k] += separation_grad * double(a.log);
          total[k] += separation_grad * double(a.log);
        } else {
          total[k] += total_share * double(a.value);
        }
      }
    }
  }
};

// At the end of a class whose rows were not all near: grad = sum_i own_factor_i (p_ik - q_ck), and for
// centroid_to_sample own_separation = sum_i beta_i (log a_ik - log a_ck).
template <bool centroid_to_sample, class T>
struct FinishClass {
  const ColumnSums<T>& sums;  // with the logits of the class in x
  int64_t n;
  T shift;
  double inverse_norm, excess_base, own_factor_sum, separation_grad_sum;
  T* __restrict grad;
  T* __restrict own_separation;

  template <Kind kind>
  void operator()() const {
    const T* __restrict x = sums.x;
    const T* __restrict own_excess = sums.own_excess;
    const double* __restrict own = sums.own;
    const double* __restrict own_log = sums.own_log;
    for_logits<kind>(x, n, [&]<Kind as>(int64_t begin, int64_t m) __attribute__((always_inline)) {
      const T s = argument_scale<as, T>(1.0);
      NCMI_SIMD()
      for (int64_t k = begin; k < begin + m; ++k) {
        const Activation<T> a = activate<as>(x[k], s, shift);
        const double p_sum = own[k] + (excess_base + double(own_excess[k]));
        grad[k] = T(p_sum - own_factor_sum * (double(a.value) * inverse_norm));
        if constexpr (centroid_to_sample)
          own_separation[k] = T(own_log[k] - separation_grad_sum * double(a.log));
      }
    });
  }
};

constexpr int64_t kRowsPerFlush = 64;  // rows whose excess is added in T before it goes to a double

template <class T>
void flush_totals(ColumnSums<T>& sums, int64_t n) {
  for (int64_t k = 0; k < n; ++k) {
    sums.total[k] += double(sums.total_excess[k]);
    sums.total_excess[k] = 0;
  }
}

template <bool centroid_to_sample, class T>
void centroid_sums_range(const CentroidGradArgs<T>& args, int64_t column_begin, int64_t column_end,
                         ColumnSums<T>& sums) {
  const Centroids<T>& q = args.centroids;
  for (int64_t begin = column_begin; begin < column_end; begin += kColumnBlock) {
    const int64_t n = min(kColumnBlock, column_end - begin);
    double total_base = 0;  // sum over near rows of beta / 2 S, for the 1 in 1 + t
    int64_t unflushed = 0;
    for (int64_t k = 0; k < n; ++k) sums.total[k] = sums.total_excess[k] = 0;
    for (int64_t c = 0; c < q.classes; ++c) {
      const int64_t first = args.class_begin[c], last = args.class_begin[c + 1];
      if (first == last) continue;
      const ClassSums& of_class = args.class_sums[c];
      T* own = args.own + of_class.slot * q.columns + begin;
      memset(sums.own_excess, 0, n * sizeof(T));
      if (!of_class.all_near) {
        memset(sums.own, 0, n * sizeof(double));
        memset(sums.own_log, 0, n * sizeof(double));
      }
      for (int64_t j = first; j < last; ++j) {
        const int64_t i = args.order[j];
        const RowStats& row = args.rows[i];
        load(args.input, i, begin, n, args.center, sums.x);
        with_kind<T>(kind_of(row.kind),
                     AddRow<centroid_to_sample, true, T>{sums, n, row, args.own_factor[i], args.separation_grad[i]});
        if (is_near(kind_of(row.kind)) && !centroid_to_sample)
          total_base += 0.5 * args.separation_grad[i] * row.inverse_norm;
        if (++unflushed == kRowsPerFlush) {
          flush_totals(sums, n);
          unflushed = 0;
        }
      }
      if (of_class.all_near) {  // left to centroid_grad: the excess is all that it needs
        memcpy(own, sums.own_excess, n * sizeof(T));
        continue;
      }
      load(args.logits, c, begin, n, static_cast<const T*>(nullptr), sums.x);
      with_kind<T>(kind_of(q.of[c].kind),
                   FinishClass<centroid_to_sample, T>{
                       sums, n, T(q.of[c].shift), exp(-q.of[c].log_norm), of_class.excess_base, of_class.own_factor,
                       of_class.separation_grad, own,
                       centroid_to_sample ? args.own_separation + of_class.slot * q.columns + begin : nullptr});
    }
    flush_totals(sums, n);
    for (int64_t k = 0; k < n; ++k) args.totals[begin + k] = sums.total[k] + total_base;
  }
}

// The totals alone, rows in the order of the batch.
template <bool centroid_to_sample, class T>
void totals_range(const TotalsArgs<T>& args, int64_t column_begin, int64_t column_end) {
  ColumnSums<T> sums;
  for (int64_t begin = column_begin; begin < column_end; begin += kColumnBlock) {
    const int64_t n = min(kColumnBlock, column_end - begin);
    double total_base = 0;
    for (int64_t k = 0; k < n; ++k) sums.total[k] = sums.total_excess[k] = 0;
    for (int64_t i = 0; i < args.row_count; ++i) {
      if (i % kRowsPerFlush == 0) flush_totals(sums, n);
      if (args.target[i] == args.target.ignore_index) continue;
      const RowStats& row = args.rows[i];
      load(args.input, i, begin, n, args.center, sums.x);
      with_kind<T>(kind_of(row.kind),
                   AddRow<centroid_to_sample, false, T>{sums, n, row, 0, args.separation_grad[i]});
      if (is_near(kind_of(row.kind)) && !centroid_to_sample)
        total_base += 0.5 * args.separation_grad[i] * row.inverse_norm;
    }
    flush_totals(sums, n);
    for (int64_t k = 0; k < n; ++k) args.totals[begin + k] = sums.total[k] + total_base;
  }
}

template <class T>
void totals(const TotalsArgs<T>& args, int64_t column_begin, int64_t column_end) {
  if (args.centroid_to_sample)
    totals_range<true>(args, column_begin, column_end);
  else
    totals_range<false>(args, column_begin, column_end);
}

template <class T>
void centroid_sums(const CentroidGradArgs<T>& args, int64_t column_begin, int64_t column_end) {
  ColumnSums<T> sums;
  if (args.centroids.centroid_to_sample)
    centroid_sums_range<true>(args, column_begin, column_end, sums);
  else
    centroid_sums_range<false>(args, column_begin, column_end, sums);
}

// What the classes' sums hold, decided before they are formed so that every owner of columns agrees.
template <class T>
void class_sums(const CentroidGradArgs<T>& args, ClassSums* result) {
  int64_t used = 0;
  for (int64_t c = 0; c < args.centroids.classes; ++c) {
    const bool has_rows = args.class_begin[c] != args.class_begin[c + 1];
    ClassSums of_class{args.own_is_grad ? c : used, 0, 0, 0, has_rows, !args.centroids.centroid_to_sample};
    used += has_rows;
    for (int64_t j = args.class_begin[c]; j < args.class_begin[c + 1]; ++j) {
      const int64_t i = args.order[j];
      const bool near = is_near(kind_of(args.rows[i].kind));
      of_class.own_factor += args.own_factor[i];
      of_class.separation_grad += args.separation_grad[i];
      if (near && !args.centroids.centroid_to_sample)
        of_class.excess_base += 0.5 * args.own_factor[i] * args.rows[i].inverse_norm;
      of_class.all_near = of_class.all_near && near;
    }
    result[c] = of_class;
  }
}

// sample_to_centroid: slope (-own - (1/C) sum_i beta_i (p_ik - q_ck)), own = sum over the rows of the class of
// own_factor_i (p_ik - q_ck).
enum class Own { kNothing, kExcess, kFinished };

template <class T>
struct GradFromSample {
  const T* __restrict x;
  int64_t n;
  T shift;
  double inverse_norm, inverse_classes, separation_grad_sum;
  const ClassSums& of_class;
  const T* own;  // of the class; not read where it has no rows; may be grad
  double level;
  const T* __restrict variation;
  T* grad;

  template <Kind kind, Own sums>
  void loop() const {
    // own + all = (excess_base + own_excess) - own_factor q + (1/C) (total - beta q), or with own finished without it.
    const double own_factor = sums == Own::kExcess ? of_class.own_factor : 0;
    const double base = level + (sums == Own::kExcess ? of_class.excess_base : 0);
    const double q_factor = (own_factor + inverse_classes * separation_grad_sum) * inverse_norm;
    // Near the centre q = (1 + t) / 2 S: what cancels is constant along the row, and the rest, small with a small error,
    // need not be double.
    const T near_base = T(base - 0.5 * q_factor), near_factor = T(0.5 * q_factor);
    for_logits<kind>(x, n, [&]<Kind as>(int64_t begin, int64_t m) __attribute__((always_inline)) {
      const T s = argument_scale<as, T>(1.0);
      NCMI_SIMD()
      for (int64_t k = begin; k < begin + m; ++k) {
        const T rest = sums == Own::kNothing ? variation[k] : variation[k] + own[k];
        if constexpr (is_near(as)) {
          const T t = near<as>(x[k] * s).excess;
          grad[k] = (T(0.5) * t - T(0.5)) * ((near_base + rest) - near_factor * t);
        } else {
          const Activation<T> a = activate<as>(x[k], s, shift);
          grad[k] = -a.slope * T((base + double(rest)) - q_factor * double(a.value));
        }
      }
    });
  }

  template <Kind kind>
  void operator()() const {
    if (!of_class.has_rows) return loop<kind, Own::kNothing>();
    if (of_class.all_near) return loop<kind, Own::kExcess>();
    loop<kind, Own::kFinished>();
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
  const T* own;  // of the class, and may be grad; null where it has no rows, as own_separation is
  const T* __restrict own_separation;
  T* grad;

  template <Kind kind, bool has_rows>
  void loop() const {
    // Copies, which a loop that writes numbers of their type does not read again.
    const T row_shift = shift;
    const double q_factor = inverse_norm, by_log = separation_grad_sum;
    const T share = T(inverse_classes * inverse_norm);
    const auto s_at = [&](int64_t k, T log) __attribute__((always_inline)) {
      const double s = by_log * double(log) - totals[k];
      if constexpr (has_rows) return s + double(own_separation[k]);
      return s;
    };
    Lanes<double> sum;
    for_logits<kind>(x, n, [&]<Kind as>(int64_t begin, int64_t m) __attribute__((always_inline)) {
      const T argument = argument_scale<as, T>(1.0);
      NCMI_SIMD()
      for (int64_t j = 0; j < m; ++j) {
        const Activation<T> a = activate<as>(x[begin + j], argument, row_shift);
        sum.lane[j] += double(a.value) * q_factor * s_at(begin + j, a.log);
      }
    });
    const double mean = sum.total();
    for_logits<kind>(x, n, [&]<Kind as>(int64_t begin, int64_t m) __attribute__((always_inline)) {
      const T argument = argument_scale<as, T>(1.0);
      NCMI_SIMD()
      for (int64_t k = begin; k < begin + m; ++k) {
        const Activation<T> a = activate<as>(x[k], argument, row_shift);
        // What is to cancel has done so: the rest in T.
        const T by_separation = share * a.value * T(s_at(k, a.log) - mean);
        if constexpr (has_rows)
          grad[k] = a.slope * (by_separation - own[k]);
        else
          grad[k] = a.slope * by_separation;
      }
    });
  }

  template <Kind kind>
  void operator()() const {
    own ? loop<kind, true>() : loop<kind, false>();
  }
};

// The gradient of a class by its logits x.
template <class T>
void grad_of_class(const CentroidGradArgs<T>& args, int64_t c, const T* x, T* grad) {
  const Centroids<T>& q = args.centroids;
  const int64_t n = q.columns;
  const ClassSums& of_class = args.class_sums[c];
  const Kind kind = kind_of(q.of[c].kind);
  const T shift = T(q.of[c].shift);
  const double inverse_norm = exp(-q.of[c].log_norm), inverse_classes = 1.0 / q.of_all.classes;
  const T* own = of_class.has_rows ? args.own + of_class.slot * n : nullptr;
  if (q.centroid_to_sample)
    with_kind<T>(kind, GradFromCentroid<T>{x, n, shift, inverse_norm, inverse_classes, args.separation_grad_sum,
                                           args.totals, own, own ? args.own_separation + of_class.slot * n : nullptr,
                                           grad});
  else
    with_kind<T>(kind, GradFromSample<T>{x, n, shift, inverse_norm, inverse_classes, args.separation_grad_sum, of_class,
                                         own, args.level, args.variation, grad});
}

template <class T>
void centroid_grad(const CentroidGradArgs<T>& args, int64_t class_begin, int64_t class_end, T* grad, T* x) {
  const int64_t n = args.centroids.columns;
  for (int64_t c = class_begin; c < class_end; ++c) {
    load(args.logits, c, 0, n, static_cast<const T*>(nullptr), x);
    grad_of_class(args, c, x, grad + c * n);
  }
}

// -------------------------------------------------------------------------------------------------------------
// A step of the centroids: while a class is in cache its gradient, the update, and the statistics of what it became.
// -------------------------------------------------------------------------------------------------------------

// Returns the size of the new logits.
template <bool with_momentum, bool nesterov, class T>
Size<T> step_of_class(const StepArgs<T>& args, const T* __restrict grad, int64_t n, T* __restrict logits,
                      T* __restrict buffer) {
  using Bits = decltype(magnitude_bits(T()));
  const T lr = T(args.lr), momentum = T(args.momentum), weight_decay = T(args.weight_decay);
  T squares = 0;
  Bits largest = 0;
  NCMI_SIMD(reduction(+ : squares) reduction(max : largest))
  for (int64_t k = 0; k < n; ++k) {
    T step = grad[k] + weight_decay * logits[k];
    if constexpr (with_momentum) {
      const T average = momentum * buffer[k] + step;
      buffer[k] = average;
      step = nesterov ? step + momentum * average : average;
    }
    const T moved = logits[k] - lr * step;
    logits[k] = moved;
    squares += moved * moved;
    largest = magnitude_bits(moved) > largest ? magnitude_bits(moved) : largest;
  }
  return {double(squares), bit_cast<T>(largest)};
}

template <class T>
void centroid_step(const CentroidGradArgs<T>& grad_args, const StepArgs<T>& step_args,
                   const CentroidStatsArgs<T>& stats_args, int64_t chunk_begin, int64_t chunk_end, T* grad) {
  const int64_t n = stats_args.columns;
  const int64_t last = min(stats_args.classes, chunk_end * stats_args.classes_per_chunk);
  for_classes(stats_args, chunk_begin, chunk_end, [&]<bool centroid_to_sample>(int64_t c, double* sums) {
    T* logits = step_args.logits + c * n;
    grad_of_class(grad_args, c, logits, grad);
    T* buffer = step_args.momentum_buffer ? step_args.momentum_buffer + c * n : nullptr;
    const Size<T> size = !buffer              ? step_of_class<false, false>(step_args, grad, n, logits, buffer)
                         : step_args.nesterov ? step_of_class<true, true>(step_args, grad, n, logits, buffer)
                                              : step_of_class<true, false>(step_args, grad, n, logits, buffer);
    Ahead ahead;
    if (c + 1 < last) {
      ahead.add(logits + n, sizeof(T));
      if (buffer) ahead.add(buffer + n, sizeof(T));
      ahead.add(stats_args.log_activation + (c + 1) * n, sizeof(T));
    }
    stats_of_class<centroid_to_sample>(stats_args, c, logits, size, ahead, sums);
  });
}

// -------------------------------------------------------------------------------------------------------------
// Column sums over the rows that are not ignored, for the mean of the features.
// -------------------------------------------------------------------------------------------------------------

template <class In, class T>
void add_stretch(const Matrix& m, int64_t row, int64_t begin, int64_t n, const Ahead& ahead, T* __restrict sums) {
  const In* __restrict in = static_cast<const In*>(m.data) + row * m.row_stride + begin * m.column_stride;
  const int64_t stride = m.column_stride;
  if (stride == 1) {
    const int64_t whole = n / kLanes<T> * kLanes<T>;
    for_stretches<kLanes<T>>(0, whole, [&](int64_t k, int64_t count) __attribute__((always_inline)) {
      ahead.fetch(begin + k, count);
      NCMI_SIMD()
      for (int64_t j = k; j < k + count; ++j) sums[j] += T(widen(in[j]));
    });
    for (int64_t k = whole; k < n; ++k) sums[k] += T(widen(in[k]));
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
        Ahead ahead;
        if (i + 1 < rows) ahead.row(m, i + 1);
        switch (m.dtype) {
          case Dtype::kFloat32: add_stretch<float>(m, i, begin, n, ahead, partial); break;
          case Dtype::kFloat64: add_stretch<double>(m, i, begin, n, ahead, partial); break;
          case Dtype::kBFloat16: add_stretch<BFloat16>(m, i, begin, n, ahead, partial); break;
          case Dtype::kFloat16: add_stretch<Float16>(m, i, begin, n, ahead, partial); break;
        }
      }
      NCMI_SIMD()
      for (int64_t k = 0; k < n; ++k) sums[begin + k] += double(partial[k]);
    }
  }
}

template <class T>
constexpr Kernels<T> table() {
  return {terms<T>, input_grad, centroid_rows<T>, centroid_columns<T>, class_sums<T>, centroid_sums<T>, centroid_grad<T>,
          centroid_step<T>, totals<T>, column_sums<T>};
}

}  // namespace

extern const KernelTable NCMI_KERNEL_TABLE{NCMI_KERNEL_NAME, table<float>(), table<double>()};

}  // namespace ncmi::cpu
