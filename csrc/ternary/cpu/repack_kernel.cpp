// Reading and writing rows of codes, and the fast ways into the layout that the products read (t2x16).
//
// A 32-bit word of t2 holds 16 k of one row: byte j, field b is k = 4j + b. A lane of a t2x16 line holds the same 16 k
// with the places of byte and field exchanged: a 4 x 4 transposition of 2-bit fields, two swaps of bit groups.
#include "repack_kernel.h"

#include <stddef.h>

#include <utility>

#include "../../common/simd.h"

namespace pyops::PYOPS_ISA {
namespace {

constexpr uint32_t kPadding = 0x55555555u;  // code 1 throughout

// The five trits of a byte as 2-bit fields, or code 3 throughout for a byte that is none.
struct TritTable {
  uint16_t fields[256];
  constexpr TritTable() : fields() {
    for (int v = 0; v < 256; ++v) {
      fields[v] = uint16_t(v < 243 ? v % 3 | v / 3 % 3 << 2 | v / 9 % 3 << 4 | v / 27 % 3 << 6 | v / 81 << 8 : 0x3ff);
    }
  }
};
constexpr TritTable kTrits;

template <class Words>
static inline Words exchanged(Words word) {
  const Words inner = (word ^ word >> 6) & 0x00cc00ccu;
  word ^= inner ^ inner << 6;
  const Words outer = (word ^ word >> 12) & 0x0000f0f0u;
  return word ^ outer ^ outer << 12;
}

// Bits that are set where a 2-bit field is 3.
template <class Words>
static inline Words threes(Words word) {
  return word & word >> 1 & kPadding;
}

// ---- rows of codes -----------------------------------------------------------------------------------------

void read_row(TernaryFormat format, const void* data, int64_t in_features, int64_t n, uint8_t* codes) {
  const uint8_t* packed = static_cast<const uint8_t*>(data);
  switch (format) {
    case TernaryFormat::int8:
      for (int64_t k = 0; k < in_features; ++k) codes[k] = uint8_t(packed[n * in_features + k] + 1);
      return;
    case TernaryFormat::t2: {
      const uint8_t* row = packed + n * ceil_div(in_features, 4);
      int64_t b = 0;
      for (; 4 * b + 4 <= in_features; ++b) {
        const uint32_t v = row[b];
        const uint32_t word = (v & 3) | (v >> 2 & 3) << 8 | (v >> 4 & 3) << 16 | v >> 6 << 24;
        __builtin_memcpy(codes + 4 * b, &word, 4);
      }
      for (int64_t k = 4 * b; k < in_features; ++k) codes[k] = row[b] >> 2 * (k - 4 * b) & 3;
      return;
    }
    case TernaryFormat::t5: {
      const uint8_t* row = packed + n * ceil_div(in_features, 5);
      for (int64_t b = 0; 5 * b < in_features; ++b) {
        const uint32_t fields = kTrits.fields[row[b]];
        for (int64_t j = 0; j < 5 && 5 * b + j < in_features; ++j) codes[5 * b + j] = fields >> 2 * j & 3;
      }
      return;
    }
    case TernaryFormat::t2x16:
    case TernaryFormat::t2mma:
      for (int64_t k = 0; k < in_features; ++k) {
        const CodePlace place = code_place(format, in_features, n, k);
        codes[k] = packed[place.byte] >> 2 * place.digit & 3;
      }
      return;
    case TernaryFormat::t5x16:
      for (int64_t k = 0; k < in_features; ++k) {
        const CodePlace place = code_place(format, in_features, n, k);
        codes[k] = kTrits.fields[packed[place.byte]] >> 2 * place.digit & 3;
      }
      return;
  }
}

void write_row(TernaryFormat format, const uint8_t* codes, int64_t in_features, int64_t n, void* data) {
  uint8_t* packed = static_cast<uint8_t*>(data);
  switch (format) {
    case TernaryFormat::int8:
      for (int64_t k = 0; k < in_features; ++k) packed[n * in_features + k] = uint8_t(codes[k] - 1);
      return;
    case TernaryFormat::t2: {
      const int64_t bytes = ceil_div(in_features, 4);
      for (int64_t b = 0; b < bytes; ++b) {
        const uint8_t* c = codes + 4 * b;
        packed[n * bytes + b] = uint8_t(c[0] | c[1] << 2 | c[2] << 4 | c[3] << 6);
      }
      return;
    }
    case TernaryFormat::t5: {
      const int64_t bytes = ceil_div(in_features, 5);
      for (int64_t b = 0; b < bytes; ++b) {
        const uint8_t* c = codes + 5 * b;
        packed[n * bytes + b] = uint8_t(c[0] + 3 * c[1] + 9 * c[2] + 27 * c[3] + 81 * c[4]);
      }
      return;
    }
    case TernaryFormat::t2x16: {
      const int64_t chunks = ceil_div(in_features, 16);
      uint8_t* lane = packed + (n / 16 * chunks * 16 + n % 16) * 4;
      for (int64_t c = 0; c < chunks; ++c) {
        for (int b = 0; b < 4; ++b) {
          const uint8_t* k = codes + 16 * c + b;
          lane[64 * c + b] = uint8_t(k[0] | k[4] << 2 | k[8] << 4 | k[12] << 6);
        }
      }
      return;
    }
    case TernaryFormat::t5x16: {
      const int64_t chunks = ceil_div(in_features, 20);
      uint8_t* lane = packed + (n / 16 * chunks * 16 + n % 16) * 4;
      for (int64_t c = 0; c < chunks; ++c) {
        for (int b = 0; b < 4; ++b) {
          const uint8_t* k = codes + 20 * c + b;
          lane[64 * c + b] = uint8_t(k[0] + 3 * k[4] + 9 * k[8] + 27 * k[12] + 81 * k[16]);
        }
      }
      return;
    }
    case TernaryFormat::t2mma: {
      // A byte holds two k that are 16 apart, of two rows that are 8 apart: clear what this row owns, then set it.
      const int64_t columns = ceil_div(in_features, 128) * 128;
      for (int64_t k = 0; k < columns; ++k) {
        const CodePlace place = code_place(format, in_features, n, k);
        uint8_t& byte = packed[place.byte];
        byte = uint8_t((byte & ~(3 << 2 * place.digit)) | codes[k] << 2 * place.digit);
      }
      return;
    }
  }
}

// ---- lines of t2x16 ------------------------------------------------------------------------------------------

constexpr int kWords = kLanes<float>;
using Words = VectorTypes<float>::bits;

// Exchanges blocks of kSize x kSize words across the diagonal, of rows that are kSize apart.
template <int kSize, size_t... kLane>
static inline void exchange_blocks(Words& upper, Words& lower, std::index_sequence<kLane...>) {
  const Words a = upper, b = lower;
  upper = __builtin_shufflevector(a, b, (kLane & kSize ? kWords + kLane - kSize : kLane)...);
  lower = __builtin_shufflevector(a, b, (kLane & kSize ? kWords + kLane : kLane + kSize)...);
}

template <int kSize = kWords / 2>
static inline void transpose(Words (&rows)[kWords]) {
  for (int i = 0; i < kWords; ++i) {
    if (!(i & kSize)) exchange_blocks<kSize>(rows[i], rows[i + kSize], std::make_index_sequence<kWords>());
  }
  if constexpr (kSize > 1) transpose<kSize / 2>(rows);
}

// Both canonical formats have whole bytes here: 256 of t5, 320 of t2.
constexpr int kBlockWords = 80;

// Words in the order of t2 from the bytes of a row, of which `count` are left. What is not there is padding.
static inline void words_from_t2(const uint8_t* row, int64_t count, uint32_t* words) {
  const size_t bytes = size_t(count < 4 * kBlockWords ? count : 4 * kBlockWords);
  __builtin_memcpy(words, row, bytes);
  __builtin_memset(reinterpret_cast<uint8_t*>(words) + bytes, 0x55, 4 * kBlockWords - bytes);
}

static inline void words_from_t5(const uint8_t* row, int64_t count, uint32_t* words) {
  uint8_t padded[16];
  for (int i = 0; i < kBlockWords; i += 5, row += 16, count -= 16) {
    const uint8_t* from = row;
    if (count < 16) {
      __builtin_memset(padded, 121, sizeof(padded));  // five times code 1
      if (count > 0) __builtin_memcpy(padded, row, size_t(count));
      from = padded;
    }
    // 16 times 10 bits: each half fills two words and 16 bits.
    uint64_t low[2], high[2];
    for (int half = 0; half < 2; ++half) {
      uint64_t f[8];
      for (int b = 0; b < 8; ++b) f[b] = kTrits.fields[from[8 * half + b]];
      low[half] = f[0] | f[1] << 10 | f[2] << 20 | f[3] << 30 | f[4] << 40 | f[5] << 50 | f[6] << 60;
      high[half] = f[6] >> 4 | f[7] << 6;
    }
    words[i] = uint32_t(low[0]);
    words[i + 1] = uint32_t(low[0] >> 32);
    words[i + 2] = uint32_t(high[0] | low[1] << 16);
    words[i + 3] = uint32_t(low[1] >> 16);
    words[i + 4] = uint32_t(low[1] >> 48 | high[1] << 16);
  }
}

// From rows of t2 or t5, a block of words of all 16 rows at a time.
static inline bool lines_from_rows(bool fives, const uint8_t* packed, int64_t out_features, int64_t in_features,
                                   int64_t group, uint8_t* lines) {
  const int64_t per_byte = fives ? 5 : 4, bytes = ceil_div(in_features, per_byte), chunks = ceil_div(in_features, 16);
  Words bad = {};
  for (int64_t first = 0; first < chunks; first += kBlockWords) {
    alignas(64) uint32_t words[16][kBlockWords];
    const void* rows[16];  // their words, of t2 where they lie if they can be used as they are
    const int64_t begin = 16 * first / per_byte, last = in_features / 16 - first;  // the word that ends in padding
    for (int r = 0; r < 16; ++r) {
      const int64_t n = 16 * group + r, count = n < out_features ? bytes - begin : 0;
      const uint8_t* row = packed + (count > 0 ? n * bytes + begin : 0);
      const bool as_it_is = !fives && count >= 4 * kBlockWords && last >= kBlockWords;
      rows[r] = as_it_is ? static_cast<const void*>(row) : words[r];
      if (as_it_is) continue;
      fives ? words_from_t5(row, count, words[r]) : words_from_t2(row, count, words[r]);
      if (last < kBlockWords && in_features % 16) {
        const uint32_t kept = (uint32_t(1) << 2 * (in_features % 16)) - 1;
        words[r][last] = (words[r][last] & kept) | (kPadding & ~kept);
      }
    }
    for (int c = 0; c < kBlockWords && first + c < chunks; c += kWords) {
      for (int r = 0; r < 16; r += kWords) {
        Words block[kWords];
        for (int i = 0; i < kWords; ++i) {
          __builtin_memcpy(&block[i], static_cast<const uint8_t*>(rows[r + i]) + 4 * c, sizeof(Words));
          bad |= threes(block[i]);
          block[i] = exchanged(block[i]);
        }
        transpose(block);
        for (int i = 0; i < kWords && first + c + i < chunks; ++i) {
          __builtin_memcpy(lines + (first + c + i) * 64 + 4 * r, &block[i], sizeof(Words));
        }
      }
    }
  }
  uint32_t any = 0;
  for (int i = 0; i < kWords; ++i) any |= bad[i];
  return any == 0;
}

// Four lines of t5x16 are five of t2x16: each byte place is a run of fields of its own.
static inline bool lines_from_t5x16(const uint8_t* packed, int64_t in_features, int64_t group, uint8_t* lines) {
  const int64_t from = ceil_div(in_features, 20), to = ceil_div(in_features, 16);
  const uint8_t* source = packed + group * from * 64;
  uint32_t bad = 0;
  for (int64_t done = 0, written = 0; done < from; done += 4, written += 5) {
    const int64_t size = from - done < 4 ? from - done : 4, room = to - written < 5 ? to - written : 5;
    for (int place = 0; place < 64; ++place) {
      uint64_t fields = 0x5555555555555555u;
      for (int64_t c = 0; c < size; ++c) {
        const uint64_t five = kTrits.fields[source[(done + c) * 64 + place]];
        fields = (fields & ~(uint64_t(0x3ff) << 10 * c)) | five << 10 * c;
      }
      for (int64_t c = 0; c < room; ++c) {
        const uint8_t byte = uint8_t(fields >> 8 * c);
        bad |= threes(byte);
        lines[(written + c) * 64 + place] = byte;
      }
    }
  }
  return bad == 0;
}

bool lines(TernaryFormat format, const uint8_t* packed, int64_t out_features, int64_t in_features, int64_t group,
           uint8_t* out) {
  if (format == TernaryFormat::t5x16) return lines_from_t5x16(packed, in_features, group, out);
  return lines_from_rows(format == TernaryFormat::t5, packed, out_features, in_features, group, out);
}

}  // namespace

extern const RepackKernels repack_kernels = {&read_row, &write_row, &lines};

}  // namespace pyops::PYOPS_ISA
