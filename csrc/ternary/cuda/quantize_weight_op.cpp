// CUDA front of ternary_quantize_weight: check, lay out, allocate, launch on the current stream. A weight that is not
// finite makes gamma NaN; nothing waits for the device.
#include "../../common/library.h"
#include "quantize_weight.cuh"
#include "ternary_front.h"

namespace pyops {
namespace {

std::tuple<Tensor, Tensor> quantize_weight_cuda(const Tensor& weight_in, const OptionalTensor& scale_in,
                                                int64_t measure, bool per_row, double eps, bool add_eps) {
  constexpr const char* op = "ternary_quantize_weight";
  const WeightArguments a = check_quantize_weight(weight_in, scale_in, measure, per_row, eps);
  const CudaScope scope(weight_in);
  const Tensor weight = as_contiguous(weight_in);
  OptionalTensor scale;
  if (scale_in) scale = as_contiguous(*scale_in);
  Tensor packed = new_tensor(weight, {a.out_features, ceil_div(a.in_features, 4)}, ScalarType::Byte);
  Tensor gamma =
      per_row ? new_tensor(weight, {a.out_features}, ScalarType::Float) : new_tensor(weight, {}, ScalarType::Float);
  QuantizeWeight quantize{};
  quantize.weight = weight.const_data_ptr();
  quantize.dtype = a.dtype;
  quantize.out_features = a.out_features;
  quantize.in_features = a.in_features;
  quantize.scale = scale ? static_cast<const float*>(scale->const_data_ptr()) : nullptr;
  quantize.median = measure == 1;
  quantize.per_row = per_row;
  quantize.add_eps = add_eps;
  quantize.eps = float(eps);
  quantize.packed = static_cast<uint8_t*>(packed.data_ptr());
  quantize.gamma = static_cast<float*>(gamma.data_ptr());
  const Tensor workspace =
      new_tensor(weight, {ceil_div(pyops_ternary_quantize_weight_workspace(&quantize), 8)}, ScalarType::Long);
  quantize.workspace = workspace.data_ptr();
  check_launch(op, pyops_ternary_quantize_weight(&quantize, scope.stream()));
  return {packed, gamma};
}

}  // namespace
}  // namespace pyops

STABLE_TORCH_LIBRARY_IMPL(PYOPS_LIBRARY, PYOPS_CUDA_KEY, m) {
  m.impl("ternary_quantize_weight", TORCH_BOX(&pyops::quantize_weight_cuda));
}
