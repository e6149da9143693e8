// Streaming CPU kernels of softmax cross-entropy: plain pointers, one table per ISA level, no torch header.
#pragma once

#include "../../common/dtype.h"
#include "../cross_entropy_formula.h"

namespace pyops {

// Row numbers of the backward pass after multiplication by the upstream gradient; see cross_entropy_formula.h.
struct CrossEntropyRowGradient {
  double shift, slope, smooth;
};

struct CrossEntropyKernels {
  // (shift, sum, weighted_sum) of the n elements at `x`. `class_weight` (accumulation type) may be null: ones.
  using Exponentials = RowExponentials (*)(const void* x, const void* class_weight, int64_t n, bool weighted_sum);
  // out = slope * exp(x - shift) - smooth * w; out may be x.
  using Gradient = void (*)(const void* x, const void* class_weight, void* out, int64_t n,
                            const CrossEntropyRowGradient& row, bool nontemporal);
  Exponentials exponentials[4];  // by DType
  Gradient gradient[4];          // by DType
};

namespace baseline {
extern const CrossEntropyKernels cross_entropy_kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const CrossEntropyKernels cross_entropy_kernels;
}
namespace avx512 {
extern const CrossEntropyKernels cross_entropy_kernels;
}
#endif

}  // namespace pyops
