// CUDA front of ternary_linear. Weights in the layout t2mma go straight to the kernels; any other format is converted
// first, for which the host waits to know whether every code was valid: convert once with ternary_repack.
#include "../../common/library.h"
#include "ternary_product_front.h"

namespace pyops {
namespace {

Tensor ternary_linear_cuda(const Tensor& x_in, const Tensor& packed, const Tensor& gamma, const OptionalTensor& bias,
                           int64_t format, int64_t out_features, int64_t in_features, int64_t act_bits, int64_t qmax,
                           double eps, std::optional<ScalarType> out_dtype) {
  const LinearArguments a =
      check_linear(x_in, packed, gamma, bias, format, out_features, in_features, act_bits, qmax, eps, out_dtype);
  const CudaScope scope(x_in);
  const Tensor x = rows_dense(x_in);
  Tensor y = new_tensor(x, {a.tokens, a.out_features}, scalar_type_of(a.out_dtype));
  if (y.numel()) ternary_product(a, x, packed, gamma, bias, InvalidCode::count, {}, y, scope.stream());
  return y;
}

}  // namespace
}  // namespace pyops

STABLE_TORCH_LIBRARY_IMPL(PYOPS_LIBRARY, PYOPS_CUDA_KEY, m) {
  m.impl("ternary_linear", TORCH_BOX(&pyops::ternary_linear_cuda));
}
