// Row formulas of softmax cross-entropy with the log-sum-exp-squared regulariser: shared by CPU and CUDA.
//
//   loss_i = sum_j t_j [ (1 - s) w_cj (lse - o_cj) + s/D sum_k w_k (lse - o_k) ]  + lambda * lse^2
// with t the target weights, w the class weights, s the label smoothing. The streaming pass leaves
// (shift, sum = sum_k exp(o_k - shift), weighted_sum = sum_k w_k o_k), the shift being the maximum or a little less;
// the rest is scalar work in double.
//
// Gradient of a row, for upstream gradients of 1 and before division by the normalisers:
//   d loss / d o_k = (slope + z_slope) * exp(o_k - shift) - smooth * w_k + sum_j target_gradient_j * [k = c_j]
// `slope` belongs to the cross-entropy part (divided by the sum of class weights under 'mean'), `z_slope` to
// the regulariser (divided by the number of rows that count): hence two columns.
#pragma once

#include <math.h>

#include "../common/host_device.h"

namespace pyops {

// Columns of `statistics` (m x (kTargetGradientCe + K)), float64 as in spherical_loss_formula.h.
enum CrossEntropyStatistics : int { kLogitShift = 0, kSlopeCe, kZSlope, kSmoothCe, kTargetGradientCe };

struct CrossEntropyOptions {
  double label_smoothing, lse_square_scale;
};

struct RowExponentials {
  double shift;         // -inf before anything was seen
  double sum;           // of exp(o - shift); of exp(o) while the shift is -inf, which is 0
  double weighted_sum;  // of w o; only when smoothing
};

PYOPS_HOST_DEVICE static inline RowExponentials no_exponentials() { return {-HUGE_VAL, 0, 0}; }

PYOPS_HOST_DEVICE static inline void merge_exponentials(RowExponentials& total, const RowExponentials& other) {
  const double shift = other.shift > total.shift ? other.shift : total.shift;
  // An empty or all -inf stretch has sum 0 and must not meet exp(-inf + inf).
  const double kept = total.sum == 0 ? 0 : total.sum * exp(total.shift - shift);
  const double added = other.sum == 0 ? 0 : other.sum * exp(other.shift - shift);
  total = {shift, kept + added, total.weighted_sum + other.weighted_sum};
}

struct CrossEntropyPartials {
  double loss, slope, target_weight;
};

// Adds one target: `omega` is target weight times class weight. Returns its target gradient. With one class the
// softmax is 1 whatever the logit: the gradient is exactly 0, not the difference of rounded equal terms.
PYOPS_HOST_DEVICE static inline double add_target(const CrossEntropyOptions& options, const RowExponentials& row,
                                                  double log_sum, double classes, double o, double target_weight,
                                                  double omega, CrossEntropyPartials& partials) {
  const double share = (1 - options.label_smoothing) * omega;
  partials.target_weight += target_weight;
  if (omega == 0) return 0;  // a class of weight 0 adds nothing, whatever its logit
  partials.loss += share * ((row.shift - o) + log_sum);
  if (classes == 1) return 0;
  partials.slope += share;
  return -share;
}

// Completes a row after its targets; writes its four statistics and returns lambda * lse^2.
PYOPS_HOST_DEVICE static inline double finish_row(const CrossEntropyOptions& options, const RowExponentials& row,
                                                  double log_sum, double classes, double class_weight_sum,
                                                  CrossEntropyPartials& partials, double* statistics) {
  const double lse = row.shift + log_sum;
  const bool smoothing = options.label_smoothing != 0 && classes != 1;
  const double smooth = smoothing ? options.label_smoothing / classes * partials.target_weight : 0;
  if (smooth != 0) {
    partials.loss += smooth * (lse * class_weight_sum - row.weighted_sum);
    partials.slope += smooth * class_weight_sum;
  }
  const double lambda = options.lse_square_scale;
  statistics[kLogitShift] = row.shift;
  statistics[kSlopeCe] = partials.slope / row.sum;
  statistics[kZSlope] = lambda == 0 ? 0 : 2 * lambda * lse / row.sum;
  statistics[kSmoothCe] = smooth;
  return lambda == 0 ? 0 : lambda * lse * lse;
}

}  // namespace pyops
