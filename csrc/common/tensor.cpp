#include "tensor.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace pyops {
namespace {

int32_t dtype_code(const Tensor& tensor) {
  int32_t code = -1;
  aoti_torch_get_dtype(tensor.get(), &code);
  return code;
}

int32_t code_of(ScalarType dtype) { return torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)); }

// The shim gives no names, and Tensor::scalar_type() throws for what it does not know.
std::string name_of_code(int32_t code) {
  const struct {
    int32_t code;
    const char* name;
  } known[] = {
      {aoti_torch_dtype_float32(), "float32"},
      {aoti_torch_dtype_float64(), "float64"},
      {aoti_torch_dtype_bfloat16(), "bfloat16"},
      {aoti_torch_dtype_float16(), "float16"},
      {aoti_torch_dtype_int64(), "int64"},
      {aoti_torch_dtype_int32(), "int32"},
      {aoti_torch_dtype_int16(), "int16"},
      {aoti_torch_dtype_int8(), "int8"},
      {aoti_torch_dtype_uint8(), "uint8"},
      {aoti_torch_dtype_uint16(), "uint16"},
      {aoti_torch_dtype_uint32(), "uint32"},
      {aoti_torch_dtype_uint64(), "uint64"},
      {aoti_torch_dtype_bool(), "bool"},
      {aoti_torch_dtype_complex32(), "complex32"},
      {aoti_torch_dtype_complex64(), "complex64"},
      {aoti_torch_dtype_complex128(), "complex128"},
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

std::string dtype_name(ScalarType dtype) { return name_of_code(code_of(dtype)); }

std::string shape_name(const Tensor& tensor) {
  std::ostringstream text;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) text << (dim ? ", " : "[") << tensor.size(dim);
  text << (tensor.dim() ? "]" : "[]");
  return text.str();
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

bool same_dtype(const Tensor& left, const Tensor& right) { return dtype_code(left) == dtype_code(right); }

bool is_dtype(const Tensor& tensor, ScalarType dtype) { return dtype_code(tensor) == code_of(dtype); }

ScalarType scalar_type_of(DType dtype) {
  switch (dtype) {
    case DType::float32:
      return ScalarType::Float;
    case DType::float64:
      return ScalarType::Double;
    case DType::bfloat16:
      return ScalarType::BFloat16;
    case DType::float16:
      return ScalarType::Half;
  }
  return ScalarType::Float;
}

DType dtype_of(ScalarType dtype) {
  return dtype == ScalarType::Double     ? DType::float64
         : dtype == ScalarType::BFloat16 ? DType::bfloat16
         : dtype == ScalarType::Half     ? DType::float16
                                         : DType::float32;
}

#ifdef PYOPS_EMU
// Of the checker, where it is linked in: memory that kernels may touch.
extern "C" __attribute__((weak)) void pyops_emulator_register(void* begin, size_t bytes, size_t element_bytes,
                                                              bool writable, const char* name);
#endif

// A tensor that was made here and that a kernel will be given.
static Tensor known_to_emulator(Tensor tensor) {
#ifdef PYOPS_EMU
  if (pyops_emulator_register && tensor.numel()) {
    const size_t element = tensor.element_size();
    pyops_emulator_register(tensor.data_ptr(), size_t(tensor.numel()) * element, element, true, "a new tensor");
  }
#endif
  return tensor;
}

Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  int64_t strides[8], stride = 1;
  for (size_t dim = sizes.size(); dim-- > 0;) {
    strides[dim] = stride;
    stride *= sizes.begin()[dim] > 1 ? sizes.begin()[dim] : 1;
  }
  int32_t device_type = 0, device_index = 0;
  aoti_torch_get_device_type(like.get(), &device_type);
  aoti_torch_get_device_index(like.get(), &device_index);
  AtenTensorHandle handle = nullptr;
  const auto status = aoti_torch_empty_strided(int64_t(sizes.size()), sizes.begin(), strides, code_of(dtype),
                                               device_type, device_index, &handle);
  if (status != AOTI_TORCH_SUCCESS) {  // the shim of torch 2.11 does not hand on torch's own words
    throw std::runtime_error("pyops: out of memory: no " + std::to_string(stride * element_bytes(dtype_of(dtype))) +
                             " bytes for a result on " + device_name(like));
  }
  return known_to_emulator(Tensor(handle));
}

Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : known_to_emulator(torch::stable::contiguous(tensor));
}

void check_strided(const char* op, const char* argument, const Tensor& tensor) {
  int32_t layout = -1;
  aoti_torch_get_layout(tensor.get(), &layout);
  PYOPS_CHECK(layout == aoti_torch_layout_strided(), op, argument, "be a strided tensor", "another layout");
}

void check_device(const char* op, const char* argument, const Tensor& tensor, const Tensor& like,
                  const char* like_name) {
  int32_t type = 0, index = 0, like_type = 0, like_index = 0;
  aoti_torch_get_device_type(tensor.get(), &type);
  aoti_torch_get_device_index(tensor.get(), &index);
  aoti_torch_get_device_type(like.get(), &like_type);
  aoti_torch_get_device_index(like.get(), &like_index);
  PYOPS_CHECK(type == like_type && index == like_index, op, argument, std::string("be on the device of ") + like_name,
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
  return dense ? tensor : known_to_emulator(torch::stable::contiguous(tensor));
}

bool advise_huge_pages([[maybe_unused]] const Tensor& tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t(2) << 20;
  const uintptr_t bytes = uintptr_t(tensor.numel()) * tensor.element_size();
  if (bytes < 2 * kHugePage) return false;
  const uintptr_t begin = (uintptr_t(tensor.data_ptr()) + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (uintptr_t(tensor.data_ptr()) + bytes) & ~(kHugePage - 1);
  // Ask about a page in the middle: allocators touch the ends for their own bookkeeping.
  const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
  unsigned char resident = 1;
  const uintptr_t middle = (begin + (end - begin) / 2) & ~(page - 1);
  if (mincore(reinterpret_cast<void*>(middle), page, &resident) != 0 || (resident & 1)) return false;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: failure costs only speed
  return true;
#else
  return false;
#endif
}

LargeOutput new_large_output(const Tensor& like, int64_t rows, int64_t columns) {
  LargeOutput output{new_tensor(like, {rows, columns}, like.scalar_type()), false};
  output.fresh = advise_huge_pages(output.tensor);
  return output;
}

bool elements_distinct(const Tensor& tensor) {
  if (tensor.numel() <= 1) return true;
  const int64_t rows = tensor.size(0), columns = tensor.dim() == 2 ? tensor.size(1) : 1;
  const int64_t row = tensor.stride(0), column = tensor.dim() == 2 ? tensor.stride(1) : 1;
  // The wider stride steps over everything that the narrower one reaches.
  return rows == 1      ? column > 0
         : columns == 1 ? row > 0
         : row > column ? column > 0 && row / columns >= column
                        : row > 0 && column / rows >= row;
}

int64_t element_bytes(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

}  // namespace pyops
