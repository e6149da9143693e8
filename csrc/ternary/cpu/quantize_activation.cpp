// CPU front of ternary_quantize_activation: check, lay out, allocate, run.
#include "ternary_product.h"

namespace pyops {
namespace {

std::tuple<Tensor, Tensor, Tensor> ternary_quantize_activation_cpu(const Tensor& x_in, int64_t qmax, double eps) {
  const ActivationArguments arguments = check_quantize_activation("ternary_quantize_activation", x_in, qmax, eps);
  const Tensor x = rows_dense(x_in);
  Tensor quantized = new_tensor(x, {arguments.tokens, arguments.in_features}, ScalarType::Char);
  Tensor step = new_tensor(x, {arguments.tokens}, ScalarType::Float);
  Tensor sum = new_tensor(x, {arguments.tokens}, ScalarType::Int);
  quantize_tokens(x, arguments.dtype, float(qmax), float(eps),
                  {static_cast<int8_t*>(quantized.mutable_data_ptr()), arguments.in_features,
                   static_cast<float*>(step.mutable_data_ptr()), static_cast<int32_t*>(sum.mutable_data_ptr())});
  return {quantized, step, sum};
}

}  // namespace
}  // namespace pyops

STABLE_TORCH_LIBRARY_IMPL(pyops, CPU, m) {
  m.impl("ternary_quantize_activation", TORCH_BOX(&pyops::ternary_quantize_activation_cpu));
}
