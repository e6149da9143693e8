// See gemm_kernel.h. Compiled once per ISA level.
#include "gemm_kernel.h"

#include <utility>

#include "../simd.h"

namespace pyops::PYOPS_ISA {
namespace {

constexpr int kVectors = 2;  // across a tile
#if defined(__AVX512F__)
constexpr int kRows = 12;  // 24 of 32 registers hold sums
#elif defined(__AVX2__)
constexpr int kRows = 6;  // 12 of 16
#else
constexpr int kRows = 4;
#endif

template <class Real>
constexpr int kWidth = VectorTypes<Real>::lanes;

// ---- panels ----------------------------------------------------------------------------------------------------

template <class Real, int... lane>
PYOPS_INLINE void interleave(Vector<Real> first, Vector<Real> second, Vector<Real>& low, Vector<Real>& high,
                             std::integer_sequence<int, lane...>) {
  constexpr int width = kWidth<Real>;
  low = __builtin_shufflevector(first, second, (lane / 2 + lane % 2 * width)...);
  high = __builtin_shufflevector(first, second, (width / 2 + lane / 2 + lane % 2 * width)...);
}

// A square of vectors becomes its transpose: with each round row i and row i + half are woven together.
template <class Real>
PYOPS_INLINE void transpose(Vector<Real> (&square)[kWidth<Real>]) {
  constexpr int width = kWidth<Real>;
  Vector<Real> woven[width];
#pragma GCC unroll 4
  for (int round = 1; round < width; round *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < width / 2; ++i) {
      interleave<Real>(square[i], square[i + width / 2], woven[2 * i], woven[2 * i + 1],
                       std::make_integer_sequence<int, width>());
    }
#pragma GCC unroll 16
    for (int i = 0; i < width; ++i) square[i] = woven[i];
  }
}

template <class Real>
void pack(const Real* x, int64_t stride, int64_t depth_stride, int64_t count, int64_t width, int64_t depth,
          const Real* scale, Real* panel) {
  constexpr int lanes = kWidth<Real>;
  int64_t k = 0;
  if (depth_stride == 1) {
    for (; k + lanes <= depth; k += lanes) {
      const Vector<Real> factor = scale ? load(scale + k) : broadcast(Real(1));
      // The last block first: what its vectors write beyond their row of the panel is overwritten by the first's.
      for (int64_t first = (width - 1) / lanes * lanes; first >= 0; first -= lanes) {
        Vector<Real> square[lanes];
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) {
          square[i] = first + i < count ? load(x + (first + i) * stride + k) : Vector<Real>{};
          if (scale) square[i] *= factor;
        }
        transpose<Real>(square);
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) store(panel + (k + i) * width + first, square[i]);
      }
    }
  } else if (stride == 1 && count == width) {
    for (; k < depth; ++k) {
      const Real factor = scale ? scale[k] : Real(1);
      const Real* from = x + k * depth_stride;
      int64_t i = 0;
      for (; i + lanes <= width; i += lanes) {
        store(panel + k * width + i, scale ? load(from + i) * factor : load(from + i));
      }
      for (; i < width; ++i) panel[k * width + i] = from[i] * factor;
    }
  }
  for (; k < depth; ++k) {
    const Real factor = scale ? scale[k] : Real(1);
    for (int64_t i = 0; i < width; ++i) {
      panel[k * width + i] = i < count ? x[i * stride + k * depth_stride] * factor : Real(0);
    }
  }
}

// ---- tiles -----------------------------------------------------------------------------------------------------

template <class Real, int rows>
void tile_of(const Real* a, const Real* b, int64_t depth, Real alpha, bool accumulate, Real* c, int64_t stride,
             int64_t columns) {
  constexpr int width = kWidth<Real>;
  Vector<Real> sums[rows][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const Vector<Real> low = load(b + k * 2 * width), high = load(b + k * 2 * width + width);
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
      const Real number = a[k * rows + r];
      sums[r][0] += low * number;
      sums[r][1] += high * number;
    }
  }
  if (columns == kVectors * width) {
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        Real* out = c + r * stride + v * width;
        store(out, accumulate ? load(out) + sums[r][v] * alpha : sums[r][v] * alpha);
      }
    }
    return;
  }
  for (int r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < columns; ++j) {
      const Real value = sums[r][j / width][j % width] * alpha;
      c[r * stride + j] = accumulate ? c[r * stride + j] + value : value;
    }
  }
}

