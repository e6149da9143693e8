// Launcher of dW = (step g)^T q. It returns 0 or a CUDA error code; nothing waits for the device.
#pragma once

#include <stdint.h>

#include "../../common/dtype.h"

namespace pyops {

struct BitlinearBackwardWeight {
  const void* grad;  // tokens x out_features; rows of a multiple of eight elements on 16-byte boundaries
  int64_t row_stride;
  DType dtype;
  int64_t tokens, out_features, in_features;
  const int8_t* quantized;  // tokens x in_features, rows as of grad
  int64_t quantized_stride;
  const float* step;  // per token
  void* out;          // out_features x in_features, contiguous
  DType out_dtype;
};

}  // namespace pyops

extern "C" int pyops_bitlinear_backward_weight(const pyops::BitlinearBackwardWeight* arguments, void* stream);
