// Inner loops of dense matrix products and factorisations in float32 and float64: plain pointers, one table per ISA
// level. The blocking around them is gemm.cpp.
#pragma once

#include <stdint.h>

namespace pyops {

template <class Real>
struct GemmKernels {
  int rows, columns;  // of a tile
  // panel[k][i] = x[i * stride + k * depth_stride] * scale[k] for i < count, 0 up to `width`; scale may be null. Writes
  // up to one vector beyond its end.
  void (*pack)(const Real* x, int64_t stride, int64_t depth_stride, int64_t count, int64_t width, int64_t depth,
               const Real* scale, Real* panel);
  // c[r][j] = (accumulate ? c[r][j] : 0) + alpha * sum over k of a[k][r] * b[k][j], for r < rows, j < columns; a has
  // `rows` numbers per k.
  void (*tile)(const Real* a, const Real* b, int64_t depth, Real alpha, bool accumulate, Real* c, int64_t stride,
               int64_t rows, int64_t columns);
  // LU of a panel of `rows` x `columns` (rows >= columns) with row exchanges; pivots[i] is the row that went to i.
  void (*factor_panel)(Real* panel, int64_t stride, int64_t rows, int64_t columns, int64_t* pivots);
  // x <- T^-1 x for the `size` rows of x, T lower triangular with ones on its diagonal, or upper triangular.
  void (*solve_lower)(const Real* t, int64_t t_stride, int64_t size, Real* x, int64_t x_stride, int64_t columns);
  void (*solve_upper)(const Real* t, int64_t t_stride, int64_t size, Real* x, int64_t x_stride, int64_t columns);
};

namespace baseline {
extern const GemmKernels<float> gemm_kernels_float32;
extern const GemmKernels<double> gemm_kernels_float64;
}  // namespace baseline
#if defined(__x86_64__)
namespace avx2 {
extern const GemmKernels<float> gemm_kernels_float32;
extern const GemmKernels<double> gemm_kernels_float64;
}  // namespace avx2
namespace avx512 {
extern const GemmKernels<float> gemm_kernels_float32;
extern const GemmKernels<double> gemm_kernels_float64;
}  // namespace avx512
#endif

}  // namespace pyops
