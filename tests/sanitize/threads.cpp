// The CPU operators on several threads, for ThreadSanitizer (`make sanitize`). With an argument the threads' parts
// overlap: a race in the kernels that it must find.
#include "../../csrc/cpu/ops_centroids.cpp"
#include "../../csrc/cpu/ops_cpu.cpp"
#include "../../csrc/cpu/ops_focus.cpp"

#include <thread>

int64_t overlap = 0;

// Takes the place of torch's, whose threads ThreadSanitizer does not know: up to 5 parts whatever the grain.
AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t, ParallelFunc f, void* context) {
  const int64_t parts = std::min<int64_t>(5, end - begin);
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < parts; ++i) {
    const int64_t part_end = begin + (end - begin) * (i + 1) / parts;
    threads.emplace_back(f, begin + (end - begin) * i / parts, std::min(end, part_end + overlap), context);
  }
  for (std::thread& thread : threads) thread.join();
  return AOTI_TORCH_SUCCESS;
}

namespace ncmi::cpu {

template <class T>
Tensor numbers(std::initializer_list<int64_t> sizes) {
  Tensor t = empty(sizes, kScalarType<T>);
  for (int64_t i = 0; i < t.numel(); ++i) output<T>(t)[i] = T(0.1) * T(i * 7919 % 61 - 30);
  return t;
}

template <class T>
void run(int64_t rows, int64_t classes, int64_t columns, bool softmax, bool centroid_to_sample) {
  const Tensor z = numbers<T>({rows, columns}), xi = numbers<T>({classes, columns}), center = numbers<T>({columns});
  const Tensor buffer = numbers<T>({classes, columns}), upstream = numbers<T>({});
  Tensor y = empty({rows}, ScalarType::Long), batches = empty({}, ScalarType::Long);
  for (int64_t i = 0; i < rows; ++i) output<int64_t>(y)[i] = i % 5 == 3 ? -100 : i * i % classes;
  *output<int64_t>(batches) = 1;
  const auto [log_a, a, reference, norms] = centroid_stats(xi, softmax, centroid_to_sample, std::nullopt);
  terms(z, y, center, log_a, a, reference, norms, 1, false, softmax, centroid_to_sample, -100);
  const auto [value, stats, coefficients, moved, grad, means] =
      loss(z, y, std::nullopt, center, batches, 0.9, log_a, a, reference, norms, std::nullopt, 1, true, softmax,
           centroid_to_sample, false, kMean, 1e-8, 0.0, -100, true);
  scale_(grad, upstream);
  const auto none = std::nullopt;
  const bool c2s = centroid_to_sample;
  input_grad(z, y, moved, log_a, a, reference, norms, stats, coefficients, none, c2s, -100, z, z);
  const Tensor totals = class_totals(z, y, moved, stats, coefficients, none, c2s, -100);
  centroid_grad(z, y, moved, xi, log_a, a, reference, norms, stats, coefficients, none, c2s, -100, totals, none, none);

  const auto [relative, distribution, level] = focus_table(log_a, a, reference, norms, c2s);
  focus_rows(z, y, moved, log_a, a, reference, norms, stats, c2s, -100);
  const Tensor weights = numbers<T>({rows, classes}), separation = numbers<double>({rows});
  const Tensor shared = numbers<double>({3, rows}), nearest = focus_nearest(weights, stats, y, norms, level, c2s, -100, 1);
  focus_weights_(weights, separation, stats, y, norms, level, 5.0, c2s, -100, 1, shared);
  focus_weights_(weights, separation, stats, y, norms, level, 5.0, c2s, -100, 1, none);
  const Tensor class_weights = numbers<double>({classes, kClassWeights}), weighted = numbers<T>({classes, columns});
  focus_sums_(weights, class_weights, stats, coefficients, y, c2s, -100);
  centroid_grad(z, y, moved, xi, log_a, a, reference, norms, stats, coefficients, none, c2s, -100, none, class_weights,
                weighted);
  centroid_step_(z, y, moved, xi, buffer, log_a, a, reference, norms, stats, coefficients, softmax, c2s, -100, 0.1, 0.9,
                 1e-4, true, none, none);
}

}  // namespace ncmi::cpu

int main(int argc, char**) {
  overlap = argc - 1;
  for (const bool softmax : {false, true}) {
    for (const bool centroid_to_sample : {false, true}) {
      for (const auto& [rows, classes, columns] : {std::tuple{1, 1, 2}, {7, 3, 33}, {131, 257, 70}, {65, 40, 515}}) {
        ncmi::cpu::run<float>(rows, classes, columns, softmax, centroid_to_sample);
        ncmi::cpu::run<double>(rows, classes, columns, softmax, centroid_to_sample);
      }
    }
  }
}
