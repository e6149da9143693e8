// y = x_q (T gamma)^T + bias for up to four tokens, bound by the stream of weights.
//
// Tiling: a block owns 16 rows of T and a range of in_features (all of them, unless there are few rows), a warp every
// eighth chunk of 128. A lane reads 16 bytes of a chunk, 64 weights: fields of two bits, of which `field & 0x03030303`
// is four weights of a row, the operand of one dp4a. Weights are asked for four chunks ahead, the first before anything
// else, so that memory works while the block prepares the tokens.
//
// Tokens lie in shared memory in the order in which lanes want them: of a chunk, lane % 4 finds its 32 bytes in one
// place. A single token is rounded to 8 bits by every block itself, which is cheaper than a launch in front; several
// come rounded.
//
// Sums are int32 and exact: codes 0, 1, 2 are summed, and the sum of the token's bytes is subtracted at the end. Lanes
// are added by shuffles, warps through shared memory, splits by finish_kernel.
#include "activation_quantizer.cuh"
#include "ternary_output.cuh"

namespace pyops {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps, kRows = 16, kAhead = 4;
constexpr int64_t kSharedBytes = 64 << 10;  // of tokens; three blocks fit a multiprocessor
constexpr int64_t kFilled = 128;            // blocks that give every multiprocessor work

// Words of a token: chunk, lane % 4, k-tile, half of the k-tile.
PYOPS_DEVICE int word_place(int chunk, int quarter, int tile, int half) {
  return ((chunk * 4 + quarter) * 4 + tile) * 2 + half;
}
constexpr int kChunkWords = 32;

// The bytes of the range of one token to shared memory; returns this thread's share of their sum.
PYOPS_DEVICE int take_quantized(const TernaryLinear& a, int64_t token, const Split& chunks, uint32_t* words) {
  int sum = 0;
  const int vectors = (chunks.end - chunks.begin) * 8;
  for (int vector = int(threadIdx.x); vector < vectors; vector += kThreads) {
    const int64_t column = chunks.begin * int64_t(128) + vector * 16;
    dev::Bits128 bits = {};
    if (token < a.tokens && column < a.width) bits = dev::ldg128(a.quantized + token * a.width + column);
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
      words[word_place(vector / 8, quarter, vector / 2 % 4, vector % 2)] = bits.word[quarter];
      sum = dev::dp4a(bits.word[quarter], kOnes, sum);
    }
  }
  return sum;
}

// A vector of columns of the range, rounded, to shared memory, from `at` in it on; returns their sum.
template <class T>
PYOPS_DEVICE int put_vector(const dev::Bits128& bits, const Quantizer& quantizer, int at, uint32_t* words) {
  float values[dev::kVectorElements<T>];
  widen_vector<T>(bits, values);
  int sum = 0;
#pragma unroll
  for (int i = 0; i < dev::kVectorElements<T>; i += 4) {
    const uint32_t word = quantize_four(values + i, quantizer);
    words[word_place(at / 128, (at + i) / 4 % 4, at / 32 % 4, at / 16 % 2)] = word;
    sum = dev::dp4a(word, kOnes, sum);
  }
  return sum;
}

// The same of a token in floating point, whose largest magnitude is needed first: it is read once, up to what 20
// registers of each thread hold.
template <class T>
PYOPS_DEVICE int take_floats(const TernaryLinear& a, const Split& chunks, uint32_t* words, uint32_t* scratch,
                             float* step) {
  constexpr int kHeld = 5, width = dev::kVectorElements<T>, stride = kThreads * width;
  const T* x = static_cast<const T*>(a.x);
  const int columns = int(a.in_features), own = int(threadIdx.x) * width, begin = chunks.begin * 128;
  dev::Bits128 held[kHeld];
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int column = own + i * stride;
    held[i] = column < columns ? dev::ldg128(x + column) : dev::Bits128{};
    largest = largest_magnitude<T>(held[i], largest);
  }
  for (int column = own + kHeld * stride; column < columns; column += stride) {
    largest = largest_magnitude<T>(dev::ldg128(x + column), largest);
  }
  const Quantizer quantizer = quantizer_of(reduce_block(largest, scratch, Larger{}), a.qmax, a.eps);
  if (threadIdx.x == 0) *step = quantizer.step;

  int sum = 0;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int column = own + i * stride;
    if (column < begin || column >= chunks.end * 128) continue;
    sum += put_vector<T>(held[i], quantizer, column - begin, words);
  }
  for (int column = own + kHeld * stride; column < chunks.end * 128; column += stride) {
    if (column < begin) continue;
    const dev::Bits128 bits = column < columns ? dev::ldg128(x + column) : dev::Bits128{};
    sum += put_vector<T>(bits, quantizer, column - begin, words);
  }
  return sum;
}

