// Launcher of dx = (g gamma) T. It returns 0 or a CUDA error code; nothing waits for the device.
#pragma once

#include <stdint.h>

#include "../../common/dtype.h"

namespace pyops {

struct TernaryLinearBackwardInput {
  const void* grad;  // tokens x out_features; rows of a multiple of eight elements on 16-byte boundaries
  int64_t row_stride;
  DType dtype;  // of grad and of the result
  int64_t tokens, out_features, in_features;
  const uint8_t* packed;  // t2mma, on a 16-byte boundary
  const float* gamma;
  int64_t gamma_stride;  // between rows of T; 0: one for all
  bool grouped;          // gamma per group of in_features
  void* out;             // tokens x in_features, contiguous
};

}  // namespace pyops

extern "C" int pyops_ternary_linear_backward_input(const pyops::TernaryLinearBackwardInput* arguments, void* stream);
