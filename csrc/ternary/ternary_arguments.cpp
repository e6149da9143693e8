#include "ternary_arguments.h"

#include <math.h>

#include <vector>

namespace pyops {
namespace {

constexpr const char* kFloatingRule = "be float32, bfloat16 or float16";

DType check_kernel_floating(const char* op, const char* argument, const Tensor& tensor) {
  check_strided(op, argument, tensor);
  PYOPS_CHECK(is_dtype(tensor, ScalarType::Float) || is_dtype(tensor, ScalarType::BFloat16) ||
                  is_dtype(tensor, ScalarType::Half),
              op, argument, kFloatingRule, dtype_name(tensor));
  return dtype_of(tensor.scalar_type());
}

std::string list_name(const std::vector<int64_t>& sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

bool has_shape(const Tensor& tensor, const std::vector<int64_t>& sizes) {
  if (tensor.dim() != int64_t(sizes.size())) return false;
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (tensor.size(int64_t(i)) != sizes[i]) return false;
  }
  return true;
}

void check_typed(const char* op, const char* argument, const Tensor& tensor, const Tensor& like, const char* like_name,
                 ScalarType dtype) {
  check_strided(op, argument, tensor);
  check_device(op, argument, tensor, like, like_name);
  PYOPS_CHECK(is_dtype(tensor, dtype), op, argument, "be " + dtype_name(dtype), dtype_name(tensor));
}

void check_shape(const char* op, const char* argument, const Tensor& tensor, const std::vector<int64_t>& sizes) {
  PYOPS_CHECK(has_shape(tensor, sizes), op, argument, "have shape " + list_name(sizes), shape_name(tensor));
}

TernaryFormat check_format(const char* op, const char* argument, int64_t format) {
  PYOPS_CHECK(format >= 0 && format < kTernaryFormats, op, argument,
              "be 0 (int8), 1 (t2), 2 (t5), 3 (t2x16), 4 (t5x16) or 5 (t2mma)", format);
  return static_cast<TernaryFormat>(format);
}

void check_features(const char* op, int64_t out_features, int64_t in_features) {
  PYOPS_CHECK(out_features >= 0, op, "out_features", "be at least 0", out_features);
  PYOPS_CHECK(in_features >= 0 && in_features <= kTernaryMaxIn, op, "in_features", "be in [0, 16777216]", in_features);
}

void check_quantizer(const char* op, int64_t qmax, double eps) {
  PYOPS_CHECK(qmax == 127 || qmax == 128, op, "qmax", "be 127 or 128", qmax);
  PYOPS_CHECK(float(eps) > 0 && float(eps) < HUGE_VALF, op, "eps", "be positive", eps);
}

Granularity check_gamma(const char* op, const Tensor& gamma, const Tensor& like, const char* like_name,
                        int64_t out_features, int64_t in_features) {
  check_typed(op, "gamma", gamma, like, like_name, ScalarType::Float);
  if (gamma.dim() == 0) return Granularity::tensor;
  if (has_shape(gamma, {out_features})) return Granularity::row;
  if (in_features % kTernaryGroup == 0 && has_shape(gamma, {out_features, in_features / kTernaryGroup})) {
    return Granularity::group;
  }
  const std::string n = std::to_string(out_features);
  reject<std::runtime_error>(op, "gamma", "have shape [], [" + n + "] or [" + n + ", in_features / 256]",
                             shape_name(gamma));
}

void check_packed(const char* op, const Tensor& packed, const Tensor& like, const char* like_name, TernaryFormat format,
                  int64_t out_features, int64_t in_features) {
  check_typed(op, "packed", packed, like, like_name,
              format == TernaryFormat::int8 ? ScalarType::Char : ScalarType::Byte);
  check_shape(op, "packed", packed, packed_shape(format, out_features, in_features));
}

void check_bias(const char* op, const OptionalTensor& bias, const Tensor& x, int64_t out_features) {
  if (!bias) return;
  check_strided(op, "bias", *bias);
  check_device(op, "bias", *bias, x, "x");
  PYOPS_CHECK(same_dtype(*bias, x), op, "bias", "be " + dtype_name(x) + " like x", dtype_name(*bias));
  check_shape(op, "bias", *bias, {out_features});
}

bool check_act_bits(const char* op, int64_t act_bits) {
  PYOPS_CHECK(act_bits == 8 || act_bits == 0, op, "act_bits", "be 8 or 0 (not quantized)", act_bits);
  return act_bits == 8;
}

void check_two_dimensions(const char* op, const char* argument, const Tensor& tensor, const char* shape) {
  PYOPS_CHECK(tensor.dim() == 2, op, argument, std::string("have shape ") + shape, shape_name(tensor));
}

}  // namespace

std::vector<int64_t> packed_shape(TernaryFormat format, int64_t out_features, int64_t in_features) {
  const int64_t rows = ceil_div(out_features, block_rows(format));
  const int64_t columns = ceil_div(in_features, block_columns(format));
  if (format == TernaryFormat::t2mma) return {rows, columns, 32, 16};
  if (format >= TernaryFormat::t2x16) return {rows, columns, 16, 4};
  return {rows, columns};
}

void reject_code(const char* op, const char* argument, TernaryFormat format, int64_t out_feature, int64_t in_feature,
                 int value) {
  const char* rule = format == TernaryFormat::int8                                   ? "hold -1, 0 and 1 only"
                     : format == TernaryFormat::t5 || format == TernaryFormat::t5x16 ? "hold bytes below 243 only"
                                                                                     : "hold the codes 0, 1 and 2 only";
  reject<std::invalid_argument>(op, argument, rule, value, " at [", out_feature, ", ", in_feature, "]");
}

WeightArguments check_quantize_weight(const Tensor& weight, const OptionalTensor& scale, int64_t measure, bool per_row,
                                      double eps) {
  constexpr const char* op = "ternary_quantize_weight";
  const DType dtype = check_kernel_floating(op, "weight", weight);
  check_two_dimensions(op, "weight", weight, "[out_features, in_features]");
  const int64_t out_features = weight.size(0), in_features = weight.size(1);
  if (scale) {
    check_typed(op, "scale", *scale, weight, "weight", ScalarType::Float);
    check_shape(op, "scale", *scale, per_row ? std::vector<int64_t>{out_features} : std::vector<int64_t>{});
  }
  PYOPS_CHECK(measure == 0 || measure == 1, op, "measure", "be 0 (absmean) or 1 (absmedian)", measure);
  PYOPS_CHECK(eps >= 0 && float(eps) < HUGE_VALF, op, "eps", "be at least 0", eps);
  return {out_features, in_features, dtype};
}

ActivationArguments check_quantize_activation(const char* op, const Tensor& x, int64_t qmax, double eps) {
  const DType dtype = check_kernel_floating(op, "x", x);
  check_two_dimensions(op, "x", x, "[tokens, in_features]");
  check_quantizer(op, qmax, eps);
  check_features(op, 0, x.size(1));
  return {x.size(0), x.size(1), dtype};
}

RepackArguments check_repack(const Tensor& source, int64_t from_format, int64_t to_format, int64_t out_features,
                             int64_t in_features) {
  constexpr const char* op = "ternary_repack";
  const TernaryFormat from = check_format(op, "from_format", from_format);
  const TernaryFormat to = check_format(op, "to_format", to_format);
  PYOPS_CHECK(from != to, op, "to_format", "differ from from_format", to_format);
  check_features(op, out_features, in_features);
  check_typed(op, "source", source, source, "source",
              from == TernaryFormat::int8 ? ScalarType::Char : ScalarType::Byte);
  check_shape(op, "source", source, packed_shape(from, out_features, in_features));
  return {from, to, out_features, in_features};
}

LinearArguments check_linear(const Tensor& x, const Tensor& packed, const Tensor& gamma, const OptionalTensor& bias,
                             int64_t format_code, int64_t out_features, int64_t in_features, int64_t act_bits,
                             int64_t qmax, double eps, const std::optional<ScalarType>& out_dtype) {
  constexpr const char* op = "ternary_linear";
  const DType dtype = check_kernel_floating(op, "x", x);
  check_two_dimensions(op, "x", x, "[tokens, in_features]");
  const TernaryFormat format = check_format(op, "format", format_code);
  check_features(op, out_features, in_features);
  PYOPS_CHECK(x.size(1) == in_features, op, "x", "have in_features = " + std::to_string(in_features) + " columns",
              shape_name(x));
  check_packed(op, packed, x, "x", format, out_features, in_features);
  const Granularity granularity = check_gamma(op, gamma, x, "x", out_features, in_features);
  check_bias(op, bias, x, out_features);
  const bool quantized = check_act_bits(op, act_bits);
  check_quantizer(op, qmax, eps);
  if (out_dtype) {
    PYOPS_CHECK(*out_dtype == ScalarType::Float || *out_dtype == ScalarType::BFloat16 || *out_dtype == ScalarType::Half,
                op, "out_dtype", kFloatingRule, dtype_name(*out_dtype));
  }
  return {op,        x.size(0),   out_features, in_features,
          format,    granularity, dtype,        out_dtype ? dtype_of(*out_dtype) : dtype,
          quantized, float(qmax), float(eps)};
}

LinearArguments check_linear_backward_input(const Tensor& grad, const Tensor& packed, const Tensor& gamma,
                                            int64_t format_code, int64_t in_features) {
  constexpr const char* op = "ternary_linear_backward_input";
  const DType dtype = check_kernel_floating(op, "grad", grad);
  check_two_dimensions(op, "grad", grad, "[tokens, out_features]");
  const TernaryFormat format = check_format(op, "format", format_code);
  const int64_t out_features = grad.size(1);
  check_features(op, out_features, in_features);
  check_packed(op, packed, grad, "grad", format, out_features, in_features);
  const Granularity granularity = check_gamma(op, gamma, grad, "grad", out_features, in_features);
  return {op, grad.size(0), out_features, in_features, format, granularity, dtype, dtype, false, 0, 0};
}

LinearArguments check_bitlinear(const Tensor& x, const Tensor& weight, const Tensor& packed, const Tensor& gamma,
                                const OptionalTensor& bias, int64_t act_bits, int64_t qmax, double eps) {
  constexpr const char* op = "bitlinear";
  const DType dtype = check_kernel_floating(op, "x", x);
  check_two_dimensions(op, "x", x, "[tokens, in_features]");
  check_kernel_floating(op, "weight", weight);
  check_device(op, "weight", weight, x, "x");
  check_two_dimensions(op, "weight", weight, "[out_features, in_features]");
  const int64_t out_features = weight.size(0), in_features = weight.size(1);
  check_features(op, out_features, in_features);
  PYOPS_CHECK(x.size(1) == in_features, op, "x", "have in_features = " + std::to_string(in_features) + " columns",
              shape_name(x));
  check_packed(op, packed, x, "x", TernaryFormat::t2, out_features, in_features);
  const Granularity granularity = check_gamma(op, gamma, x, "x", out_features, in_features);
  check_bias(op, bias, x, out_features);
  const bool quantized = check_act_bits(op, act_bits);
  check_quantizer(op, qmax, eps);
  return {op,    x.size(0), out_features, in_features, TernaryFormat::t2, granularity,
          dtype, dtype,     quantized,    float(qmax), float(eps)};
}

WeightGradientArguments check_backward_weight(const Tensor& grad, const Tensor& quantized, const Tensor& step,
                                              ScalarType out_dtype) {
  constexpr const char* op = "bitlinear_backward_weight";
  const DType dtype = check_kernel_floating(op, "grad", grad);
  check_two_dimensions(op, "grad", grad, "[tokens, out_features]");
  check_typed(op, "quantized", quantized, grad, "grad", ScalarType::Char);
  PYOPS_CHECK(quantized.dim() == 2 && quantized.size(0) == grad.size(0), op, "quantized",
              "have shape [" + std::to_string(grad.size(0)) + ", in_features]", shape_name(quantized));
  check_typed(op, "step", step, grad, "grad", ScalarType::Float);
  check_shape(op, "step", step, {grad.size(0)});
  PYOPS_CHECK(out_dtype == ScalarType::Float || out_dtype == ScalarType::BFloat16 || out_dtype == ScalarType::Half, op,
              "dtype", kFloatingRule, dtype_name(out_dtype));
  return {grad.size(0), grad.size(1), quantized.size(1), dtype, dtype_of(out_dtype)};
}

}  // namespace pyops
