// Vectors of the width of the ISA level that the including file is compiled for, on the compiler's vector
// extension: one source for SSE2, AVX2, AVX-512 and NEON. Include from *_kernel.cpp only.
//
// Everything has internal linkage: an inline function with external linkage compiled with AVX-512 flags could
// become the copy that the linker keeps for every level.
#pragma once

#include "dtype.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define PYOPS_INLINE static inline __attribute__((always_inline))

namespace pyops {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class Real>
struct VectorTypes;

template <>
struct VectorTypes<float> {
  static constexpr int lanes = kVectorBytes / 4;
  typedef float real __attribute__((vector_size(kVectorBytes)));
  typedef int32_t integer __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t bits __attribute__((vector_size(kVectorBytes)));
  typedef uint16_t half_bits __attribute__((vector_size(kVectorBytes / 2)));
};

template <>
struct VectorTypes<double> {
  static constexpr int lanes = kVectorBytes / 8;
  typedef double real __attribute__((vector_size(kVectorBytes)));
  typedef int64_t integer __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t bits __attribute__((vector_size(kVectorBytes)));
};

template <class Real>
using Vector = typename VectorTypes<Real>::real;
template <class Real>
using IntegerVector = typename VectorTypes<Real>::integer;
template <class T>
using AccumulationVector = Vector<typename Accumulation<T>::type>;
template <class T>
constexpr int kLanes = VectorTypes<typename Accumulation<T>::type>::lanes;

template <class Real>
PYOPS_INLINE Vector<Real> broadcast(Real value) {
  return Vector<Real>{} + value;
}

template <class To, class From>
PYOPS_INLINE To reinterpret(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

// ---- load and widen -------------------------------------------------------------------------------------

PYOPS_INLINE Vector<float> load(const float* p) {
  Vector<float> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

PYOPS_INLINE Vector<double> load(const double* p) {
  Vector<double> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

PYOPS_INLINE Vector<float> load(const bfloat16* p) {
  // The zero-masking forms below: the plain ones trip a false gcc 12 warning about an uninitialised pass-through.
#if defined(__AVX512F__)
  const __m512i wide = _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return reinterpret<Vector<float>>(_mm512_maskz_slli_epi32(0xffff, wide, 16));
#else
  using Types = VectorTypes<float>;
  Types::half_bits half;
  __builtin_memcpy(&half, p, sizeof(half));
  return reinterpret<Vector<float>>(__builtin_convertvector(half, Types::bits) << 16);
#endif
}

PYOPS_INLINE Vector<float> load(const float16* p) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vector<float> v;
  for (int lane = 0; lane < kLanes<float>; ++lane) v[lane] = widen(p[lane]);
  return v;
#endif
}

// Two vectors of elements, in whatever order costs least: for sums.
template <class T>
PYOPS_INLINE void load_pair(const T* p, AccumulationVector<T>& first, AccumulationVector<T>& second) {
  first = load(p);
  second = load(p + kLanes<T>);
}

PYOPS_INLINE void load_pair(const bfloat16* p, Vector<float>& even, Vector<float>& odd) {
  VectorTypes<float>::bits bits;
  __builtin_memcpy(&bits, p, sizeof(bits));
  even = reinterpret<Vector<float>>(bits << 16);
  odd = reinterpret<Vector<float>>(bits & 0xffff0000u);
}

// The first `count` lanes, the others `fill`; nothing beyond them is read. By a masked load where the ISA has one:
// rows of a few classes spend their time here.
template <class T>
PYOPS_INLINE AccumulationVector<T> load_partial(const T* p, int64_t count, typename Accumulation<T>::type fill) {
#if defined(__AVX512F__)
  const __mmask16 mask = __mmask16((1u << count) - 1);
  if constexpr (sizeof(T) == 8) {
    return _mm512_mask_loadu_pd(broadcast(fill), __mmask8(mask), p);
  } else if constexpr (sizeof(T) == 4) {
    return _mm512_mask_loadu_ps(broadcast(fill), mask, p);
  } else {
    alignas(32) T lanes[kLanes<T>];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), _mm256_maskz_loadu_epi16(mask, p));
    return _mm512_mask_mov_ps(broadcast(fill), mask, load(lanes));
  }
#else
  AccumulationVector<T> v = broadcast(fill);
  for (int64_t lane = 0; lane < count; ++lane) v[lane] = widen(p[lane]);
  return v;
#endif
}

// Half as many floats, as doubles.
PYOPS_INLINE Vector<double> load_double(const float* p) {
  typedef float Half __attribute__((vector_size(sizeof(Vector<double>) / 2)));
  Half half;
  __builtin_memcpy(&half, p, sizeof(half));
  return __builtin_convertvector(half, Vector<double>);
}

// ---- narrow and store -----------------------------------------------------------------------------------

// What a vector becomes in memory, so that ordinary and non-temporal stores share the rounding.
PYOPS_INLINE Vector<float> narrowed(Vector<float> v, const float*) { return v; }
PYOPS_INLINE Vector<double> narrowed(Vector<double> v, const double*) { return v; }

PYOPS_INLINE VectorTypes<float>::half_bits narrowed(Vector<float> v, const bfloat16*) {
  using Types = VectorTypes<float>;
  const auto bits = reinterpret<Types::bits>(v);
  const auto rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const auto quiet = (bits >> 16) | 0x40u;
#if defined(__AVX512F__)
  const auto chosen = reinterpret<__m512i>(v != v ? quiet : rounded);
  return reinterpret<Types::half_bits>(_mm512_maskz_cvtepi32_epi16(0xffff, chosen));
#else
  return __builtin_convertvector(v != v ? quiet : rounded, Types::half_bits);
#endif
}

PYOPS_INLINE VectorTypes<float>::half_bits narrowed(Vector<float> v, const float16*) {
  using Half = VectorTypes<float>::half_bits;
#if defined(__AVX512F__)
  return reinterpret<Half>(_mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  return reinterpret<Half>(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  Half half;
  for (int lane = 0; lane < kLanes<float>; ++lane) {
    float16 value;
    narrow(v[lane], value);
    half[lane] = value.bits;
  }
  return half;
#endif
}

template <class T, class V>
PYOPS_INLINE void store(T* p, V v) {
  const auto bits = narrowed(v, p);
  __builtin_memcpy(static_cast<void*>(p), &bits, sizeof(bits));
}

// Past the caches, without first reading the line that is overwritten. `p` is aligned to the stored size.
template <class T, class V>
PYOPS_INLINE void store_nontemporal(T* p, V v) {
  const auto bits = narrowed(v, p);
#if defined(__x86_64__)
  if constexpr (sizeof(bits) == 8) {
    long long word;
    __builtin_memcpy(&word, &bits, 8);
    _mm_stream_si64(reinterpret_cast<long long*>(p), word);
  } else if constexpr (sizeof(bits) == 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), reinterpret<__m128i>(bits));
  }
#if defined(__AVX2__)
  if constexpr (sizeof(bits) == 32) _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret<__m256i>(bits));
#endif
#if defined(__AVX512F__)
  if constexpr (sizeof(bits) == 64) _mm512_stream_si512(reinterpret_cast<__m512i*>(p), reinterpret<__m512i>(bits));
#endif
#else
  __builtin_memcpy(static_cast<void*>(p), &bits, sizeof(bits));
#endif
}

