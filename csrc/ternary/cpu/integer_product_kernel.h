// Products of ternary codes with 8-bit activations, exact in int32: plain pointers, one table per ISA level.
//
// A unit is two row groups of 16 output features. Accumulators are int32 [tokens][32], a token's 32 rows side by
// side; what a kernel adds is sum over k of code * q, the codes being t + 1: subtract sum q for sum t * q.
#pragma once

#include "../../common/dtype.h"

namespace pyops {

constexpr int kGroupRows = 16;
constexpr int kUnitRows = 2 * kGroupRows;
constexpr int kLineBytes = 64;  // 16 rows x 16 k in t2x16, 16 rows x 20 k in t5x16
constexpr int kGemvTokens = 3;  // up to here the weights' bytes are what counts
constexpr int kMostTileTokens = 12;

struct IntegerProductKernels {
  // One row group in the packed layout (lines of t2x16 or t5x16) times up to kGemvTokens tokens; `q` rows are padded
  // with zeros to whole chunks. Adds into acc. gemv_t5 is null where unpacking first is as good.
  void (*gemv_t2)(const uint8_t* lines, int64_t chunks, const int8_t* q, int64_t q_stride, int tokens, int32_t* acc);
  void (*gemv_t5)(const uint8_t* lines, int64_t chunks, const int8_t* q, int64_t q_stride, int tokens, int32_t* acc);
  // `count` <= 32 rows of t2 or t5 as they lie times up to kGemvTokens tokens, whose q lie in planes [tokens][field of
  // a byte][plane_bytes], padded with zeros to whole lines of bytes. Adds into acc; false if something stands for no
  // weight. Null where bringing rows into lines first is as good.
  bool (*gemv_rows)(bool fives, const uint8_t* rows, int64_t count, int64_t in_features, const int8_t* planes,
                    int64_t plane_bytes, int tokens, int32_t* acc);
  // Lines as bytes: codes [k / 4][16 rows][4 k], 4 steps of 4 k a line of t2x16, 5 of t5x16. decode_t5 is null where
  // gemv_t5 is.
  void (*decode_t2)(const uint8_t* lines, int64_t chunks, uint8_t* codes);
  void (*decode_t5)(const uint8_t* lines, int64_t chunks, uint8_t* codes);
  // A unit times up to tile_tokens tokens, whose q lie as panel [k / 4][tokens][4]. `second` may be null: 16 rows.
  // From t2x16 lines (one use of the weights) or from decoded codes (several). Adds into acc.
  void (*tile_lines)(const uint8_t* first, const uint8_t* second, int64_t chunks, const int8_t* panel, int tokens,
                     int32_t* acc);
  void (*tile_codes)(const uint8_t* first, const uint8_t* second, int64_t steps, const int8_t* panel, int tokens,
                     int32_t* acc);
  int tile_tokens;
  // out[r] = float(acc[r] - sum) * (step * gamma[r]) + bias[r], by DType of the output; bias may be null.
  void (*finish[4])(const int32_t* acc, int32_t sum, float step, const float* gamma, const float* bias, int64_t rows,
                    void* out);
  // value[r] += float(acc[r] - sum) * gamma[r]: one group of 256 k.
  void (*add_group)(const int32_t* acc, int32_t sum, const float* gamma, int64_t rows, float* value);
  // out[r] = step * value[r] + bias[r].
  void (*finish_groups[4])(const float* value, float step, const float* bias, int64_t rows, void* out);
};

namespace baseline {
extern const IntegerProductKernels integer_product_kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const IntegerProductKernels integer_product_kernels;
}
namespace avxvnni {
extern const IntegerProductKernels integer_product_kernels;
}
namespace avx512 {
extern const IntegerProductKernels integer_product_kernels;
}
namespace avx512vnni {
extern const IntegerProductKernels integer_product_kernels;
}
#endif

}  // namespace pyops
