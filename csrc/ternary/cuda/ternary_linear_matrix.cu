// y = x_q (T gamma)^T + bias for more than four tokens, by the int8 matrix instruction m16n8k32.
//
// Tiling: a block owns a tile of rows of T and of tokens (MatrixTile), and all of in_features or a split of them.
// Weights are the A operand and come from memory as the lanes of the instruction want them: 16 bytes of t2mma are four
// A fragments of two-bit codes, decoded by five operations each, without a way through shared memory; they are asked
// for kAhead steps ahead. Tokens are the B operand: kStages steps of them are copied in the background to a ring in
// shared memory, 16-byte parts of a row permuted by the token so that neither copies nor ldmatrix meet in a bank.
//
// Warps share the rows, the tokens, and the chunks of 128 in_features of a step (kDepthWarps), so that a small tile
// keeps enough loads in flight. Sums are int32, exact: of codes 0, 1, 2, minus the sum of the token's bytes at the end.
// They go through shared memory, where the warps of one tile are added, and leave as rows of eight outputs.
//
// gamma per group of 256 in_features: the same with signed codes, and after each group a float32 multiply-add.
#include "ternary_output.cuh"

namespace pyops {
namespace {

constexpr int kStages = 4;
constexpr int kFilled = 128;  // blocks that give every multiprocessor work
constexpr int64_t kLargestGridY = 65535;
constexpr int64_t kSplitColumns = 1 << 20;  // four times a sum of codes of so many columns fits an int32

template <int kRowWarps_, int kTokenWarps_, int kDepthWarps_, int kRowTiles_, int kTokenTiles_, int kAhead_,
          int kBlocks_, bool kGrouped_ = false>
struct MatrixTile {
  static constexpr int kRowWarps = kRowWarps_, kTokenWarps = kTokenWarps_, kDepthWarps = kDepthWarps_;
  static constexpr int kRowTiles = kRowTiles_, kTokenTiles = kTokenTiles_;  // of 16 rows, of 8 tokens; of a warp
  static constexpr int kAhead = kAhead_, kBlocks = kBlocks_;  // steps of weights; blocks on a multiprocessor, at least
  static constexpr bool kGrouped = kGrouped_;
  static constexpr int kThreads = 32 * kRowWarps * kTokenWarps * kDepthWarps;
  static constexpr int kRows = 16 * kRowWarps * kRowTiles, kTokens = 8 * kTokenWarps * kTokenTiles;
  static constexpr int kDepth = 128 * kDepthWarps;      // columns of a step
  static constexpr int kStageBytes = kTokens * kDepth;  // of the ring
  static constexpr int kStagedRow = kRows + 4;  // sums of a token in shared memory; 4 more spread the fragments' rows
  static constexpr int kStagedBytes = kDepthWarps * kTokens * kStagedRow * 4;
  static constexpr int kSharedBytes = kStages * kStageBytes > kStagedBytes ? kStages * kStageBytes : kStagedBytes;
};

using UpTo8 = MatrixTile<1, 1, 8, 1, 1, 4, 2>;          // 16 rows x 8 tokens x 1024
using UpTo16 = MatrixTile<1, 1, 8, 1, 2, 4, 2>;         // 16 x 16 x 1024
using Medium = MatrixTile<2, 1, 4, 2, 4, 2, 2>;         // 64 x 32 x 512
using Large = MatrixTile<4, 1, 2, 2, 8, 2, 2>;          // 128 x 64 x 256
using Wide = MatrixTile<4, 2, 1, 2, 8, 2, 2>;           // 128 x 128 x 128
using Grouped = MatrixTile<4, 1, 1, 1, 4, 2, 2, true>;  // 64 x 32 x 128

// The ring is walked by offsets that a thread carries along: made anew from its number they would cost more than what
// they address. Part p of a token's row lies at p ^ (token % 8).
template <class Tile>
PYOPS_DEVICE int part_offset(int token, int part) {
  return token * Tile::kDepth + (part ^ (token & 7)) * 16;
}
template <class Tile>
PYOPS_DEVICE int next_stage(int offset) {
  static_assert((Tile::kStageBytes & (Tile::kStageBytes - 1)) == 0);
  return (offset + Tile::kStageBytes) & (kStages * Tile::kStageBytes - 1);
}

// Copies step after step of the block's tokens to the ring; a thread the same part of every kApart-th token.
template <class Tile>
struct TokenCopies {
  static constexpr int kParts = Tile::kDepth / 16, kApart = Tile::kThreads / kParts;
  const int8_t* source;  // of its first token
  int columns_left;      // from its column to the row's end
  int tokens_left;       // from its first
  int offset;            // in the ring

