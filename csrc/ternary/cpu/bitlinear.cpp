// CPU front of bitlinear and of the gradient of its weight: check, lay out, allocate, run.
#include "ternary_product.h"

namespace pyops {
namespace {

std::tuple<Tensor, Tensor, Tensor> bitlinear_cpu(const Tensor& x_in, const Tensor& weight, const Tensor& packed_in,
                                                 const Tensor& gamma_in, const OptionalTensor& bias_in,
                                                 int64_t act_bits, int64_t qmax, double eps) {
  const LinearArguments arguments = check_bitlinear(x_in, weight, packed_in, gamma_in, bias_in, act_bits, qmax, eps);
  const Tensor x = rows_dense(x_in), packed = as_contiguous(packed_in), gamma = as_contiguous(gamma_in);
  const OptionalTensor bias = bias_in ? OptionalTensor(as_contiguous(*bias_in)) : std::nullopt;
  const int64_t tokens = arguments.tokens, in_features = arguments.in_features;
  Tensor y = new_tensor(x, {tokens, arguments.out_features}, scalar_type_of(arguments.dtype));
  if (!arguments.quantized) {
    float_linear(arguments, x, packed, gamma, bias, y);
    return {y, new_tensor(x, {0, 0}, ScalarType::Char), new_tensor(x, {0}, ScalarType::Float)};
  }
  Tensor quantized = new_tensor(x, {tokens, in_features}, ScalarType::Char);
  Tensor step = new_tensor(x, {tokens}, ScalarType::Float);
  Scratch<int32_t> sum(tokens);
  const QuantizedTokens all{static_cast<int8_t*>(quantized.mutable_data_ptr()), in_features,
                            static_cast<float*>(step.mutable_data_ptr()), sum.get()};
  quantize_tokens(x, arguments.dtype, arguments.qmax, arguments.eps, all);
  integer_product(arguments, all, packed, gamma, bias, y);
  return {y, quantized, step};
}

Tensor bitlinear_backward_weight_cpu(const Tensor& grad_in, const Tensor& quantized_in, const Tensor& step,
                                     ScalarType dtype) {
  const WeightGradientArguments arguments = check_backward_weight(grad_in, quantized_in, step, dtype);
  const Tensor grad = rows_dense(grad_in), quantized = rows_dense(quantized_in);
  Tensor dw = new_tensor(grad, {arguments.out_features, arguments.in_features}, dtype);
  float_backward_weight(arguments, grad, quantized, as_contiguous(step), dw);
  return dw;
}

}  // namespace
}  // namespace pyops

STABLE_TORCH_LIBRARY_IMPL(pyops, CPU, m) {
  m.impl("bitlinear", TORCH_BOX(&pyops::bitlinear_cpu));
  m.impl("bitlinear_backward_weight", TORCH_BOX(&pyops::bitlinear_backward_weight_cpu));
}
