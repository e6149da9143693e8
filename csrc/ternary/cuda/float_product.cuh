// C[r, c] = sum over k of left[r, k] right[k, c] on the 16-bit matrix instruction with float32 sums: the product of the
// float ops of the family. The operands come from where they lie, whatever their type: numbers scaled along k, packed
// weights, bytes. A block fetches a step of 64 k into registers while it multiplies the step before, and converts on
// the way to shared memory.
//
// Weights (-1, 0, 1) and bytes are exact in 16 bits. Numbers that are not are cut into planes: a float32 is exactly the
// sum of three bfloat16, and the planes are multiplied one after the other into the same sums. Each product is exact,
// so that the error is that of adding in float32.
//
// Numbers and bytes are read in vectors of eight: their lines start on 16-byte (8-byte) boundaries and have a multiple
// of eight elements; the fronts copy what has not.
//
// Tiling: kRows x 128 results per block of 8 warps. In shared memory an operand lies as in memory, lines of 16-byte
// parts permuted by the line, so that neither stores nor ldmatrix meet in a bank; ldmatrix transposes where k is not
// what lies side by side.
#pragma once

#include "ternary_device.cuh"

namespace pyops {
namespace {

struct FloatProduct {
  int64_t rows, columns, reduction;
  const void* left;
  int64_t left_stride;  // elements between lines, which are rows of C or k; a multiple of eight
  const float* scale;   // of k
  int64_t scale_stride;
  bool scale_grouped;  // a scale for every kTernaryGroup columns of C, side by side
  const void* right;
  int64_t right_stride;  // bytes between lines of bytes; packed weights: ceil(in_features / 128)
  const float* factor;   // of columns of C; null: ones
  int64_t factor_stride;
  const void* bias;  // of columns of C; null: none
  DType bias_dtype;
  void* out;  // contiguous, at any alignment
  DType out_dtype;
};

constexpr int kProductWarps = 8, kProductThreads = 32 * kProductWarps;
constexpr int kProductColumns = 128, kProductDepth = 64;

// ---- operands on their way to shared memory --------------------------------------------------------------

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

PYOPS_DEVICE void multiply_accumulate(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bfloat16) {
  dev::mma_m16n8k16_bf16(d, a, b);
}
PYOPS_DEVICE void multiply_accumulate(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float16) {
  dev::mma_m16n8k16_f16(d, a, b);
}

// Where a 16-byte part of a line is, in parts.
PYOPS_DEVICE int part_at(int line, int parts, int part) { return line * parts + (part ^ (line & 7)); }

// The top 16 bits as a number; what is left is exact in float32. An infinity leaves nothing.
PYOPS_DEVICE float take_plane(float& value) {
  const float top = __uint_as_float(__float_as_uint(value) & 0xffff0000u);
  value = value == top ? 0.0f : value - top;
  return top;
}

// Eight numbers as planes of 16-bit ones, `plane` parts apart. The last plane is rounded, the others cut.
template <class Element, int kPlanes>
PYOPS_DEVICE void store_planes(float (&values)[8], dev::Bits128* out, int plane) {
#pragma unroll
  for (int i = 0; i < kPlanes - 1; ++i) {
    float top[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) top[j] = take_plane(values[j]);
    dev::pack(top, out[i * plane], static_cast<const Element*>(nullptr));
  }
  dev::pack(values, out[(kPlanes - 1) * plane], static_cast<const Element*>(nullptr));
}

// Numbers of type S as the left operand: lines of k (kTransposed: lines of rows), from memory of the same order.
// kScaled: each times the scale of its k.
template <class S, class Element, int kPlanes, int kRows, bool kTransposed, bool kScaled>
struct LeftTile {
  static constexpr int kLines = kTransposed ? kProductDepth : kRows;
  static constexpr int kParts = (kTransposed ? kRows : kProductDepth) / 8;
  static constexpr int kPlane = kLines * kParts;  // parts of a plane
  static constexpr int kBytes = kPlanes * kPlane * 16;
  static constexpr int kApart = kProductThreads / kParts;  // lines between two of a thread
  static constexpr int kOwn = (kLines + kApart - 1) / kApart;