  PYOPS_DEVICE TokenCopies(const TernaryLinear& a, int64_t first_token, int first_step) {
    const int token = int(threadIdx.x / kParts), part = int(threadIdx.x % kParts);
    const int64_t left = a.tokens - first_token - token;
    tokens_left = left < Tile::kTokens ? int(left) : Tile::kTokens;
    columns_left = int(a.width) - first_step * Tile::kDepth - part * 16;
    source = a.quantized + (first_token + token) * a.width + first_step * Tile::kDepth + part * 16;
    offset = part_offset<Tile>(token, part);
  }

  PYOPS_DEVICE void copy_next(const TernaryLinear& a, int8_t* ring) {
    static_assert(kApart % 8 == 0 || kApart == 4);
#pragma unroll
    for (int i = 0; i < Tile::kTokens / kApart; ++i) {
      int8_t* to = ring + (offset ^ (i * kApart & 7) * 16) + i * kApart * Tile::kDepth;
      dev::cp_async16(to, source + i * kApart * a.width, columns_left > 0 && i * kApart < tokens_left);
    }
    source += Tile::kDepth;
    columns_left -= Tile::kDepth;
    offset = next_stage<Tile>(offset);
  }
};

// B fragments of a warp's chunk.
template <class Tile>
struct TokenFragments {
  int offset;  // of the lane's row for ldmatrix, k-tile 0

  PYOPS_DEVICE TokenFragments(int first_token, int depth_warp) {
    const int lane = dev::lane(), half = Tile::kTokenTiles == 1 ? 0 : lane / 16;
    offset = part_offset<Tile>(first_token + 8 * half + lane % 8, 8 * depth_warp + lane / 8 % 2);
  }

  // Of sixteen tokens, or of eight where the warp has no more.
  PYOPS_DEVICE void load(const int8_t* ring, int k_tile, int token, uint32_t (&b)[2][2]) const {
    const int8_t* row = ring + (offset ^ k_tile * 32) + token * Tile::kDepth;
    if constexpr (Tile::kTokenTiles == 1) {
      dev::ldmatrix_x2(b[0], row);
    } else {
      uint32_t both[4];
      dev::ldmatrix_x4(both, row);
      b[0][0] = both[0];
      b[0][1] = both[1];
      b[1][0] = both[2];
      b[1][1] = both[3];
    }
  }
};

template <class Tile>
using Fragments = int[Tile::kRowTiles][Tile::kTokenTiles][4];

// 128 columns of the warp's rows and tokens.
template <class Tile>
PYOPS_DEVICE void multiply_step(const dev::Bits128 (&weights)[Tile::kRowTiles], const int8_t* ring,
                                const TokenFragments<Tile>& tokens, Fragments<Tile>& sums) {
  constexpr int together = Tile::kTokenTiles < 2 ? 1 : 2;
#pragma unroll
  for (int tile = 0; tile < 4; ++tile) {
    uint32_t codes[Tile::kRowTiles][4];
#pragma unroll
    for (int row = 0; row < Tile::kRowTiles; ++row) {
      if constexpr (Tile::kGrouped) {
        decode_signed(weights[row].word[tile], codes[row]);
      } else {
        decode_codes(weights[row].word[tile], codes[row]);
      }
    }
#pragma unroll
    for (int token = 0; token < Tile::kTokenTiles; token += together) {
      uint32_t b[2][2];
      tokens.load(ring, tile, 8 * token, b);
#pragma unroll
      for (int i = 0; i < together; ++i) {
#pragma unroll
        for (int row = 0; row < Tile::kRowTiles; ++row) {
          dev::mma_m16n8k32_s8(sums[row][token + i], codes[row], b[i]);
        }
      }
    }
  }
}

// What a warp works on.
template <class Tile>
struct WarpPlace {
  int depth, row, token;  // its chunk of a step; its first row and token in the tile
  PYOPS_DEVICE WarpPlace() {
    const unsigned warp = threadIdx.x / 32;  // unsigned: divisions are shifts
    depth = int(warp % Tile::kDepthWarps);
    row = int(warp / Tile::kDepthWarps % Tile::kRowWarps * (16 * Tile::kRowTiles));
    token = int(warp / (Tile::kDepthWarps * Tile::kRowWarps) * (8 * Tile::kTokenTiles));
  }
};

// The weights of the warp's rows. Beyond the matrix they stay as they are: tokens are 0 there, or results not stored.
template <class Tile>
struct WeightLoads {
  const uint8_t* source;  // of the lane in the first 16 rows, first chunk
  int64_t between;        // bytes from 16 rows to the next
  int chunks, row_tiles;  // that exist

