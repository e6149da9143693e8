// CUDA front of cross_entropy and its backward: check, lay out, allocate, launch on the current stream. Nothing
// waits for the device; a target out of range stops the kernel instead of raising here.
#include "../../common/library.h"
#include "cross_entropy.cuh"
#include "row_front.h"

namespace pyops {
namespace {

constexpr const char* kForward = "cross_entropy";
constexpr const char* kBackward = "cross_entropy_backward";

std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy_cuda(const Tensor& logits_in, const Tensor& target,
                                                              const OptionalTensor& target_weight,
                                                              const OptionalTensor& weight_in, double label_smoothing,
                                                              double lse_square_scale, int64_t ignore_index,
                                                              int64_t reduction, bool safe_mean,
                                                              std::optional<ScalarType> out_dtype) {
  const LossArguments arguments = check_loss_arguments(kForward, logits_in, target, target_weight, weight_in,
                                                       label_smoothing, reduction, out_dtype);
  PYOPS_CHECK(lse_square_scale >= 0, kForward, "lse_square_scale", "be at least 0", lse_square_scale);
  check_column_count(arguments);
  const CudaScope scope(logits_in);
  const Tensor logits = rows_dense(logits_in);
  const OptionalTensor weight = contiguous_or_none(weight_in);
  const ScalarType dtype = out_dtype.value_or(scalar_type_of(arguments.dtype));
  Tensor loss = new_loss(arguments, logits, reduction, dtype);
  Tensor z_term = new_loss(arguments, logits, reduction, dtype);
  Tensor statistics = new_tensor(logits, {arguments.rows, kTargetGradientCe + arguments.targets}, ScalarType::Double);
  Tensor normalizer = new_tensor(logits, {2}, ScalarType::Double);
  CrossEntropyForward forward{
      loss_rows(arguments, logits, target, target_weight, weight, ignore_index, reduction, safe_mean),
      {label_smoothing, lse_square_scale}};
  Tensor workspace = new_tensor(logits, {pyops_cross_entropy_workspace(&forward)}, ScalarType::Double);
  forward.rows.statistics = static_cast<double*>(statistics.mutable_data_ptr());
  forward.rows.normalizer = static_cast<double*>(normalizer.mutable_data_ptr());
  forward.rows.loss = loss.mutable_data_ptr();
  forward.rows.z_term = z_term.mutable_data_ptr();
  forward.rows.loss_dtype = dtype_of(dtype);
  forward.rows.workspace = static_cast<double*>(workspace.mutable_data_ptr());
  check_launch(kForward, pyops_cross_entropy(&forward, scope.stream()));
  return {loss, z_term, statistics, normalizer};
}

LossArguments check_backward(const Tensor& grad_loss, const Tensor& logits, const Tensor& target,
                             const OptionalTensor& weight, const Tensor& statistics, const Tensor& normalizer) {
  const LossArguments arguments =
      check_backward_arguments(kBackward, grad_loss, logits, target, statistics, normalizer, kTargetGradientCe, 2);
  if (weight) check_class_weight(arguments, *weight, logits);
  check_column_count(arguments);
  return arguments;
}

void backward_into(const LossArguments& arguments, const Tensor& grad_loss, const Tensor& logits, const Tensor& target,
                   const OptionalTensor& weight_in, const Tensor& statistics_in, const Tensor& normalizer_in,
                   const Tensor& out, void* stream) {
  const Tensor statistics = as_contiguous(statistics_in);
  const Tensor normalizer = as_contiguous(normalizer_in);
  const OptionalTensor weight = contiguous_or_none(weight_in);
  const OptionalTensor originals = new_originals(arguments, logits);
  CrossEntropyBackward backward{
      gradient_rows(arguments, grad_loss, logits, target, statistics, normalizer, out, originals)};
  if (weight) backward.rows.class_weight = weight->const_data_ptr();
  check_launch(kBackward, pyops_cross_entropy_backward(&backward, stream));
}

Tensor cross_entropy_backward_cuda(const Tensor& grad_loss, const Tensor& logits_in, const Tensor& target,
                                   const OptionalTensor& weight, const Tensor& statistics, const Tensor& normalizer) {
  const LossArguments arguments = check_backward(grad_loss, logits_in, target, weight, statistics, normalizer);
  const CudaScope scope(logits_in);
  const Tensor logits = rows_dense(logits_in);
  Tensor out = new_tensor(logits, {arguments.rows, arguments.classes}, scalar_type_of(arguments.dtype));
  backward_into(arguments, grad_loss, logits, target, weight, statistics, normalizer, out, scope.stream());
  return out;
}

void cross_entropy_backward_cuda_(const Tensor& grad_loss, Tensor logits, const Tensor& target,
                                  const OptionalTensor& weight, const Tensor& statistics, const Tensor& normalizer) {
  const LossArguments arguments = check_backward(grad_loss, logits, target, weight, statistics, normalizer);
  check_rows_distinct(arguments, logits);
  const CudaScope scope(logits);
  Tensor dense = rows_dense(logits);
  backward_into(arguments, grad_loss, dense, target, weight, statistics, normalizer, dense, scope.stream());
  if (dense.const_data_ptr() != logits.const_data_ptr()) torch::stable::copy_(logits, dense);
}

}  // namespace
}  // namespace pyops

STABLE_TORCH_LIBRARY_IMPL(PYOPS_LIBRARY, PYOPS_CUDA_KEY, m) {
  m.impl("cross_entropy", TORCH_BOX(&pyops::cross_entropy_cuda));
  m.impl("cross_entropy_backward", TORCH_BOX(&pyops::cross_entropy_backward_cuda));
  m.impl("cross_entropy_backward_", TORCH_BOX(&pyops::cross_entropy_backward_cuda_));
}
