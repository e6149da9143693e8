// Operator schemas of the ternary family. Weights are rows of codes {0, 1, 2} = {-1, 0, +1} + 1 in one of the
// packed formats of ternary_format.h, given by number; `gamma` (float32) multiplies and its shape tells the
// granularity: [] one per tensor, [out_features] one per row, [out_features, in_features / 256] one per group.
// `measure` is 0 for the mean of |W|, 1 for the lower median; `act_bits` is 8, or 0 for activations as they are.
#include "../common/library.h"

STABLE_TORCH_LIBRARY_FRAGMENT(PYOPS_LIBRARY, m) {
  m.def(
      "ternary_quantize_weight(Tensor weight, Tensor? scale, int measure, bool per_row, float eps, bool add_eps) "
      "-> (Tensor packed, Tensor gamma)");
  m.def(
      "ternary_quantize_activation(Tensor x, int qmax, float eps) "
      "-> (Tensor quantized, Tensor step, Tensor sum)");
  m.def(
      "ternary_repack(Tensor source, int from_format, int to_format, SymInt out_features, SymInt in_features) "
      "-> Tensor");
  m.def(
      "ternary_linear(Tensor x, Tensor packed, Tensor gamma, Tensor? bias, int format, SymInt out_features, "
      "SymInt in_features, int act_bits, int qmax, float eps, ScalarType? out_dtype) -> Tensor");
  m.def(
      "ternary_linear_backward_input(Tensor grad, Tensor packed, Tensor gamma, int format, SymInt in_features) "
      "-> Tensor");
  // `weight` is there for its gradient only: what is multiplied is (packed, gamma), format t2.
  m.def(
      "bitlinear(Tensor x, Tensor weight, Tensor packed, Tensor gamma, Tensor? bias, int act_bits, int qmax, "
      "float eps) -> (Tensor y, Tensor quantized, Tensor step)");
  m.def("bitlinear_backward_weight(Tensor grad, Tensor quantized, Tensor step, ScalarType dtype) -> Tensor");
}
