// Launchers of the spherical losses. Each returns 0 or a CUDA error code; nothing waits for the device.
#pragma once

#include "../spherical_loss_formula.h"
#include "row_arguments.cuh"

namespace pyops {

struct SphericalLossForward {
  LossRows rows;
  SphericalOptions options;
};

struct SphericalLossBackward {
  GradientRows rows;
  SphericalLoss loss;
  double eps;
};

}  // namespace pyops

// Number of doubles that `workspace` must hold.
extern "C" int64_t pyops_spherical_loss_workspace(const pyops::SphericalLossForward* arguments);

extern "C" int pyops_spherical_loss(const pyops::SphericalLossForward* arguments, void* stream);

extern "C" int pyops_spherical_loss_backward(const pyops::SphericalLossBackward* arguments, void* stream);