  Eight<S> held[kOwn];
  const S* source;  // of the first line at step 0
  int line, part;   // of the first
  int64_t left;     // lines at step 0, from the first on; 0 if the vector lies beyond the lines' end

  PYOPS_DEVICE LeftTile(const FloatProduct& p, int64_t first_row)
      : line(int(threadIdx.x) / kParts), part(int(threadIdx.x) % kParts) {
    const int64_t first_line = line + (kTransposed ? 0 : first_row);
    const int64_t column = part * 8 + (kTransposed ? first_row : 0);
    source = static_cast<const S*>(p.left) + first_line * p.left_stride + column;
    left = (kTransposed ? p.reduction : p.rows) - first_line;
    if (kTransposed && column >= p.rows) left = 0;
  }

  // Whether line i of a thread is one of the tile.
  PYOPS_DEVICE bool owns(int i) const { return kLines % kApart == 0 || line + i * kApart < kLines; }

  PYOPS_DEVICE void fetch(const FloatProduct& p, int64_t step) {
    const int64_t moved = step * kProductDepth, lines = kTransposed ? left - moved : left;
    const bool column_exists = kTransposed || moved + part * 8 < p.reduction;
    const S* first = source + (kTransposed ? moved * p.left_stride : moved);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      held[i] = load_whole_eight(first + i * kApart * p.left_stride, owns(i) && column_exists && i * kApart < lines);
    }
  }

  // Of a thread's lines, or of the elements of each.
  static constexpr int kScales = kTransposed ? kOwn : 8;
  PYOPS_DEVICE void load_scales(const FloatProduct& p, int64_t first_column, int64_t step,
                                float (&scales)[kScales]) const {
    const float* scale = p.scale + (p.scale_grouped ? first_column / kTernaryGroup : 0);
    const int64_t first = step * kProductDepth + (kTransposed ? line : part * 8);
    if constexpr (!kTransposed) {
      if (p.scale_stride == 1 && first + 8 <= p.reduction && is_aligned(scale + first, 16)) {
        widen_eight(load_whole_eight(scale + first, true), scales);
        return;
      }
    }
#pragma unroll
    for (int i = 0; i < kScales; ++i) {
      const int64_t k = first + i * (kTransposed ? kApart : 1);
      scales[i] = k < p.reduction ? scale[k * p.scale_stride] : 0.0f;
    }
  }

  PYOPS_DEVICE void put(const FloatProduct& p, int64_t first_column, int64_t step, dev::Bits128* tile) const {
    float scales[kScales];
    if constexpr (kScaled) load_scales(p, first_column, step, scales);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (!owns(i)) continue;
      dev::Bits128* to = tile + part_at(line + i * kApart, kParts, part);
      if constexpr (!kScaled && kSame<S, Element>) {
        *to = held[i].part[0];
        continue;
      }
      float values[8];
      widen_eight(held[i], values);
      if constexpr (kScaled) {
#pragma unroll
        for (int j = 0; j < 8; ++j) values[j] = __fmul_rn(values[j], scales[kTransposed ? i : j]);
      }
      store_planes<Element, kPlanes>(values, to, kPlane);
    }
  }
};

// Four codes, one in the low bits of each byte, as four numbers -1, 0, 1. Bytes are looked up: of 1.0 and its negative
// only the sign differs, and the byte below is the same.
template <class Element>
PYOPS_DEVICE uint64_t decode_four(uint32_t codes) {
  constexpr bool wide_exponent = kSame<Element, bfloat16>;
  constexpr uint32_t upper = wide_exponent ? 0x003f00bfu : 0x003c00bcu, lower = wide_exponent ? 0x00800080u : 0u;
  const uint32_t selector = codes * 0x11u + 0x04040404u;
  return uint64_t(__byte_perm(upper, lower, selector >> 16)) << 32 | __byte_perm(upper, lower, selector & 0xffffu);
}

