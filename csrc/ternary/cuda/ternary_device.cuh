// What the kernels of the family share: grids, eight elements at any alignment, reductions over a block.
#pragma once

#include <math.h>

#include "../../device/pyops_device.h"
#include "../ternary_format.h"

namespace pyops {
namespace {

constexpr int64_t kLargestGrid = (int64_t(1) << 31) - 1;
constexpr uint32_t kMagnitude = 0x7fffffffu, kInfinity = 0x7f800000u;

// Runs launch(first, blocks) for slices of a count that fit grid.x; stops at the first error.
template <class Launch>
int for_each_grid(int64_t count, const Launch& launch) {
  for (int64_t first = 0; first < count; first += kLargestGrid) {
    const int64_t left = count - first;
    const int error = launch(first, unsigned(left < kLargestGrid ? left : kLargestGrid));
    if (error) return error;
  }
  return 0;
}

// Calls f with a value of the element type that `dtype` names; the family has no float64.
template <class Function>
int with_element_type(DType dtype, const Function& f) {
  if (dtype == DType::bfloat16) return f(bfloat16());
  if (dtype == DType::float16) return f(float16());
  return f(float());
}

PYOPS_DEVICE bool is_aligned(const void* address, int bytes) {
  return (reinterpret_cast<uintptr_t>(address) & uintptr_t(bytes - 1)) == 0;
}

// ---- 16 bytes of elements, as a thread of an elementwise pass takes them: neighbours touch neighbouring sectors
// -------

// p[0, valid), zeros behind; nothing beyond is read.
template <class T>
PYOPS_DEVICE dev::Bits128 load_vector(const T* p, int64_t valid) {
  constexpr int width = dev::kVectorElements<T>;
  if (valid >= width && is_aligned(p, 16)) return dev::ldg128(p);
  T elements[width];
#pragma unroll
  for (int i = 0; i < width; ++i) elements[i] = i < valid ? p[i] : T{};
  dev::Bits128 bits;
  memcpy(&bits, elements, 16);
  return bits;
}

template <class T>
PYOPS_DEVICE void widen_vector(const dev::Bits128& bits, float (&values)[dev::kVectorElements<T>]) {
  dev::unpack(bits, values, static_cast<const T*>(nullptr));
}

// The larger of `largest` and the magnitudes, as bits, whose order is that of the numbers; NaN above infinity.
template <class T>
PYOPS_DEVICE uint32_t largest_magnitude(const dev::Bits128& bits, uint32_t largest) {
  float values[dev::kVectorElements<T>];
  widen_vector<T>(bits, values);
#pragma unroll
  for (int i = 0; i < dev::kVectorElements<T>; ++i) {
    const uint32_t magnitude = __float_as_uint(values[i]) & kMagnitude;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

// The low bytes of `bits`, of which `valid` have a place.
template <class Word>
PYOPS_DEVICE void store_bytes(Word bits, void* out, int64_t valid) {
  if (valid >= int64_t(sizeof(Word)) && is_aligned(out, sizeof(Word))) {
    *static_cast<Word*>(out) = bits;
  } else {
#pragma unroll
    for (int i = 0; i < int(sizeof(Word)); ++i) {
      if (i < valid) static_cast<uint8_t*>(out)[i] = uint8_t(bits >> 8 * i);
    }
  }
}

// ---- eight elements -------------------------------------------------------------------------------------

template <class T>
struct Eight {
  dev::Bits128 part[sizeof(T) / 2];
};

// p[0, valid), zeros behind; nothing beyond is read.
template <class T>
PYOPS_DEVICE Eight<T> load_eight(const T* p, int64_t valid) {
  Eight<T> eight;
  if (valid >= 8 && is_aligned(p, 16)) {
#pragma unroll
    for (int i = 0; i < int(sizeof(T) / 2); ++i) eight.part[i] = dev::ldg128(p + i * dev::kVectorElements<T>);
  } else {
    T elements[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) elements[i] = i < valid ? p[i] : T{};
    memcpy(&eight, elements, sizeof(eight));
  }
  return eight;
}

// Eight elements on a 16-byte boundary, or zeros.
template <class T>
PYOPS_DEVICE Eight<T> load_whole_eight(const T* p, bool exist) {
  Eight<T> eight = {};
  if (exist) {
#pragma unroll
    for (int i = 0; i < int(sizeof(T) / 2); ++i) eight.part[i] = dev::ldg128(p + i * dev::kVectorElements<T>);
  }
  return eight;
}

template <class T>
PYOPS_DEVICE void widen_eight(const Eight<T>& eight, float (&values)[8]) {
  dev::unpack(eight.part[0], values, static_cast<const T*>(nullptr));
}
PYOPS_DEVICE void widen_eight(const Eight<float>& eight, float (&values)[8]) { memcpy(values, &eight, 32); }

// Eight results in a run-time dtype: wide where the address allows it; only `valid` of them exist.
template <class T>
PYOPS_DEVICE void store_eight_as(const float (&values)[8], T* out, int64_t valid) {
  if (valid >= 8 && is_aligned(out, 16)) {
    constexpr int width = dev::kVectorElements<T>;
#pragma unroll
    for (int i = 0; i < 8; i += width) {
      float part[width];
#pragma unroll
      for (int j = 0; j < width; ++j) part[j] = values[i + j];
      dev::Bits128 bits;
      dev::pack(part, bits, out);
      dev::stg128(out + i, bits);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < valid) dev::narrow(values[i], out[i]);
    }
  }
}

PYOPS_DEVICE void store_eight(const float (&values)[8], void* out, DType dtype, int64_t at, int64_t valid) {
  if (dtype == DType::bfloat16) {
    store_eight_as(values, static_cast<bfloat16*>(out) + at, valid);
  } else if (dtype == DType::float16) {
    store_eight_as(values, static_cast<float16*>(out) + at, valid);
  } else {
    store_eight_as(values, static_cast<float*>(out) + at, valid);
  }
}

// The same the other way, zeros where nothing is valid.
PYOPS_DEVICE void load_eight_from(const void* data, DType dtype, int64_t at, int64_t valid, float (&values)[8]) {
  if (dtype == DType::bfloat16) {
    widen_eight(load_eight(static_cast<const bfloat16*>(data) + at, valid), values);
  } else if (dtype == DType::float16) {
    widen_eight(load_eight(static_cast<const float16*>(data) + at, valid), values);
  } else {
    widen_eight(load_eight(static_cast<const float*>(data) + at, valid), values);
  }
}

PYOPS_DEVICE float load_element(const void* data, DType dtype, int64_t at) {
  if (dtype == DType::bfloat16) return dev::widen(static_cast<const bfloat16*>(data)[at]);
  if (dtype == DType::float16) return dev::widen(static_cast<const float16*>(data)[at]);
  return static_cast<const float*>(data)[at];
}

// ---- reductions over a block ----------------------------------------------------------------------------

struct Larger {
  template <class V>
  PYOPS_DEVICE V operator()(V a, V b) const {
    return a > b ? a : b;
  }
};
struct Sum {
  template <class V>
  PYOPS_DEVICE V operator()(V a, V b) const {
    return a + b;
  }
};

// The same value in every thread. `scratch` holds a value per warp and is free again after the next barrier.
template <class V, class Combine>
PYOPS_DEVICE V reduce_block(V value, V* scratch, const Combine& combine) {
#pragma unroll
  for (int lanes = 16; lanes; lanes /= 2) value = combine(value, __shfl_xor_sync(dev::kFullWarp, value, lanes));
  if (dev::lane() == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  value = scratch[0];
  for (int warp = 1; warp < int(blockDim.x / 32); ++warp) value = combine(value, scratch[warp]);
  return value;
}

}  // namespace
}  // namespace pyops
