// Element types as kernels see them. Torch-free; conversions of single values (vectors: simd.h).
#pragma once

#include <stdint.h>
#include <string.h>

namespace pyops {

enum class DType : int { float32 = 0, float64, bfloat16, float16 };

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// The type in which a kernel computes on elements of type T.
template <class T>
struct Accumulation {
  using type = float;
};
template <>
struct Accumulation<double> {
  using type = double;
};

static inline float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

static inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

static inline float widen(float value) { return value; }
static inline double widen(double value) { return value; }
static inline float widen(bfloat16 value) { return bits_to_float(uint32_t(value.bits) << 16); }

static inline float widen(float16 value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16, rest = uint32_t(value.bits & 0x7fffu) << 13;
  // Shifting places the 5-bit exponent in the 8-bit field; 2^112 corrects the bias and normalises subnormals.
  if (rest >= 0x0f800000u) return bits_to_float(sign | 0x70000000u | rest);  // inf and NaN
  return bits_to_float(sign | float_to_bits(bits_to_float(rest) * bits_to_float(0x77800000u)));
}

static inline void narrow(float value, float& out) { out = value; }
static inline void narrow(double value, float& out) { out = float(value); }
static inline void narrow(double value, double& out) { out = value; }

// Round to nearest even; NaN stays NaN.
static inline void narrow(float value, bfloat16& out) {
  const uint32_t bits = float_to_bits(value);
  out.bits = value != value ? uint16_t((bits >> 16) | 0x40u) : uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline void narrow(float value, float16& out) {
  const uint32_t bits = float_to_bits(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;  // NaN
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00u;  // rounds to infinity
  } else if (magnitude < 0x38800000u) {
    // Subnormal result: adding 0.5 lets the FPU round at the last bit of a half (0.5 has ulp 2^-24).
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out.bits = uint16_t(sign | half);
}

// A double goes through float: both steps round to nearest, which differs from one rounding only in ties that
// need more than 24 bits to see.
static inline void narrow(double value, bfloat16& out) { narrow(float(value), out); }
static inline void narrow(double value, float16& out) { narrow(float(value), out); }

// One element of an array whose type is only known at run time; for per-row numbers, not for inner loops.
static inline double read_element(const void* data, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::float32:
      return static_cast<const float*>(data)[index];
    case DType::float64:
      return static_cast<const double*>(data)[index];
    case DType::bfloat16:
      return widen(static_cast<const bfloat16*>(data)[index]);
    case DType::float16:
      return widen(static_cast<const float16*>(data)[index]);
  }
  return 0;
}

static inline void write_element(void* data, DType dtype, int64_t index, double value) {
  switch (dtype) {
    case DType::float32:
      static_cast<float*>(data)[index] = float(value);
      break;
    case DType::float64:
      static_cast<double*>(data)[index] = value;
      break;
    case DType::bfloat16:
      narrow(value, static_cast<bfloat16*>(data)[index]);
      break;
    case DType::float16:
      narrow(value, static_cast<float16*>(data)[index]);
      break;
  }
}

}  // namespace pyops
