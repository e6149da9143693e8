// Reading and writing rows of codes, and the fast ways into the layout that the products read (t2x16).
//
// A 32-bit word of t2 holds 16 k of one row: byte j, field b is k = 4j + b. A lane of a t2x16 line holds the same 16 k
// with the places of byte and field exchanged: a 4 x 4 transposition of 2-bit fields, two swaps of bit groups.
#include "repack_kernel.h"

#include <stddef.h>

#include <utility>

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

// One row of 16-k words (fields in the order of t2) into its lane, `next()` giving the words in turn.
template <class Next>
static inline uint32_t fill_lane(int64_t in_features, uint8_t* lane, Next next) {
  uint32_t bad = 0;
  const int64_t chunks = ceil_div(in_features, 16);
  for (int64_t c = 0; c < chunks; ++c) {
    uint32_t word = next();
    const int64_t left = in_features - 16 * c;
    if (left < 16) {
      const uint32_t kept = (uint32_t(1) << 2 * left) - 1;
      word = (word & kept) | (kPadding & ~kept);
    }
    bad |= threes(word);
    word = exchanged(word);
    __builtin_memcpy(lane + 64 * c, &word, 4);
  }
  return bad;
}

// ---- from t2: as many rows and words at a time as a vector has lanes

#if defined(__AVX512F__)
constexpr int kWords = 16;
#elif defined(__AVX2__)
constexpr int kWords = 8;
#else
constexpr int kWords = 4;
#endif
typedef uint32_t Words __attribute__((vector_size(4 * kWords)));

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

static inline bool lines_from_t2(const uint8_t* packed, int64_t out_features, int64_t in_features, int64_t group,
                                 uint8_t* lines) {
  const int64_t bytes = ceil_div(in_features, 4), chunks = ceil_div(in_features, 16);
  Words bad = {};
  for (int64_t c = 0; c < chunks; c += kWords) {
    // What lies behind the last weight counts as padding, whatever it is.
    const int64_t left = in_features - 16 * c;
    Words kept, padding = Words{} + kPadding;
    for (int i = 0; i < kWords; ++i) {
      const int64_t fields = left - 16 * i;
      kept[i] = fields >= 16 ? ~uint32_t(0) : fields <= 0 ? 0 : (uint32_t(1) << 2 * fields) - 1;
    }
    for (int r = 0; r < 16; r += kWords) {
      Words words[kWords];
      for (int i = 0; i < kWords; ++i) {
        const int64_t n = 16 * group + r + i;
        words[i] = padding;
        if (n >= out_features) continue;
        const uint8_t* from = packed + n * bytes + 4 * c;
        if (left >= 16 * kWords) {
          __builtin_memcpy(&words[i], from, sizeof(Words));
        } else {
          __builtin_memcpy(&words[i], from, size_t(bytes - 4 * c));
          words[i] = (words[i] & kept) | (padding & ~kept);
        }
        bad |= threes(words[i]);
        words[i] = exchanged(words[i]);
      }
      transpose(words);
      for (int i = 0; i < kWords && c + i < chunks; ++i) {
        __builtin_memcpy(lines + (c + i) * 64 + 4 * r, &words[i], sizeof(Words));
      }
    }
  }
  uint32_t any = 0;
  for (int i = 0; i < kWords; ++i) any |= bad[i];
  return any == 0;
}

// ---- from t5: one row after the other

static inline bool lines_from_t5(const uint8_t* packed, int64_t out_features, int64_t in_features, int64_t group,
                                 uint8_t* lines) {
  const int64_t bytes = ceil_div(in_features, 5);
  uint32_t bad = 0;
  for (int64_t r = 0; r < 16; ++r) {
    const int64_t n = 16 * group + r;
    if (n >= out_features) {
      fill_lane(in_features, lines + 4 * r, [] { return kPadding; });
      continue;
    }
    const uint8_t* row = packed + n * bytes;
    int64_t at = 0;
    uint64_t waiting = 0;  // fields that were read and not yet used, the first lowest
    int held = 0;
    bad |= fill_lane(in_features, lines + 4 * r, [&] {
      while (held < 16) {
        waiting |= uint64_t(at < bytes ? kTrits.fields[row[at]] : 0x155u) << 2 * held;
        held += 5;
        ++at;
      }
      const uint32_t word = uint32_t(waiting);
      waiting >>= 32;
      held -= 16;
      return word;
    });
  }
  return bad == 0;
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
  if (format == TernaryFormat::t2) return lines_from_t2(packed, out_features, in_features, group, out);
  if (format == TernaryFormat::t5) return lines_from_t5(packed, out_features, in_features, group, out);
  return lines_from_t5x16(packed, in_features, group, out);
}

}  // namespace

extern const RepackKernels repack_kernels = {&read_row, &write_row, &lines};

}  // namespace pyops::PYOPS_ISA
