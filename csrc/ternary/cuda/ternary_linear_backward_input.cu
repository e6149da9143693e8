// dx = (g gamma) T, straight through the rounding of activations: float_product.cuh with rows of g and T as it lies,
// whose rows are what is summed over.
//
// One gamma for all is taken after the sum, and 16-bit gradients go into the product as they are. A gamma per row is
// taken on the way into the product; g gamma then is one plane of bfloat16 for bfloat16 gradients (the rounding that a
// product with bfloat16 weights T gamma makes), two for float16 and three for float32. With a gamma per group blocks of
// columns have one each, as no block of 128 columns belongs to two groups.
#include "float_product.cuh"
#include "ternary_linear_backward_input.cuh"

namespace pyops {
namespace {

template <class S, class Scaled, int kPlanes, class Plain, int kPlainPlanes>
int launch(const FloatProduct& p, void* stream) {
  return p.scale ? launch_ternary_product<S, Scaled, kPlanes, true, true>(p, stream)
                 : launch_ternary_product<S, Plain, kPlainPlanes, true, false>(p, stream);
}

}  // namespace
}  // namespace pyops

using namespace pyops;

extern "C" int pyops_ternary_linear_backward_input(const TernaryLinearBackwardInput* arguments, void* stream) {
  const TernaryLinearBackwardInput& a = *arguments;
  const bool scaled = a.gamma_stride != 0;
  FloatProduct p{};
  p.rows = a.tokens;
  p.columns = a.in_features;
  p.reduction = a.out_features;
  p.left = a.grad;
  p.left_stride = a.row_stride;
  p.scale = scaled ? a.gamma : nullptr;
  p.scale_stride = a.gamma_stride;
  p.scale_grouped = a.grouped;
  p.right = a.packed;
  p.right_stride = ceil_div(a.in_features, 128);
  p.factor = scaled ? nullptr : a.gamma;
  p.out = a.out;
  p.out_dtype = a.dtype;
  if (a.dtype == DType::bfloat16) return launch<bfloat16, bfloat16, 1, bfloat16, 1>(p, stream);
  if (a.dtype == DType::float16) return launch<float16, bfloat16, 2, float16, 1>(p, stream);
  return launch<float, bfloat16, 3, bfloat16, 3>(p, stream);
}