PYOPS_INLINE void nontemporal_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// ---- arithmetic -----------------------------------------------------------------------------------------

// A NaN in `value` is passed over: callers see it in the sum that they also take.
PYOPS_INLINE Vector<float> maximum(Vector<float> best, Vector<float> value) {
#if defined(__AVX512F__)
  return _mm512_maskz_max_ps(0xffff, value, best);  // of a NaN and a number the second operand
#else
  return value > best ? value : best;
#endif
}

PYOPS_INLINE Vector<double> maximum(Vector<double> best, Vector<double> value) {
#if defined(__AVX512F__)
  return _mm512_maskz_max_pd(0xff, value, best);
#else
  return value > best ? value : best;
#endif
}

// Asks for memory that a streaming pass will reach kPrefetchBytes later. Hardware prefetchers stop at 4 KiB page
// borders; this carries over them: 13.4 -> 15.1 GB/s for a one-thread read pass on a Sapphire Rapids core (15.6
// GB/s with huge pages, which is what the core can take).
constexpr int64_t kPrefetchBytes = 4096;
template <class T>
PYOPS_INLINE void prefetch_ahead(const T* p) {
  __builtin_prefetch(reinterpret_cast<const char*>(p) + kPrefetchBytes);
}

template <class Real>
PYOPS_INLINE double sum_lanes(Vector<Real> v) {
  double sum = 0;
  for (int lane = 0; lane < VectorTypes<Real>::lanes; ++lane) sum += v[lane];
  return sum;
}

