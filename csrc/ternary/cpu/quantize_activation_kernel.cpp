// Two passes over one token, which stays in the first-level cache between them: the largest magnitude, compared as
// integers (a NaN is larger than infinity there, where a maximum of floats would drop it), then the rounding.
#include "quantize_activation_kernel.h"

#include <float.h>

#include "../../common/simd.h"

namespace pyops::PYOPS_ISA {
namespace {

using Floats = Vector<float>;
using Integers = VectorTypes<float>::integer;
constexpr int kWidth = kLanes<float>;
constexpr int kUnroll = 4;
constexpr int32_t kMagnitude = 0x7fffffff, kInfinity = 0x7f800000;
// Adding 1.5 * 2^23 rounds a small float to an integer, ties to even, and leaves that in the low bits.
constexpr float kRounder = 12582912.0f;

PYOPS_INLINE Integers larger(Integers a, Integers b) { return a > b ? a : b; }

template <class T>
PYOPS_INLINE int32_t largest_magnitude(const T* x, int64_t n) {
  Integers best[kUnroll] = {};
  int64_t k = 0;
  for (; k + kUnroll * kWidth <= n; k += kUnroll * kWidth) {
    for (int u = 0; u < kUnroll; ++u) {
      best[u] = larger(best[u], reinterpret<Integers>(load(x + k + u * kWidth)) & kMagnitude);
    }
  }
  for (; k < n; k += kWidth) {
    const Floats v = n - k >= kWidth ? load(x + k) : load_partial(x + k, n - k, 0.0f);
    best[0] = larger(best[0], reinterpret<Integers>(v) & kMagnitude);
  }
  const Integers all = larger(larger(best[0], best[1]), larger(best[2], best[3]));
  int32_t found = all[0];
  for (int lane = 1; lane < kWidth; ++lane) found = all[lane] > found ? all[lane] : found;
  return found;
}

PYOPS_INLINE Integers rounded(Floats v, float scale) {
  Floats scaled = v * scale;
  scaled = scaled < 127.0f ? scaled : broadcast(127.0f);
  scaled = scaled > -128.0f ? scaled : broadcast(-128.0f);
  return reinterpret<Integers>(scaled + kRounder) - int32_t(0x4b400000);
}

PYOPS_INLINE void store_bytes(int8_t* q, Integers v) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(q), _mm512_maskz_cvtepi32_epi8(0xffff, reinterpret<__m512i>(v)));
#else
  typedef int8_t Bytes __attribute__((vector_size(kWidth)));
  const Bytes bytes = __builtin_convertvector(v, Bytes);
  __builtin_memcpy(q, &bytes, sizeof(bytes));
#endif
}

template <class T>
TokenScale quantize(const void* data, int64_t n, float qmax, float eps, int8_t* q) {
  const T* x = static_cast<const T*>(data);
  const int32_t magnitude = largest_magnitude(x, n);
  if (magnitude >= kInfinity) {
    __builtin_memset(q, 0, size_t(n));
    return {__builtin_nanf(""), 0};
  }
  const float absmax = bits_to_float(uint32_t(magnitude));
  const float largest = absmax < eps ? eps : absmax;
  float scale = qmax / largest;
  scale = scale < FLT_MAX ? scale : FLT_MAX;
  Integers sums[2] = {};
  int64_t k = 0;
  for (; k + 2 * kWidth <= n; k += 2 * kWidth) {
    for (int u = 0; u < 2; ++u) {
      const Integers v = rounded(load(x + k + u * kWidth), scale);
      sums[u] += v;
      store_bytes(q + k + u * kWidth, v);
    }
  }
  for (; k < n; k += kWidth) {
    const int64_t left = n - k;
    const Integers v = rounded(left >= kWidth ? load(x + k) : load_partial(x + k, left, 0.0f), scale);
    sums[0] += v;
    if (left >= kWidth) {
      store_bytes(q + k, v);
    } else {
      for (int64_t lane = 0; lane < left; ++lane) q[k + lane] = int8_t(v[lane]);
    }
  }
  const Integers all = sums[0] + sums[1];
  int32_t sum = 0;
  for (int lane = 0; lane < kWidth; ++lane) sum += all[lane];
  return {largest / qmax, sum};
}

}  // namespace

extern const QuantizeActivationKernels quantize_activation_kernels = {
    {&quantize<float>, nullptr, &quantize<bfloat16>, &quantize<float16>}};

}  // namespace pyops::PYOPS_ISA
