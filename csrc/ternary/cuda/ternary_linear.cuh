// Launchers of y = x_q (T gamma)^T + bias. Each returns 0 or a CUDA error code; nothing waits for the device.
#pragma once

#include <stdint.h>

#include "../../common/dtype.h"
#include "../ternary_format.h"

namespace pyops {

// y[m, n] = sum * (step[m] * gamma[n]) + bias[n], rounded to float32 after each operation, then cast.
struct TernaryOutput {
  const float* step;     // per token
  const float* gamma;    // one; one per row; or one per row and group
  int64_t gamma_stride;  // between rows: 0, 1, or the number of groups
  const void* bias;      // null: none
  DType bias_dtype;
  void* y;  // tokens x out_features, contiguous, at any alignment
  DType y_dtype;
};

// Activations as bytes.
struct TernaryLinear {
  const uint8_t* packed;  // t2mma, on a 16-byte boundary
  int64_t tokens, out_features, in_features;
  bool grouped;             // gamma per group of kTernaryGroup in_features
  const int8_t* quantized;  // tokens x width; width a multiple of 16, zeros behind in_features; on a 16-byte boundary
  int64_t width;
  const int* sum;  // of the bytes of a token
  TernaryOutput output;
  // Parts of in_features that different blocks sum, and their sums: splits x tokens x out_features. How
  // many is told by pyops_ternary_linear_*_splits; one split needs no memory.
  int splits;
  int* partial;
  // Whether the product itself rounds its only token: `x`, on a 16-byte boundary, a multiple of eight elements with
  // zeros behind in_features. `quantized`, `sum` and `output.step` are not used then.
  bool rounds;
  const void* x;
  DType x_dtype;
  float qmax, eps;
  float* step_of_split;  // a float for the launcher, if there are several splits
};

// Activations as they are; float32 sums.
struct TernaryLinearFloat {
  const uint8_t* packed;
  int64_t tokens, out_features, in_features;
  bool grouped;
  const void* x;  // tokens x in_features; rows of a multiple of eight elements on 16-byte boundaries
  int64_t row_stride;
  DType x_dtype;
  TernaryOutput output;  // step is not used
};

constexpr int64_t kVectorTokens = 4;  // up to so many the product is one of a matrix and vectors

}  // namespace pyops

extern "C" int64_t pyops_ternary_linear_vector_splits(const pyops::TernaryLinear* arguments);

extern "C" int64_t pyops_ternary_linear_matrix_splits(const pyops::TernaryLinear* arguments);

extern "C" int pyops_ternary_linear_vector(const pyops::TernaryLinear* arguments, void* stream);

extern "C" int pyops_ternary_linear_matrix(const pyops::TernaryLinear* arguments, void* stream);

// The result from the sums of several splits.
extern "C" int pyops_ternary_linear_finish(const pyops::TernaryLinear* arguments, void* stream);

extern "C" int pyops_ternary_linear_float(const pyops::TernaryLinearFloat* arguments, void* stream);
