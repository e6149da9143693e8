#include "loss_arguments.h"

namespace pyops {
namespace {

const char* const kForwardNames[4] = {"z_loss", "taylor_softmax_loss", "spherical_softmax_loss", "mse_onehot_loss"};
const char* const kBackwardNames[4] = {"z_loss_backward", "taylor_softmax_loss_backward",
                                       "spherical_softmax_loss_backward", "mse_onehot_loss_backward"};

LossArguments check_logits_target(const char* op, const Tensor& logits, const Tensor& target) {
  check_strided(op, "logits", logits);
  const DType dtype = check_floating(op, "logits", logits);
  PYOPS_CHECK(logits.dim() == 2, op, "logits", "have shape [rows, classes]", shape_name(logits));
  check_strided(op, "target", target);
  check_device(op, "target", target, logits);
  PYOPS_CHECK(is_dtype(target, ScalarType::Long) || is_dtype(target, ScalarType::Int), op, "target",
              "be int64 or int32", dtype_name(target));
  const int64_t rows = logits.size(0), classes = logits.size(1);
  PYOPS_CHECK((target.dim() == 1 || target.dim() == 2) && target.size(0) == rows, op, "target",
              "have shape [" + std::to_string(rows) + "] or [" + std::to_string(rows) + ", targets per row]",
              shape_name(target));
  return {op, rows, classes, target.dim() == 2 ? target.size(1) : 1, dtype};
}

bool same_shape(const Tensor& left, const Tensor& right) {
  if (left.dim() != right.dim()) return false;
  for (int64_t dim = 0; dim < left.dim(); ++dim) {
    if (left.size(dim) != right.size(dim)) return false;
  }
  return true;
}

void check_weight(const LossArguments& arguments, const char* name, const Tensor& weight, const Tensor& logits) {
  check_strided(arguments.op, name, weight);
  check_device(arguments.op, name, weight, logits);
  PYOPS_CHECK(same_dtype(weight, logits), arguments.op, name, "be " + dtype_name(logits) + " like logits",
              dtype_name(weight));
}

}  // namespace

void check_class_weight(const LossArguments& arguments, const Tensor& weight, const Tensor& logits) {
  check_weight(arguments, "weight", weight, logits);
  PYOPS_CHECK(weight.dim() == 1 && weight.size(0) == arguments.classes, arguments.op, "weight",
              "have shape [" + std::to_string(arguments.classes) + "]", shape_name(weight));
}

LossArguments check_loss_arguments(const char* op, const Tensor& logits, const Tensor& target,
                                   const OptionalTensor& target_weight, const OptionalTensor& weight,
                                   double label_smoothing, int64_t reduction,
                                   const std::optional<ScalarType>& out_dtype) {
  const LossArguments arguments = check_logits_target(op, logits, target);
  if (target_weight) {
    check_weight(arguments, "target_weight", *target_weight, logits);
    PYOPS_CHECK(same_shape(*target_weight, target), op, "target_weight",
                "have the shape of target, " + shape_name(target), shape_name(*target_weight));
  }
  if (weight) check_class_weight(arguments, *weight, logits);
  PYOPS_CHECK(label_smoothing >= 0 && label_smoothing <= 1, op, "label_smoothing", "be in [0, 1]", label_smoothing);
  PYOPS_CHECK(reduction >= kReductionNone && reduction <= kReductionSum, op, "reduction",
              "be 0 (none), 1 (mean) or 2 (sum)", reduction);
  if (out_dtype) {
    const bool floating = *out_dtype == ScalarType::Float || *out_dtype == ScalarType::Double ||
                          *out_dtype == ScalarType::BFloat16 || *out_dtype == ScalarType::Half;
    PYOPS_CHECK(floating, op, "out_dtype", "be float32, float64, bfloat16 or float16", dtype_name(*out_dtype));
  }
  return arguments;
}

LossArguments check_backward_arguments(const char* op, const Tensor& grad_loss, const Tensor& logits,
                                       const Tensor& target, const Tensor& statistics, const Tensor& normalizer,
                                       int64_t columns, int64_t normalizers) {
  const LossArguments arguments = check_logits_target(op, logits, target);
  check_strided(op, "grad_loss", grad_loss);
  check_device(op, "grad_loss", grad_loss, logits);
  check_floating(op, "grad_loss", grad_loss);
  PYOPS_CHECK(grad_loss.dim() == 0 || (grad_loss.dim() == 1 && grad_loss.size(0) == arguments.rows), op, "grad_loss",
              "have shape [] or [" + std::to_string(arguments.rows) + "]", shape_name(grad_loss));
  check_strided(op, "statistics", statistics);
  check_device(op, "statistics", statistics, logits);
  PYOPS_CHECK(is_dtype(statistics, ScalarType::Double), op, "statistics", "be float64", dtype_name(statistics));
  const int64_t width = columns + arguments.targets;
  PYOPS_CHECK(statistics.dim() == 2 && statistics.size(0) == arguments.rows && statistics.size(1) == width, op,
              "statistics", "have shape [" + std::to_string(arguments.rows) + ", " + std::to_string(width) + "]",
              shape_name(statistics));
  check_strided(op, "normalizer", normalizer);
  check_device(op, "normalizer", normalizer, logits);
  PYOPS_CHECK(is_dtype(normalizer, ScalarType::Double), op, "normalizer", "be float64", dtype_name(normalizer));
  PYOPS_CHECK(normalizer.numel() == normalizers, op, "normalizer", "have " + std::to_string(normalizers) + " elements",
              shape_name(normalizer));
  return arguments;
}

SphericalLoss check_spherical_loss(int64_t loss) {
  PYOPS_CHECK(loss >= 0 && loss <= 3, "spherical_loss", "loss",
              "be 0 (z), 1 (taylor_softmax), 2 (spherical_softmax) or 3 (mse_onehot)", loss);
  return static_cast<SphericalLoss>(loss);
}

const char* spherical_op_name(SphericalLoss loss, bool backward) {
  return (backward ? kBackwardNames : kForwardNames)[static_cast<int>(loss)];
}

SphericalOptions check_spherical_options(int64_t loss, double a, double b, double eps, double label_smoothing) {
  const SphericalLoss kind = check_spherical_loss(loss);
  const char* op = spherical_op_name(kind, false);
  PYOPS_CHECK(a > 0, op, "a", "be positive", a);
  PYOPS_CHECK(b == b, op, "b", "be a number", b);
  PYOPS_CHECK(eps >= 0, op, "eps", "be at least 0", eps);
  return {kind, a, b, eps, label_smoothing};
}

void check_rows_distinct(const LossArguments& arguments, const Tensor& logits) {
  PYOPS_CHECK(elements_distinct(logits), arguments.op, "logits",
              "not overlap in memory when its gradient is written in place", "strides [", logits.stride(0), ", ",
              logits.stride(1), "]");
}

}  // namespace pyops
