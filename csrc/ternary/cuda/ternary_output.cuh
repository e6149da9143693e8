// From integer sums to results, and how in_features are split; shared by the integer products.
#pragma once

#include "ternary_device.cuh"
#include "ternary_linear.cuh"

namespace pyops {
namespace {

// The part of some units of in_features that a split sums; all but the last are equal.
struct Split {
  int begin, end;
};
PYOPS_DEVICE Split split_of(int units, int split, int splits) {
  const int each = (units + splits - 1) / splits, begin = split * each, end = begin + each;
  return {begin < units ? begin : units, end < units ? end : units};
}

// The codes of a word as the four registers of an operand, each with four codes of a row. The codes of the registers 1
// and 3 come out times 4, which saves their shifts: these are the rows from 8 on, whose sums are multiples of 4.
PYOPS_DEVICE void decode_codes(uint32_t word, uint32_t (&registers)[4]) {
  const uint32_t upper = word >> 4;
  registers[0] = word & 0x03030303u;
  registers[1] = word & 0x0c0c0c0cu;
  registers[2] = upper & 0x03030303u;
  registers[3] = upper & 0x0c0c0c0cu;
}
constexpr int kUpperRowsShift = 2;

// -1, 0, 1 as signed bytes; no byte carries into the next.
PYOPS_DEVICE void decode_signed(uint32_t word, uint32_t (&registers)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) registers[i] = ((word >> 2 * i & 0x03030303u) + 0x7f7f7f7fu) ^ 0x80808080u;
}

PYOPS_DEVICE float scaled_sum(float sum, float step, float gamma) { return __fmul_rn(sum, __fmul_rn(step, gamma)); }

// y[token, n .. n + 8) from the sums; `valid` of them exist.
PYOPS_DEVICE void finish_eight(const TernaryOutput& out, const int (&sums)[8], float step, int64_t at, int64_t n,
                               int64_t valid) {
  float gamma[8], values[8];
  if (out.gamma_stride) {
    widen_eight(load_eight(out.gamma + n, valid), gamma);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) gamma[i] = *out.gamma;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] = scaled_sum(float(sums[i]), step, gamma[i]);
  if (out.bias) {
    float bias[8];
    load_eight_from(out.bias, out.bias_dtype, n, valid, bias);
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = __fadd_rn(values[i], bias[i]);
  }
  store_eight(values, out.y, out.y_dtype, at, valid);
}

// One element of y.
PYOPS_DEVICE void finish_one(const TernaryOutput& out, int sum, float step, int64_t at, int64_t n) {
  float value = scaled_sum(float(sum), step, out.gamma[out.gamma_stride * n]);
  if (out.bias) value = __fadd_rn(value, load_element(out.bias, out.bias_dtype, n));
  if (out.y_dtype == DType::bfloat16) {
    dev::narrow(value, static_cast<bfloat16*>(out.y)[at]);
  } else if (out.y_dtype == DType::float16) {
    dev::narrow(value, static_cast<float16*>(out.y)[at]);
  } else {
    static_cast<float*>(out.y)[at] = value;
  }
}

}  // namespace
}  // namespace pyops