  PYOPS_DEVICE WeightLoads(const TernaryLinear& a, int64_t first_row, int last_chunk) : chunks(last_chunk) {
    const int64_t left = ceil_div(a.out_features, 16) - first_row / 16;
    row_tiles = left < Tile::kRowTiles ? int(left) : Tile::kRowTiles;
    between = ceil_div(a.in_features, 128) * 512;
    source = a.packed + first_row / 16 * between + dev::lane() * 16;
  }

  PYOPS_DEVICE void load(int chunk, dev::Bits128 (&weights)[Tile::kRowTiles]) const {
#pragma unroll
    for (int row = 0; row < Tile::kRowTiles; ++row) {
      if (chunk < chunks && row < row_tiles) weights[row] = dev::ldg128(source + row * between + int64_t(chunk) * 512);
    }
  }
};

// Adds gamma * sums of a group that is complete, and starts the next.
template <class Tile>
PYOPS_DEVICE void add_group(const TernaryLinear& a, int64_t first_row, int64_t group, Fragments<Tile>& sums,
                            float (&totals)[Tile::kRowTiles][Tile::kTokenTiles][4]) {
#pragma unroll
  for (int row = 0; row < Tile::kRowTiles; ++row) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t n = first_row + 16 * row + dev::lane() / 4 + 8 * half;
      const float gamma = n < a.out_features ? a.output.gamma[n * a.output.gamma_stride + group] : 0.0f;
#pragma unroll
      for (int token = 0; token < Tile::kTokenTiles; ++token) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          totals[row][token][i] += gamma * float(sums[row][token][i]);
          sums[row][token][i] = 0;
        }
      }
    }
  }
}

// The fragments of a warp to rows of shared memory, one per token.
template <class Tile, class Value>
PYOPS_DEVICE void stage_sums(const Value (&sums)[Tile::kRowTiles][Tile::kTokenTiles][4], const WarpPlace<Tile>& warp,
                             Value* staged) {
  const int group = dev::lane() / 4, quarter = dev::lane() % 4;
#pragma unroll
  for (int row = 0; row < Tile::kRowTiles; ++row) {
#pragma unroll
    for (int token = 0; token < Tile::kTokenTiles; ++token) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at_token = warp.token + 8 * token + 2 * quarter + i % 2, at_row = warp.row + 16 * row + group;
        Value value = sums[row][token][i];
        if constexpr (!Tile::kGrouped) value = i < 2 ? value : value >> kUpperRowsShift;
        staged[(warp.depth * Tile::kTokens + at_token) * Tile::kStagedRow + at_row + 8 * (i / 2)] = value;
      }
    }
  }
}

