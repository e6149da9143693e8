// What the two CUDA fronts share: tensors to the plain arguments of the launchers. Host compiler only.
#pragma once

#include "../../common/cuda_stream.h"
#include "../loss_arguments.h"
#include "row_arguments.cuh"

namespace pyops {

inline StridedMatrix strided_matrix(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.numel() ? tensor.stride(0) : 0, tensor.dim() == 2 ? tensor.stride(1) : 0};
}

// D up to 2^31 - 1: column offsets within a part of a row are 32 bits wide.
inline void check_column_count(const LossArguments& arguments) {
  PYOPS_CHECK(arguments.classes < (int64_t(1) << 31), arguments.op, "logits", "have fewer than 2^31 classes on CUDA",
              arguments.classes);
}

// Everything but the outputs and the workspace; `class_weight` is contiguous.
inline LossRows loss_rows(const LossArguments& arguments, const Tensor& logits, const Tensor& target,
                          const OptionalTensor& target_weight, const OptionalTensor& class_weight, int64_t ignore_index,
                          int64_t reduction, bool safe_mean) {
  LossRows rows{};
  rows.logits = logits.const_data_ptr();
  rows.row_stride = logits.stride(0);
  rows.rows = arguments.rows;
  rows.classes = arguments.classes;
  rows.targets = arguments.targets;
  rows.dtype = arguments.dtype;
  rows.target = strided_matrix(target);
  rows.target_is_wide = target.element_size() == 8;
  rows.ignore_index = ignore_index;
  if (target_weight) rows.target_weight = strided_matrix(*target_weight);
  if (class_weight) rows.class_weight = class_weight->const_data_ptr();
  rows.reduction = static_cast<RowReduction>(reduction);
  rows.safe_mean = safe_mean;
  return rows;
}

// Everything but the class weights. `originals` is scratch that must live until the launch; see GradientRows.
inline GradientRows gradient_rows(const LossArguments& arguments, const Tensor& grad_loss, const Tensor& logits,
                                  const Tensor& target, const Tensor& statistics, const Tensor& normalizer,
                                  const Tensor& gradient, const OptionalTensor& originals) {
  GradientRows rows{};
  rows.grad_loss = grad_loss.const_data_ptr();
  rows.grad_dtype = check_floating(arguments.op, "grad_loss", grad_loss);
  rows.grad_stride = grad_loss.dim() == 1 && arguments.rows > 0 ? grad_loss.stride(0) : 0;
  rows.logits = logits.const_data_ptr();
  rows.row_stride = logits.stride(0);
  rows.gradient = gradient.data_ptr();
  rows.gradient_row_stride = gradient.stride(0);
  rows.rows = arguments.rows;
  rows.classes = arguments.classes;
  rows.targets = arguments.targets;
  rows.dtype = arguments.dtype;
  rows.target = strided_matrix(target);
  rows.target_is_wide = target.element_size() == 8;
  rows.statistics = static_cast<const double*>(statistics.const_data_ptr());
  rows.normalizer = static_cast<const double*>(normalizer.const_data_ptr());
  if (originals) rows.originals = originals->data_ptr();
  return rows;
}

inline OptionalTensor new_originals(const LossArguments& arguments, const Tensor& logits) {
  if (arguments.targets <= kHeldTargets) return std::nullopt;
  return new_tensor(logits, {arguments.rows, arguments.targets}, scalar_type_of(arguments.dtype));
}

inline OptionalTensor contiguous_or_none(const OptionalTensor& tensor) {
  if (!tensor) return std::nullopt;
  return as_contiguous(*tensor);
}

// An output of the reduced shape: () or (rows).
inline Tensor new_loss(const LossArguments& arguments, const Tensor& logits, int64_t reduction, ScalarType dtype) {
  if (reduction == kReductionNone) return new_tensor(logits, {arguments.rows}, dtype);
  return new_tensor(logits, {}, dtype);
}

}  // namespace pyops
