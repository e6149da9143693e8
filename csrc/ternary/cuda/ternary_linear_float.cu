// y = x (T gamma)^T + bias with activations as they are: float_product.cuh with rows of x and rows of T, both of which
// lie along k. float32 activations are three planes of bfloat16, 16-bit ones go as they are.
#include "float_product.cuh"
#include "ternary_linear.cuh"

namespace pyops {
namespace {

template <class S, class Element, int kPlanes>
int launch(const FloatProduct& p, bool grouped, void* stream) {
  if (grouped) return launch_product<TernaryProduct<S, Element, kPlanes, 64, false, false, true>>(p, stream);
  return launch_ternary_product<S, Element, kPlanes, false, false>(p, stream);
}

}  // namespace
}  // namespace pyops

using namespace pyops;

extern "C" int pyops_ternary_linear_float(const TernaryLinearFloat* arguments, void* stream) {
  const TernaryLinearFloat& a = *arguments;
  FloatProduct p{};
  p.rows = a.tokens;
  p.columns = a.out_features;
  p.reduction = a.in_features;
  p.left = a.x;
  p.left_stride = a.row_stride;
  p.right = a.packed;
  p.right_stride = ceil_div(a.in_features, 128);
  p.factor = a.output.gamma;
  p.factor_stride = a.output.gamma_stride;
  p.bias = a.output.bias;
  p.bias_dtype = a.output.bias_dtype;
  p.out = a.output.y;
  p.out_dtype = a.output.y_dtype;
  if (a.x_dtype == DType::bfloat16) return launch<bfloat16, bfloat16, 1>(p, a.grouped, stream);
  if (a.x_dtype == DType::float16) return launch<float16, float16, 1>(p, a.grouped, stream);
  return launch<float, bfloat16, 3>(p, a.grouped, stream);
}
