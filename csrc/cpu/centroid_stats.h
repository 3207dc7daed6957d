// Centroids: log a(xi), a(xi), their normalisers, and the sums over classes that stand in for the loop over them.
#pragma once

#include "activation.h"
#include "load.h"

namespace ncmi::cpu {
namespace {

// With `sums`, adds log a times the prior to them.
template <Kind kind, bool with_value, bool with_sums, class T>
double activate_row(const T* __restrict x, int64_t n, T shift, T* __restrict value, T* __restrict log, double prior,
                    double* __restrict sums, const Ahead& ahead) {
  Lanes<double> norm;
  int64_t near_columns = 0;  // whose excess is summed: sigma = (1 + excess) / 2
  Lanes<double> excess;
  for (int64_t first = 0; first < n; first += kBlock) {
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
          excess.lane[j] += double(a.excess);
          if constexpr (with_value) value[k + j] = T(0.5) + T(0.5) * a.excess;
          log[k + j] = a.log;
          if constexpr (with_sums) sums[k + j] += prior * double(a.log);
        } else {
          const Activation<T> a = activate<as>(x[k + j], s, shift);
          T in_norm = a.value;
          if constexpr (as == Kind::kNsfMostlyNear) {
            in_norm = is_small(x[k + j]) ? T(0.5) : a.value;
            excess.lane[j] += is_small(x[k + j]) ? double(near<Kind::kNsfNear>(x[k + j] * T(0.5)).excess) : 0.0;
          }
          norm.lane[j] += double(in_norm);
          if constexpr (with_value) value[k + j] = a.value;
          log[k + j] = a.log;
          if constexpr (with_sums) sums[k + j] += prior * double(a.log);
        }
      }
    });
  }
  return norm.total() + 0.5 * (double(near_columns) + excess.total());
}

// Adds a class to the sums of its chunk, while its row is in cache: for centroid_to_sample q, q log a and q log_norm,
// times the prior.
template <class T>
void add_class(const T* __restrict log, const T* __restrict value, int64_t n, double log_norm, double prior,
               double* __restrict sums) {
  double* __restrict log_sums = sums + n;
  double* __restrict norm_sums = sums + 2 * n;
  const double by = prior * exp(-log_norm);
  NCMI_SIMD()
  for (int64_t k = 0; k < n; ++k) {
    const double q = double(value[k]) * by;
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
  const double prior = args.of[c].prior;
  T* value = centroid_to_sample ? args.activation + c * n : nullptr;
  T* log = args.log_activation + c * n;
  Kind kind = first_kind<T>(args.softmax, double(size.largest));
  if (kind == Kind::kNsf && is_shifted(x, n)) kind = Kind::kNsfShifted;
  const T shift = kind == Kind::kSoftmax || kind == Kind::kNsfShifted ? largest_of(x, n) : T(0);
  const double norm = with_kind<T>(kind, [&]<Kind as>() {
    return activate_row<as, centroid_to_sample, !centroid_to_sample>(x, n, shift, value, log, prior, sums, ahead);
  });
  const double log_norm = ::log(norm + double(poison(x, n, size.squares)));
  const int64_t lone = find_lone(x, n), other = lone == 0 ? 1 : 0;
  args.of[c] = {log_norm, double(shift), double(kind), double(lone), 0, 0, 0, 0, prior};
  if (lone >= 0) {
    args.of[c].lone_log = log[lone];
    args.of[c].other_log = log[other];
    if (value) {
      args.of[c].lone_activation = value[lone];
      args.of[c].other_activation = value[other];
    }
  }
  if constexpr (centroid_to_sample) add_class<T>(log, value, n, log_norm, prior, sums);
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
//   sample_to_centroid: the mean over classes of log a(xi), by their priors;
//   centroid_to_sample: its mean weighted with q as well.
// What rounding `reference` to T loses goes, weighted, to `residual` [M], for the caller to add to a constant.
template <class T>
void centroid_columns(const CentroidStatsArgs<T>& args, int64_t column_begin, int64_t column_end) {
  double log_mean[kColumnBlock], q_mean[kColumnBlock], norm_mean[kColumnBlock];
  for (int64_t begin = column_begin; begin < column_end; begin += kColumnBlock) {
    const int64_t n = min(kColumnBlock, column_end - begin);
    for (int64_t k = 0; k < n; ++k) log_mean[k] = q_mean[k] = norm_mean[k] = 0;
    const int64_t chunks = ceil_div(args.classes, args.classes_per_chunk);
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
          args.centroid_to_sample ? (q_mean[k] > 0 ? log_mean[k] / q_mean[k] : 0) : log_mean[k];
      const T rounded = T(reference), weight = T(q_mean[k]);
      args.reference[begin + k] = rounded;
      args.reference[args.columns + begin + k] = weight;
      args.residual[begin + k] = reference - double(rounded);
      args.weighted_log_norm[begin + k] = q_mean[k] > 0 ? double(weight) * (norm_mean[k] / q_mean[k]) : 0;
    }
  }
}

}  // namespace
}  // namespace ncmi::cpu
