// CUDA front of bitlinear_backward_weight: check, lay out, allocate, launch on the current stream.
#include "../../common/library.h"
#include "bitlinear_backward_weight.cuh"
#include "ternary_front.h"

namespace pyops {
namespace {

Tensor bitlinear_backward_weight_cuda(const Tensor& grad_in, const Tensor& quantized_in, const Tensor& step_in,
                                      ScalarType dtype) {
  constexpr const char* op = "bitlinear_backward_weight";
  const WeightGradientArguments a = check_backward_weight(grad_in, quantized_in, step_in, dtype);
  const CudaScope scope(grad_in);
  Tensor out = new_tensor(grad_in, {a.out_features, a.in_features}, dtype);
  if (out.numel() == 0) return out;
  const Tensor grad = padded_rows(grad_in), quantized = padded_rows(quantized_in), step = as_contiguous(step_in);
  BitlinearBackwardWeight backward{};
  backward.grad = grad.const_data_ptr();
  backward.row_stride = grad.stride(0);
  backward.dtype = a.dtype;
  backward.tokens = a.tokens;
  backward.out_features = a.out_features;
  backward.in_features = a.in_features;
  backward.quantized = static_cast<const int8_t*>(quantized.const_data_ptr());
  backward.quantized_stride = quantized.stride(0);
  backward.step = static_cast<const float*>(step.const_data_ptr());
  backward.out = out.data_ptr();
  backward.out_dtype = a.out_dtype;
  check_launch(op, pyops_bitlinear_backward_weight(&backward, scope.stream()));
  return out;
}

}  // namespace
}  // namespace pyops

STABLE_TORCH_LIBRARY_IMPL(PYOPS_LIBRARY, PYOPS_CUDA_KEY, m) {
  m.impl("bitlinear_backward_weight", TORCH_BOX(&pyops::bitlinear_backward_weight_cuda));
}
