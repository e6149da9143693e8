// The passes behind a ternary weight. The mean is one pass that sums in double. The lower median is one pass too: the
// front brackets it from a sample, the pass counts what lies below the bracket and collects what lies inside, a few
// per cent, and the answer is selected from that. Magnitudes are compared as integers, whose order is that of floats.
#include "quantize_weight_kernel.h"

#include "../../common/simd.h"

namespace pyops::PYOPS_ISA {
namespace {

using Floats = Vector<float>;
using Integers = VectorTypes<float>::integer;
constexpr int kWidth = kLanes<float>;
constexpr int32_t kMagnitude = 0x7fffffff;

PYOPS_INLINE Integers magnitude(Floats v) { return reinterpret<Integers>(v) & kMagnitude; }
PYOPS_INLINE Integers larger(Integers a, Integers b) { return a > b ? a : b; }

PYOPS_INLINE int32_t largest_lane(Integers v) {
  int32_t found = v[0];
  for (int lane = 1; lane < kWidth; ++lane) found = v[lane] > found ? v[lane] : found;
  return found;
}

template <class T>
double sum(const void* data, int64_t n) {
  const T* w = static_cast<const T*>(data);
  WideSum sums[4] = {};
  int64_t k = 0;
  for (; k + 4 * kWidth <= n; k += 4 * kWidth) {
    for (int u = 0; u < 4; u += 2) {
      prefetch_ahead(w + k + u * kWidth);
      if constexpr (sizeof(T) >= 4) prefetch_ahead(w + k + (u + 1) * kWidth);
      Floats first, second;
      load_pair(w + k + u * kWidth, first, second);
      add(sums[u], reinterpret<Floats>(magnitude(first)));
      add(sums[u + 1], reinterpret<Floats>(magnitude(second)));
    }
  }
  for (; k < n; k += kWidth) {
    const Floats v = n - k >= kWidth ? load(w + k) : load_partial(w + k, n - k, 0.0f);
    add(sums[0], reinterpret<Floats>(magnitude(v)));
  }
  return sum_lanes(sums[0]) + sum_lanes(sums[1]) + sum_lanes(sums[2]) + sum_lanes(sums[3]);
}

template <class T>
int32_t magnitudes(const void* data, int64_t n, int32_t* out) {
  const T* w = static_cast<const T*>(data);
  Integers best = {};
  int64_t k = 0;
  for (; k + kWidth <= n; k += kWidth) {
    const Integers bits = magnitude(load(w + k));
    best = larger(best, bits);
    __builtin_memcpy(out + k, &bits, sizeof(bits));
  }
  int32_t largest = largest_lane(best);
  for (; k < n; ++k) {
    out[k] = int32_t(float_to_bits(widen(w[k]))) & kMagnitude;
    largest = out[k] > largest ? out[k] : largest;
  }
  return largest;
}

#if defined(__AVX512F__)
template <class T>
MagnitudeCount collect(const void* data, int64_t n, int32_t low, int32_t high, int32_t* out, int64_t room,
                       int32_t& largest) {
  const T* w = static_cast<const T*>(data);
  const __m512i lows = _mm512_set1_epi32(low), span = _mm512_set1_epi32(high - low);
  __m512i best = _mm512_setzero_si512();
  int64_t below = 0, total = 0;
  const auto take = [&](__m512i bits, __mmask16 valid) {
    best = _mm512_mask_max_epi32(best, valid, best, bits);
    below += __builtin_popcount(unsigned(_mm512_mask_cmplt_epi32_mask(valid, bits, lows)));
    const __mmask16 inside = _mm512_mask_cmple_epu32_mask(valid, _mm512_sub_epi32(bits, lows), span);
    if (total + kWidth <= room) {
      // Compressing in the register and storing it whole: the compressing store is microcode on some processors.
      _mm512_storeu_si512(out + total, _mm512_maskz_compress_epi32(inside, bits));
    }
    total += __builtin_popcount(unsigned(inside));
  };
  int64_t k = 0;
  for (; k + kWidth <= n; k += kWidth) {
    prefetch_ahead(w + k);
    take(reinterpret<__m512i>(magnitude(load(w + k))), 0xffff);
  }
  if (k < n) {
    take(reinterpret<__m512i>(magnitude(load_partial(w + k, n - k, 0.0f))), __mmask16((1u << (n - k)) - 1));
  }
  const int32_t found = largest_lane(reinterpret<Integers>(best));
  largest = found > largest ? found : largest;
  return {below, total + kWidth <= room ? total : -1, total};
}
#else
template <class T>
MagnitudeCount collect(const void* data, int64_t n, int32_t low, int32_t high, int32_t* out, int64_t room,
                       int32_t& largest) {
  const T* w = static_cast<const T*>(data);
  int64_t below = 0, total = 0;
  constexpr int kBlock = 64;
  int32_t bits[kBlock];
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int size = int(n - begin < kBlock ? n - begin : kBlock);
    const int32_t found = magnitudes<T>(w + begin, size, bits);
    largest = found > largest ? found : largest;
    for (int k = 0; k < size; ++k) {
      below += bits[k] < low;
      const bool inside = uint32_t(bits[k]) - uint32_t(low) <= uint32_t(high) - uint32_t(low);
      if (total < room) out[total] = bits[k];  // overwritten by the next one unless it is inside
      total += inside;
    }
  }
  return {below, total < room ? total : -1, total};
}
#endif

// How many of n magnitudes are at most `bound`.
PYOPS_INLINE int64_t count_up_to(const int32_t* values, int64_t n, int32_t bound) {
  Integers counts[2] = {};
  int64_t k = 0;
  for (; k + 2 * kWidth <= n; k += 2 * kWidth) {
    Integers first, second;
    __builtin_memcpy(&first, values + k, sizeof(first));
    __builtin_memcpy(&second, values + k + kWidth, sizeof(second));
    counts[0] += first <= bound;  // -1 where true
    counts[1] += second <= bound;
  }
  int64_t found = 0;
  const Integers all = counts[0] + counts[1];
  for (int lane = 0; lane < kWidth; ++lane) found -= all[lane];
  for (; k < n; ++k) found += values[k] <= bound;
  return found;
}

int32_t select(const int32_t* values, int64_t n, int64_t rank) {
  constexpr int64_t kChunk = int64_t(1) << 30;  // lanes count in 32 bits
  int32_t low = 0, high = kMagnitude;
  while (low < high) {
    const int32_t middle = low + (high - low) / 2;
    int64_t count = 0;
    for (int64_t begin = 0; begin < n; begin += kChunk) {
      count += count_up_to(values + begin, n - begin < kChunk ? n - begin : kChunk, middle);
    }
    if (count > rank) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// Bits of `mask` in the even places of a word.
PYOPS_INLINE uint32_t spread(uint32_t mask) {
#if defined(__BMI2__)
  return _pdep_u32(mask, 0x55555555u);
#else
  mask = (mask | mask << 8) & 0x00ff00ffu;
  mask = (mask | mask << 4) & 0x0f0f0f0fu;
  mask = (mask | mask << 2) & 0x33333333u;
  return (mask | mask << 1) & 0x55555555u;
#endif
}

// Which lanes are above a half and which below minus a half, after scaling.
struct Signs {
  uint32_t above, below;
};

PYOPS_INLINE Signs signs(Floats v, float inverse) {
  const Floats scaled = v * inverse;
#if defined(__AVX512F__)
  const __m512 half = _mm512_set1_ps(0.5f);
  return {_mm512_cmp_ps_mask(scaled, half, _CMP_GT_OQ), _mm512_cmp_ps_mask(scaled, _mm512_set1_ps(-0.5f), _CMP_LT_OQ)};
#elif defined(__AVX2__)
  return {uint32_t(_mm256_movemask_ps(reinterpret<__m256>(scaled > 0.5f))),
          uint32_t(_mm256_movemask_ps(reinterpret<__m256>(scaled < -0.5f)))};
#else
  const Integers above = scaled > 0.5f, below = scaled < -0.5f;
  Signs found{0, 0};
  for (int lane = 0; lane < kWidth; ++lane) {
    found.above |= uint32_t(above[lane] & 1) << lane;
    found.below |= uint32_t(below[lane] & 1) << lane;
  }
  return found;
#endif
}

// Two bits per lane: 2 above, 0 below, 1 otherwise.
PYOPS_INLINE uint32_t codes(Signs s) {
  return spread(s.above) << 1 | spread(~(s.above | s.below) & ((1u << kWidth) - 1));
}

template <class T>
int32_t encode(const void* data, int64_t n, float inverse, uint8_t* out) {
  const T* w = static_cast<const T*>(data);
  constexpr int bytes = kWidth / 4;
  Integers largest = {};
  int64_t k = 0;
  for (; k + kWidth <= n; k += kWidth) {
    prefetch_ahead(w + k);
    const Floats v = load(w + k);
    largest = larger(largest, magnitude(v));
    const uint32_t word = codes(signs(v, inverse));
    __builtin_memcpy(out + k / 4, &word, bytes);
  }
  if (k < n) {
    const Floats v = load_partial(w + k, n - k, 0.0f);
    largest = larger(largest, magnitude(v));
    const uint32_t word = codes(signs(v, inverse));
    __builtin_memcpy(out + k / 4, &word, size_t(n - k + 3) / 4);
  }
  return largest_lane(largest);
}

}  // namespace

extern const QuantizeWeightKernels quantize_weight_kernels = {
    {&sum<float>, nullptr, &sum<bfloat16>, &sum<float16>},
    {&magnitudes<float>, nullptr, &magnitudes<bfloat16>, &magnitudes<float16>},
    {&collect<float>, nullptr, &collect<bfloat16>, &collect<float16>},
    &select,
    {&encode<float>, nullptr, &encode<bfloat16>, &encode<float16>},
};

}  // namespace pyops::PYOPS_ISA
