// What the CUDA fronts of the family share. Host compiler only.
#pragma once

#include "../../common/cuda_stream.h"
#include "../ternary_arguments.h"
#include "quantize_activation.cuh"
#include "ternary_repack.cuh"

namespace pyops {

// Contiguous, with data on a 16-byte boundary: the tensor itself or a copy.
inline Tensor aligned(const Tensor& tensor) {
  const Tensor dense = as_contiguous(tensor);
  if (reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % 16 == 0) return dense;
  Tensor copy = new_tensor(dense, {dense.numel()}, dense.scalar_type());
  torch::stable::copy_(copy, torch::stable::view(dense, {dense.numel()}));
  return copy;
}

// A matrix whose rows are dense, start on 16-byte boundaries and have a multiple of eight elements, zeros at their
// ends: the tensor itself or a copy.
inline Tensor padded_rows(const Tensor& matrix) {
  const int64_t columns = matrix.size(1), width = ceil_div(columns, 8) * 8;
  if (width == columns && matrix.stride(1) == 1 && matrix.stride(0) % 8 == 0 &&
      reinterpret_cast<uintptr_t>(matrix.const_data_ptr()) % 16 == 0) {
    return matrix;
  }
  Tensor padded = new_tensor(matrix, {matrix.size(0), width}, matrix.scalar_type());
  torch::stable::zero_(padded);
  Tensor inside = torch::stable::narrow(padded, 1, 0, columns);
  torch::stable::copy_(inside, matrix);
  return padded;
}

// What a kernel left in a few bytes on the device; waits for it.
template <class Value>
Value read_back(const Tensor& device) {
  const int64_t sizes[] = {device.numel()}, strides[] = {1};
  AtenTensorHandle handle = nullptr;
  int32_t dtype = 0;
  aoti_torch_get_dtype(device.get(), &dtype);
  STD_TORCH_CHECK(aoti_torch_empty_strided(1, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle) ==
                  AOTI_TORCH_SUCCESS);
  Tensor host(handle);
  torch::stable::copy_(host, device);
  return *static_cast<const Value*>(host.const_data_ptr());
}

// The weights in another format. `policy` count: a code that stands for no weight raises, and the host waits to know;
// assert: nothing waits, and such a code stops the device.
inline void repack_into(const char* op, const char* argument, const Tensor& source_in, const RepackArguments& a,
                        InvalidCode policy, const Tensor& out, void* stream) {
  const Tensor source = as_contiguous(source_in);
  const Tensor invalid = new_tensor(source, {1}, ScalarType::Int);
  RepackTernary repack{source.const_data_ptr(), out.data_ptr(), a.from, a.to,
                       a.out_features,          a.in_features,  policy, static_cast<unsigned*>(invalid.data_ptr())};
  check_launch(op, pyops_ternary_repack(&repack, stream));
  if (policy == InvalidCode::assert || out.numel() == 0 || read_back<unsigned>(invalid) == 0) return;
  const Tensor place = new_tensor(source, {2}, ScalarType::Long);
  check_launch(op, pyops_ternary_find_invalid(&repack, static_cast<InvalidTernary*>(place.data_ptr()), stream));
  const auto found = read_back<InvalidTernary>(place);
  reject_code(op, argument, a.from, found.place / a.in_features, found.place % a.in_features, int(found.value));
}

// In the layout of the matrix instruction.
inline Tensor matrix_layout(const char* op, const Tensor& packed, TernaryFormat format, int64_t out_features,
                            int64_t in_features, InvalidCode policy, void* stream) {
  if (format == TernaryFormat::t2mma) return aligned(packed);
  const auto shape = packed_shape(TernaryFormat::t2mma, out_features, in_features);
  Tensor out = new_tensor(packed, {shape[0], shape[1], shape[2], shape[3]}, ScalarType::Byte);
  const RepackArguments arguments{format, TernaryFormat::t2mma, out_features, in_features};
  repack_into(op, "packed", packed, arguments, policy, out, stream);
  return out;
}

// Activations as bytes: `quantized` tokens x width, zeros behind in_features.
inline void quantize_tokens(const char* op, const Tensor& x, DType dtype, float qmax, float eps,
                            const Tensor& quantized, const Tensor& step, const OptionalTensor& sum, void* stream) {
  QuantizeActivation a{};
  a.x = x.const_data_ptr();
  a.row_stride = x.stride(0);
  a.dtype = dtype;
  a.tokens = x.size(0);
  a.in_features = x.size(1);
  a.qmax = qmax;
  a.eps = eps;
  a.quantized = static_cast<int8_t*>(quantized.data_ptr());
  a.width = quantized.size(1);
  a.step = static_cast<float*>(step.data_ptr());
  a.sum = sum ? static_cast<int*>(sum->data_ptr()) : nullptr;
  check_launch(op, pyops_ternary_quantize_activation(&a, stream));
}

}  // namespace pyops