// Sums of vectors, lane by lane, in double.
struct WideSum {
  Vector<double> low, high;
};

PYOPS_INLINE void add(WideSum& sum, Vector<double> v) { sum.low += v; }

PYOPS_INLINE void add(WideSum& sum, Vector<float> v) {
  typedef float Half __attribute__((vector_size(sizeof(v) / 2)));
  Half halves[2];
  __builtin_memcpy(halves, &v, sizeof(v));
  sum.low += __builtin_convertvector(halves[0], Vector<double>);
  sum.high += __builtin_convertvector(halves[1], Vector<double>);
}

PYOPS_INLINE double sum_lanes(const WideSum& sum) { return sum_lanes<double>(sum.low + sum.high); }

template <class Real>
PYOPS_INLINE Real maximum_lane(Vector<Real> v) {
  Real best = v[0];
  for (int lane = 1; lane < VectorTypes<Real>::lanes; ++lane) best = v[lane] > best ? v[lane] : best;
  return best;
}

// out[i] = f(x[i], w[i]) over n elements; w may be null (f then gets zeros). In place (out == x) is allowed.
template <class T, class Function>
PYOPS_INLINE void stream(const T* x, const typename Accumulation<T>::type* w, T* out, int64_t n, bool nontemporal,
                         Function f) {
  using Real = typename Accumulation<T>::type;
  constexpr int lanes = kLanes<T>;
  const auto partial = [&](int64_t begin, int64_t count) {
    const auto second = w ? load_partial(w + begin, count, Real(0)) : broadcast(Real(0));
    const auto result = f(load_partial(x + begin, count, Real(0)), second);
    for (int64_t lane = 0; lane < count; ++lane) narrow(Real(result[lane]), out[begin + lane]);
  };
  const auto second = [&](int64_t i) { return w ? load(w + i) : broadcast(Real(0)); };
  int64_t i = 0;
  if (nontemporal) {
    constexpr uintptr_t stored = lanes * sizeof(T);
    const uintptr_t misaligned = reinterpret_cast<uintptr_t>(out) % stored;
    if (misaligned % sizeof(T) == 0 && n >= 2 * lanes) {
      if (misaligned) {
        i = int64_t((stored - misaligned) / sizeof(T));
        partial(0, i);
      }
      for (; i + lanes <= n; i += lanes) {
        prefetch_ahead(x + i);
        store_nontemporal(out + i, f(load(x + i), second(i)));
      }
      nontemporal_fence();
    }
  }
  for (; i + lanes <= n; i += lanes) {
    prefetch_ahead(x + i);
    store(out + i, f(load(x + i), second(i)));
  }
  if (i < n) partial(i, n - i);
}

}  // namespace
}  // namespace pyops