// 16 bytes of weights of a lane times the tokens of their chunk; sums of rows lane / 4 and, times 4, lane / 4 + 8.
template <int kTokens>
PYOPS_DEVICE void multiply_chunk(const dev::Bits128& weights, const uint32_t* words, int token_words,
                                 int (&sums)[kTokens][2]) {
  uint32_t codes[4][4];
#pragma unroll
  for (int tile = 0; tile < 4; ++tile) decode_codes(weights.word[tile], codes[tile]);
#pragma unroll
  for (int token = 0; token < kTokens; ++token) {
    const auto* q = reinterpret_cast<const dev::Bits128*>(words + token * token_words);
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      const dev::Bits128 bytes = q[pair];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t (&c)[4] = codes[2 * pair + i];
        const uint32_t low = bytes.word[2 * i], high = bytes.word[2 * i + 1];
        sums[token][0] = dev::dp4a(c[2], high, dev::dp4a(c[0], low, sums[token][0]));
        sums[token][1] = dev::dp4a(c[3], high, dev::dp4a(c[1], low, sums[token][1]));
      }
    }
  }
}

// T is int8_t for tokens that come rounded.
template <int kTokens, class T>
__global__ void __launch_bounds__(kThreads, 3) vector_kernel(TernaryLinear a) {
  PYOPS_DYN_SHARED(uint32_t, words);
  PYOPS_SHARED(uint32_t, magnitudes, kWarps);
  PYOPS_SHARED(int, byte_sums, kTokens* kWarps);
  PYOPS_SHARED(float, step, 1);
  PYOPS_SHARED(int, row_sums, kWarps * kTokens * kRows);
  const int lane = dev::lane(), warp = int(threadIdx.x) / 32;
  const int64_t all_chunks = ceil_div(a.in_features, 128), first_row = int64_t(blockIdx.x) * kRows;
  const Split chunks = split_of(int(all_chunks), int(blockIdx.y), a.splits);
  const int count = chunks.end - chunks.begin, token_words = count * kChunkWords;

  const uint8_t* weights = a.packed + ((blockIdx.x * all_chunks + chunks.begin) * 32 + lane) * 16;
  dev::Bits128 ahead[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    const int chunk = warp + i * kWarps;
    if (chunk < count) ahead[i] = dev::ldg128(weights + int64_t(chunk) * 512);
  }

  int byte_sum[kTokens];
#pragma unroll
  for (int token = 0; token < kTokens; ++token) {
    if constexpr (sizeof(T) == 1) {
      byte_sum[token] = take_quantized(a, token, chunks, words + token * token_words);
    } else {
      byte_sum[token] = take_floats<T>(a, chunks, words, magnitudes, step);
    }
    byte_sum[token] = reduce_block(byte_sum[token], byte_sums + token * kWarps, Sum{});  // and a barrier for `words`
  }

  int sums[kTokens][2] = {};
  for (int first = warp; first < count; first += kAhead * kWarps) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int chunk = first + i * kWarps, next = chunk + kAhead * kWarps;
      if (chunk < count) {
        multiply_chunk<kTokens>(ahead[i], words + word_place(chunk, lane % 4, 0, 0), token_words, sums);
        if (next < count) ahead[i] = dev::ldg128(weights + int64_t(next) * 512);
      }
    }
  }

