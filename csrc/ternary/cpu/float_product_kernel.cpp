// A tile of C stays in registers while it runs along the depth: kRows x 2 vectors of sums, two vectors of B, and one
// number of A at a time for all lanes. Panels make every access contiguous; ternary codes and integers become floats
// when B is packed, once per 12 rows or more of A.
#include "float_product_kernel.h"

#include <stddef.h>

#include <type_traits>

#include "../../common/simd.h"

namespace pyops::PYOPS_ISA {
namespace {

using Floats = Vector<float>;
using Integers = VectorTypes<float>::integer;
constexpr int kWidth = kLanes<float>;
constexpr int kColumns = 2 * kWidth;
#if defined(__AVX512F__)
constexpr int kRows = 12;  // 24 of 32 registers hold sums
#elif defined(__AVX2__)
constexpr int kRows = 6;  // 12 of 16
#else
constexpr int kRows = 4;
#endif

// ---- tiles ---------------------------------------------------------------------------------------------------

// Sums run over stretches of the depth, and then over the stretches: their error grows with the length of either only.
constexpr int64_t kStretch = 64;

template <int kTileRows>
void tile_of(const float* a, const float* b, int64_t depth, float* c, int64_t c_stride) {
  for (int64_t begin = 0; begin < depth; begin += kStretch) {
    const int64_t end = begin + kStretch < depth ? begin + kStretch : depth;
    Floats sums[kTileRows][2] = {};
    for (int64_t d = begin; d < end; ++d) {
      const Floats low = load(b + d * kColumns), high = load(b + d * kColumns + kWidth);
      for (int r = 0; r < kTileRows; ++r) {
        const float number = a[d * kTileRows + r];
        sums[r][0] += low * number;
        sums[r][1] += high * number;
      }
    }
    for (int r = 0; r < kTileRows; ++r) {
      for (int v = 0; v < 2; ++v) {
        float* out = c + r * c_stride + v * kWidth;
        store(out, load(out) + sums[r][v]);
      }
    }
  }
}

void tile(const float* a, const float* b, int64_t depth, int rows, float* c, int64_t c_stride) {
  using Tile = void (*)(const float*, const float*, int64_t, float*, int64_t);
#if defined(__AVX512F__)
  static constexpr Tile tiles[] = {tile_of<1>, tile_of<2>, tile_of<3>, tile_of<4>,  tile_of<5>,  tile_of<6>,
                                   tile_of<7>, tile_of<8>, tile_of<9>, tile_of<10>, tile_of<11>, tile_of<12>};
#elif defined(__AVX2__)
  static constexpr Tile tiles[] = {tile_of<1>, tile_of<2>, tile_of<3>, tile_of<4>, tile_of<5>, tile_of<6>};
#else
  static constexpr Tile tiles[] = {tile_of<1>, tile_of<2>, tile_of<3>, tile_of<4>};
#endif
  static_assert(sizeof(tiles) / sizeof(tiles[0]) == kRows);
  tiles[rows - 1](a, b, depth, c, c_stride);
}

// ---- panels of A -----------------------------------------------------------------------------------------------

template <class T>
void pack_along_depth(const void* data, int64_t stride, int rows, int64_t depth, const float* scale, float* a) {
  const T* x = static_cast<const T*>(data);
  constexpr int64_t kBlock = kWidth;
  int64_t d = 0;
  for (; d + kBlock <= depth; d += kBlock) {
    for (int r = 0; r < rows; ++r) {
      Floats v = load(x + r * stride + d);
      if (scale != nullptr) v *= load(scale + d);
      for (int lane = 0; lane < kBlock; ++lane) a[(d + lane) * rows + r] = v[lane];
    }
  }
  for (; d < depth; ++d) {
    for (int r = 0; r < rows; ++r) a[d * rows + r] = widen(x[r * stride + d]) * (scale != nullptr ? scale[d] : 1.0f);
  }
}

// Rows of a matrix of which only a narrow strip is read: hardware prefetchers do not follow the stride.
constexpr int64_t kRowsAhead = 16;

template <class T>
void pack_across_depth(const void* data, int64_t stride, int rows, int64_t depth, const float* scale, float* a) {
  const T* x = static_cast<const T*>(data);
  const auto pack = [=](auto rows) __attribute__((always_inline)) {
    for (int64_t d = 0; d < depth; ++d) {
      __builtin_prefetch(x + (d + kRowsAhead) * stride);
      const float factor = scale != nullptr ? scale[d] : 1.0f;
      for (int r = 0; r < rows; ++r) a[d * rows + r] = widen(x[d * stride + r]) * factor;
    }
  };
  if (rows == kRows) {
    pack(std::integral_constant<int, kRows>());
  } else {
    pack(rows);
  }
}

// ---- panels of B -----------------------------------------------------------------------------------------------

// The 16 weights of a word of t2, in the order of k.
PYOPS_INLINE void decode_word(uint32_t word, float* out) {
#if defined(__AVX512F__)
  // The permutation looks at four bits of each lane: the table repeats, so that the upper two do not matter.
  const __m512 table = _mm512_setr_ps(-1, 0, 1, 0, -1, 0, 1, 0, -1, 0, 1, 0, -1, 0, 1, 0);
  const __m512i shifts = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i fields = _mm512_maskz_srlv_epi32(0xffff, _mm512_set1_epi32(int(word)), shifts);
  _mm512_storeu_ps(out, _mm512_maskz_permutexvar_ps(0xffff, fields, table));
#elif defined(__AVX2__)
  const __m256 table = _mm256_setr_ps(-1, 0, 1, 0, -1, 0, 1, 0);  // three bits of each lane count
  const __m256i shifts = _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14);
  const __m256i low = _mm256_srlv_epi32(_mm256_set1_epi32(int(word)), shifts);
  const __m256i high = _mm256_srlv_epi32(_mm256_set1_epi32(int(word >> 16)), shifts);
  _mm256_storeu_ps(out, _mm256_permutevar8x32_ps(table, low));
  _mm256_storeu_ps(out + 8, _mm256_permutevar8x32_ps(table, high));
#else
  for (int i = 0; i < 16; ++i) out[i] = float(int(word >> 2 * i & 3) - 1);
#endif
}

void decode_rows(const uint8_t* rows, int64_t stride, int64_t bytes, int64_t depth, const float* gamma,
                 int64_t gamma_stride, float* b) {
  constexpr int64_t kBytes = kColumns / 4;
  constexpr int kWords = kColumns < 16 ? 1 : kColumns / 16;
  const size_t held = size_t(bytes < kBytes ? bytes : kBytes);
  for (int64_t d = 0; d < depth; ++d) {
    uint32_t words[kWords];
    __builtin_memset(words, 0x55, sizeof(words));  // weights of 0
    __builtin_memcpy(words, rows + d * stride, held);
    float wide[16 * kWords];
    for (int i = 0; i < kWords; ++i) decode_word(words[i], wide + 16 * i);
    for (int v = 0; v < 2; ++v) {
      Floats t = load(wide + v * kWidth);
      if (gamma != nullptr) t *= gamma[d * gamma_stride];
      store(b + d * kColumns + v * kWidth, t);
    }
  }
}

void decode_columns(const uint8_t* first, const uint8_t* second, int first_row, int64_t begin, int64_t depth,
                    float* b) {
  for (int v = 0; v < 2; ++v) {
    const int row = first_row + v * kWidth;
    const uint8_t* group = row < 16 ? first : second;
    for (int64_t d = 0; d < depth; ++d) {
      Floats t = {};
      if (group != nullptr) {
        const int64_t k = begin + d;
        VectorTypes<float>::bits words;
        __builtin_memcpy(&words, group + k / 4 * 64 + row % 16 * 4, sizeof(words));
        t = __builtin_convertvector(reinterpret<Integers>(words >> uint32_t(8 * (k % 4)) & 0xffu) - 1, Floats);
      }
      store(b + d * kColumns + v * kWidth, t);
    }
  }
}

void widen_rows(const int8_t* q, int64_t stride, int64_t count, int64_t depth, float* b) {
  typedef int8_t Bytes __attribute__((vector_size(kWidth)));
  for (int64_t d = 0; d < depth; ++d) {
    const int8_t* row = q + d * stride;
    __builtin_prefetch(row + kRowsAhead * stride);
    float* out = b + d * kColumns;
    if (count >= kColumns) {
      for (int v = 0; v < 2; ++v) {
        Bytes bytes;
        __builtin_memcpy(&bytes, row + v * kWidth, sizeof(bytes));
        store(out + v * kWidth, __builtin_convertvector(bytes, Floats));
      }
    } else {
      for (int64_t j = 0; j < kColumns; ++j) out[j] = j < count ? float(row[j]) : 0.0f;
    }
  }
}

// ---- out of the tile -------------------------------------------------------------------------------------------

template <class T>
void finish(const float* c, int64_t c_stride, const float* scale, const float* bias, int64_t rows, int64_t count,
            void* out, int64_t stride, bool past_caches) {
  T* y = static_cast<T*>(out);
  const auto value = [=](int64_t r, int64_t j) __attribute__((always_inline)) {
    Floats v = load(c + r * c_stride + j);
    if (scale != nullptr) v *= load(scale + j);
    return bias != nullptr ? v + load(bias + j) : v;
  };
  constexpr uintptr_t kStored = kWidth * sizeof(T);
  past_caches &= uintptr_t(out) % kStored == 0 && uintptr_t(stride) * sizeof(T) % kStored == 0;
  for (int64_t r = 0; r < rows; ++r, y += stride) {
    int64_t j = 0;
    if (past_caches) {
      for (; j + kWidth <= count; j += kWidth) store_nontemporal(y + j, value(r, j));
    } else {
      for (; j + kWidth <= count; j += kWidth) store(y + j, value(r, j));
    }
    for (; j < count; ++j) {
      const float v = c[r * c_stride + j] * (scale != nullptr ? scale[j] : 1.0f);
      narrow(bias != nullptr ? v + bias[j] : v, y[j]);
    }
  }
  if (past_caches) nontemporal_fence();
}

}  // namespace

extern const FloatProductKernels float_product_kernels = {
    kRows,
    kColumns,
    &tile,
    {&pack_along_depth<float>, nullptr, &pack_along_depth<bfloat16>, &pack_along_depth<float16>},
    {&pack_across_depth<float>, nullptr, &pack_across_depth<bfloat16>, &pack_across_depth<float16>},
    &decode_rows,
    &decode_columns,
    &widen_rows,
    {&finish<float>, nullptr, &finish<bfloat16>, &finish<float16>},
};

}  // namespace pyops::PYOPS_ISA
