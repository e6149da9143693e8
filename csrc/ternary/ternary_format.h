// Packed formats of ternary weights: numbers, shapes and where a weight lies. Torch-free; shared by CPU and CUDA.
//
// A weight t in {-1, 0, 1} is stored as its code c = t + 1. Padding (rows and k beyond the matrix) is code 1.
//   int8    int8 [N, K]                          t itself
//   t2      uint8 [N, ceil(K/4)]                 byte b: k = 4b + i at bits [2i+1 : 2i]
//   t5      uint8 [N, ceil(K/5)]                 byte b: sum over j of c(k = 5b + j) * 3^j
//   t2x16   uint8 [ceil(N/16), ceil(K/16), 16, 4]   lane r, byte b of chunk c: k = 16c + 4j + b of row 16g + r at bits
//                                                [2j+1 : 2j]: the CPU's layout, one 64-byte line per 16 x 16 weights
//   t5x16   uint8 [ceil(N/16), ceil(K/20), 16, 4]   lane r, byte b of chunk c: sum over j of c(k = 20c + 4j + b) * 3^j
//   t2mma   uint8 [ceil(N/16), ceil(K/128), 32, 16]  the GPU's layout: 32 lanes x 4 k-tiles x u32; lane (g = lane / 4,
//                                                t = lane % 4), k-tile s, byte b: row g + 8 (i % 2),
//                                                k = 128c + 32s + 16 (i / 2) + 4t + b at bits [2i+1 : 2i]: field i is
//                                                register i of the A operand of mma.m16n8k32
#pragma once

#include <stdint.h>

#include "../common/host_device.h"

namespace pyops {

enum class TernaryFormat : int { int8 = 0, t2, t5, t2x16, t5x16, t2mma };
constexpr int kTernaryFormats = 6;
constexpr int kTernaryGroup = 256;          // in_features that share one gamma, where it has two dimensions
constexpr int64_t kTernaryMaxIn = 1 << 24;  // int32 holds 128 * in_features

PYOPS_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Weights of one byte, and how many rows and in_features a block of the compute layouts covers.
PYOPS_HOST_DEVICE constexpr int64_t codes_per_byte(TernaryFormat format) {
  return format == TernaryFormat::int8 ? 1 : format == TernaryFormat::t5 || format == TernaryFormat::t5x16 ? 5 : 4;
}
PYOPS_HOST_DEVICE constexpr int64_t block_rows(TernaryFormat format) { return format >= TernaryFormat::t2x16 ? 16 : 1; }
PYOPS_HOST_DEVICE constexpr int64_t block_columns(TernaryFormat format) {
  return format == TernaryFormat::t2x16   ? 16
         : format == TernaryFormat::t5x16 ? 20
         : format == TernaryFormat::t2mma ? 128
                                          : codes_per_byte(format);
}
PYOPS_HOST_DEVICE constexpr int64_t packed_bytes(TernaryFormat format, int64_t out_features, int64_t in_features) {
  return ceil_div(out_features, block_rows(format)) * ceil_div(in_features, block_columns(format)) *
         block_rows(format) * block_columns(format) / codes_per_byte(format);
}

// The byte that holds weight (n, k), and its place in it: a power of 4 or of 3.
struct CodePlace {
  int64_t byte;
  int digit;
};

PYOPS_HOST_DEVICE inline CodePlace code_place(TernaryFormat format, int64_t in_features, int64_t n, int64_t k) {
  switch (format) {
    case TernaryFormat::t2:
      return {n * ((in_features + 3) / 4) + k / 4, int(k % 4)};
    case TernaryFormat::t5:
      return {n * ((in_features + 4) / 5) + k / 5, int(k % 5)};
    case TernaryFormat::t2x16:
      return {((n / 16 * ((in_features + 15) / 16) + k / 16) * 16 + n % 16) * 4 + k % 4, int(k % 16 / 4)};
    case TernaryFormat::t5x16:
      return {((n / 16 * ((in_features + 19) / 20) + k / 20) * 16 + n % 16) * 4 + k % 4, int(k % 20 / 4)};
    case TernaryFormat::t2mma: {
      const int64_t block = n / 16 * ((in_features + 127) / 128) + k / 128;
      const int row = int(n % 16), column = int(k % 128);
      const int lane = row % 8 * 4 + column % 16 / 4, tile = column / 32;
      return {block * 512 + lane * 16 + tile * 4 + column % 4, row / 8 + 2 * (column % 32 / 16)};
    }
    case TernaryFormat::int8:
      break;
  }
  return {n * in_features + k, 0};
}

}  // namespace pyops
