// Matrix products of floats with ternary codes or 8-bit integers, summed in float32: plain pointers, one table per ISA
// level. C[rows, columns] = A[rows, depth] B[depth, columns], in panels: A as [depth][rows of a tile], B as
// [depth][kColumns of the level].
#pragma once

#include "../../common/dtype.h"

namespace pyops {

constexpr int kMostFloatRows = 12;
constexpr int kMostFloatColumns = 32;

struct FloatProductKernels {
  int rows, columns;  // of a tile
  // c[r][j] += sum over d of a[d][r] * b[d][j]; `rows` may be fewer than those of a tile (a then has that many).
  void (*tile)(const float* a, const float* b, int64_t depth, int rows, float* c, int64_t c_stride);
  // a[d][r] = x[r * stride + d] * scale[d], by DType of x; scale may be null.
  void (*pack_along_depth[4])(const void* x, int64_t stride, int rows, int64_t depth, const float* scale, float* a);
  // a[d][r] = x[d * stride + r] * scale[d]
  void (*pack_across_depth[4])(const void* x, int64_t stride, int rows, int64_t depth, const float* scale, float* a);
  // b[d][j] = t(row d, k = 4 byte + j) for j < columns from rows of t2 that are `stride` bytes apart and have `bytes`
  // left; what lies beyond is 0. gamma, if not null, multiplies row d with gamma[d * gamma_stride].
  void (*decode_rows)(const uint8_t* rows, int64_t stride, int64_t bytes, int64_t depth, const float* gamma,
                      int64_t gamma_stride, float* b);
  // b[d][j] = t(row first_row + j, k = begin + d) from the decoded codes [k / 4][16 rows][4 k] of two row groups, the
  // rows counted through both; `second` may be null (zeros).
  void (*decode_columns)(const uint8_t* first, const uint8_t* second, int first_row, int64_t begin, int64_t depth,
                         float* b);
  // b[d][j] = q[d * stride + j] for j < count, 0 beyond.
  void (*widen_rows)(const int8_t* q, int64_t stride, int64_t count, int64_t depth, float* b);
  // y[r][j] = c[r][j] * scale[j] + bias[j] by DType of y; scale and bias may be null.
  void (*finish[4])(const float* c, int64_t c_stride, const float* scale, const float* bias, int64_t rows,
                    int64_t count, void* y, int64_t stride, bool past_caches);
};

namespace baseline {
extern const FloatProductKernels float_product_kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const FloatProductKernels float_product_kernels;
}
namespace avxvnni {
extern const FloatProductKernels float_product_kernels;
}
namespace avx512 {
extern const FloatProductKernels float_product_kernels;
}
namespace avx512vnni {
extern const FloatProductKernels float_product_kernels;
}
#endif

}  // namespace pyops
