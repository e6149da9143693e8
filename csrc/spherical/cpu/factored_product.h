// The factored layer by plain pointers: forward, gradient and step. Formulas and symbols as in
// pyops/spherical/factored_reference.py; Real is the type of the state, V has its own.
//
// With at most as many rows as features the second-order term of C and the inverse of the step's factor go through
// m x m matrices, else through d x d ones: at m = d the two take equally long.
#pragma once

#include <vector>

#include "../../common/dtype.h"
#include "../spherical_loss_formula.h"

namespace pyops {

// Before the gradients of the targets in a row of `partials`.
enum FactoredPartials : int { kBeta = 0, kFactoredShift, kFactoredTargets };

template <class Real>
struct FactoredState {
  void* V;  // classes x features, its rows `V_stride` apart
  bool wide_V;
  int64_t V_stride;
  Real *U, *U_inv, *omega, *wbar, *C;  // contiguous
  int64_t classes, features;

  char* row(int64_t c) const { return static_cast<char*>(V) + c * V_stride * (wide_V ? 8 : 4); }
};

struct FactoredTargets {
  const int64_t* index;  // rows x targets; -1: does not count
  int64_t rows, targets;
};

// HC, P (rows x features), the rows' partials and losses from H. `omega` weights the targets.
template <class Real>
void factored_forward(const FactoredState<Real>& state, const FactoredTargets& targets, const double* omega,
                      const SphericalOptions& options, const Real* H, Real* HC, Real* P, double* partials,
                      double* losses);

// Z, what the targets add to the gradient of H, and that gradient.
template <class Real>
void factored_gradient(const FactoredState<Real>& state, const FactoredTargets& targets, const double* partials,
                       const Real* HC, Real* Z, Real* dH);

enum class FactoredOutcome : int { factored = 0, singular = 1, skipped = 2 };

struct FactoredStep {
  FactoredOutcome outcome;
  double norm, inverse_norm;  // Frobenius norms of U and U_inv after the step
};

// W <- keep * (W - rate * dW). Changes nothing unless it returns `factored`.
template <class Real>
FactoredStep factored_step(const FactoredState<Real>& state, const FactoredTargets& targets, const double* partials,
                           const Real* H, const Real* HC, const Real* P, const Real* Z, double rate, double keep,
                           bool shift_invariant);

// Conversions of rows, at the level of the processor.
template <class Real>
void widen_rows(const void* x, DType dtype, int64_t stride, int64_t rows, int64_t columns, Real* out,
                int64_t out_stride);
template <class Real>
void narrow_rows(const Real* x, int64_t stride, int64_t rows, int64_t columns, void* out, DType dtype);

}  // namespace pyops
