// dW = (step g)^T q, straight through the rounding of weights: float_product.cuh with both operands as they lie, tokens
// being what is summed over. Bytes are exact; step g is one plane of bfloat16 for bfloat16 gradients (as the rounding
// of step q would be in a product of bfloat16), two for float16, three for float32 and for results in float32.
#include "bitlinear_backward_weight.cuh"
#include "float_product.cuh"

namespace pyops {
namespace {

template <class S, int kPlanes>
int launch(const FloatProduct& p, void* stream) {
  constexpr int rows = 64;
  using Left = LeftTile<S, bfloat16, kPlanes, rows, true, true>;
  return launch_product<Product<bfloat16, Left, ByteTile, kPlanes, rows, true, true, false>>(p, stream);
}

}  // namespace
}  // namespace pyops

using namespace pyops;

extern "C" int pyops_bitlinear_backward_weight(const BitlinearBackwardWeight* arguments, void* stream) {
  const BitlinearBackwardWeight& a = *arguments;
  FloatProduct p{};
  p.rows = a.out_features;
  p.columns = a.in_features;
  p.reduction = a.tokens;
  p.left = a.grad;
  p.left_stride = a.row_stride;
  p.scale = a.step;
  p.scale_stride = 1;
  p.right = a.quantized;
  p.right_stride = a.quantized_stride;
  p.out = a.out;
  p.out_dtype = a.out_dtype;
  if (a.dtype == DType::float32) return launch<float, 3>(p, stream);
  if (a.out_dtype == DType::float32) {  // asked for where all of dW is summed up: the gradient of a learned scale
    return a.dtype == DType::bfloat16 ? launch<bfloat16, 3>(p, stream) : launch<float16, 3>(p, stream);
  }
  return a.dtype == DType::bfloat16 ? launch<bfloat16, 1>(p, stream) : launch<float16, 2>(p, stream);
}
