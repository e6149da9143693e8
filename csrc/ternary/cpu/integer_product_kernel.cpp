// How the codes {0, 1, 2} meet 8-bit activations at each level.
//
// A vector of codes holds 4 k of each of its rows, one row per 32-bit lane, and is multiplied with 4 activations that
// are broadcast to all lanes: no sum ever runs across lanes. With a dot instruction (VNNI) lanes accumulate in 32 bits.
// Without one, products are added in pairs to 16 bits: a pair is at most 2 * 2 * 128, so that 64 of them fit, after
// which they are widened (kSteps16).
//
// The four fields of a line need no shift where accumulators are plenty (AVX-512 VNNI, GEMV): each keeps its factor
// 1, 4, 16 or 64, and its sum is shifted back once, exactly.
#include "integer_product_kernel.h"

#include "../../common/simd.h"

namespace pyops::PYOPS_ISA {
namespace {

PYOPS_INLINE int32_t load_word(const int8_t* p) {
  int32_t word;
  __builtin_memcpy(&word, p, 4);
  return word;
}

// Weights that are used once come at the speed of memory only if they are asked for early, into the second-level cache,
// and a little later into the first. Cold t2 at 4096 x 14336 on a Sapphire Rapids core, of what a plain reading loop
// with prefetch gets: 0.86 with the first request alone (0.81 where that goes into the first level), 0.90 with both
// (0.88 and 0.89 where the second is for 512 and 1024 bytes ahead).
PYOPS_INLINE void prefetch_weights(const uint8_t* line) {
  __builtin_prefetch(line + 8192, 0, 2);
  __builtin_prefetch(line + 2048, 0, 3);
}

// ---- the vector of a level ---------------------------------------------------------------------------------

#if defined(__AVX512BW__)
#define PYOPS_HAS_DOT 1
using Codes = __m512i;
constexpr int kVectorRows = 16;
constexpr int kTileTokens = 12;
PYOPS_INLINE Codes load_codes(const uint8_t* p) { return _mm512_loadu_si512(p); }
PYOPS_INLINE void store_codes(uint8_t* p, Codes v) { _mm512_storeu_si512(p, v); }
PYOPS_INLINE Codes broadcast_word(int32_t word) { return _mm512_set1_epi32(word); }
PYOPS_INLINE Codes both(Codes a, Codes b) { return _mm512_and_si512(a, b); }
PYOPS_INLINE Codes add32(Codes a, Codes b) { return _mm512_add_epi32(a, b); }
template <int kBits>
PYOPS_INLINE Codes shifted_right(Codes v) {
  return _mm512_maskz_srli_epi32(0xffff, v, kBits);  // the plain form trips a false gcc 12 warning
}
PYOPS_INLINE Codes load_sums(const int32_t* p) { return _mm512_loadu_si512(p); }
PYOPS_INLINE void store_sums(int32_t* p, Codes v) { _mm512_storeu_si512(p, v); }
#if defined(__AVX512VNNI__)
constexpr bool kDot = true;
PYOPS_INLINE Codes accumulate(Codes sums, Codes codes, Codes q) { return _mm512_dpbusd_epi32(sums, codes, q); }
PYOPS_INLINE Codes widened(Codes sums) { return sums; }
#else
constexpr bool kDot = false;
PYOPS_INLINE Codes accumulate(Codes sums, Codes codes, Codes q) {
  return _mm512_add_epi16(sums, _mm512_maddubs_epi16(codes, q));
}
PYOPS_INLINE Codes widened(Codes sums) { return _mm512_madd_epi16(sums, _mm512_set1_epi16(1)); }
#endif

#elif defined(__AVX2__)
#define PYOPS_HAS_DOT 1
using Codes = __m256i;
constexpr int kVectorRows = 8;
constexpr int kTileTokens = 6;  // 12 of 16 registers hold sums
PYOPS_INLINE Codes load_codes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
PYOPS_INLINE void store_codes(uint8_t* p, Codes v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
PYOPS_INLINE Codes broadcast_word(int32_t word) { return _mm256_set1_epi32(word); }
PYOPS_INLINE Codes both(Codes a, Codes b) { return _mm256_and_si256(a, b); }
PYOPS_INLINE Codes add32(Codes a, Codes b) { return _mm256_add_epi32(a, b); }
template <int kBits>
PYOPS_INLINE Codes shifted_right(Codes v) {
  return _mm256_srli_epi32(v, kBits);
}
PYOPS_INLINE Codes load_sums(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
PYOPS_INLINE void store_sums(int32_t* p, Codes v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
#if defined(__AVXVNNI__)
constexpr bool kDot = true;
PYOPS_INLINE Codes accumulate(Codes sums, Codes codes, Codes q) { return _mm256_dpbusd_avx_epi32(sums, codes, q); }
PYOPS_INLINE Codes widened(Codes sums) { return sums; }
#else
constexpr bool kDot = false;
PYOPS_INLINE Codes accumulate(Codes sums, Codes codes, Codes q) {
  return _mm256_add_epi16(sums, _mm256_maddubs_epi16(codes, q));
}
PYOPS_INLINE Codes widened(Codes sums) { return _mm256_madd_epi16(sums, _mm256_set1_epi16(1)); }
#endif
#endif

// The code of field j of a line, in every byte.
#if defined(PYOPS_HAS_DOT)
template <int kField>
PYOPS_INLINE Codes field(Codes line) {
  const Codes mask = broadcast_word(0x03030303);
  if constexpr (kField == 0) return both(line, mask);
  return both(shifted_right<2 * kField>(line), mask);
}

constexpr int kGroupVectors = kGroupRows / kVectorRows;
constexpr int64_t kSteps16 = 64;

// ---- a row group times a few tokens --------------------------------------------------------------------------

template <int kTokens>
PYOPS_INLINE void gemv_lines(const uint8_t* lines, int64_t chunks, const int8_t* q, int64_t q_stride, int32_t* acc) {
  // A chunk adds 4 products of pairs to a lane.
  constexpr int64_t kBlock = kDot ? int64_t(1) << 30 : kSteps16 / 4;
  for (int64_t begin = 0; begin < chunks; begin += kBlock) {
    const int64_t end = chunks - begin < kBlock ? chunks : begin + kBlock;
    Codes sums[kTokens][kGroupVectors] = {};
    for (int64_t c = begin; c < end; ++c) {
      prefetch_weights(lines + c * kLineBytes);
      for (int v = 0; v < kGroupVectors; ++v) {
        const Codes line = load_codes(lines + c * kLineBytes + v * sizeof(Codes));
        const Codes fields[4] = {field<0>(line), field<1>(line), field<2>(line), field<3>(line)};
        for (int j = 0; j < 4; ++j) {
          for (int t = 0; t < kTokens; ++t) {
            const Codes word = broadcast_word(load_word(q + t * q_stride + 16 * c + 4 * j));
            sums[t][v] = accumulate(sums[t][v], fields[j], word);
          }
        }
      }
    }
    for (int t = 0; t < kTokens; ++t) {
      for (int v = 0; v < kGroupVectors; ++v) {
        int32_t* at = acc + t * kUnitRows + v * kVectorRows;
        store_sums(at, add32(load_sums(at), widened(sums[t][v])));
      }
    }
  }
}
#endif

#if defined(__AVX512VNNI__)
// Sums of fields with factors 1, 4, 16, 64, one row per lane, added up without the factors.
PYOPS_INLINE __m512i without_factors(const __m512i (&sums)[4]) {
  const __m512i low = _mm512_add_epi32(sums[0], _mm512_maskz_srai_epi32(0xffff, sums[1], 2));
  return _mm512_add_epi32(
      low, _mm512_add_epi32(_mm512_maskz_srai_epi32(0xffff, sums[2], 4), _mm512_maskz_srai_epi32(0xffff, sums[3], 6)));
}

PYOPS_INLINE int32_t sum_of_lanes(__m512i v) {
  __m256i halves[2];  // by memory: the intrinsic trips a false gcc 12 warning
  _mm512_storeu_si512(halves, v);
  const __m256i half = _mm256_add_epi32(halves[0], halves[1]);
  const __m128i quarter = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  const __m128i pair = _mm_add_epi32(quarter, _mm_unpackhi_epi64(quarter, quarter));
  return _mm_cvtsi128_si32(pair) + _mm_extract_epi32(pair, 1);
}

PYOPS_INLINE void add_to(int32_t* acc, __m512i sums) {
  _mm512_storeu_si512(acc, _mm512_add_epi32(_mm512_loadu_si512(acc), sums));
}

// A factor of 64 leaves 31 - 6 - 1 - 7 bits for the number of terms.
constexpr int64_t kBlockChunks = 4096;

template <int kTokens>
PYOPS_INLINE void gemv_t2_dot(const uint8_t* lines, int64_t chunks, const int8_t* q, int64_t q_stride, int32_t* acc) {
  constexpr int kUnroll = kTokens == 1 ? 2 : 1;  // sums in flight: a dot instruction takes 4 or 5 cycles
  const __m512i masks[4] = {_mm512_set1_epi8(0x03), _mm512_set1_epi8(0x0c), _mm512_set1_epi8(0x30),
                            _mm512_set1_epi8(char(0xc0))};
  for (int64_t begin = 0; begin < chunks; begin += kBlockChunks) {
    const int64_t end = chunks - begin < kBlockChunks ? chunks : begin + kBlockChunks;
    __m512i sums[kUnroll][kTokens][4] = {};
    const auto chunk = [&](int64_t c, int u) __attribute__((always_inline)) {
      prefetch_weights(lines + c * kLineBytes);
      const __m512i line = _mm512_loadu_si512(lines + c * kLineBytes);
      for (int j = 0; j < 4; ++j) {
        const __m512i codes = _mm512_and_si512(line, masks[j]);
        for (int t = 0; t < kTokens; ++t) {
          const __m512i word = _mm512_set1_epi32(load_word(q + t * q_stride + 16 * c + 4 * j));
          sums[u][t][j] = _mm512_dpbusd_epi32(sums[u][t][j], codes, word);
        }
      }
    };
    int64_t c = begin;
    for (; c + kUnroll <= end; c += kUnroll) {
      for (int u = 0; u < kUnroll; ++u) chunk(c + u, u);
    }
    if (c < end) chunk(c, 0);
    for (int u = 0; u < kUnroll; ++u) {
      for (int t = 0; t < kTokens; ++t) add_to(acc + t * kUnitRows, without_factors(sums[u][t]));
    }
  }
}

// The lower four trits of a byte below 81 as four 2-bit fields.
struct TritTable {
  alignas(64) uint8_t fields[128];
  constexpr TritTable() : fields() {
    for (int v = 0; v < 81; ++v) {
      fields[v] = uint8_t(v % 3 | v / 3 % 3 << 2 | v / 9 % 3 << 4 | v / 27 % 3 << 6);
    }
  }
};
constexpr TritTable kTrits;

// Bytes of five trits: a line of t2x16 with the lower four, and what is left of the byte without the fifth.
PYOPS_INLINE __m512i lower_trits(__m512i byte, __m512i& rest) {
  const __m512i low = _mm512_load_si512(kTrits.fields), high = _mm512_load_si512(kTrits.fields + 64);
  const __m512i top = _mm512_set1_epi8(81);
  // A subtraction that wraps is larger than what it came from: the minimum takes 81 off where it can, twice.
  rest = _mm512_min_epu8(byte, _mm512_sub_epi8(byte, top));
  rest = _mm512_min_epu8(rest, _mm512_sub_epi8(rest, top));
  return _mm512_permutex2var_epi8(low, rest, high);
}

template <int kTokens>
PYOPS_INLINE void gemv_t5_dot(const uint8_t* lines, int64_t chunks, const int8_t* q, int64_t q_stride, int32_t* acc) {
  constexpr int kUnroll = kTokens == 1 ? 2 : 1;
  const __m512i masks[4] = {_mm512_set1_epi8(0x03), _mm512_set1_epi8(0x0c), _mm512_set1_epi8(0x30),
                            _mm512_set1_epi8(char(0xc0))};
  for (int64_t begin = 0; begin < chunks; begin += kBlockChunks) {
    const int64_t end = chunks - begin < kBlockChunks ? chunks : begin + kBlockChunks;
    __m512i sums[kUnroll][kTokens][4] = {}, fifth[kUnroll][kTokens] = {};
    const auto chunk = [&](int64_t c, int u) __attribute__((always_inline)) {
      prefetch_weights(lines + c * kLineBytes);
      const __m512i byte = _mm512_loadu_si512(lines + c * kLineBytes);
      __m512i rest;
      const __m512i line = lower_trits(byte, rest);
      const __m512i last = _mm512_sub_epi8(byte, rest);  // 81 times the fifth trit
      for (int t = 0; t < kTokens; ++t) {
        const int8_t* words = q + t * q_stride + 20 * c;
        for (int j = 0; j < 4; ++j) {
          const __m512i codes = _mm512_and_si512(line, masks[j]);
          sums[u][t][j] = _mm512_dpbusd_epi32(sums[u][t][j], codes, _mm512_set1_epi32(load_word(words + 4 * j)));
        }
        fifth[u][t] = _mm512_dpbusd_epi32(fifth[u][t], last, _mm512_set1_epi32(load_word(words + 16)));
      }
    };
    int64_t c = begin;
    for (; c + kUnroll <= end; c += kUnroll) {
      for (int u = 0; u < kUnroll; ++u) chunk(c + u, u);
    }
    if (c < end) chunk(c, 0);
    for (int u = 0; u < kUnroll; ++u) {
      for (int t = 0; t < kTokens; ++t) {
        add_to(acc + t * kUnitRows, without_factors(sums[u][t]));
        alignas(64) int32_t lanes[16];
        _mm512_store_si512(lanes, fifth[u][t]);
        for (int r = 0; r < 16; ++r) acc[t * kUnitRows + r] += lanes[r] / 81;  // exact
      }
    }
  }
}

void gemv_t5(const uint8_t* lines, int64_t chunks, const int8_t* q, int64_t q_stride, int tokens, int32_t* acc) {
  if (tokens == 1) gemv_t5_dot<1>(lines, chunks, q, q_stride, acc);
  if (tokens == 2) gemv_t5_dot<2>(lines, chunks, q, q_stride, acc);
  if (tokens == 3) gemv_t5_dot<3>(lines, chunks, q, q_stride, acc);
}

// Canonical rows as they lie, kRows at a time: a line is 64 bytes of one row, and only at the end does a sum run across
// lanes. False if something stands for no weight.
template <int kTokens, int kRows, bool kFives>
PYOPS_INLINE bool rows_times_planes(const uint8_t* rows, int64_t row_bytes, int last_weights, const int8_t* planes,
                                    int64_t plane_bytes, int32_t* acc) {
  constexpr int kFields = kFives ? 5 : 4;
  const __m512i masks[4] = {_mm512_set1_epi8(0x03), _mm512_set1_epi8(0x0c), _mm512_set1_epi8(0x30),
                            _mm512_set1_epi8(char(0xc0))};
  __m512i sums[kTokens][kRows][4] = {}, fifth[kTokens][kRows] = {};
  __m512i found = _mm512_setzero_si512();  // t2: both bits of a field; t5: the largest byte
  const auto add_line = [&](int r, __m512i line, int64_t b) __attribute__((always_inline)) {
    __m512i last = line;
    if constexpr (kFives) {
      __m512i rest;
      found = _mm512_max_epu8(found, line);
      line = lower_trits(line, rest);
      last = _mm512_sub_epi8(last, rest);
    } else {
      found = _mm512_or_si512(found, _mm512_and_si512(line, _mm512_maskz_srli_epi32(0xffff, line, 1)));
    }
    for (int t = 0; t < kTokens; ++t) {
      const int8_t* q = planes + t * kFields * plane_bytes + b;
      for (int j = 0; j < 4; ++j) {
        sums[t][r][j] = _mm512_dpbusd_epi32(sums[t][r][j], _mm512_and_si512(line, masks[j]),
                                            _mm512_loadu_si512(q + j * plane_bytes));
      }
      if constexpr (kFives) {
        fifth[t][r] = _mm512_dpbusd_epi32(fifth[t][r], last, _mm512_loadu_si512(q + 4 * plane_bytes));
      }
    }
  };
  const auto flush = [&]() __attribute__((always_inline)) {
    for (int t = 0; t < kTokens; ++t) {
      for (int r = 0; r < kRows; ++r) {
        int32_t& sum = acc[t * kUnitRows + r];
        sum += sum_of_lanes(without_factors(sums[t][r]));
        if constexpr (kFives) sum += sum_of_lanes(fifth[t][r]) / 81;  // exact
        for (int j = 0; j < 4; ++j) sums[t][r][j] = _mm512_setzero_si512();
        fifth[t][r] = _mm512_setzero_si512();
      }
    }
  };
  const int64_t whole = (row_bytes - 1) / kLineBytes * kLineBytes;
  // Sums across all lanes still hold 81 times the fifth trits: 16 lanes x 4 x 162 x 128 for each line.
  constexpr int64_t kBlock = (kFives ? kBlockChunks / 4 : kBlockChunks) * kLineBytes;
  for (int64_t begin = 0; begin < whole; begin += kBlock) {
    const int64_t end = whole - begin < kBlock ? whole : begin + kBlock;
    for (int64_t b = begin; b < end; b += kLineBytes) {
      for (int r = 0; r < kRows; ++r) {
        prefetch_weights(rows + r * row_bytes + b);
        add_line(r, _mm512_loadu_si512(rows + r * row_bytes + b), b);
      }
    }
    if (end < whole) flush();
  }
  const __mmask64 left = ~uint64_t(0) >> (kLineBytes - (row_bytes - whole));
  for (int r = 0; r < kRows; ++r) {
    __m512i line = _mm512_maskz_loadu_epi8(left, rows + r * row_bytes + whole);
    if constexpr (!kFives) {  // what lies behind the last weight counts as nothing
      const __m512i kept =
          _mm512_mask_set1_epi8(_mm512_set1_epi8(-1), left ^ left >> 1, char((1 << 2 * last_weights) - 1));
      line = _mm512_and_si512(line, kept);
    }
    add_line(r, line, whole);
  }
  flush();
  return kFives ? _mm512_cmpge_epu8_mask(found, _mm512_set1_epi8(char(243))) == 0
                : _mm512_test_epi8_mask(found, _mm512_set1_epi8(0x55)) == 0;
}

template <int kTokens, bool kFives>
bool gemv_rows_of(const uint8_t* rows, int64_t count, int64_t in_features, const int8_t* planes, int64_t plane_bytes,
                  int32_t* acc) {
  constexpr int kRows = kTokens == 1 ? 4 : kTokens == 2 ? 2 : 1, kPerByte = kFives ? 5 : 4;
  const int64_t row_bytes = (in_features + kPerByte - 1) / kPerByte;
  const int last_weights = in_features % 4 ? int(in_features % 4) : 4;
  bool good = true;
  if (row_bytes == 0) return good;
  int64_t r = 0;
  for (; r + kRows <= count; r += kRows) {
    good &= rows_times_planes<kTokens, kRows, kFives>(rows + r * row_bytes, row_bytes, last_weights, planes,
                                                      plane_bytes, acc + r);
  }
  for (; r < count; ++r) {
    good &= rows_times_planes<kTokens, 1, kFives>(rows + r * row_bytes, row_bytes, last_weights, planes, plane_bytes,
                                                  acc + r);
  }
  return good;
}

bool gemv_rows(bool fives, const uint8_t* rows, int64_t count, int64_t in_features, const int8_t* planes,
               int64_t plane_bytes, int tokens, int32_t* acc) {
  static constexpr decltype(&gemv_rows_of<1, false>) kernels[2][kGemvTokens] = {
      {gemv_rows_of<1, false>, gemv_rows_of<2, false>, gemv_rows_of<3, false>},
      {gemv_rows_of<1, true>, gemv_rows_of<2, true>, gemv_rows_of<3, true>}};
  return kernels[fives][tokens - 1](rows, count, in_features, planes, plane_bytes, acc);
}

void decode_t5(const uint8_t* lines, int64_t chunks, uint8_t* codes) {
  for (int64_t c = 0; c < chunks; ++c, codes += 5 * kLineBytes) {
    prefetch_weights(lines + c * kLineBytes);
    const __m512i byte = _mm512_loadu_si512(lines + c * kLineBytes);
    __m512i rest;
    const __m512i line = lower_trits(byte, rest);
    store_codes(codes, field<0>(line));
    store_codes(codes + kLineBytes, field<1>(line));
    store_codes(codes + 2 * kLineBytes, field<2>(line));
    store_codes(codes + 3 * kLineBytes, field<3>(line));
    const __m512i one = _mm512_maskz_set1_epi8(_mm512_cmpneq_epu8_mask(byte, rest), 1);
    const __m512i two = _mm512_maskz_set1_epi8(_mm512_cmpge_epu8_mask(byte, _mm512_set1_epi8(char(162))), 1);
    store_codes(codes + 4 * kLineBytes, _mm512_add_epi8(one, two));
  }
}
#endif

void gemv_t2(const uint8_t* lines, int64_t chunks, const int8_t* q, int64_t q_stride, int tokens, int32_t* acc) {
#if defined(__AVX512VNNI__)
  if (tokens == 1) gemv_t2_dot<1>(lines, chunks, q, q_stride, acc);
  if (tokens == 2) gemv_t2_dot<2>(lines, chunks, q, q_stride, acc);
  if (tokens == 3) gemv_t2_dot<3>(lines, chunks, q, q_stride, acc);
#elif defined(PYOPS_HAS_DOT)
  if (tokens == 1) gemv_lines<1>(lines, chunks, q, q_stride, acc);
  if (tokens == 2) gemv_lines<2>(lines, chunks, q, q_stride, acc);
  if (tokens == 3) gemv_lines<3>(lines, chunks, q, q_stride, acc);
#else
  for (int64_t c = 0; c < chunks; ++c) {
    for (int i = 0; i < kLineBytes; ++i) {
      const uint8_t byte = lines[c * kLineBytes + i];
      for (int t = 0; t < tokens; ++t) {
        const int8_t* words = q + t * q_stride + 16 * c + i % 4;
        acc[t * kUnitRows + i / 4] +=
            (byte & 3) * words[0] + (byte >> 2 & 3) * words[4] + (byte >> 4 & 3) * words[8] + (byte >> 6) * words[12];
      }
    }
  }
#endif
}

// ---- tiles -----------------------------------------------------------------------------------------------------

void decode_t2(const uint8_t* lines, int64_t chunks, uint8_t* codes) {
#if defined(PYOPS_HAS_DOT)
  for (int64_t c = 0; c < chunks; ++c) {
    prefetch_weights(lines + c * kLineBytes);
    for (int v = 0; v < kGroupVectors; ++v) {
      const Codes line = load_codes(lines + c * kLineBytes + v * sizeof(Codes));
      uint8_t* at = codes + 4 * c * kLineBytes + v * sizeof(Codes);
      store_codes(at, field<0>(line));
      store_codes(at + kLineBytes, field<1>(line));
      store_codes(at + 2 * kLineBytes, field<2>(line));
      store_codes(at + 3 * kLineBytes, field<3>(line));
    }
  }
#else
  for (int64_t c = 0; c < chunks; ++c) {
    for (int j = 0; j < 4; ++j) {
      for (int i = 0; i < kLineBytes; ++i) {
        codes[(4 * c + j) * kLineBytes + i] = lines[c * kLineBytes + i] >> 2 * j & 3;
      }
    }
  }
#endif
}

#if defined(PYOPS_HAS_DOT)
// kVectors vectors of rows times kTokens tokens; all sums stay in registers. `count` lines or steps. Two vectors are
// two row groups of 16 (AVX-512) or the two halves of one (AVX2).
template <int kTokens, int kVectors, bool kFromLines>
PYOPS_INLINE void tile(const uint8_t* const (&weights)[2], int64_t count, const int8_t* panel, int32_t* acc) {
  constexpr int64_t kBlock = kDot ? int64_t(1) << 30 : kFromLines ? kSteps16 / 4 : kSteps16;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = count - begin < kBlock ? count : begin + kBlock;
    Codes sums[kTokens][kVectors] = {};
    if constexpr (kDot) {  // sums continue; without a dot instruction they are of 16 bits
      for (int t = 0; t < kTokens; ++t) {
        for (int v = 0; v < kVectors; ++v) sums[t][v] = load_sums(acc + t * kUnitRows + v * kVectorRows);
      }
    }
    const auto step = [&](const int8_t* q, const Codes(&codes)[2]) __attribute__((always_inline)) {
      for (int t = 0; t < kTokens; ++t) {
        const Codes word = broadcast_word(load_word(q + 4 * t));
        for (int v = 0; v < kVectors; ++v) sums[t][v] = accumulate(sums[t][v], codes[v], word);
      }
    };
    for (int64_t i = begin; i < end; ++i) {
      Codes codes[2];
      if constexpr (kFromLines) {
        const int8_t* q = panel + i * 16 * kTokens;
        Codes lines[2];
        for (int v = 0; v < kVectors; ++v) lines[v] = load_codes(weights[v] + i * kLineBytes);
        for (int v = 0; v < kVectors; ++v) codes[v] = field<0>(lines[v]);
        step(q, codes);
        for (int v = 0; v < kVectors; ++v) codes[v] = field<1>(lines[v]);
        step(q + 4 * kTokens, codes);
        for (int v = 0; v < kVectors; ++v) codes[v] = field<2>(lines[v]);
        step(q + 8 * kTokens, codes);
        for (int v = 0; v < kVectors; ++v) codes[v] = field<3>(lines[v]);
        step(q + 12 * kTokens, codes);
      } else {
        for (int v = 0; v < kVectors; ++v) codes[v] = load_codes(weights[v] + i * kLineBytes);
        step(panel + 4 * i * kTokens, codes);
      }
    }
    for (int t = 0; t < kTokens; ++t) {
      for (int v = 0; v < kVectors; ++v) {
        int32_t* at = acc + t * kUnitRows + v * kVectorRows;
        store_sums(at, kDot ? sums[t][v] : add32(load_sums(at), widened(sums[t][v])));
      }
    }
  }
}

#if defined(__AVX512VNNI__)
// The same from lines without a shift of the weights, which would take a third of the slots that decoding needs: fields
// are masked where they are, the highest first, and the sums lose a factor of 4 between one field and the next. A block
// of lines and its part of the panel stay in the first-level cache for the four turns.
template <int kTokens, int kVectors>
PYOPS_INLINE void tile_masked(const uint8_t* const (&weights)[2], int64_t chunks, const int8_t* panel, int32_t* acc) {
  constexpr int64_t kBlock = 128;
  for (int64_t begin = 0; begin < chunks; begin += kBlock) {
    const int64_t end = chunks - begin < kBlock ? chunks : begin + kBlock;
    __m512i sums[kTokens][kVectors] = {};
#pragma GCC unroll 1
    for (int field = 3; field >= 0; --field) {
      const __m512i mask = _mm512_set1_epi8(char(3 << 2 * field));
      for (int t = 0; t < kTokens; ++t) {
        for (int v = 0; v < kVectors; ++v) sums[t][v] = _mm512_maskz_srai_epi32(0xffff, sums[t][v], 2);
      }
      for (int64_t c = begin; c < end; ++c) {
        const int8_t* q = panel + (4 * c + field) * 4 * kTokens;
        for (int v = 0; v < kVectors; ++v) prefetch_weights(weights[v] + c * kLineBytes);
        __m512i codes[2];
        for (int v = 0; v < kVectors; ++v) {
          codes[v] = _mm512_and_si512(mask, _mm512_loadu_si512(weights[v] + c * kLineBytes));
        }
        for (int t = 0; t < kTokens; ++t) {
          const __m512i word = _mm512_set1_epi32(load_word(q + 4 * t));
          for (int v = 0; v < kVectors; ++v) sums[t][v] = _mm512_dpbusd_epi32(sums[t][v], codes[v], word);
        }
      }
    }
    for (int t = 0; t < kTokens; ++t) {
      for (int v = 0; v < kVectors; ++v) add_to(acc + t * kUnitRows + v * kVectorRows, sums[t][v]);
    }
  }
}
#endif

template <int kTokens, bool kFromLines>
void unit(const uint8_t* first, const uint8_t* second, int64_t count, const int8_t* panel, int32_t* acc) {
#if defined(__AVX512VNNI__)
  // Fewer tokens have too few sums in flight for one field at a time (M = 4: 181 against 191 GMAC/s; M = 8: 252 against
  // 246, M = 12: 277 against 270, 2560 x 2560 on a Sapphire Rapids core).
  if constexpr (kFromLines && kTokens >= 5) {
    if (second != nullptr) {
      tile_masked<kTokens, 2>({first, second}, count, panel, acc);
    } else {
      tile_masked<kTokens, 1>({first, first}, count, panel, acc);
    }
    return;
  }
#endif
#if defined(__AVX512BW__)
  if (second != nullptr) {
    tile<kTokens, 2, kFromLines>({first, second}, count, panel, acc);
  } else {
    tile<kTokens, 1, kFromLines>({first, first}, count, panel, acc);
  }
#else
  tile<kTokens, 2, kFromLines>({first, first + sizeof(Codes)}, count, panel, acc);
  if (second == nullptr) return;
  tile<kTokens, 2, kFromLines>({second, second + sizeof(Codes)}, count, panel, acc + kGroupRows);
#endif
}

using Unit = void (*)(const uint8_t*, const uint8_t*, int64_t, const int8_t*, int32_t*);

template <bool kFromLines>
void tile_any(const uint8_t* first, const uint8_t* second, int64_t count, const int8_t* panel, int tokens,
              int32_t* acc) {
#if defined(__AVX512BW__)
  static constexpr Unit units[] = {unit<1, kFromLines>,  unit<2, kFromLines>,  unit<3, kFromLines>,
                                   unit<4, kFromLines>,  unit<5, kFromLines>,  unit<6, kFromLines>,
                                   unit<7, kFromLines>,  unit<8, kFromLines>,  unit<9, kFromLines>,
                                   unit<10, kFromLines>, unit<11, kFromLines>, unit<12, kFromLines>};
#else
  static constexpr Unit units[] = {unit<1, kFromLines>, unit<2, kFromLines>, unit<3, kFromLines>,
                                   unit<4, kFromLines>, unit<5, kFromLines>, unit<6, kFromLines>};
#endif
  static_assert(sizeof(units) / sizeof(units[0]) == kTileTokens);
  units[tokens - 1](first, second, count, panel, acc);
}

#else
constexpr int kTileTokens = 4;

template <bool kFromLines>
void tile_any(const uint8_t* first, const uint8_t* second, int64_t count, const int8_t* panel, int tokens,
              int32_t* acc) {
  const uint8_t* groups[2] = {first, second};
  for (int g = 0; g < 2 && groups[g] != nullptr; ++g) {
    for (int64_t s = 0; s < (kFromLines ? 4 * count : count); ++s) {
      const uint8_t* bytes = groups[g] + (kFromLines ? s / 4 : s) * kLineBytes;
      const int shift = kFromLines ? 2 * int(s % 4) : 0;
      for (int t = 0; t < tokens; ++t) {
        const int8_t* q = panel + (s * tokens + t) * 4;
        int32_t* sums = acc + t * kUnitRows + g * kGroupRows;
        for (int r = 0; r < kGroupRows; ++r) {
          const uint8_t* c = bytes + 4 * r;
          sums[r] += (c[0] >> shift & 3) * q[0] + (c[1] >> shift & 3) * q[1] + (c[2] >> shift & 3) * q[2] +
                     (c[3] >> shift & 3) * q[3];
        }
      }
    }
  }
}
#endif

// ---- from integers to outputs ------------------------------------------------------------------------------------

using Floats = Vector<float>;
using Integers = VectorTypes<float>::integer;
constexpr int kWidth = kLanes<float>;

PYOPS_INLINE Floats integers_as_floats(const int32_t* acc, int32_t sum) {
  Integers v;
  __builtin_memcpy(&v, acc, sizeof(v));
  return __builtin_convertvector(v - sum, Floats);
}

// Rows come in whole vectors in the accumulators; only the output may end earlier.
template <class T, class Value>
PYOPS_INLINE void store_rows(int64_t rows, void* out, Value value) {
  T* y = static_cast<T*>(out);
  int64_t r = 0;
  for (; r + kWidth <= rows; r += kWidth) store(y + r, value(r));
  if (r == rows) return;
  const Floats last = value(r);
  for (int64_t lane = 0; r + lane < rows; ++lane) narrow(float(last[lane]), y[r + lane]);
}

template <class T>
void finish(const int32_t* acc, int32_t sum, float step, const float* gamma, const float* bias, int64_t rows,
            void* out) {
  store_rows<T>(rows, out, [=](int64_t r) __attribute__((always_inline)) {
    const Floats y = integers_as_floats(acc + r, sum) * (load(gamma + r) * step);
    return bias ? y + load(bias + r) : y;
  });
}

void add_group(const int32_t* acc, int32_t sum, const float* gamma, int64_t rows, float* value) {
  for (int64_t r = 0; r < rows; r += kWidth) {
    store(value + r, load(value + r) + integers_as_floats(acc + r, sum) * load(gamma + r));
  }
}

template <class T>
void finish_groups(const float* value, float step, const float* bias, int64_t rows, void* out) {
  store_rows<T>(rows, out, [=](int64_t r) __attribute__((always_inline)) {
    const Floats y = load(value + r) * step;
    return bias ? y + load(bias + r) : y;
  });
}

#if defined(__AVX512VNNI__)
constexpr auto kGemvT5 = &gemv_t5;
constexpr auto kDecodeT5 = &decode_t5;
constexpr auto kGemvRows = &gemv_rows;
#else
constexpr decltype(&gemv_t2) kGemvT5 = nullptr;
constexpr decltype(&decode_t2) kDecodeT5 = nullptr;
constexpr decltype(IntegerProductKernels::gemv_rows) kGemvRows = nullptr;
#endif

}  // namespace

extern const IntegerProductKernels integer_product_kernels = {
    &gemv_t2,
    kGemvT5,
    kGemvRows,
    &decode_t2,
    kDecodeT5,
    &tile_any<true>,
    &tile_any<false>,
    kTileTokens,
    {&finish<float>, nullptr, &finish<bfloat16>, &finish<float16>},
    &add_group,
    {&finish_groups<float>, nullptr, &finish_groups<bfloat16>, &finish_groups<float16>},
};

}  // namespace pyops::PYOPS_ISA
