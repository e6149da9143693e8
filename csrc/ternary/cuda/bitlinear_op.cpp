// CUDA front of bitlinear. Nothing waits for the device: packed weights come from ternary_quantize_weight, and a code
// that stands for no weight stops the kernel, as an index out of range does.
#include "../../common/library.h"
#include "ternary_product_front.h"

namespace pyops {
namespace {

std::tuple<Tensor, Tensor, Tensor> bitlinear_cuda(const Tensor& x_in, const Tensor& weight, const Tensor& packed,
                                                  const Tensor& gamma, const OptionalTensor& bias, int64_t act_bits,
                                                  int64_t qmax, double eps) {
  const LinearArguments a = check_bitlinear(x_in, weight, packed, gamma, bias, act_bits, qmax, eps);
  const CudaScope scope(x_in);
  const Tensor x = rows_dense(x_in);
  Tensor y = new_tensor(x, {a.tokens, a.out_features}, scalar_type_of(a.dtype));
  Tensor quantized = a.quantized ? new_tensor(x, {a.tokens, a.in_features}, ScalarType::Char)
                                 : new_tensor(x, {0, 0}, ScalarType::Char);
  Tensor step = new_tensor(x, {a.quantized ? a.tokens : 0}, ScalarType::Float);
  if (y.numel()) {
    SavedActivations saved;
    if (a.quantized) saved = {quantized, step};
    ternary_product(a, x, packed, gamma, bias, InvalidCode::assert, saved, y, scope.stream());
  } else if (a.quantized) {
    quantize_tokens(a.op, x, a.dtype, a.qmax, a.eps, quantized, step, std::nullopt, scope.stream());
  }
  return {y, quantized, step};
}

}  // namespace
}  // namespace pyops

STABLE_TORCH_LIBRARY_IMPL(PYOPS_LIBRARY, PYOPS_CUDA_KEY, m) { m.impl("bitlinear", TORCH_BOX(&pyops::bitlinear_cuda)); }
