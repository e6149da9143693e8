// CPU front of ternary_linear and its backward: check, lay out, allocate, run.
#include "ternary_product.h"

namespace pyops {
namespace {

Tensor ternary_linear_cpu(const Tensor& x_in, const Tensor& packed_in, const Tensor& gamma_in,
                          const OptionalTensor& bias_in, int64_t format, int64_t out_features, int64_t in_features,
                          int64_t act_bits, int64_t qmax, double eps, std::optional<ScalarType> out_dtype) {
  const LinearArguments arguments = check_linear(x_in, packed_in, gamma_in, bias_in, format, out_features, in_features,
                                                 act_bits, qmax, eps, out_dtype);
  const Tensor x = rows_dense(x_in), packed = as_contiguous(packed_in), gamma = as_contiguous(gamma_in);
  const OptionalTensor bias = bias_in ? OptionalTensor(as_contiguous(*bias_in)) : std::nullopt;
  Tensor y = new_tensor(x, {arguments.tokens, out_features}, scalar_type_of(arguments.out_dtype));
  if (!arguments.quantized) {
    float_linear(arguments, x, packed, gamma, bias, y);
    return y;
  }
  Scratch<int8_t> q(arguments.tokens * in_features);
  Scratch<float> step(arguments.tokens);
  Scratch<int32_t> sum(arguments.tokens);
  const QuantizedTokens tokens{q.get(), in_features, step.get(), sum.get()};
  quantize_tokens(x, arguments.dtype, arguments.qmax, arguments.eps, tokens);
  integer_product(arguments, tokens, packed, gamma, bias, y);
  return y;
}

Tensor ternary_linear_backward_input_cpu(const Tensor& grad_in, const Tensor& packed, const Tensor& gamma,
                                         int64_t format, int64_t in_features) {
  const LinearArguments arguments = check_linear_backward_input(grad_in, packed, gamma, format, in_features);
  const Tensor grad = rows_dense(grad_in);
  Tensor dx = new_tensor(grad, {arguments.tokens, in_features}, scalar_type_of(arguments.dtype));
  float_backward_input(arguments, grad, as_contiguous(packed), as_contiguous(gamma), dx);
  return dx;
}

}  // namespace
}  // namespace pyops

STABLE_TORCH_LIBRARY_IMPL(pyops, CPU, m) {
  m.impl("ternary_linear", TORCH_BOX(&pyops::ternary_linear_cpu));
  m.impl("ternary_linear_backward_input", TORCH_BOX(&pyops::ternary_linear_backward_input_cpu));
}
