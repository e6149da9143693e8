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

// Whether two tensors have one dtype; cheap, where dtype_name() is for messages.
bool same_dtype(const Tensor& left, const Tensor& right);
bool is_dtype(const Tensor& tensor, ScalarType dtype);
ScalarType scalar_type_of(DType dtype);
DType dtype_of(ScalarType dtype);  // of one of the four floating types

// A new contiguous tensor on the device of `like`, straight from the C shim: a quarter of the time of
// torch::stable::new_empty, which looks its operator up by name.
Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype);

// The tensor itself when it is contiguous, else one copy.
Tensor as_contiguous(const Tensor& tensor);

// Rejects sparse, quantised and other tensors without strides; to be called before strides are asked for.
void check_strided(const char* op, const char* argument, const Tensor& tensor);

// `like_name` is the argument whose device all others must share.
void check_device(const char* op, const char* argument, const Tensor& tensor, const Tensor& like,
                  const char* like_name = "logits");

// float32, float64, bfloat16 or float16; anything else is rejected by name.
DType check_floating(const char* op, const char* argument, const Tensor& tensor);

// A tensor of two dimensions whose rows are dense (any row stride): the input itself or one copy.
Tensor rows_dense(const Tensor& tensor);

int64_t element_bytes(DType dtype);

// Whether the elements of a tensor of one or two dimensions have addresses of their own, so that it can be written.
bool elements_distinct(const Tensor& tensor);

// Has the memory of a new CPU tensor of some MiB come in huge pages, if it is not there yet; returns whether that was
// so. The first touch of fresh pages costs more than the work that fills them: a copy into 4 KiB pages ran at 5.0 GB/s,
// into 2 MiB pages at 8.5, into pages already there at 21.8 on a Sapphire Rapids core.
bool advise_huge_pages(const Tensor& tensor);

// A new CPU tensor of logits-like size, in huge pages where that helps.
struct LargeOutput {
  Tensor tensor;
  bool fresh;  // its pages are not there yet: the kernel will zero them in the cache, so store through the cache
};
LargeOutput new_large_output(const Tensor& like, int64_t rows, int64_t columns);

}  // namespace pyops