// Packed weights as the right operand. A row of T is a column of C and lines are rows of T (kTransposed: a row of T is
// a k, and so are lines).
template <class Element, bool kTransposed>
struct TernaryTile {
  static constexpr int kParts = (kTransposed ? kProductColumns : kProductDepth) / 8;
  static constexpr int kBytes = kProductColumns * kProductDepth * 2;

  uint64_t held;           // two k-tiles of a lane
  const uint64_t* source;  // at step 0
  int64_t left;            // rows of T at step 0 that exist, from the warp's on; 0 if its columns do not

  // The warp's 16 rows and 64 columns within the tile, which is 128 x 64 or 64 x 128.
  PYOPS_DEVICE static int own_row() { return int(threadIdx.x) / 32 / (kTransposed ? 2 : 1) * 16; }
  PYOPS_DEVICE static int own_column() { return kTransposed ? int(threadIdx.x) / 32 % 2 * 64 : 0; }

  PYOPS_DEVICE TernaryTile(const FloatProduct& p, int64_t first_column) {
    const int64_t row = own_row() + (kTransposed ? 0 : first_column);
    const int64_t column = own_column() + (kTransposed ? first_column : 0);
    source = static_cast<const uint64_t*>(p.right) + (row / 16 * p.right_stride + column / 128) * 64 +
             column % 128 / 64 + dev::lane() * 2;
    left = (kTransposed ? p.reduction : p.columns) - row;
  }

  PYOPS_DEVICE void fetch(const FloatProduct& p, int64_t step) {
    held = 0x5555555555555555ull;  // zeros
    if constexpr (kTransposed) {
      if (step * kProductDepth < left) held = source[step * (kProductDepth / 16 * 64) * p.right_stride];
    } else {
      if (left > 0) held = source[step / 2 * 64 + step % 2];
    }
  }

  PYOPS_DEVICE void put(dev::Bits128* tile) const {
    const int group = dev::lane() / 4, quarter = dev::lane() % 4;
#pragma unroll
    for (int word = 0; word < 2; ++word) {
#pragma unroll
      for (int field = 0; field < 4; ++field) {
        const int line = own_row() + group + 8 * (field & 1);
        const int column = own_column() + 32 * word + 16 * (field >> 1) + 4 * quarter;
        auto* half = reinterpret_cast<uint64_t*>(tile + part_at(line, kParts, column / 8)) + quarter % 2;
        *half = decode_four<Element>(uint32_t(held >> 32 * word) >> 2 * field & 0x03030303u);
      }
    }
  }
};

// Two signed bytes of a word that had its signs flipped, as bfloat16: 2^23 + byte is exact in a float, and so is what
// is left of it without 2^23 + 128.
PYOPS_DEVICE uint32_t two_bytes(uint32_t word, int first) {
  float values[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    values[i] = __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7440u + unsigned(first + i))) - 8388736.0f;
  }
  return __byte_perm(__float_as_uint(values[0]), __float_as_uint(values[1]), 0x7632u);
}

// Bytes as the right operand: lines of k.
struct ByteTile {
  static constexpr int kParts = kProductColumns / 8, kBytes = kProductColumns * kProductDepth * 2;
  static constexpr int kOwn = kProductDepth * kParts / kProductThreads;

  static constexpr int kApart = kProductThreads / kParts;

  uint64_t held[kOwn];
  const uint8_t* source;  // of the first line at step 0
  int64_t left;           // lines at step 0, from the first on; 0 if the columns do not exist

  PYOPS_DEVICE ByteTile(const FloatProduct& p, int64_t first_column) {
    const int64_t line = int(threadIdx.x) / kParts, column = first_column + int(threadIdx.x) % kParts * 8;
    source = static_cast<const uint8_t*>(p.right) + line * p.right_stride + column;
    left = column < p.columns ? p.reduction - line : 0;
  }

