// The product that ternary_linear and bitlinear share, from tensors to launches. Host compiler only.
#pragma once

#include "ternary_front.h"
#include "ternary_linear.cuh"

namespace pyops {

inline int64_t gamma_stride(Granularity granularity, int64_t in_features) {
  return granularity == Granularity::tensor ? 0 : granularity == Granularity::row ? 1 : in_features / kTernaryGroup;
}

// Rounded activations that a backward wants: tokens x in_features, and per token. Without tensors they are not kept.
struct SavedActivations {
  OptionalTensor quantized, step;
};

namespace detail {

inline void float_product(const LinearArguments& a, const Tensor& x_in, const Tensor& weights,
                          const TernaryOutput& output, void* stream) {
  const Tensor x = padded_rows(x_in);
  TernaryLinearFloat linear{};
  linear.packed = static_cast<const uint8_t*>(weights.const_data_ptr());
  linear.tokens = a.tokens;
  linear.out_features = a.out_features;
  linear.in_features = a.in_features;
  linear.grouped = a.granularity == Granularity::group;
  linear.x = x.const_data_ptr();
  linear.row_stride = x.stride(0);
  linear.x_dtype = a.dtype;
  linear.output = output;
  check_launch(a.op, pyops_ternary_linear_float(&linear, stream));
}

// Memory for the sums of several splits, if the launcher wants any.
inline OptionalTensor split_memory(TernaryLinear& linear, const Tensor& like, int64_t splits) {
  linear.splits = int(splits);
  if (splits == 1) return std::nullopt;
  Tensor partial = new_tensor(like, {splits, linear.tokens, linear.out_features}, ScalarType::Int);
  linear.partial = static_cast<int*>(partial.data_ptr());
  return partial;
}

inline void integer_product(const LinearArguments& a, const Tensor& x, const Tensor& weights,
                            const TernaryOutput& output, const SavedActivations& saved, void* stream) {
  TernaryLinear linear{};
  linear.packed = static_cast<const uint8_t*>(weights.const_data_ptr());
  linear.tokens = a.tokens;
  linear.out_features = a.out_features;
  linear.in_features = a.in_features;
  linear.grouped = a.granularity == Granularity::group;
  linear.output = output;
  const bool vector = a.tokens <= kVectorTokens && !linear.grouped;
  const OptionalTensor partial = split_memory(
      linear, x, vector ? pyops_ternary_linear_vector_splits(&linear) : pyops_ternary_linear_matrix_splits(&linear));
  if (vector && a.tokens == 1 && !saved.step) {
    const Tensor step = new_tensor(x, {1}, ScalarType::Float), token = padded_rows(x);
    linear.rounds = true;
    linear.x = token.const_data_ptr();
    linear.x_dtype = a.dtype;
    linear.qmax = a.qmax;
    linear.eps = a.eps;
    linear.step_of_split = static_cast<float*>(step.data_ptr());
    check_launch(a.op, pyops_ternary_linear_vector(&linear, stream));
    return;
  }
  const int64_t width = ceil_div(a.in_features, 16) * 16;
  const Tensor step = saved.step ? *saved.step : new_tensor(x, {a.tokens}, ScalarType::Float);
  const Tensor sum = new_tensor(x, {a.tokens}, ScalarType::Int);
  const bool in_place = saved.quantized && width == a.in_features;
  const Tensor quantized = in_place ? *saved.quantized : new_tensor(x, {a.tokens, width}, ScalarType::Char);
  quantize_tokens(a.op, x, a.dtype, a.qmax, a.eps, quantized, step, sum, stream);
  if (saved.quantized && !in_place) {
    quantize_tokens(a.op, x, a.dtype, a.qmax, a.eps, *saved.quantized, step, std::nullopt, stream);
  }
  linear.quantized = static_cast<const int8_t*>(quantized.const_data_ptr());
  linear.width = width;
  linear.sum = static_cast<const int*>(sum.const_data_ptr());
  linear.output.step = static_cast<const float*>(step.const_data_ptr());
  check_launch(a.op,
               vector ? pyops_ternary_linear_vector(&linear, stream) : pyops_ternary_linear_matrix(&linear, stream));
}

}  // namespace detail

// y = x (T gamma)^T + bias; x has dense rows, `y` has elements.
inline void ternary_product(const LinearArguments& a, const Tensor& x, const Tensor& packed, const Tensor& gamma_in,
                            const OptionalTensor& bias_in, InvalidCode policy, const SavedActivations& saved, Tensor& y,
                            void* stream) {
  const Tensor weights = matrix_layout(a.op, packed, a.format, a.out_features, a.in_features, policy, stream);
  const Tensor gamma = as_contiguous(gamma_in);
  OptionalTensor bias;
  if (bias_in) bias = as_contiguous(*bias_in);
  TernaryOutput output{};
  output.gamma = static_cast<const float*>(gamma.const_data_ptr());
  output.gamma_stride = gamma_stride(a.granularity, a.in_features);
  output.bias = bias ? bias->const_data_ptr() : nullptr;
  output.bias_dtype = a.dtype;
  output.y = y.data_ptr();
  output.y_dtype = a.out_dtype;
  if (a.quantized) {
    detail::integer_product(a, x, weights, output, saved, stream);
  } else {
    detail::float_product(a, x, weights, output, stream);
  }
}

}  // namespace pyops
