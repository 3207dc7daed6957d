// The operators of ncmi_kernels, declared once for every backend; csrc/cpu/ops_cpu.cpp implements them for the CPU.
//
// Only LibTorch's stable ABI is used, and no part of the CPython API: one binary serves every torch from 2.12 on
// and every Python that those run on. The library is loaded with torch.ops.load_library.
//
// B rows, M columns, C classes. "Arithmetic type": float64 where centroid_logits are, else float32.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(ncmi_kernels, m) {
  // What the rows need to know of the centroids, from their logits [C, M] in the arithmetic type:
  // log_activation [C, M]; activation [C, M], or [0, M] for sample_to_centroid; reference [2, M];
  // norms [C + 1, 8] float64. The operators below also take a table (log_activation, activation, norms) of only some of
  // the classes, of which the targets are then row numbers: reference and the last record of norms speak for all C.
  m.def(
      "centroid_stats(Tensor centroid_logits, bool softmax, bool centroid_to_sample)"
      " -> (Tensor log_activation, Tensor activation, Tensor reference, Tensor norms)");

  // By row: terms [2, B] = (concentration, separation) in the arithmetic type; rows [B, 9] float64, what the backward
  // passes need to form p again and, in the last two columns, zeros for d loss / d terms.
  m.def(
      "terms(Tensor input, Tensor target, Tensor? center, Tensor log_activation, Tensor activation,"
      " Tensor reference, Tensor norms, float temperature, bool l2_normalize, bool softmax,"
      " bool centroid_to_sample, int ignore_index) -> (Tensor terms, Tensor rows)");

  // The same, reduced: the loss in the arithmetic type, a scalar or for reduction 0 (none; 1 mean, 2 sum) [B]; rows with
  // d loss / d terms; means [2] float64, those over the rows of concentration and separation, weighted as the loss is
  // (NaN where no row counts). Given a running centre in the place of center, the rows are centred by moved_center,
  // what update_center_ would make of it ([0] without one), and it is moved once nothing can fail any more. `with_grad`,
  // for the ratio by sample and a scalar loss: d loss / d input [B, M] from the same pass, for an input in the arithmetic
  // type; else grad is [0].
  m.def(
      "loss(Tensor input, Tensor target, Tensor? center, Tensor(a!)? running_center,"
      " Tensor(b!)? num_batches_tracked, float momentum, Tensor log_activation, Tensor activation,"
      " Tensor reference, Tensor norms, Tensor? weight, float temperature, bool l2_normalize, bool softmax,"
      " bool centroid_to_sample, bool batch_ratio, int reduction, float eps, int ignore_index,"
      " bool with_grad)"
      " -> (Tensor loss, Tensor rows, Tensor moved_center, Tensor grad, Tensor means)");

  // grad [B, M] times upstream [], in place; nothing is touched where that is 1. 0, as in ignored rows, stays 0.
  m.def("scale_(Tensor(a!) grad, Tensor upstream) -> ()");

  // Backward by row: d loss / d input [B, M] in the dtype of input. `upstream` (a scalar or [B]) multiplies
  // d loss / d terms.
  m.def(
      "input_grad(Tensor input, Tensor target, Tensor? center, Tensor log_activation, Tensor activation,"
      " Tensor reference, Tensor norms, Tensor rows, Tensor? upstream,"
      " bool centroid_to_sample, int ignore_index) -> Tensor");

  // The centroid sums: d loss / d centroid_logits [C, M]. `totals`, as class_totals gives them, stand in for the sums over
  // all rows: those over the rows of a class are of the rows that are passed, which may be none.
  m.def(
      "centroid_grad(Tensor input, Tensor target, Tensor? center, Tensor centroid_logits, Tensor log_activation,"
      " Tensor activation, Tensor reference, Tensor norms, Tensor rows, Tensor? upstream,"
      " bool centroid_to_sample, int ignore_index, Tensor? totals=None) -> Tensor");

  // What every class's gradient has of all rows, [M + 1] float64, beta_i = d loss / d G_i: sum_i beta_i p_i, for
  // centroid_to_sample sum_i beta_i log a_i, and last sum_i beta_i.
  m.def(
      "class_totals(Tensor input, Tensor target, Tensor? center, Tensor rows, Tensor? upstream,"
      " bool centroid_to_sample, int ignore_index) -> Tensor");

  // A step of torch.optim.SGD on centroid_logits, by the gradient that centroid_grad would give and that is formed a row
  // at a time; momentum_buffer goes with a momentum. The statistics, those that centroid_stats gave of the centroids,
  // become those of the new ones, in place. A batch without rows that count, or with terms that are not finite, moves
  // nothing.
  m.def(
      "centroid_step_(Tensor input, Tensor target, Tensor? center, Tensor(a!) centroid_logits,"
      " Tensor(b!)? momentum_buffer, Tensor(c!) log_activation, Tensor(d!) activation, Tensor(e!) reference,"
      " Tensor(f!) norms, Tensor rows, bool softmax, bool centroid_to_sample, int ignore_index, float lr,"
      " float momentum, float weight_decay, bool nesterov) -> ()");

  // The running centre: set to the mean of the rows at the first batch, then momentum * center +
  // (1 - momentum) * mean. Returns a copy of the new centre, for the graph to keep.
  m.def(
      "update_center_(Tensor(a!) center, Tensor(b!) num_batches_tracked, Tensor input, Tensor target,"
      " float momentum, int num_classes, int ignore_index) -> Tensor");

  // The instruction set that the CPU kernels use: "default", "avx2" or "avx512".
  m.def("cpu_capability() -> str");
}