  PYOPS_DEVICE void fetch(const FloatProduct& p, int64_t step) {
    const uint8_t* first = source + step * kProductDepth * p.right_stride;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      held[i] = 0;
      if (step * kProductDepth + i * kApart < left) {
        held[i] = *reinterpret_cast<const uint64_t*>(first + i * kApart * p.right_stride);
      }
    }
  }

  PYOPS_DEVICE void put(dev::Bits128* tile) const {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int at = i * kProductThreads + int(threadIdx.x);
      const uint64_t bits = held[i] ^ 0x8080808080808080ull;
      const uint32_t low = uint32_t(bits), high = uint32_t(bits >> 32);
      tile[part_at(at / kParts, kParts, at % kParts)] = {
          {two_bytes(low, 0), two_bytes(low, 2), two_bytes(high, 0), two_bytes(high, 2)}};
    }
  }
};

// ---- the product -----------------------------------------------------------------------------------------

// What becomes of the sums of a column, in shared memory.
struct ColumnTerms {
  float factor[kProductColumns], bias[kProductColumns];
};

// Left and Right say what the operands are; kGrouped: `factor` changes every kTernaryGroup k.
template <class Element_, class Left_, class Right_, int kPlanes_, int kRows_, bool kLeftTransposed_,
          bool kRightTransposed_, bool kGrouped_>
struct Product {
  using Element = Element_;
  using Left = Left_;
  using Right = Right_;
  static constexpr int kPlanes = kPlanes_, kRows = kRows_;
  static constexpr bool kLeftTransposed = kLeftTransposed_, kRightTransposed = kRightTransposed_;
  static constexpr bool kGrouped = kGrouped_;
  static constexpr int kRowWarps = kRows >= 64 ? 2 : 1, kColumnWarps = kProductWarps / kRowWarps;
  static constexpr int kRowTiles = kRows / kRowWarps / 16, kWarpColumns = kProductColumns / kColumnWarps;
  static constexpr int kColumnTiles = kWarpColumns / 8;
  // Of a step's matrix instructions along k: the addresses of all would not fit the registers that two blocks leave.
  static constexpr int kUnrolled = kRightTransposed ? kProductDepth / 16 : 2;
  static constexpr int kStagedRow = kWarpColumns + 8;  // floats; 8 more spread the fragments' rows
  static constexpr int kStagedBytes = kProductWarps * 16 * kStagedRow * 4 + int(sizeof(ColumnTerms));
  static constexpr int kTileBytes = Left::kBytes + Right::kBytes;
  static constexpr int kSharedBytes = kTileBytes > kStagedBytes ? kTileBytes : kStagedBytes;
};

template <class P>
using ProductSums = float[P::kRowTiles][P::kColumnTiles][4];

template <class P>
PYOPS_DEVICE void load_left(const dev::Bits128* tile, int row, int depth, uint32_t (&a)[4]) {
  const int lane = dev::lane();
  if constexpr (P::kLeftTransposed) {
    const int line = depth + 8 * (lane / 16) + lane % 8;
    dev::ldmatrix_x4_trans(a, tile + part_at(line, P::Left::kParts, row / 8 + lane / 8 % 2));
  } else {
    dev::ldmatrix_x4(a, tile + part_at(row + lane % 16, P::Left::kParts, depth / 8 + lane / 16));
  }
}

// Fragments of 16 columns.
template <class P>
PYOPS_DEVICE void load_right(const dev::Bits128* tile, int column, int depth, uint32_t (&b)[4]) {
  const int lane = dev::lane();
  if constexpr (P::kRightTransposed) {
    dev::ldmatrix_x4_trans(b, tile + part_at(depth + lane % 16, P::Right::kParts, column / 8 + lane / 16));
  } else {
    const int line = column + 8 * (lane / 16) + lane % 8;
    dev::ldmatrix_x4(b, tile + part_at(line, P::Right::kParts, depth / 8 + lane / 8 % 2));
  }
}