#pragma unroll
  for (int token = 0; token < kTokens; ++token) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int sum = half ? sums[token][1] >> kUpperRowsShift : sums[token][0];
      sum += __shfl_xor_sync(dev::kFullWarp, sum, 1);
      sum += __shfl_xor_sync(dev::kFullWarp, sum, 2);
      if (lane % 4 == 0) row_sums[(warp * kTokens + token) * kRows + lane / 4 + 8 * half] = sum;
    }
  }
  __syncthreads();
  const int token = int(threadIdx.x) / kRows, row = int(threadIdx.x) % kRows;
  const int64_t n = first_row + row, at = token * a.out_features + n;
  if (token >= kTokens || token >= a.tokens || n >= a.out_features) return;
  int sum = 0;
#pragma unroll
  for (int other = 0; other < kTokens; ++other) sum = other == token ? -byte_sum[other] : sum;
  for (int other = 0; other < kWarps; ++other) sum += row_sums[(other * kTokens + token) * kRows + row];
  const float own_step = sizeof(T) == 1 ? a.output.step[token] : *step;
  if (a.splits == 1) {
    finish_one(a.output, sum, own_step, at, n);
  } else {
    a.partial[blockIdx.y * a.tokens * a.out_features + at] = sum;
    if (sizeof(T) != 1 && blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) *a.step_of_split = own_step;
  }
}

__global__ void __launch_bounds__(kThreads) finish_kernel(TernaryLinear a) {
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x, outputs = a.tokens * a.out_features;
  if (at >= outputs) return;
  int sum = 0;
  for (int split = 0; split < a.splits; ++split) sum += a.partial[split * outputs + at];
  const int64_t token = at / a.out_features;
  finish_one(a.output, sum, a.output.step[token], at, at - token * a.out_features);
}

template <int kTokens, class T>
int launch_vector(const TernaryLinear& a, void* stream) {
  const int64_t chunks = ceil_div(ceil_div(a.in_features, 128), a.splits);
  const dim3 grid(unsigned(ceil_div(a.out_features, kRows)), unsigned(a.splits));
  const size_t shared = size_t(chunks * kChunkWords * 4 * kTokens);
  return PYOPS_LAUNCH((vector_kernel<kTokens, T>), grid, kThreads, shared, stream, a);
}

}  // namespace
}  // namespace pyops

using namespace pyops;

// One where rows alone give enough blocks. A warp of a split keeps two chunks or more; a range fits shared memory.
extern "C" int64_t pyops_ternary_linear_vector_splits(const TernaryLinear* arguments) {
  const TernaryLinear& a = *arguments;
  const int64_t chunks = ceil_div(a.in_features, 128), blocks = ceil_div(a.out_features, kRows);
  const int64_t wanted = ceil_div(kFilled, blocks), most = ceil_div(chunks, 2 * kWarps);
  const int64_t tokens = a.tokens > 2 ? 4 : a.tokens, fewest = ceil_div(chunks, kSharedBytes / (128 * tokens));
  const int64_t splits = wanted < most ? wanted : most;
  return splits > fewest ? splits : fewest > 0 ? fewest : 1;
}

extern "C" int pyops_ternary_linear_finish(const TernaryLinear* arguments, void* stream) {
  const int64_t outputs = arguments->tokens * arguments->out_features;
  return PYOPS_LAUNCH(finish_kernel, unsigned(ceil_div(outputs, kThreads)), kThreads, 0, stream, *arguments);
}

extern "C" int pyops_ternary_linear_vector(const TernaryLinear* arguments, void* stream) {
  TernaryLinear a = *arguments;
  int error = 0;
  if (a.rounds) {
    error = with_element_type(a.x_dtype, [&](auto element) { return launch_vector<1, decltype(element)>(a, stream); });
    a.output.step = a.step_of_split;
  } else {
    error = a.tokens == 1   ? launch_vector<1, int8_t>(a, stream)
            : a.tokens == 2 ? launch_vector<2, int8_t>(a, stream)
                            : launch_vector<4, int8_t>(a, stream);
  }
  return error || a.splits == 1 ? error : pyops_ternary_linear_finish(&a, stream);
}
