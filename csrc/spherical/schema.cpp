// Operator schemas of the spherical family. Each forward returns what its backward needs beside the logits:
// `statistics`, a few numbers per row (spherical_loss_formula.h, cross_entropy_formula.h), and `normalizer`,
// what the 'mean' reduction divides by (float64; ones otherwise). `loss` is a SphericalLoss and `reduction` a
// Reduction by number: torch loses the memory of a string argument at each call (32 bytes, torch 2.11 to 2.13).
#include "../common/library.h"

STABLE_TORCH_LIBRARY_FRAGMENT(PYOPS_LIBRARY, m) {
  m.def(
      "spherical_loss(Tensor logits, Tensor target, Tensor? target_weight, Tensor? weight, int loss, float a, "
      "float b, float eps, float label_smoothing, int ignore_index, int reduction, bool safe_mean, "
      "ScalarType? out_dtype) -> (Tensor loss, Tensor statistics, Tensor normalizer)");
  m.def(
      "spherical_loss_backward(Tensor grad_loss, Tensor logits, Tensor target, Tensor statistics, "
      "Tensor normalizer, int loss, float eps) -> Tensor");
  m.def(
      "spherical_loss_backward_(Tensor grad_loss, Tensor(a!) logits, Tensor target, Tensor statistics, "
      "Tensor normalizer, int loss, float eps) -> ()");
  m.def(
      "cross_entropy(Tensor logits, Tensor target, Tensor? target_weight, Tensor? weight, "
      "float label_smoothing, float lse_square_scale, int ignore_index, int reduction, bool safe_mean, "
      "ScalarType? out_dtype) -> (Tensor loss, Tensor z_term, Tensor statistics, Tensor normalizer)");
  m.def(
      "cross_entropy_backward(Tensor grad_loss, Tensor logits, Tensor target, Tensor? weight, "
      "Tensor statistics, Tensor normalizer) -> Tensor");
  m.def(
      "cross_entropy_backward_(Tensor grad_loss, Tensor(a!) logits, Tensor target, Tensor? weight, "
      "Tensor statistics, Tensor normalizer) -> ()");
}
