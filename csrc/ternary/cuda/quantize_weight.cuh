// Launcher of the rounding of weights. It returns 0 or a CUDA error code; nothing waits for the device.
#pragma once

#include <stdint.h>

#include "../../common/dtype.h"

namespace pyops {

struct QuantizeWeight {
  const void* weight;  // out_features x in_features, contiguous
  DType dtype;
  int64_t out_features, in_features;
  const float* scale;  // takes the place of the measured gamma; null: none
  bool median, per_row, add_eps;
  float eps;

  uint8_t* packed;  // t2
  float* gamma;     // out_features numbers if per_row, else one
  void* workspace;  // of the size that pyops_ternary_quantize_weight_workspace returns, aligned to 8 bytes
};

}  // namespace pyops

extern "C" int64_t pyops_ternary_quantize_weight_workspace(const pyops::QuantizeWeight* arguments);

extern "C" int pyops_ternary_quantize_weight(const pyops::QuantizeWeight* arguments, void* stream);
