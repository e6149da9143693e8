// What the CUDA fronts of all families need of the device: the device of a tensor made current, the current stream,
// and the check of a launch. No CUDA header and no CUDA build of torch is needed to compile or link this.
#pragma once

#include "tensor.h"

#ifndef PYOPS_EMU
#include <torch/csrc/stable/accelerator.h>
#endif

namespace pyops {

// While it lives, the device of `tensor` is current. `stream()` is the stream that torch has current there.
class CudaScope {
 public:
  explicit CudaScope(const Tensor& tensor);
  void* stream() const { return stream_; }

 private:
#ifndef PYOPS_EMU  // the emulated device is the CPU, and has one stream
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  void* stream_;
};

// Raises for an error code that a launcher returned: "pyops::<op>: the CUDA launch failed: <name>".
void check_launch(const char* op, int error);

}  // namespace pyops
