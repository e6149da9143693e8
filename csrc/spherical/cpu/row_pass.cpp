#include "row_pass.h"

#include <limits>

namespace pyops {
namespace {

// A target or target weight tensor of one or two dimensions and any strides, by (row, position).
struct Matrix {
  const void* data;
  int64_t row_stride, column_stride;
  int64_t at(int64_t row, int64_t column) const { return row * row_stride + column * column_stride; }
};

Matrix matrix_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.numel() ? tensor.stride(0) : 0, tensor.dim() == 2 ? tensor.stride(1) : 0};
}

std::string position_name(const Tensor& target, int64_t row, int64_t column) {
  std::ostringstream text;
  text << "[" << row;
  if (target.dim() == 2) text << ", " << column;
  text << "]";
  return text.str();
}

int64_t read_index(const Matrix& matrix, bool wide, int64_t row, int64_t column) {
  const int64_t at = matrix.at(row, column);
  return wide ? static_cast<const int64_t*>(matrix.data)[at] : static_cast<const int32_t*>(matrix.data)[at];
}

}  // namespace

bool RowTargets::ignored(int64_t row) const {
  for (int64_t j = 0; j < targets; ++j) {
    if (index[row * targets + j] >= 0) return false;
  }
  return true;
}

RowTargets read_targets(const LossArguments& arguments, const Tensor& target, const OptionalTensor& target_weight,
                        const OptionalTensor& weight, int64_t ignore_index) {
  const int64_t rows = arguments.rows, targets = arguments.targets, classes = arguments.classes;
  const size_t count = size_t(rows * targets);
  RowTargets result{std::vector<int64_t>(count), std::vector<double>(count), std::vector<double>(count), targets, 0, 0};
  const bool wide = target.element_size() == 8;
  const Matrix index = matrix_of(target);
  const Matrix own = target_weight ? matrix_of(*target_weight) : Matrix{};
  const Matrix classes_weight = weight ? matrix_of(*weight) : Matrix{};
  for (int64_t row = 0; row < rows; ++row) {
    double class_weight_sum = 0;
    int64_t counted = 0;
    for (int64_t j = 0; j < targets; ++j) {
      const size_t slot = size_t(row * targets + j);
      const int64_t c = read_index(index, wide, row, j);
      PYOPS_CHECK_INDEX(c == ignore_index || (c >= 0 && c < classes), arguments.op, "target",
                        "be in [0, " + std::to_string(classes) + ") or ignore_index " + std::to_string(ignore_index), c,
                        " at position ", position_name(target, row, j));
      const double share = target_weight ? read_element(own.data, arguments.dtype, own.at(row, j)) : 1;
      const bool counts = c != ignore_index && share != 0;
      const double class_weight =
          counts && weight ? read_element(classes_weight.data, arguments.dtype, classes_weight.at(c, 0)) : 1;
      result.index[slot] = counts ? c : -1;
      result.own[slot] = counts ? share : 0;
      result.omega[slot] = counts ? share * class_weight : 0;
      class_weight_sum += counts ? class_weight : 0;
      counted += counts;
    }
    if (counted) result.weight_sum += class_weight_sum / double(counted);
    result.counted_rows += counted > 0;
  }
  return result;
}

std::vector<int64_t> read_target_indices(const LossArguments& arguments, const Tensor& target, const Tensor& statistics,
                                         int64_t columns) {
  const int64_t targets = arguments.targets, width = columns + targets;
  std::vector<int64_t> result(size_t(arguments.rows * targets));
  const bool wide = target.element_size() == 8;
  const Matrix index = matrix_of(target);
  for (int64_t row = 0; row < arguments.rows; ++row) {
    for (int64_t j = 0; j < targets; ++j) {
      const double gradient = static_cast<const double*>(statistics.const_data_ptr())[row * width + columns + j];
      const int64_t c = read_index(index, wide, row, j);
      PYOPS_CHECK_INDEX(gradient == 0 || (c >= 0 && c < arguments.classes), arguments.op, "target",
                        "be in [0, " + std::to_string(arguments.classes) + ") where it has a gradient", c,
                        " at position ", position_name(target, row, j));
      result[size_t(row * targets + j)] = gradient == 0 ? -1 : c;
    }
  }
  return result;
}

std::vector<double> read_class_weights(const OptionalTensor& weight) {
  if (!weight) return {};
  const DType dtype = check_floating("cross_entropy", "weight", *weight);
  std::vector<double> result(size_t(weight->size(0)));
  const int64_t stride = weight->numel() ? weight->stride(0) : 0;
  for (size_t k = 0; k < result.size(); ++k) {
    result[k] = read_element(weight->const_data_ptr(), dtype, int64_t(k) * stride);
  }
  return result;
}

double mean_divisor(int64_t reduction, double sum, bool safe_mean) {
  if (reduction != kReductionMean) return 1;
  return safe_mean && sum == 0 ? 1 : sum;
}

Tensor reduce_rows(const Tensor& logits, const std::vector<double>& rows, int64_t reduction, double divisor,
                   const std::optional<ScalarType>& out_dtype) {
  const DType type = out_dtype ? dtype_of(*out_dtype) : check_floating("loss", "logits", logits);
  const ScalarType dtype = scalar_type_of(type);
  if (reduction == kReductionNone) {
    Tensor out = new_tensor(logits, {int64_t(rows.size())}, dtype);
    for (size_t row = 0; row < rows.size(); ++row) write_element(out.mutable_data_ptr(), type, int64_t(row), rows[row]);
    return out;
  }
  double total = 0;
  for (const double row : rows) total += row;
  Tensor out = new_tensor(logits, {}, dtype);
  write_element(out.mutable_data_ptr(), type, 0, total / divisor);
  return out;
}

std::vector<double> read_row_gradients(const LossArguments& arguments, const Tensor& grad_loss) {
  const DType dtype = check_floating(arguments.op, "grad_loss", grad_loss);
  const int64_t stride = grad_loss.dim() == 1 && arguments.rows > 0 ? grad_loss.stride(0) : 0;
  std::vector<double> result(size_t(arguments.rows));
  for (size_t row = 0; row < result.size(); ++row) {
    result[row] = read_element(grad_loss.const_data_ptr(), dtype, int64_t(row) * stride);
  }
  return result;
}

bool use_nontemporal(const LossArguments& arguments, const LargeOutput& output) {
  return !output.fresh && arguments.rows * arguments.classes * element_bytes(arguments.dtype) >= (int64_t(32) << 20);
}

}  // namespace pyops
