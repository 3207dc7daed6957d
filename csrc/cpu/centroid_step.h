// A step of the centroids: while a class is in cache its gradient, the update, and the statistics of what it became.
#pragma once

#include "centroid_grad.h"
#include "centroid_stats.h"

namespace ncmi::cpu {
namespace {

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

}  // namespace
}  // namespace ncmi::cpu