// Eight rows of one token from shared memory; the warps that shared its columns are added.
template <class Tile>
PYOPS_DEVICE void staged_sums(const int* staged, int token, int row, int (&sums)[8]) {
#pragma unroll
  for (int depth = 0; depth < Tile::kDepthWarps; ++depth) {
    const int* from = staged + (depth * Tile::kTokens + token) * Tile::kStagedRow + row;
    const dev::Bits128 low = *reinterpret_cast<const dev::Bits128*>(from);
    const dev::Bits128 high = *reinterpret_cast<const dev::Bits128*>(from + 4);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      sums[i] = (depth ? sums[i] : 0) + int(i < 4 ? low.word[i % 4] : high.word[i % 4]);
    }
  }
}

// y = step * totals + bias where gamma is in the totals already.
PYOPS_DEVICE void store_totals(const TernaryOutput& out, const float* totals, float step, int64_t at, int64_t n,
                               int64_t valid) {
  float values[8], bias[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] = __fmul_rn(step, totals[i]);
  if (out.bias) {
    load_eight_from(out.bias, out.bias_dtype, n, valid, bias);
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = __fadd_rn(values[i], bias[i]);
  }
  store_eight(values, out.y, out.y_dtype, at, valid);
}

PYOPS_DEVICE void store_partial(const TernaryLinear& a, const int (&sums)[8], int64_t at, int64_t valid) {
  int* out = a.partial + int64_t(blockIdx.z) * a.tokens * a.out_features + at;
  if (valid >= 8 && is_aligned(out, 16)) {
    dev::Bits128 bits[2];
    memcpy(bits, sums, 32);
    dev::stg128(out, bits[0]);
    dev::stg128(out + 4, bits[1]);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < valid) out[i] = sums[i];
    }
  }
}

// The tile of a block as rows of eight outputs.
template <class Tile>
PYOPS_DEVICE void store_tile(const TernaryLinear& a, int64_t first_row, int64_t first_token, const int* staged) {
  constexpr int per_token = Tile::kRows / 8;
  for (int vector = int(threadIdx.x); vector < Tile::kTokens * per_token; vector += Tile::kThreads) {
    const int token = vector / per_token, row = vector % per_token * 8;
    const int64_t m = first_token + token, n = first_row + row, at = m * a.out_features + n;
    const int64_t valid = a.out_features - n;
    if (m >= a.tokens || valid <= 0) continue;
    const float step = a.output.step[m];
    if constexpr (Tile::kGrouped) {
      store_totals(a.output, reinterpret_cast<const float*>(staged) + token * Tile::kStagedRow + row, step, at, n,
                   valid);
    } else {
      int sums[8];
      staged_sums<Tile>(staged, token, row, sums);
      const int byte_sum = blockIdx.z == 0 ? a.sum[m] : 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[i] -= byte_sum;
      if (a.splits == 1) {
        finish_eight(a.output, sums, step, at, n, valid);
      } else {
        store_partial(a, sums, at, valid);
      }
    }
  }
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks) matrix_kernel(TernaryLinear a, int first_tile) {
  PYOPS_DYN_SHARED(int8_t, ring);
  const WarpPlace<Tile> warp;
  const int64_t first_row = int64_t(blockIdx.x) * Tile::kRows;
  const int64_t first_token = int64_t(first_tile + int(blockIdx.y)) * Tile::kTokens;
  const Split steps = split_of(int(ceil_div(a.in_features, Tile::kDepth)), int(blockIdx.z), a.splits);
  const int begin = steps.begin, end = steps.end, chunks = int(ceil_div(a.in_features, 128));
  const int last_chunk = end * Tile::kDepthWarps < chunks ? end * Tile::kDepthWarps : chunks;
  const WeightLoads<Tile> loads(a, first_row + warp.row, last_chunk);
  TokenCopies<Tile> copies(a, first_token, begin);
  TokenFragments<Tile> tokens(warp.token, warp.depth);

  dev::Bits128 weights[Tile::kAhead][Tile::kRowTiles] = {};
#pragma unroll
  for (int i = 0; i < Tile::kAhead; ++i) loads.load((begin + i) * Tile::kDepthWarps + warp.depth, weights[i]);
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (begin + i < end) copies.copy_next(a, ring);
    dev::cp_async_commit();
  }

  Fragments<Tile> sums = {};
  float totals[Tile::kGrouped ? Tile::kRowTiles : 1][Tile::kTokenTiles][4] = {};
  for (int first = begin; first < end; first += Tile::kAhead) {
#pragma unroll
    for (int i = 0; i < Tile::kAhead; ++i) {
      const int step = first + i;
      if (step < end) {
        dev::cp_async_wait<kStages - 2>();
        __syncthreads();
        if (step + kStages - 1 < end) copies.copy_next(a, ring);
        dev::cp_async_commit();
        multiply_step<Tile>(weights[i], ring, tokens, sums);
        tokens.offset = next_stage<Tile>(tokens.offset);
        loads.load((step + Tile::kAhead) * Tile::kDepthWarps + warp.depth, weights[i]);
        if constexpr (Tile::kGrouped) {
          if (step % 2 == 1) add_group<Tile>(a, first_row + warp.row, step / 2, sums, totals);
        }
      }
    }
  }

  dev::cp_async_wait<0>();
  __syncthreads();  // the ring becomes the place of the sums
  if constexpr (Tile::kGrouped) {
    stage_sums<Tile>(totals, warp, reinterpret_cast<float*>(ring));
  } else {
    stage_sums<Tile>(sums, warp, reinterpret_cast<int*>(ring));
  }
  __syncthreads();
  store_tile<Tile>(a, first_row, first_token, reinterpret_cast<const int*>(ring));
}

