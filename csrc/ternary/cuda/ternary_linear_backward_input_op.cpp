// CUDA front of ternary_linear_backward_input. Nothing waits for the device: the forward has seen the weights, and a
// code that stands for none stops the kernel.
#include "../../common/library.h"
#include "ternary_linear_backward_input.cuh"
#include "ternary_product_front.h"

namespace pyops {
namespace {

Tensor ternary_linear_backward_input_cuda(const Tensor& grad_in, const Tensor& packed, const Tensor& gamma_in,
                                          int64_t format, int64_t in_features) {
  const LinearArguments a = check_linear_backward_input(grad_in, packed, gamma_in, format, in_features);
  const CudaScope scope(grad_in);
  Tensor out = new_tensor(grad_in, {a.tokens, a.in_features}, scalar_type_of(a.dtype));
  if (out.numel() == 0) return out;
  const Tensor weights =
      matrix_layout(a.op, packed, a.format, a.out_features, a.in_features, InvalidCode::assert, scope.stream());
  const Tensor grad = padded_rows(grad_in), gamma = as_contiguous(gamma_in);
  TernaryLinearBackwardInput backward{};
  backward.grad = grad.const_data_ptr();
  backward.row_stride = grad.stride(0);
  backward.dtype = a.dtype;
  backward.tokens = a.tokens;
  backward.out_features = a.out_features;
  backward.in_features = a.in_features;
  backward.packed = static_cast<const uint8_t*>(weights.const_data_ptr());
  backward.gamma = static_cast<const float*>(gamma.const_data_ptr());
  backward.gamma_stride = gamma_stride(a.granularity, a.in_features);
  backward.grouped = a.granularity == Granularity::group;
  backward.out = out.data_ptr();
  check_launch(a.op, pyops_ternary_linear_backward_input(&backward, scope.stream()));
  return out;
}

}  // namespace
}  // namespace pyops

STABLE_TORCH_LIBRARY_IMPL(PYOPS_LIBRARY, PYOPS_CUDA_KEY, m) {
  m.impl("ternary_linear_backward_input", TORCH_BOX(&pyops::ternary_linear_backward_input_cuda));
}
