// CUDA front of ternary_repack. A conversion is made once, so the host waits to know whether every code was valid.
#include "../../common/library.h"
#include "ternary_front.h"

namespace pyops {
namespace {

Tensor ternary_repack_cuda(const Tensor& source, int64_t from_format, int64_t to_format, int64_t out_features,
                           int64_t in_features) {
  const RepackArguments a = check_repack(source, from_format, to_format, out_features, in_features);
  const CudaScope scope(source);
  const auto shape = packed_shape(a.to, out_features, in_features);
  const ScalarType dtype = a.to == TernaryFormat::int8 ? ScalarType::Char : ScalarType::Byte;
  Tensor out = shape.size() == 2 ? new_tensor(source, {shape[0], shape[1]}, dtype)
                                 : new_tensor(source, {shape[0], shape[1], shape[2], shape[3]}, dtype);
  repack_into("ternary_repack", "source", source, a, InvalidCode::count, out, scope.stream());
  return out;
}

}  // namespace
}  // namespace pyops

STABLE_TORCH_LIBRARY_IMPL(PYOPS_LIBRARY, PYOPS_CUDA_KEY, m) {
  m.impl("ternary_repack", TORCH_BOX(&pyops::ternary_repack_cuda));
}
