// Passes over rows of d numbers that the factored layer needs beside matrix products: plain pointers, one table per ISA
// level. Rows of V are float32 or float64 ([0] and [1]); Real is the type of the state.
#pragma once

#include "../../common/dtype.h"

namespace pyops {

template <class Real>
struct FactoredRowKernels {
  // out = x, by DType of x; and back.
  void (*widen[4])(const void* x, int64_t n, Real* out);
  void (*narrow[4])(const Real* x, int64_t n, void* out);
  double (*dot)(const Real* x, const Real* y, int64_t n);
  double (*dot_row[2])(const void* v, const Real* x, int64_t n);
  // out += factor * v
  void (*add_row[2])(const void* v, Real factor, Real* out, int64_t n);
  // v -= factor * x, rounded once
  void (*subtract_row[2])(void* v, const Real* x, Real factor, int64_t n);
  // out = x_factor * x + y_factor * y
  void (*combine)(const Real* x, Real x_factor, const Real* y, Real y_factor, Real* out, int64_t n);
  // out = keep * (out + factor * x); returns the sum of the squares.
  double (*advance)(const Real* x, Real factor, Real keep, Real* out, int64_t n);
  bool (*finite)(const Real* x, int64_t n);
};

namespace baseline {
extern const FactoredRowKernels<float> factored_row_kernels_float32;
extern const FactoredRowKernels<double> factored_row_kernels_float64;
}  // namespace baseline
#if defined(__x86_64__)
namespace avx2 {
extern const FactoredRowKernels<float> factored_row_kernels_float32;
extern const FactoredRowKernels<double> factored_row_kernels_float64;
}  // namespace avx2
namespace avx512 {
extern const FactoredRowKernels<float> factored_row_kernels_float32;
extern const FactoredRowKernels<double> factored_row_kernels_float64;
}  // namespace avx512
#endif

}  // namespace pyops
