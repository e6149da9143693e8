// The same ternary weights in another packed format.
//
// Any pair of formats: a thread makes one byte of the result and fetches the code of each weight in it from where
// code_place() of ../ternary_format.h says (repack_kernel). The pair that a training step needs, t2 to the layout of
// the matrix instruction, is done 16 x 128 weights per warp: bytes of t2 hold four codes of a row, words of t2mma four
// bytes of four codes each, so that a lane spreads four bytes per word (t2_to_t2mma_kernel).
//
// Codes that stand for no weight are counted or asserted; find_invalid_kernel then looks for the first, on one block:
// it runs before an error only.
#include "ternary_device.cuh"
#include "ternary_repack.cuh"

namespace pyops {
namespace {

constexpr int kThreads = 256;
// The op that the weights are for cannot be named here.
#define PYOPS_INVALID_CODE "pyops::ternary_repack: source must hold codes of weights only"

PYOPS_DEVICE int power_of_three(int exponent) {
  return exponent == 0 ? 1 : exponent == 1 ? 3 : exponent == 2 ? 9 : exponent == 3 ? 27 : 81;
}

PYOPS_DEVICE bool holds_trits(TernaryFormat format) { return codes_per_byte(format) == 5; }

// The code of a weight, outside of 0, 1, 2 where none stands there.
PYOPS_DEVICE int read_code(const RepackTernary& a, int64_t n, int64_t k) {
  const CodePlace place = code_place(a.from, a.in_features, n, k);
  if (a.from == TernaryFormat::int8) return int(static_cast<const int8_t*>(a.source)[place.byte]) + 1;
  const int byte = static_cast<const uint8_t*>(a.source)[place.byte];
  if (!holds_trits(a.from)) return byte >> 2 * place.digit & 3;
  return byte < 243 ? byte / power_of_three(place.digit) % 3 : 3;
}

struct Place {
  int64_t n, k;
};

// Which weight digit `digit` of byte `byte` of a format is: the inverse of code_place(). It may lie in the padding.
PYOPS_DEVICE Place weight_at(TernaryFormat format, int64_t in_features, int64_t byte, int digit) {
  const int64_t columns = block_columns(format), per_row = ceil_div(in_features, columns);
  switch (format) {
    case TernaryFormat::t2:
    case TernaryFormat::t5:
      return {byte / per_row, byte % per_row * columns + digit};
    case TernaryFormat::t2x16:
    case TernaryFormat::t5x16: {
      const int64_t block = byte / 64, lane = byte / 4 % 16, b = byte % 4;
      return {block / per_row * 16 + lane, block % per_row * columns + 4 * digit + b};
    }
    case TernaryFormat::t2mma: {
      const int64_t block = byte / 512, lane = byte / 16 % 32, tile = byte / 4 % 4, b = byte % 4;
      return {block / per_row * 16 + lane / 4 + 8 * (digit & 1),
              block % per_row * 128 + 32 * tile + 16 * (digit >> 1) + 4 * (lane % 4) + b};
    }
    case TernaryFormat::int8:
      break;
  }
  return {byte / in_features, byte % in_features};
}

__global__ void __launch_bounds__(kThreads) repack_kernel(RepackTernary a, int64_t bytes) {
  const int64_t byte = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (byte >= bytes) return;
  const int digits = a.to == TernaryFormat::int8 ? 1 : int(codes_per_byte(a.to));
  const bool trits = holds_trits(a.to);
  int value = 0;
  bool valid = true;
  for (int digit = 0; digit < digits; ++digit) {
    const Place place = weight_at(a.to, a.in_features, byte, digit);
    const bool exists = place.n < a.out_features && place.k < a.in_features;
    const int code = exists ? read_code(a, place.n, place.k) : 1;
    valid = valid && unsigned(code) <= 2;
    value += trits ? code * power_of_three(digit) : code << 2 * digit;
  }
  static_cast<uint8_t*>(a.out)[byte] = uint8_t(a.to == TernaryFormat::int8 ? value - 1 : value);
  if (valid) return;
  PYOPS_DEVICE_ASSERT(a.policy == InvalidCode::count, PYOPS_INVALID_CODE);
  dev::count(a.invalid, 1);
}

// The four codes of a byte of t2, one in the low bits of each byte.
PYOPS_DEVICE uint32_t spread_codes(uint32_t byte) {
  return (byte & 0x03u) | (byte & 0x0cu) << 6 | (byte & 0x30u) << 12 | (byte & 0xc0u) << 18;
}

// Where rows are whole 16-byte vectors: a lane reads half of a row of the block, and lanes ask each other.
struct VectorRows {
  dev::Bits128 own;
  PYOPS_DEVICE VectorRows(const RepackTernary& a, int64_t first_row, int64_t first_byte, int64_t row_bytes) {
    const int64_t row = first_row + dev::lane() / 2, byte = first_byte + dev::lane() % 2 * 16;
    own = {{kZeros, kZeros, kZeros, kZeros}};
    if (row < a.out_features && byte < row_bytes) {
      own = dev::ldg128(static_cast<const uint8_t*>(a.source) + row * row_bytes + byte);
    }
  }
  // Byte 4 * word + lane % 4 of row lane / 4 + 8 * half.
  PYOPS_DEVICE uint32_t byte(int word, int half) const {
    const int source = (dev::lane() / 4 + 8 * half) * 2 + word / 4;
    return __shfl_sync(dev::kFullWarp, own.word[word % 4], source) >> 8 * (dev::lane() % 4) & 0xffu;
  }
  static constexpr uint32_t kZeros = 0x55555555u;
};

// Of any rows, byte by byte. Rows and bytes that do not exist are zeros, and so are the last codes of a row's last
// byte, whatever they hold.
struct ByteRows {
  const uint8_t* source;
  int64_t rows_left, bytes_left, row_bytes;
  uint32_t last_codes;
  PYOPS_DEVICE ByteRows(const RepackTernary& a, int64_t first_row, int64_t first_byte, int64_t bytes_of_row)
      : row_bytes(bytes_of_row) {
    const int64_t row = first_row + dev::lane() / 4, byte = first_byte + dev::lane() % 4;
    source = static_cast<const uint8_t*>(a.source) + row * row_bytes + byte;
    rows_left = a.out_features - row;
    bytes_left = row_bytes - byte;
    last_codes = a.in_features % 4 ? (1u << 2 * (a.in_features % 4)) - 1 : 0xffu;
  }
  PYOPS_DEVICE uint32_t byte(int word, int half) const {
    if (8 * half >= rows_left || 4 * word >= bytes_left) return 0x55u;
    const uint32_t found = source[8 * half * row_bytes + 4 * word];
    return 4 * word == bytes_left - 1 ? (found & last_codes) | (0x55u & ~last_codes) : found;
  }
};

// A warp per block of 16 x 128.
template <class Rows>
__global__ void __launch_bounds__(kThreads) t2_to_t2mma_kernel(RepackTernary a, int64_t blocks) {
  const int64_t block = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (block >= blocks) return;
  const int64_t chunks = ceil_div(a.in_features, 128), row_bytes = ceil_div(a.in_features, 4);
  const Rows rows(a, block / chunks * 16, block % chunks * 32, row_bytes);
  dev::Bits128 bits;
  uint32_t invalid = 0;
#pragma unroll
  for (int tile = 0; tile < 4; ++tile) {
    bits.word[tile] = 0;
#pragma unroll
    for (int field = 0; field < 4; ++field) {
      const uint32_t byte = rows.byte(2 * tile + (field >> 1), field & 1);
      invalid |= byte & byte >> 1 & 0x55u;
      bits.word[tile] |= spread_codes(byte) << 2 * field;
    }
  }
  dev::stg128(static_cast<uint8_t*>(a.out) + block * 512 + dev::lane() * 16, bits);
  if (!invalid) return;
  PYOPS_DEVICE_ASSERT(a.policy == InvalidCode::count, PYOPS_INVALID_CODE);
  dev::count(a.invalid, 1);
}

__global__ void clear_kernel(unsigned* invalid) { *invalid = 0; }

__global__ void __launch_bounds__(kThreads) find_invalid_kernel(RepackTernary a, InvalidTernary* found) {
  PYOPS_SHARED(int64_t, scratch, kThreads / 32);
  const int64_t weights = a.out_features * a.in_features;
  int64_t after = 0;  // how many weights follow the first bad one of this thread, and itself; 0: none is bad
  for (int64_t at = threadIdx.x; at < weights && after == 0; at += kThreads) {
    if (unsigned(read_code(a, at / a.in_features, at % a.in_features)) > 2) after = weights - at;
  }
  after = reduce_block(after, scratch, Larger{});
  if (threadIdx.x != 0) return;
  const int64_t place = after ? weights - after : -1;
  int64_t value = -1;
  if (after) {
    const int64_t n = place / a.in_features, k = place % a.in_features;
    value = read_code(a, n, k) - (a.from == TernaryFormat::int8);
    if (holds_trits(a.from))
      value = static_cast<const uint8_t*>(a.source)[code_place(a.from, a.in_features, n, k).byte];
  }
  *found = {place, value};
}

}  // namespace
}  // namespace pyops