template <class Real>
void tile(const Real* a, const Real* b, int64_t depth, Real alpha, bool accumulate, Real* c, int64_t stride,
          int64_t rows, int64_t columns) {
  [&]<int... count>(std::integer_sequence<int, count...>) {
    using Tile = void (*)(const Real*, const Real*, int64_t, Real, bool, Real*, int64_t, int64_t);
    static constexpr Tile tiles[] = {tile_of<Real, count + 1>...};
    tiles[rows - 1](a, b, depth, alpha, accumulate, c, stride, columns);
  }(std::make_integer_sequence<int, kRows>());
}

// ---- factorisation -----------------------------------------------------------------------------------------------

// out[j] -= factor * x[j]
template <class Real>
PYOPS_INLINE void subtract(const Real* x, Real factor, Real* out, int64_t n) {
  int64_t j = 0;
  for (; j + kWidth<Real> <= n; j += kWidth<Real>) store(out + j, load(out + j) - load(x + j) * factor);
  for (; j < n; ++j) out[j] -= x[j] * factor;
}

template <class Real>
void factor_panel(Real* panel, int64_t stride, int64_t rows, int64_t columns, int64_t* pivots) {
  for (int64_t k = 0; k < columns; ++k) {
    int64_t best = k;
    Real largest = -1;
    for (int64_t i = k; i < rows; ++i) {
      const Real size = __builtin_fabs(panel[i * stride + k]);
      if (size > largest) {
        largest = size;
        best = i;
      }
    }
    pivots[k] = best;
    if (best != k) {
      for (int64_t j = 0; j < columns; ++j) std::swap(panel[k * stride + j], panel[best * stride + j]);
    }
    const Real pivot = panel[k * stride + k];
    const Real inverse = pivot == 0 ? Real(0) : 1 / pivot;  // a column of zeros stays one
    for (int64_t i = k + 1; i < rows; ++i) {
      Real* row = panel + i * stride;
      row[k] *= inverse;
      subtract(panel + k * stride + k + 1, row[k], row + k + 1, columns - k - 1);
    }
  }
}

// Strips of four vectors stay in registers and the cache while all rows before go into one.
template <class Real, bool upper>
PYOPS_INLINE void solve_strip(const Real* t, int64_t t_stride, int64_t size, Real* x, int64_t x_stride, int vectors) {
  constexpr int width = kWidth<Real>;
  for (int64_t step = 0; step < size; ++step) {
    const int64_t i = upper ? size - 1 - step : step;
    Vector<Real> sums[4];
    for (int v = 0; v < vectors; ++v) sums[v] = load(x + i * x_stride + v * width);
    for (int64_t j = upper ? i + 1 : 0; j < (upper ? size : i); ++j) {
      const Real factor = t[i * t_stride + j];
      for (int v = 0; v < vectors; ++v) sums[v] -= load(x + j * x_stride + v * width) * factor;
    }
    const Real inverse = upper ? 1 / t[i * t_stride + i] : Real(1);
    for (int v = 0; v < vectors; ++v) store(x + i * x_stride + v * width, upper ? sums[v] * inverse : sums[v]);
  }
}

template <class Real, bool upper>
void solve(const Real* t, int64_t t_stride, int64_t size, Real* x, int64_t x_stride, int64_t columns) {
  constexpr int width = kWidth<Real>;
  int64_t c = 0;
  for (; c + 4 * width <= columns; c += 4 * width) solve_strip<Real, upper>(t, t_stride, size, x + c, x_stride, 4);
  for (; c + width <= columns; c += width) solve_strip<Real, upper>(t, t_stride, size, x + c, x_stride, 1);
  for (; c < columns; ++c) {
    for (int64_t step = 0; step < size; ++step) {
      const int64_t i = upper ? size - 1 - step : step;
      Real sum = x[i * x_stride + c];
      for (int64_t j = upper ? i + 1 : 0; j < (upper ? size : i); ++j) sum -= x[j * x_stride + c] * t[i * t_stride + j];
      x[i * x_stride + c] = upper ? sum / t[i * t_stride + i] : sum;
    }
  }
}

template <class Real>
constexpr GemmKernels<Real> kKernels = {
    kRows,
    kVectors * kWidth<Real>,
    &pack<Real>,
    &tile<Real>,
    &factor_panel<Real>,
    &solve<Real, false>,
    &solve<Real, true>,
};

}  // namespace

extern const GemmKernels<float> gemm_kernels_float32 = kKernels<float>;
extern const GemmKernels<double> gemm_kernels_float64 = kKernels<double>;

}  // namespace pyops::PYOPS_ISA
