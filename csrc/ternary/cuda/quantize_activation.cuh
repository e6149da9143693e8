// Launcher of the rounding of activations. It returns 0 or a CUDA error code; nothing waits for the device.
#pragma once

#include <stdint.h>

#include "../../common/dtype.h"

namespace pyops {

struct QuantizeActivation {
  const void* x;  // tokens x in_features, dense within a row
  int64_t row_stride;
  DType dtype;
  int64_t tokens, in_features;
  float qmax, eps;

  int8_t* quantized;  // tokens x width; zeros from in_features on
  int64_t width;
  float* step;
  int* sum;  // of the bytes of a token; null: not wanted
};

}  // namespace pyops

extern "C" int pyops_ternary_quantize_activation(const pyops::QuantizeActivation* arguments, void* stream);