template <class P>
PYOPS_DEVICE void multiply_tiles(const dev::Bits128* left, const dev::Bits128* right, int row, int column,
                                 ProductSums<P>& sums) {
#pragma unroll P::kUnrolled
  for (int depth = 0; depth < kProductDepth; depth += 16) {
    uint32_t b[P::kColumnTiles][2];
#pragma unroll
    for (int tile = 0; tile < P::kColumnTiles; tile += 2) {
      uint32_t both[4];
      load_right<P>(right, column + 8 * tile, depth, both);
      b[tile][0] = both[0];
      b[tile][1] = both[1];
      b[tile + 1][0] = both[2];
      b[tile + 1][1] = both[3];
    }
#pragma unroll
    for (int plane = 0; plane < P::kPlanes; ++plane) {
#pragma unroll
      for (int i = 0; i < P::kRowTiles; ++i) {
        uint32_t a[4];
        load_left<P>(left + plane * P::Left::kPlane, row + 16 * i, depth, a);
#pragma unroll
        for (int j = 0; j < P::kColumnTiles; ++j) multiply_accumulate(sums[i][j], a, b[j], typename P::Element{});
      }
    }
  }
}

// totals += factor * sums, and the next group starts at 0.
template <class P>
PYOPS_DEVICE void add_product_group(const FloatProduct& p, int64_t column, int64_t group, ProductSums<P>& sums,
                                    ProductSums<P>& totals) {
#pragma unroll
  for (int j = 0; j < P::kColumnTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int64_t c = column + 8 * j + 2 * (dev::lane() % 4) + e % 2;
      const float factor = c < p.columns ? p.factor[c * p.factor_stride + group] : 0.0f;
#pragma unroll
      for (int i = 0; i < P::kRowTiles; ++i) {
        totals[i][j][e] += factor * sums[i][j][e];
        sums[i][j][e] = 0;
      }
    }
  }
}

template <class P>
PYOPS_DEVICE void load_terms(const FloatProduct& p, int64_t first_column, ColumnTerms& terms) {
  const int own = int(threadIdx.x);
  const int64_t column = first_column + own;
  if (own >= kProductColumns || column >= p.columns) return;
  terms.factor[own] = !P::kGrouped && p.factor ? p.factor[column * p.factor_stride] : 1.0f;
  terms.bias[own] = p.bias ? load_element(p.bias, p.bias_dtype, column) : 0.0f;
}

// 16 rows of a warp's results through its own part of shared memory, to rows of eight. `own_column` is the warp's first
// in the tile.
template <class P>
PYOPS_DEVICE void store_rows(const FloatProduct& p, const float (&sums)[P::kColumnTiles][4], const ColumnTerms& terms,
                             int64_t first_row, int64_t first_column, int own_column, float* staged) {
  const int lane = dev::lane();
#pragma unroll
  for (int j = 0; j < P::kColumnTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      staged[(lane / 4 + 8 * (e / 2)) * P::kStagedRow + 8 * j + 2 * (lane % 4) + e % 2] = sums[j][e];
    }
  }
  __syncwarp();
  constexpr int per_row = P::kWarpColumns / 8;
#pragma unroll 1
  for (int vector = lane; vector < 16 * per_row; vector += 32) {
    const int own = own_column + vector % per_row * 8;
    const int64_t row = first_row + vector / per_row, column = first_column + own, valid = p.columns - column;
    if (row >= p.rows || valid <= 0) continue;
    const float* from = staged + vector / per_row * P::kStagedRow + vector % per_row * 8;
    float values[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      values[i] = i < valid ? __fmul_rn(from[i], terms.factor[own + i]) : 0.0f;
      if (p.bias && i < valid) values[i] = __fadd_rn(values[i], terms.bias[own + i]);
    }
    store_eight(values, p.out, p.out_dtype, row * p.columns + column, valid);
  }
  __syncwarp();
}

