#include "gemm.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "../isa.h"
#include "gemm_kernel.h"
#include "workspace.h"

namespace pyops {
namespace {

// A panel of B of this depth stays in the first-level cache, a block of kRowPanels panels of A in the second.
constexpr int64_t kDepthBlock = 256;
constexpr int64_t kColumnBlock = 1024;
constexpr int64_t kRowPanels = 8;
// Multiplications below which another thread costs more than it saves (about 10 us).
constexpr int64_t kGrain = 1 << 18;
constexpr int64_t kSlack = 16;  // numbers that packing may write beyond a panel

template <class Real>
const GemmKernels<Real>& kernels();

template <>
const GemmKernels<float>& kernels<float>() {
#if defined(__x86_64__)
  return isa::select(baseline::gemm_kernels_float32, avx2::gemm_kernels_float32, avx512::gemm_kernels_float32);
#else
  return baseline::gemm_kernels_float32;
#endif
}

template <>
const GemmKernels<double>& kernels<double>() {
#if defined(__x86_64__)
  return isa::select(baseline::gemm_kernels_float64, avx2::gemm_kernels_float64, avx512::gemm_kernels_float64);
#else
  return baseline::gemm_kernels_float64;
#endif
}

}  // namespace

template <class Real>
void gemm(int64_t rows, int64_t columns, int64_t depth, MatrixView<Real> a, MatrixView<Real> b, Real* c,
          int64_t c_stride, const GemmOptions<Real>& options) {
  if (rows == 0 || columns == 0) return;
  const GemmKernels<Real>& kernel = kernels<Real>();
  const int64_t tile_rows = kernel.rows, tile_columns = kernel.columns;
  const int64_t row_panels = (rows + tile_rows - 1) / tile_rows;
  Workspace shared(Workspace::kProduct);
  Real* panels_b = shared.take<Real>(kDepthBlock * (kColumnBlock + tile_columns) + kSlack);
  for (int64_t n0 = 0; n0 < columns; n0 += kColumnBlock) {
    const int64_t n1 = std::min(columns, n0 + kColumnBlock), panels = (n1 - n0 + tile_columns - 1) / tile_columns;
    for (int64_t k0 = 0; k0 == 0 || k0 < depth; k0 += kDepthBlock) {
      const int64_t size = std::min(depth - k0, kDepthBlock);
      for (int64_t p = 0; p < panels; ++p) {
        const int64_t first = n0 + p * tile_columns;
        kernel.pack(b.data + k0 * b.row_stride + first * b.column_stride, b.column_stride, b.row_stride,
                    std::min(tile_columns, n1 - first), tile_columns, size, nullptr,
                    panels_b + p * size * tile_columns);
      }
      const bool accumulate = options.accumulate || k0 > 0;
      const int64_t work = tile_rows * (n1 - n0) * std::max<int64_t>(size, 1);
      torch::stable::parallel_for(0, row_panels, (kGrain + work - 1) / work, [&](int64_t begin, int64_t end) {
        Workspace own(Workspace::kPanels);
        Real* panels_a = own.take<Real>(kRowPanels * tile_rows * kDepthBlock + kSlack);
        for (int64_t block = begin; block < end; block += kRowPanels) {
          const int64_t last = std::min(end, block + kRowPanels);
          const auto first_row = [&](int64_t unit) {
            // Triangles: long and short rows take turns, so that threads get equal shares.
            const int64_t panel = !options.lower ? unit : unit % 2 ? row_panels - 1 - unit / 2 : unit / 2;
            return panel * tile_rows;
          };
          for (int64_t unit = block; unit < last; ++unit) {
            const int64_t row = first_row(unit), count = std::min(tile_rows, rows - row);
            kernel.pack(a.data + row * a.row_stride + k0 * a.column_stride, a.row_stride, a.column_stride, count, count,
                        size, options.depth_scale ? options.depth_scale + k0 : nullptr,
                        panels_a + (unit - block) * tile_rows * size);
          }
          for (int64_t p = 0; p < panels; ++p) {
            const int64_t column = n0 + p * tile_columns;
            for (int64_t unit = block; unit < last; ++unit) {
              const int64_t row = first_row(unit), count = std::min(tile_rows, rows - row);
              if (options.lower && column > row + count - 1) continue;
              kernel.tile(panels_a + (unit - block) * tile_rows * size, panels_b + p * size * tile_columns, size,
                          options.alpha, accumulate, c + row * c_stride + column, c_stride, count,
                          std::min(tile_columns, n1 - column));
            }
          }
        }
      });
    }
  }
}

template <class Real>
void mirror_lower(Real* c, int64_t size, int64_t stride) {
  constexpr int64_t kBlock = 16;
  for (int64_t i0 = 0; i0 < size; i0 += kBlock) {
    for (int64_t j0 = 0; j0 <= i0; j0 += kBlock) {
      for (int64_t i = i0; i < std::min(size, i0 + kBlock); ++i) {
        for (int64_t j = j0; j < std::min(i, j0 + kBlock); ++j) c[j * stride + i] = c[i * stride + j];
      }
    }
  }
}

constexpr int64_t kPanel = 32;  // columns that are factored, or rows that are solved for, before a matrix product

template <class Real>
Pivots lu_factor(Real* a, int64_t size, int64_t stride, int64_t* pivots) {
  const GemmKernels<Real>& kernel = kernels<Real>();
  for (int64_t k = 0; k < size; k += kPanel) {
    const int64_t width = std::min(kPanel, size - k), next = k + width;
    kernel.factor_panel(a + k * stride + k, stride, size - k, width, pivots + k);
    for (int64_t i = k; i < next; ++i) {
      pivots[i] += k;
      if (pivots[i] == i) continue;
      Real *row = a + i * stride, *other = a + pivots[i] * stride;
      std::swap_ranges(row, row + k, other);
      std::swap_ranges(row + next, row + size, other + next);
    }
    if (next == size) break;
    kernel.solve_lower(a + k * stride + k, stride, width, a + k * stride + next, stride, size - next);
    gemm<Real>(size - next, size - next, width, {a + next * stride + k, stride, 1}, {a + k * stride + next, stride, 1},
               a + next * stride + next, stride, {.alpha = -1, .accumulate = true});
  }
  Pivots found = {HUGE_VAL, 0};
  for (int64_t i = 0; i < size; ++i) {
    const double pivot = std::fabs(double(a[i * stride + i]));
    if (!(pivot - pivot == 0)) {
      constexpr double nan = std::numeric_limits<double>::quiet_NaN();
      return {nan, nan};
    }
    found = {std::min(found.smallest, pivot), std::max(found.largest, pivot)};
  }
  return found;
}

template <class Real>
void lu_solve(const Real* factors, int64_t size, int64_t stride, const int64_t* pivots, Real* b, int64_t columns,
              int64_t b_stride) {
  const GemmKernels<Real>& kernel = kernels<Real>();
  for (int64_t i = 0; i < size; ++i) {
    if (pivots[i] != i) std::swap_ranges(b + i * b_stride, b + i * b_stride + columns, b + pivots[i] * b_stride);
  }
  for (int64_t k = 0; k < size; k += kPanel) {
    const int64_t width = std::min(kPanel, size - k), next = k + width;
    kernel.solve_lower(factors + k * stride + k, stride, width, b + k * b_stride, b_stride, columns);
    gemm<Real>(size - next, columns, width, {factors + next * stride + k, stride, 1}, {b + k * b_stride, b_stride, 1},
               b + next * b_stride, b_stride, {.alpha = -1, .accumulate = true});
  }
  for (int64_t k = size == 0 ? 0 : (size - 1) / kPanel * kPanel; k >= 0 && size; k -= kPanel) {
    const int64_t width = std::min(kPanel, size - k);
    kernel.solve_upper(factors + k * stride + k, stride, width, b + k * b_stride, b_stride, columns);
    gemm<Real>(k, columns, width, {factors + k, stride, 1}, {b + k * b_stride, b_stride, 1}, b, b_stride,
               {.alpha = -1, .accumulate = true});
  }
}

#define PYOPS_INSTANTIATE(Real)                                                                     \
  template void gemm(int64_t, int64_t, int64_t, MatrixView<Real>, MatrixView<Real>, Real*, int64_t, \
                     const GemmOptions<Real>&);                                                     \
  template void mirror_lower(Real*, int64_t, int64_t);                                              \
  template Pivots lu_factor(Real*, int64_t, int64_t, int64_t*);                                     \
  template void lu_solve(const Real*, int64_t, int64_t, const int64_t*, Real*, int64_t, int64_t);
PYOPS_INSTANTIATE(float)
PYOPS_INSTANTIATE(double)
#undef PYOPS_INSTANTIATE

}  // namespace pyops
