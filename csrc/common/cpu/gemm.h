// Dense matrix products and solves in float32 and float64 for the kernels of any family: row-major outputs, inputs by
// any two strides. Sums over the depth run in blocks of kDepthBlock in the order of the depth; which thread computes
// what does not matter to the result.
#pragma once

#include <stdint.h>

namespace pyops {

// A matrix by the strides of its rows and columns: a transpose is a swap of the two.
template <class Real>
struct MatrixView {
  const Real* data;
  int64_t row_stride, column_stride;

  MatrixView transposed() const { return {data, column_stride, row_stride}; }
};

template <class Real>
MatrixView<Real> dense(const Real* data, int64_t columns) {
  return {data, columns, 1};
}

template <class Real>
struct GemmOptions {
  Real alpha = 1;
  bool accumulate = false;            // add to C
  bool lower = false;                 // only the tiles of C that touch its lower triangle (a symmetric product)
  const Real* depth_scale = nullptr;  // multiplies the columns of A
};

// C[rows, columns] = alpha * A[rows, depth] diag(depth_scale) B[depth, columns] (+ C).
template <class Real>
void gemm(int64_t rows, int64_t columns, int64_t depth, MatrixView<Real> a, MatrixView<Real> b, Real* c,
          int64_t c_stride, const GemmOptions<Real>& options = {});

// The upper triangle of a square matrix becomes the mirror of the lower one.
template <class Real>
void mirror_lower(Real* c, int64_t size, int64_t stride);

// The smallest and the largest pivot by size; both NaN if one is not finite.
struct Pivots {
  double smallest, largest;
};

// LU with partial pivoting in place; pivots as in LAPACK, counted from 0.
template <class Real>
Pivots lu_factor(Real* a, int64_t size, int64_t stride, int64_t* pivots);

// B <- A^-1 B from what lu_factor left.
template <class Real>
void lu_solve(const Real* factors, int64_t size, int64_t stride, const int64_t* pivots, Real* b, int64_t columns,
              int64_t b_stride);

}  // namespace pyops
