// Argument checks of the ternary ops, for the CPU and the CUDA front; pyops/ternary/_checks.py repeats them.
#pragma once

#include <vector>

#include "../common/tensor.h"
#include "ternary_format.h"

namespace pyops {

// What the shape of gamma says.
enum class Granularity { tensor, row, group };

struct WeightArguments {
  int64_t out_features, in_features;
  DType dtype;
};
WeightArguments check_quantize_weight(const Tensor& weight, const OptionalTensor& scale, int64_t measure, bool per_row,
                                      double eps);

struct ActivationArguments {
  int64_t tokens, in_features;
  DType dtype;
};
ActivationArguments check_quantize_activation(const char* op, const Tensor& x, int64_t qmax, double eps);

struct RepackArguments {
  TernaryFormat from, to;
  int64_t out_features, in_features;
};
RepackArguments check_repack(const Tensor& source, int64_t from_format, int64_t to_format, int64_t out_features,
                             int64_t in_features);
// Shape of the tensor that a format stores a matrix in; 2 or 4 dimensions.
std::vector<int64_t> packed_shape(TernaryFormat format, int64_t out_features, int64_t in_features);
// A weight that no code of the format stands for, found while reading: FormatError in Python.
[[noreturn]] void reject_code(const char* op, const char* argument, TernaryFormat format, int64_t out_feature,
                              int64_t in_feature, int value);

struct LinearArguments {
  const char* op;
  int64_t tokens, out_features, in_features;
  TernaryFormat format;
  Granularity granularity;
  DType dtype, out_dtype;  // of x and of the result
  bool quantized;          // act_bits 8
  float qmax, eps;
};
LinearArguments check_linear(const Tensor& x, const Tensor& packed, const Tensor& gamma, const OptionalTensor& bias,
                             int64_t format, int64_t out_features, int64_t in_features, int64_t act_bits, int64_t qmax,
                             double eps, const std::optional<ScalarType>& out_dtype);
LinearArguments check_linear_backward_input(const Tensor& grad, const Tensor& packed, const Tensor& gamma,
                                            int64_t format, int64_t in_features);
LinearArguments check_bitlinear(const Tensor& x, const Tensor& weight, const Tensor& packed, const Tensor& gamma,
                                const OptionalTensor& bias, int64_t act_bits, int64_t qmax, double eps);

struct WeightGradientArguments {
  int64_t tokens, out_features, in_features;
  DType dtype, out_dtype;  // of grad and of the result
};
WeightGradientArguments check_backward_weight(const Tensor& grad, const Tensor& quantized, const Tensor& step,
                                              ScalarType dtype);

}  // namespace pyops
