// What the launchers of spherical_loss and cross_entropy take: plain pointers and sizes, seen by the kernels and
// by the fronts (host compiler, no CUDA header). Pointers are device pointers; strides count elements.
#pragma once

#include <stdint.h>

#include "../../common/dtype.h"

namespace pyops {

// A tensor of one or two dimensions and any strides, by (row, position). Null: absent.
struct StridedMatrix {
  const void* data;
  int64_t row_stride, column_stride;
};

// Numbers as in loss_arguments.h, which the kernels do not include.
enum class RowReduction : int { none = 0, mean = 1, sum = 2 };

// Forward of a loss over rows of logits.
struct LossRows {
  const void* logits;  // rows x classes, dense within a row
  int64_t row_stride;
  int64_t rows, classes, targets;  // `targets` per row; classes < 2^31
  DType dtype;                     // of logits, target weights and class weights

  StridedMatrix target;  // int64 if target_is_wide, else int32
  bool target_is_wide;
  int64_t ignore_index;
  StridedMatrix target_weight;  // null: ones
  const void* class_weight;     // contiguous; null: ones

  double* statistics;  // rows x (row numbers + targets)
  double* normalizer;  // what 'mean' divided by, else ones
  void* loss;          // () or (rows)
  void* z_term;        // like loss; cross_entropy only
  DType loss_dtype;
  RowReduction reduction;
  bool safe_mean;  // an empty batch has mean 0

  double* workspace;  // of the size that pyops_<loss>_workspace returns
};

// Backward: the gradient of the logits, written over them when the pointers are equal.
struct GradientRows {
  const void* grad_loss;
  DType grad_dtype;
  int64_t grad_stride;  // 0 for a scalar
  const void* logits;
  int64_t row_stride;
  void* gradient;
  int64_t gradient_row_stride;
  int64_t rows, classes, targets;
  DType dtype;
  StridedMatrix target;
  bool target_is_wide;
  const void* class_weight;  // cross_entropy only; contiguous; null: ones
  const double* statistics;  // contiguous
  const double* normalizer;
  // rows x targets elements of the dtype of logits; null up to kHeldTargets targets per row.
  void* originals;
};

// So many targets of a row are kept in registers by any backward block.
constexpr int64_t kHeldTargets = 32;

}  // namespace pyops