template <class P>
__global__ void __launch_bounds__(kProductThreads, P::kGrouped ? 1 : 2) float_product_kernel(FloatProduct p) {
  PYOPS_DYN_SHARED(dev::Bits128, memory);
  dev::Bits128 *left_tile = memory, *right_tile = memory + P::Left::kBytes / 16;
  const int64_t row_tiles = ceil_div(p.rows, P::kRows);  // neighbours share the right operand
  const int64_t first_row = blockIdx.x % row_tiles * P::kRows;
  const int64_t first_column = blockIdx.x / row_tiles * kProductColumns;
  const int warp = int(threadIdx.x) / 32;
  const int row = warp % P::kRowWarps * (16 * P::kRowTiles), column = warp / P::kRowWarps * P::kWarpColumns;
  const int64_t steps = ceil_div(p.reduction, kProductDepth);

  typename P::Left left(p, first_row);
  typename P::Right right(p, first_column);
  ProductSums<P> sums = {}, totals = {};
  if (steps > 0) {
    left.fetch(p, 0);
    right.fetch(p, 0);
  }
  for (int64_t step = 0; step < steps; ++step) {
    left.put(p, first_column, step, left_tile);
    right.put(right_tile);
    __syncthreads();
    if (step + 1 < steps) {
      left.fetch(p, step + 1);
      right.fetch(p, step + 1);
    }
    multiply_tiles<P>(left_tile, right_tile, row, column, sums);
    if constexpr (P::kGrouped) {
      constexpr int group_steps = kTernaryGroup / kProductDepth;
      if (step % group_steps == group_steps - 1) {
        add_product_group<P>(p, first_column + column, step / group_steps, sums, totals);
      }
    }
    __syncthreads();
  }

  auto* terms = reinterpret_cast<ColumnTerms*>(reinterpret_cast<float*>(memory) + kProductWarps * 16 * P::kStagedRow);
  load_terms<P>(p, first_column, *terms);
  __syncthreads();
  float* staged = reinterpret_cast<float*>(memory) + warp * 16 * P::kStagedRow;
#pragma unroll
  for (int i = 0; i < P::kRowTiles; ++i) {
    store_rows<P>(p, P::kGrouped ? totals[i] : sums[i], *terms, first_row + row + 16 * i, first_column, column, staged);
  }
}

template <class P>
int launch_product(const FloatProduct& p, void* stream) {
  const int64_t tiles = ceil_div(p.rows, P::kRows) * ceil_div(p.columns, kProductColumns);
  return PYOPS_LAUNCH(float_product_kernel<P>, unsigned(tiles), kProductThreads, P::kSharedBytes, stream, p);
}

// Numbers of type S times packed weights; rows of C are lines of the numbers.
template <class S, class Element, int kPlanes, int kRows, bool kTransposed, bool kScaled, bool kGrouped = false>
using TernaryProduct = Product<Element, LeftTile<S, Element, kPlanes, kRows, false, kScaled>,
                               TernaryTile<Element, kTransposed>, kPlanes, kRows, false, kTransposed, kGrouped>;

// With few rows a tile of 16, else the largest with registers for two blocks.
template <class S, class Element, int kPlanes, bool kTransposed, bool kScaled>
int launch_ternary_product(const FloatProduct& p, void* stream) {
  constexpr int rows = kPlanes == 1 && !kScaled ? 128 : 64;
  if (p.rows <= 16) return launch_product<TernaryProduct<S, Element, kPlanes, 16, kTransposed, kScaled>>(p, stream);
  return launch_product<TernaryProduct<S, Element, kPlanes, rows, kTransposed, kScaled>>(p, stream);
}

}  // namespace
}  // namespace pyops
