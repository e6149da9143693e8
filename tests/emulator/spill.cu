// A kernel that needs more registers than its launch bounds leave it: the ledger must refuse it.
#include "../../csrc/device/pyops_device.h"

namespace pyops {
namespace {

template <int kValues>
__global__ void __launch_bounds__(1024, 2) keep_all(const float* x, float* out, int rounds) {
  float value[kValues];
  for (int i = 0; i < kValues; ++i) value[i] = x[i * 1024 + threadIdx.x];
  for (int round = 0; round < rounds; ++round) {
    for (int i = 0; i < kValues; ++i) value[i] = value[i] * value[(i + 7) % kValues] + float(round);
  }
  for (int i = 0; i < kValues; ++i) out[i * 1024 + threadIdx.x] = value[i];
}

}  // namespace
}  // namespace pyops

extern "C" int run_keep_few(const float* x, float* out, int rounds) {
  return PYOPS_LAUNCH(pyops::keep_all<8>, 1, 1024, 0, nullptr, x, out, rounds);
}
extern "C" int run_keep_many(const float* x, float* out, int rounds) {
  return PYOPS_LAUNCH(pyops::keep_all<64>, 1, 1024, 0, nullptr, x, out, rounds);
}
