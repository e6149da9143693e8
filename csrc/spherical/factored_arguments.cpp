#include "factored_arguments.h"

namespace pyops {
namespace {

DType check_real(const char* op, const char* name, const Tensor& tensor) {
  check_strided(op, name, tensor);
  PYOPS_CHECK(is_dtype(tensor, ScalarType::Float) || is_dtype(tensor, ScalarType::Double), op, name,
              "be float32 or float64", dtype_name(tensor));
  return is_dtype(tensor, ScalarType::Double) ? DType::float64 : DType::float32;
}

std::string shape_text(int64_t size) { return std::string("[").append(std::to_string(size)).append("]"); }

std::string shape_text(int64_t rows, int64_t columns) {
  return std::string("[").append(std::to_string(rows)).append(", ").append(std::to_string(columns)).append("]");
}

}  // namespace

FactoredArguments check_factored(const char* op, const Tensor& V, const Tensor& U, const Tensor& target) {
  const DType state = check_real(op, "U", U), wide = check_real(op, "V", V);
  PYOPS_CHECK(U.dim() == 2 && U.size(0) == U.size(1), op, "U", "be square", shape_name(U));
  const int64_t features = U.size(0);
  PYOPS_CHECK(V.dim() == 2 && V.size(1) == features, op, "V", "have shape [classes, " + std::to_string(features) + "]",
              shape_name(V));
  check_device(op, "V", V, U, "U");
  check_strided(op, "target", target);
  check_device(op, "target", target, U, "U");
  PYOPS_CHECK(is_dtype(target, ScalarType::Long) || is_dtype(target, ScalarType::Int), op, "target",
              "be int64 or int32", dtype_name(target));
  PYOPS_CHECK(target.dim() == 1 || target.dim() == 2, op, "target", "have shape [rows] or [rows, targets per row]",
              shape_name(target));
  return {op, target.size(0), V.size(0), target.dim() == 2 ? target.size(1) : 1, features, state, wide};
}

void check_factored_like(const FactoredArguments& arguments, const char* name, const Tensor& tensor, const Tensor& U) {
  check_strided(arguments.op, name, tensor);
  check_device(arguments.op, name, tensor, U, "U");
  const ScalarType state = scalar_type_of(arguments.state);
  PYOPS_CHECK(is_dtype(tensor, state), arguments.op, name, "be " + dtype_name(state) + " like U", dtype_name(tensor));
}

void check_factored_state(const FactoredArguments& arguments, const char* name, const Tensor& tensor,
                          int64_t dimensions, const Tensor& U) {
  check_factored_like(arguments, name, tensor, U);
  const int64_t d = arguments.features;
  const bool right = tensor.dim() == dimensions && tensor.size(0) == d && (dimensions == 1 || tensor.size(1) == d);
  PYOPS_CHECK(right, arguments.op, name, "have shape " + (dimensions == 1 ? shape_text(d) : shape_text(d, d)),
              shape_name(tensor));
}

void check_factored_distinct(const FactoredArguments& arguments, const char* name, const Tensor& tensor) {
  if (elements_distinct(tensor)) return;
  std::string text = "strides [" + std::to_string(tensor.stride(0));
  if (tensor.dim() == 2) text.append(", ").append(std::to_string(tensor.stride(1)));
  reject<std::runtime_error>(arguments.op, name, "not overlap in memory, as it is written", text.append("]"));
}

void check_factored_rows(const FactoredArguments& arguments, const char* name, const Tensor& tensor, int64_t columns,
                         ScalarType dtype, const Tensor& U) {
  check_strided(arguments.op, name, tensor);
  check_device(arguments.op, name, tensor, U, "U");
  PYOPS_CHECK(is_dtype(tensor, dtype), arguments.op, name, "be " + dtype_name(dtype), dtype_name(tensor));
  PYOPS_CHECK(tensor.dim() == 2 && tensor.size(0) == arguments.rows && tensor.size(1) == columns, arguments.op, name,
              "have shape " + shape_text(arguments.rows, columns), shape_name(tensor));
}

}  // namespace pyops
