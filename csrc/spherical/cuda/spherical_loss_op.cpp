// CUDA front of spherical_loss and its backward: check, lay out, allocate, launch on the current stream. Nothing
// waits for the device; a target out of range stops the kernel instead of raising here.
#include "../../common/library.h"
#include "row_front.h"
#include "spherical_loss.cuh"

namespace pyops {
namespace {

std::tuple<Tensor, Tensor, Tensor> spherical_loss_cuda(const Tensor& logits_in, const Tensor& target,
                                                       const OptionalTensor& target_weight,
                                                       const OptionalTensor& weight_in, int64_t loss_number, double a,
                                                       double b, double eps, double label_smoothing,
                                                       int64_t ignore_index, int64_t reduction, bool safe_mean,
                                                       std::optional<ScalarType> out_dtype) {
  const SphericalOptions options = check_spherical_options(loss_number, a, b, eps, label_smoothing);
  const LossArguments arguments = check_loss_arguments(spherical_op_name(options.loss, false), logits_in, target,
                                                       target_weight, weight_in, label_smoothing, reduction, out_dtype);
  check_column_count(arguments);
  const CudaScope scope(logits_in);
  const Tensor logits = rows_dense(logits_in);
  const OptionalTensor weight = contiguous_or_none(weight_in);
  const ScalarType dtype = out_dtype.value_or(scalar_type_of(arguments.dtype));
  Tensor loss = new_loss(arguments, logits, reduction, dtype);
  Tensor statistics = new_tensor(logits, {arguments.rows, kTargetGradient + arguments.targets}, ScalarType::Double);
  Tensor normalizer = new_tensor(logits, {}, ScalarType::Double);
  SphericalLossForward forward{
      loss_rows(arguments, logits, target, target_weight, weight, ignore_index, reduction, safe_mean), options};
  Tensor workspace = new_tensor(logits, {pyops_spherical_loss_workspace(&forward)}, ScalarType::Double);
  forward.rows.statistics = static_cast<double*>(statistics.mutable_data_ptr());
  forward.rows.normalizer = static_cast<double*>(normalizer.mutable_data_ptr());
  forward.rows.loss = loss.mutable_data_ptr();
  forward.rows.loss_dtype = dtype_of(dtype);
  forward.rows.workspace = static_cast<double*>(workspace.mutable_data_ptr());
  check_launch(arguments.op, pyops_spherical_loss(&forward, scope.stream()));
  return {loss, statistics, normalizer};
}

LossArguments check_backward(SphericalLoss loss, const Tensor& grad_loss, const Tensor& logits, const Tensor& target,
                             const Tensor& statistics, const Tensor& normalizer) {
  const LossArguments arguments = check_backward_arguments(spherical_op_name(loss, true), grad_loss, logits, target,
                                                           statistics, normalizer, kTargetGradient, 1);
  check_column_count(arguments);
  return arguments;
}

void backward_into(const LossArguments& arguments, SphericalLoss loss, double eps, const Tensor& grad_loss,
                   const Tensor& logits, const Tensor& target, const Tensor& statistics_in, const Tensor& normalizer_in,
                   const Tensor& out, void* stream) {
  const Tensor statistics = as_contiguous(statistics_in);
  const Tensor normalizer = as_contiguous(normalizer_in);
  const OptionalTensor originals = new_originals(arguments, logits);
  const SphericalLossBackward backward{
      gradient_rows(arguments, grad_loss, logits, target, statistics, normalizer, out, originals), loss, eps};
  check_launch(arguments.op, pyops_spherical_loss_backward(&backward, stream));
}

Tensor spherical_loss_backward_cuda(const Tensor& grad_loss, const Tensor& logits_in, const Tensor& target,
                                    const Tensor& statistics, const Tensor& normalizer, int64_t loss_number,
                                    double eps) {
  const SphericalLoss loss = check_spherical_loss(loss_number);
  const LossArguments arguments = check_backward(loss, grad_loss, logits_in, target, statistics, normalizer);
  const CudaScope scope(logits_in);
  const Tensor logits = rows_dense(logits_in);
  Tensor out = new_tensor(logits, {arguments.rows, arguments.classes}, scalar_type_of(arguments.dtype));
  backward_into(arguments, loss, eps, grad_loss, logits, target, statistics, normalizer, out, scope.stream());
  return out;
}

void spherical_loss_backward_cuda_(const Tensor& grad_loss, Tensor logits, const Tensor& target,
                                   const Tensor& statistics, const Tensor& normalizer, int64_t loss_number,
                                   double eps) {
  const SphericalLoss loss = check_spherical_loss(loss_number);
  const LossArguments arguments = check_backward(loss, grad_loss, logits, target, statistics, normalizer);
  check_rows_distinct(arguments, logits);
  const CudaScope scope(logits);
  Tensor dense = rows_dense(logits);
  backward_into(arguments, loss, eps, grad_loss, dense, target, statistics, normalizer, dense, scope.stream());
  if (dense.const_data_ptr() != logits.const_data_ptr()) torch::stable::copy_(logits, dense);
}

}  // namespace
}  // namespace pyops

STABLE_TORCH_LIBRARY_IMPL(PYOPS_LIBRARY, PYOPS_CUDA_KEY, m) {
  m.impl("spherical_loss", TORCH_BOX(&pyops::spherical_loss_cuda));
  m.impl("spherical_loss_backward", TORCH_BOX(&pyops::spherical_loss_backward_cuda));
  m.impl("spherical_loss_backward_", TORCH_BOX(&pyops::spherical_loss_backward_cuda_));
}
