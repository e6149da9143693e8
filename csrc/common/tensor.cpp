#include "tensor.h"

namespace pyops {
namespace {

int32_t dtype_code(const Tensor& tensor) {
  int32_t code = -1;
  aoti_torch_get_dtype(tensor.get(), &code);
  return code;
}

// The shim gives no names, and Tensor::scalar_type() throws for what it does not know.
std::string name_of_code(int32_t code) {
  const struct {
    int32_t code;
    const char* name;
  } known[] = {
      {aoti_torch_dtype_float32(), "float32"},       {aoti_torch_dtype_float64(), "float64"},
      {aoti_torch_dtype_bfloat16(), "bfloat16"},     {aoti_torch_dtype_float16(), "float16"},
      {aoti_torch_dtype_int64(), "int64"},           {aoti_torch_dtype_int32(), "int32"},
      {aoti_torch_dtype_int16(), "int16"},           {aoti_torch_dtype_int8(), "int8"},
      {aoti_torch_dtype_uint8(), "uint8"},           {aoti_torch_dtype_uint16(), "uint16"},
      {aoti_torch_dtype_uint32(), "uint32"},         {aoti_torch_dtype_uint64(), "uint64"},
      {aoti_torch_dtype_bool(), "bool"},             {aoti_torch_dtype_complex32(), "complex32"},
      {aoti_torch_dtype_complex64(), "complex64"},   {aoti_torch_dtype_complex128(), "complex128"},
      {aoti_torch_dtype_float8_e4m3fn(), "float8_e4m3fn"},
      {aoti_torch_dtype_float8_e5m2(), "float8_e5m2"},
      {aoti_torch_dtype_float8_e4m3fnuz(), "float8_e4m3fnuz"},
      {aoti_torch_dtype_float8_e5m2fnuz(), "float8_e5m2fnuz"},
  };
  for (const auto& entry : known) {
    if (entry.code == code) return entry.name;
  }
  return "a dtype that is not supported";
}

}  // namespace

std::string dtype_name(const Tensor& tensor) { return name_of_code(dtype_code(tensor)); }

std::string dtype_name(ScalarType dtype) {
  return name_of_code(torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)));
}

std::string shape_name(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    if (dim) text += ", ";
    text += std::to_string(tensor.size(dim));
  }
  return text + "]";
}

std::string device_name(const Tensor& tensor) {
  int32_t type = 0, index = 0;
  aoti_torch_get_device_type(tensor.get(), &type);
  aoti_torch_get_device_index(tensor.get(), &index);
  if (type == aoti_torch_device_type_cpu()) return "cpu";
  if (type == aoti_torch_device_type_meta()) return "meta";
  if (type == aoti_torch_device_type_cuda()) return "cuda:" + std::to_string(index);
  return "device type " + std::to_string(type);
}

void check_strided(const char* op, const char* argument, const Tensor& tensor) {
  int32_t layout = -1;
  aoti_torch_get_layout(tensor.get(), &layout);
  PYOPS_CHECK(layout == aoti_torch_layout_strided(), op, argument, "be a strided tensor", "another layout");
}

void check_device(const char* op, const char* argument, const Tensor& tensor, const Tensor& like) {
  int32_t type = 0, index = 0, like_type = 0, like_index = 0;
  aoti_torch_get_device_type(tensor.get(), &type);
  aoti_torch_get_device_index(tensor.get(), &index);
  aoti_torch_get_device_type(like.get(), &like_type);
  aoti_torch_get_device_index(like.get(), &like_index);
  PYOPS_CHECK(type == like_type && index == like_index, op, argument, "be on the device of logits",
              device_name(tensor), " and ", device_name(like));
}

DType check_floating(const char* op, const char* argument, const Tensor& tensor) {
  const int32_t code = dtype_code(tensor);
  if (code == aoti_torch_dtype_float32()) return DType::float32;
  if (code == aoti_torch_dtype_bfloat16()) return DType::bfloat16;
  if (code == aoti_torch_dtype_float16()) return DType::float16;
  if (code == aoti_torch_dtype_float64()) return DType::float64;
  reject<std::runtime_error>(op, argument, "be float32, float64, bfloat16 or float16", dtype_name(tensor));
}

Tensor rows_dense(const Tensor& tensor) {
  const bool dense = tensor.size(1) <= 1 || tensor.stride(1) == 1;
  return dense ? tensor : torch::stable::contiguous(tensor);
}

int64_t element_bytes(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

}  // namespace pyops
