// Launchers of softmax cross-entropy. Each returns 0 or a CUDA error code; nothing waits for the device.
#pragma once

#include "../cross_entropy_formula.h"
#include "row_arguments.cuh"

namespace pyops {

struct CrossEntropyForward {
  LossRows rows;
  CrossEntropyOptions options;
};

struct CrossEntropyBackward {
  GradientRows rows;
};

}  // namespace pyops

// Number of doubles that `workspace` must hold.
extern "C" int64_t pyops_cross_entropy_workspace(const pyops::CrossEntropyForward* arguments);

extern "C" int pyops_cross_entropy(const pyops::CrossEntropyForward* arguments, void* stream);

extern "C" int pyops_cross_entropy_backward(const pyops::CrossEntropyBackward* arguments, void* stream);