template <class Tile>
int64_t tiles_of(const TernaryLinear& a) {
  return ceil_div(a.out_features, Tile::kRows) * ceil_div(a.tokens, Tile::kTokens);
}

// Calls f with the tile for a shape, the one decision of this file: the largest that still gives every multiprocessor
// a block. A larger one reads less of everything per product.
template <class Function>
auto with_tile(const TernaryLinear& a, const Function& f) {
  if (a.grouped) return f(Grouped());
  if (a.tokens <= UpTo8::kTokens) return f(UpTo8());
  if (a.tokens <= UpTo16::kTokens) return f(UpTo16());
  if (tiles_of<Wide>(a) >= kFilled) return f(Wide());
  if (tiles_of<Large>(a) >= kFilled) return f(Large());
  return f(Medium());
}

}  // namespace
}  // namespace pyops

using namespace pyops;

// One where tiles alone occupy half of the multiprocessors. A split keeps two steps or more. Sums of floats (gamma per
// group) stay in one block.
extern "C" int64_t pyops_ternary_linear_matrix_splits(const TernaryLinear* arguments) {
  const TernaryLinear& a = *arguments;
  if (a.grouped) return 1;
  return with_tile(a, [&](auto tile) {
    using Tile = decltype(tile);
    const int64_t steps = ceil_div(a.in_features, Tile::kDepth), tiles = tiles_of<Tile>(a);
    const int64_t wanted = 2 * tiles <= kFilled ? kFilled / tiles : 1, most = steps / 2;
    const int64_t fewest = ceil_div(a.in_features, kSplitColumns), splits = wanted < most ? wanted : most;
    return splits > fewest ? splits : fewest > 0 ? fewest : 1;
  });
}

extern "C" int pyops_ternary_linear_matrix(const TernaryLinear* arguments, void* stream) {
  const TernaryLinear a = *arguments;
  const int error = with_tile(a, [&](auto tile) {
    using Tile = decltype(tile);
    // Neighbours share tokens; weights, which are small, stay in the second-level cache.
    const int64_t row_tiles = ceil_div(a.out_features, Tile::kRows), token_tiles = ceil_div(a.tokens, Tile::kTokens);
    int failed = 0;
    for (int64_t first = 0; first < token_tiles && !failed; first += kLargestGridY) {
      const int64_t left = token_tiles - first;
      const dim3 grid(unsigned(row_tiles), unsigned(left < kLargestGridY ? left : kLargestGridY), unsigned(a.splits));
      failed = PYOPS_LAUNCH(matrix_kernel<Tile>, grid, Tile::kThreads, Tile::kSharedBytes, stream, a, int(first));
    }
    return failed;
  });
  return error || a.splits == 1 ? error : pyops_ternary_linear_finish(&a, stream);
}
