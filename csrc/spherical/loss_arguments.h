// What the fronts of spherical_loss and cross_entropy share on every device: checks of logits, target and the
// two weights, and the shapes of the outputs. Mirrored by pyops/spherical/_checks.py.
#pragma once

#include "../common/tensor.h"
#include "spherical_loss_formula.h"

namespace pyops {

enum Reduction : int64_t { kReductionNone = 0, kReductionMean = 1, kReductionSum = 2 };

struct LossArguments {
  const char* op;  // the public name, for messages
  int64_t rows, classes, targets;
  DType dtype;  // of logits
};

LossArguments check_loss_arguments(const char* op, const Tensor& logits, const Tensor& target,
                                   const OptionalTensor& target_weight, const OptionalTensor& weight,
                                   double label_smoothing, int64_t reduction,
                                   const std::optional<ScalarType>& out_dtype);

// The class weight: of the dtype and device of logits, one element per class.
void check_class_weight(const LossArguments& arguments, const Tensor& weight, const Tensor& logits);

// Checks the tensors that a backward takes beside the logits; `columns` is the number of row statistics before
// the target gradients, `normalizers` the number of elements of the normaliser.
LossArguments check_backward_arguments(const char* op, const Tensor& grad_loss, const Tensor& logits,
                                       const Tensor& target, const Tensor& statistics, const Tensor& normalizer,
                                       int64_t columns, int64_t normalizers);

SphericalLoss check_spherical_loss(int64_t loss);
const char* spherical_op_name(SphericalLoss loss, bool backward);

SphericalOptions check_spherical_options(int64_t loss, double a, double b, double eps, double label_smoothing);

// Rows of logits that share memory cannot be overwritten by their gradient.
void check_rows_distinct(const LossArguments& arguments, const Tensor& logits);

}  // namespace pyops
