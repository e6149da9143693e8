// The rounding of one token to 8 bits, shared by quantize_activation.cu and the matrix-vector product.
#pragma once

#include "ternary_device.cuh"

namespace pyops {
namespace {

// s = qmax / max(absmax, eps) and step = max(absmax, eps) / qmax in IEEE float32; a token that is not finite has
// q = 0 and step = NaN.
struct Quantizer {
  float scale, step;
  bool finite;
};

PYOPS_DEVICE Quantizer quantizer_of(uint32_t magnitude, float qmax, float eps) {
  const float absmax = __uint_as_float(magnitude), largest = absmax < eps ? eps : absmax;
  const float scale = __fdiv_rn(qmax, largest), greatest = __uint_as_float(kInfinity - 1);
  const bool finite = magnitude < kInfinity;
  return {scale < greatest ? scale : greatest, finite ? __fdiv_rn(largest, qmax) : __uint_as_float(0x7fc00000u),
          finite};
}

PYOPS_DEVICE uint32_t quantize_four(const float* values, const Quantizer& quantizer) {
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    int q = __float2int_rn(__fmul_rn(values[i], quantizer.scale));
    q = q > 127 ? 127 : q < -128 ? -128 : q;
    word |= (uint32_t(q) & 0xffu) << 8 * i;
  }
  return quantizer.finite ? word : 0;
}

constexpr uint32_t kOnes = 0x01010101u;  // the other operand of dp4a that sums bytes

}  // namespace
}  // namespace pyops