using namespace pyops;

extern "C" int pyops_ternary_repack(const RepackTernary* arguments, void* stream) {
  const RepackTernary a = *arguments;
  if (a.policy == InvalidCode::count) {
    const int error = PYOPS_LAUNCH(clear_kernel, 1, 1, 0, stream, a.invalid);
    if (error) return error;
  }
  const int64_t bytes = packed_bytes(a.to, a.out_features, a.in_features);
  if (bytes == 0) return 0;
  if (a.from == TernaryFormat::t2 && a.to == TernaryFormat::t2mma) {
    const int64_t blocks = bytes / 512;
    const unsigned grid = unsigned(ceil_div(blocks, kThreads / 32));
    const bool vectors = a.in_features % 64 == 0 && reinterpret_cast<uintptr_t>(a.source) % 16 == 0;
    return vectors ? PYOPS_LAUNCH(t2_to_t2mma_kernel<VectorRows>, grid, kThreads, 0, stream, a, blocks)
                   : PYOPS_LAUNCH(t2_to_t2mma_kernel<ByteRows>, grid, kThreads, 0, stream, a, blocks);
  }
  return PYOPS_LAUNCH(repack_kernel, unsigned(ceil_div(bytes, kThreads)), kThreads, 0, stream, a, bytes);
}

extern "C" int pyops_ternary_find_invalid(const RepackTernary* arguments, InvalidTernary* found, void* stream) {
  return PYOPS_LAUNCH(find_invalid_kernel, 1, kThreads, 0, stream, *arguments, found);
}
