// Torch's pool of threads, for what does not link torch: the probes of _native, which would otherwise compete for cores
// with the pool's threads, that wait for work spinning.
#include <torch/csrc/stable/ops.h>

#include <cstdint>

extern "C" __attribute__((visibility("default"))) void pyops_in_parallel(int64_t parts,
                                                                         void (*work)(int64_t part, void* context),
                                                                         void* context) {
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) work(part, context);
  });
}
