// Elementwise functions on vectors. Polynomials are our own relative-minimax fits (Remez exchange).
#pragma once

#include "simd.h"

namespace pyops {
namespace {

// e^x with x = n ln2 + r, |r| <= ln2/2 and e^r = 1 + r + r^2 p(r). Relative error of the polynomial: 2.7e-8
// (float), 3.7e-18 (double). Results below the smallest normal number may be 0; e^-inf is 0; NaN stays NaN. For x
// up to 88 (float) or 709 (double).
#if defined(__AVX512F__)

// vscalef applies 2^n without touching exponent bits and underflows by itself: no compare and blend at the end.
PYOPS_INLINE Vector<float> exponential(Vector<float> x) {
  const __m512 lowest = _mm512_set1_ps(-104.0f);                  // below half of the smallest subnormal
  const __m512 clamped = _mm512_maskz_max_ps(0xffff, lowest, x);  // second operand: NaN stays
  const __m512 n =
      _mm512_maskz_roundscale_ps(0xffff, clamped * 1.44269504f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 r =
      _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), clamped));
  __m512 p = r * 0.00144693652f + 0.00836247023f;
  p = p * r + 0.0416587036f;
  p = p * r + 0.166666024f;
  p = p * r + 0.500000159f;
  return _mm512_maskz_scalef_ps(0xffff, p * (r * r) + r + 1.0f, n);
}

#else

PYOPS_INLINE Vector<float> exponential(Vector<float> x) {
  using Types = VectorTypes<float>;
  const float lowest = -87.33654f, magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const auto clamped = x < lowest ? broadcast(lowest) : x;
  const auto shifted = clamped * 1.44269504f + magic;
  const auto n = shifted - magic;
  const auto r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  auto p = r * 0.00144693652f + 0.00836247023f;
  p = p * r + 0.0416587036f;
  p = p * r + 0.166666024f;
  p = p * r + 0.500000159f;
  const auto e = p * (r * r) + r + 1.0f;
  const auto exponent = (reinterpret<Types::integer>(shifted) + (127 - 0x4b400000)) << 23;
  return x < lowest ? broadcast(0.0f) : e * reinterpret<Types::real>(exponent);
}

#endif

PYOPS_INLINE Vector<double> exponential(Vector<double> x) {
  using Types = VectorTypes<double>;
  const double lowest = -708.39, magic = 6755399441055744.0;  // 1.5 * 2^52
  const auto clamped = x < lowest ? broadcast(lowest) : x;
  const auto shifted = clamped * 1.4426950408889634 + magic;
  const auto n = shifted - magic;
  const auto r = (clamped - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
  auto p = r * 2.49999648399501969e-8 + 2.76303787155988319e-7;
  p = p * r + 2.75575873444259279e-6;
  p = p * r + 2.48014927625225385e-5;
  p = p * r + 1.98412695047618085e-4;
  p = p * r + 1.38888889439229073e-3;
  p = p * r + 8.3333333334956262e-3;
  p = p * r + 4.16666666665291876e-2;
  p = p * r + 0.166666666666664102;
  p = p * r + 0.500000000000001072;
  const auto e = p * (r * r) + r + 1.0;
  const auto exponent = (reinterpret<Types::integer>(shifted) + (1023 - 0x4338000000000000LL)) << 52;
  return x < lowest ? broadcast(0.0) : e * reinterpret<Types::real>(exponent);
}

}  // namespace
}  // namespace pyops
