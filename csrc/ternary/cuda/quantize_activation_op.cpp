// CUDA front of ternary_quantize_activation: check, lay out, allocate, launch on the current stream.
#include "../../common/library.h"
#include "ternary_front.h"

namespace pyops {
namespace {

std::tuple<Tensor, Tensor, Tensor> quantize_activation_cuda(const Tensor& x_in, int64_t qmax, double eps) {
  constexpr const char* op = "ternary_quantize_activation";
  const ActivationArguments a = check_quantize_activation(op, x_in, qmax, eps);
  const CudaScope scope(x_in);
  const Tensor x = rows_dense(x_in);
  Tensor quantized = new_tensor(x, {a.tokens, a.in_features}, ScalarType::Char);
  Tensor step = new_tensor(x, {a.tokens}, ScalarType::Float);
  Tensor sum = new_tensor(x, {a.tokens}, ScalarType::Int);
  quantize_tokens(op, x, a.dtype, float(qmax), float(eps), quantized, step, sum, scope.stream());
  return {quantized, step, sum};
}

}  // namespace
}  // namespace pyops

STABLE_TORCH_LIBRARY_IMPL(PYOPS_LIBRARY, PYOPS_CUDA_KEY, m) {
  m.impl("ternary_quantize_activation", TORCH_BOX(&pyops::quantize_activation_cuda));
}
