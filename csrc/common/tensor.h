// What every front needs of torch's stable tensor: names for messages, dtype mapping, row layout.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "check.h"
#include "dtype.h"

namespace pyops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// "float32", as torch prints it without its prefix.
std::string dtype_name(const Tensor& tensor);
std::string dtype_name(ScalarType dtype);

// "[2, 3]"
std::string shape_name(const Tensor& tensor);

// "cpu", "cuda:0", "meta"
std::string device_name(const Tensor& tensor);

// Rejects sparse, quantised and other tensors without strides; to be called before strides are asked for.
void check_strided(const char* op, const char* argument, const Tensor& tensor);

void check_device(const char* op, const char* argument, const Tensor& tensor, const Tensor& like);

// float32, float64, bfloat16 or float16; anything else is rejected by name.
DType check_floating(const char* op, const char* argument, const Tensor& tensor);

// A tensor of two dimensions whose rows are dense (any row stride): the input itself or one copy.
Tensor rows_dense(const Tensor& tensor);

int64_t element_bytes(DType dtype);

}  // namespace pyops
