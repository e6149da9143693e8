// Row formulas of the spherical losses: one place for the C++ CPU kernels and the CUDA kernels.
//
// A spherical loss depends on the D logits o_k of a row only through their sum, their sum of squares and
// the logits of the target classes. A streaming pass leaves (mean, m2 = sum (o_k - mean)^2, sum_log); from
// these everything else is scalar work in double, done here. No torch header, no state: usable in any kernel.
//
// Gradient of a row, for an upstream gradient of 1 and before the division by the normaliser:
//   d loss / d o_k = slope * ((o_k - center) * inverse_scale) + shift + smooth * smooth_term(o_k)
//                    + sum_j target_gradient_j * [k = c_j]
// The five row numbers and the K target gradients are one row of the `statistics` output, in this order.
#pragma once

#include <math.h>

#include "../common/host_device.h"

namespace pyops {

enum class SphericalLoss : int { z = 0, taylor_softmax = 1, spherical_softmax = 2, mse_onehot = 3 };

// Columns of `statistics` (m x (kTargetGradient + K)), float64 whatever the logits: at a confident target, or with
// one or two classes, the row numbers cancel, and in float32 their rounding would be all that is left.
enum SphericalStatistics : int { kCenter = 0, kInverseScale, kSlope, kShift, kSmooth, kTargetGradient };

struct SphericalOptions {
  SphericalLoss loss;
  double a, b, eps, label_smoothing;
};

struct RowMoments {
  double mean;     // of the row
  double m2;       // sum of (o - mean)^2
  double sum_log;  // sum of log n(o) with n the unnormalised probability; only for smoothed softmax kinds
};

struct RowPartials {
  double loss, slope, shift, smooth;
};

PYOPS_HOST_DEVICE static inline bool finite(double x) { return x - x == 0; }

// Chan's merge of (count, mean, m2); counts are elements seen so far.
PYOPS_HOST_DEVICE static inline void merge_moments(double& count, RowMoments& total, double other_count,
                                                   const RowMoments& other) {
  const double sum = count + other_count;
  if (other_count == 0) return;
  if (!finite(other.m2) || !finite(total.m2)) {  // infinities stay infinities, where their difference would be NaN
    total = {total.mean + other.mean, total.m2 + other.m2, total.sum_log + other.sum_log};
    count = sum;
    return;
  }
  const double delta = other.mean - total.mean;
  const double share = other_count / sum;
  total.mean += delta * share;
  total.m2 += other.m2 + delta * delta * count * share;
  total.sum_log += other.sum_log;
  count = sum;
}

// True smoothing of these two needs sum_k log n(o_k): one more accumulator in the forward pass.
PYOPS_HOST_DEVICE static inline bool needs_sum_log(const SphericalOptions& options) {
  return options.label_smoothing != 0 &&
         (options.loss == SphericalLoss::taylor_softmax || options.loss == SphericalLoss::spherical_softmax);
}

// n(o): the unnormalised probability of the two softmax alternatives.
template <class Real>
PYOPS_HOST_DEVICE static inline Real unnormalised(SphericalLoss loss, Real o, Real eps) {
  return loss == SphericalLoss::taylor_softmax ? Real(1) + o + Real(0.5) * o * o : o * o + eps;
}

// d log n(o) / d o, which `smooth` multiplies: 2 u / (u^2 + e) with u = 1 + o and e = 1, or u = o and e = eps.
template <class Real>
PYOPS_HOST_DEVICE static inline Real smooth_term(SphericalLoss loss, Real o, Real eps) {
  const bool taylor = loss == SphericalLoss::taylor_softmax;
  const Real u = taylor ? Real(1) + o : o, e = taylor ? Real(1) : eps;
  const bool square_overflows = u * u - u * u != 0 && u - u == 0;
  return (square_overflows ? Real(2) : u + u) / (square_overflows ? u : u * u + e);
}

PYOPS_HOST_DEVICE static inline double softplus(double x) { return x > 0 ? x + log1p(exp(-x)) : log1p(exp(x)); }

PYOPS_HOST_DEVICE static inline double sigmoid(double x) {
  if (x >= 0) return 1 / (1 + exp(-x));
  const double e = exp(x);
  return e / (1 + e);
}

// A row with an infinity and no NaN has m2 = inf, and a mean that may be inf - inf.
PYOPS_HOST_DEVICE static inline double sum_of_squares(const RowMoments& row, double classes) {
  return row.m2 == HUGE_VAL ? row.m2 : row.m2 + classes * row.mean * row.mean;
}

// (o - mean) is multiplied by this before it is multiplied by `slope`: kept apart from slope because their
// product can overflow float32 when sigma is tiny although the gradient itself does not.
PYOPS_HOST_DEVICE static inline double inverse_scale(const SphericalOptions& options, const RowMoments& row,
                                                     double classes) {
  if (options.loss == SphericalLoss::mse_onehot) return 1;
  if (options.loss != SphericalLoss::z) {
    // At the largest logits slope = 1/total is below float32, although slope * o is not: a power of two moves between.
    const double squares = sum_of_squares(row, classes) / classes;
    return squares > 1e30 && finite(squares) ? ldexp(1.0, -ilogb(squares) / 2) : 1;
  }
  const double sigma = sqrt(row.m2 / classes + options.eps);
  // Equal logits and eps = 0: loss softplus(a b)/a, gradient 0. One class: z is 0 whatever its logit, so this is
  // exact, where 1/sigma = 1/sqrt(eps) would leave the rounding of two equal terms of 1e6.
  return sigma == 0 || classes == 1 ? 0 : 1 / sigma;
}

// Adds one target of weight `omega` (target_weight * class weight) and logit `o` to the row's partials;
// returns its target gradient.
PYOPS_HOST_DEVICE static inline double add_target(const SphericalOptions& options, const RowMoments& row,
                                                  double classes, double scale, double o, double omega,
                                                  RowPartials& partials) {
  if (omega == 0) return 0;  // a class of weight 0 adds nothing, whatever its logit
  const double smoothing = options.label_smoothing, keep = 1 - smoothing, mean = row.mean;
  switch (options.loss) {
    case SphericalLoss::z: {
      // sum_k t_k z_k = (1 - smoothing) z_c because the mean of z is 0: smoothing only rescales z_c.
      const double z = (o - mean) * scale;
      const double u = options.a * (options.b - keep * z);
      const double rho = omega * keep * sigmoid(u);
      partials.loss += omega * softplus(u) / options.a;
      if (classes == 2) {  // z^2 = v / (v + eps): what is left of the gradient is eps / (v + eps), without cancellation
        const double rest = 0.5 * rho * scale * (options.eps * scale * scale);
        partials.shift += rest;
        return -2 * rest;
      }
      partials.slope += rho * z * scale / classes;
      partials.shift += rho * scale / classes;
      return -rho * scale;
    }
    case SphericalLoss::taylor_softmax: {
      const double total = classes * (1 + mean + 0.5 * mean * mean) + 0.5 * row.m2;
      const double n = unnormalised(options.loss, o, options.eps);
      partials.loss += omega * (log(total) - keep * log(n) - smoothing / classes * row.sum_log);
      if (classes == 1) return 0;  // the probability is 1 whatever the logit
      partials.slope += omega / total / scale;
      partials.shift += omega / total;
      partials.smooth -= omega * smoothing / classes;
      return -omega * keep * (1 + o) / n;
    }
    case SphericalLoss::spherical_softmax: {
      const double total = sum_of_squares(row, classes) + classes * options.eps;
      const double n = unnormalised(options.loss, o, options.eps);
      partials.loss += omega * (log(total) - keep * log(n) - smoothing / classes * row.sum_log);
      if (classes == 1) return 0;
      partials.slope += 2 * omega / total / scale;
      partials.smooth -= omega * smoothing / classes;
      return -2 * omega * keep * o / n;
    }
    case SphericalLoss::mse_onehot: {
      // sum_k (o_k - t_k)^2 with t = keep * onehot + smoothing / D.
      const double squares = sum_of_squares(row, classes);
      const double target_squares = keep * keep + (2 * keep + smoothing) * smoothing / classes;
      const double cross = squares == HUGE_VAL ? 0 : 2 * (keep * o + smoothing * mean);
      partials.loss += omega * (squares - cross + target_squares);
      partials.slope += 2 * omega;
      partials.shift -= 2 * omega * smoothing / classes;
      return -2 * omega * keep;
    }
  }
  return 0;
}

// Writes the five row numbers. Only the Z-loss subtracts a centre, the mean, rounded to the type Real that the
// backward computes in; what that rounding loses goes into the shift, so that an offset of 1e4 on float32 logits
// costs no accuracy.
template <class Real>
PYOPS_HOST_DEVICE static inline void write_row(const SphericalOptions& options, double* statistics,
                                               const RowMoments& row, double scale, const RowPartials& partials) {
  const double mean = options.loss == SphericalLoss::z ? row.mean : 0;
  const double center = double(Real(mean));
  statistics[kCenter] = center;
  statistics[kInverseScale] = scale;
  statistics[kSlope] = partials.slope;
  statistics[kShift] = partials.shift - partials.slope * ((mean - center) * scale);
  statistics[kSmooth] = partials.smooth;
}

}  // namespace pyops
