// Rounding of one token to 8 bits: plain pointers, one table per ISA level, no torch header.
#pragma once

#include "../../common/dtype.h"

namespace pyops {

struct TokenScale {
  float step;   // NaN for a token that is not finite
  int32_t sum;  // of the integers
};

struct QuantizeActivationKernels {
  // q[k] = clip(round(x[k] * (qmax / max(absmax, eps))), -128, 127), ties to even. By DType (float64 is null).
  using Quantize = TokenScale (*)(const void* x, int64_t n, float qmax, float eps, int8_t* q);
  Quantize quantize[4];
};

namespace baseline {
extern const QuantizeActivationKernels quantize_activation_kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const QuantizeActivationKernels quantize_activation_kernels;
}
namespace avx512 {
extern const QuantizeActivationKernels quantize_activation_kernels;
}
#endif

}  // namespace pyops
