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
  // The factored layer W = V U + 1 omega^T: `partials` are beta, shift and the target gradients of each row
  // (factored_product.h, float64), H the features in the state's dtype with the constant of the bias, HC = H C and
  // P = H U^T. `outcome` holds 0 (factored), 1 (singular: nothing was changed) or 2 (not finite: nothing was changed),
  // and the Frobenius norms of U and U_inv. A bias_scale of 0 means no bias.
  m.def(
      "factored_linear(Tensor h, Tensor target, Tensor? target_weight, Tensor? weight, Tensor V, Tensor U, "
      "Tensor omega, Tensor wbar, Tensor C, float bias_scale, int loss, float a, float b, float eps, "
      "float label_smoothing, int ignore_index, int reduction, bool safe_mean) -> (Tensor loss, Tensor partials, "
      "Tensor normalizer, Tensor H, Tensor HC, Tensor P)");
  m.def(
      "factored_linear_gradient(Tensor grad_loss, Tensor target, Tensor partials, Tensor normalizer, Tensor HC, "
      "Tensor V, Tensor U, Tensor omega, Tensor wbar) -> (Tensor grad_H, Tensor Z, Tensor scaled_partials)");
  m.def(
      "factored_linear_step_(Tensor(a!) V, Tensor(b!) U, Tensor(c!) U_inv, Tensor(d!) omega, Tensor(e!) wbar, "
      "Tensor(f!) C, Tensor target, Tensor partials, Tensor H, Tensor HC, Tensor P, Tensor Z, float rate, "
      "float keep, bool shift_invariant) -> Tensor outcome");
}
