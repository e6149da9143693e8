// Passes over weights that make them ternary: plain pointers, one table per ISA level, no torch header.
#pragma once

#include "../../common/dtype.h"

namespace pyops {

// What a pass that looks for the median finds in a stretch of weights.
struct MagnitudeCount {
  int64_t below;      // magnitudes under the bracket
  int64_t collected;  // magnitudes within it, written out; -1 when there was no room
  int64_t total;      // magnitudes within it
};

struct QuantizeWeightKernels {
  // Sum of |w| in double; not finite exactly if a weight is not.
  double (*sum[4])(const void* w, int64_t n);
  // Magnitude bits of n weights; returns the largest, which is at least that of infinity if a weight is not finite.
  int32_t (*magnitudes[4])(const void* w, int64_t n, int32_t* out);
  // Counts the magnitudes below low and writes out those in [low, high], at most `room` of them. `largest` is raised.
  MagnitudeCount (*collect[4])(const void* w, int64_t n, int32_t low, int32_t high, int32_t* out, int64_t room,
                               int32_t& largest);
  // The element of that rank among n magnitudes.
  int32_t (*select)(const int32_t* magnitudes, int64_t n, int64_t rank);
  // Codes of one row in format t2 (ceil(n / 4) bytes): sign(w) where |w| * inverse > 0.5, else 0. Returns the largest
  // magnitude.
  int32_t (*encode[4])(const void* w, int64_t n, float inverse, uint8_t* out);
};

namespace baseline {
extern const QuantizeWeightKernels quantize_weight_kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const QuantizeWeightKernels quantize_weight_kernels;
}
namespace avx512 {
extern const QuantizeWeightKernels quantize_weight_kernels;
}
#endif

}  // namespace pyops
