// Streaming CPU kernels of the spherical losses: plain pointers, one table per ISA level, no torch header.
#pragma once

#include "../../common/dtype.h"
#include "../spherical_loss_formula.h"

namespace pyops {

// Row numbers of the backward pass after multiplication by the upstream gradient; see
// spherical_loss_formula.h.
struct SphericalRowGradient {
  double center, inverse_scale, slope, shift, smooth;
};

struct SphericalLossKernels {
  // (mean, m2, sum_log) of the n elements at `x`, by blocks that fit the first-level cache.
  using Moments = RowMoments (*)(const void* x, int64_t n, const SphericalOptions& options);
  // out = slope * ((x - center) * inverse_scale) + shift + smooth * smooth_term(x); out may be x.
  using Gradient = void (*)(const void* x, void* out, int64_t n, const SphericalRowGradient& row,
                            const SphericalOptions& options, bool nontemporal);
  Moments moments[4];    // by DType
  Gradient gradient[4];  // by DType
};

namespace baseline {
extern const SphericalLossKernels spherical_loss_kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const SphericalLossKernels spherical_loss_kernels;
}
namespace avx512 {
extern const SphericalLossKernels spherical_loss_kernels;
}
#endif

}  // namespace pyops
