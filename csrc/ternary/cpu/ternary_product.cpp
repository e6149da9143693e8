// Products over row groups of ternary weights: what is shared by ternary_linear and bitlinear on the CPU.
#include "ternary_product.h"

#include <atomic>
#include <cstring>
#include <limits>

namespace pyops {
namespace {

int64_t at_least_1(int64_t value) { return value > 1 ? value : 1; }

// Items per thread that make its start worth while, an item being `work` multiplications.
int64_t grain(int64_t work) { return at_least_1((int64_t(1) << 20) / at_least_1(work)); }

template <class T>
const T* pointer(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

char* row_of(const Tensor& tensor, DType dtype, int64_t row, int64_t stride, int64_t column) {
  return static_cast<char*>(tensor.mutable_data_ptr()) + (row * stride + column) * element_bytes(dtype);
}

const char* const_row_of(const Tensor& tensor, DType dtype, int64_t row, int64_t stride, int64_t column) {
  return static_cast<const char*>(tensor.const_data_ptr()) + (row * stride + column) * element_bytes(dtype);
}

// gamma and bias of 32 output features as floats, padded: gamma [32] (or [groups][32]), bias [32] or null.
struct UnitScales {
  Scratch<float> gamma;
  float bias_values[kUnitRows];
  const float* bias = nullptr;
  int64_t groups;

  explicit UnitScales(int64_t groups_) : gamma(groups_ * kUnitRows), groups(groups_) {}

  void load(const LinearArguments& arguments, const Tensor& all_gamma, const OptionalTensor& all_bias, int64_t begin,
            int64_t rows) {
    const float* values = pointer<float>(all_gamma);
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t r = 0; r < kUnitRows; ++r) {
        const int64_t n = begin + (r < rows ? r : rows - 1);
        gamma[g * kUnitRows + r] = arguments.granularity == Granularity::tensor ? values[0] : values[n * groups + g];
      }
    }
    if (!all_bias) return;
    for (int64_t r = 0; r < kUnitRows; ++r) {
      bias_values[r] = r < rows ? float(read_element(all_bias->const_data_ptr(), arguments.dtype, begin + r)) : 0;
    }
    bias = bias_values;
  }
};

// The lines of two row groups: where they lie, or unpacked into lines of t2x16 in scratch. With `fives` lines of t5x16
// are used as they lie.
class UnitLines {
 public:
  UnitLines(const LinearArguments& arguments, const Tensor& packed, std::atomic<bool>& bad, bool fives = false)
      : arguments_(arguments),
        packed_(pointer<uint8_t>(packed)),
        bad_(bad),
        kernels_(PYOPS_SELECT(repack_kernels)),
        bytes_(ceil_div(arguments.in_features, fives ? 20 : 16) * kLineBytes),
        direct_(fives || arguments.format == TernaryFormat::t2x16),
        unpacked_(direct_ ? 0 : 2 * bytes_) {}

  // Of row group `group` and the one after it; the second is null past the last.
  void load(int64_t group) {
    const int64_t groups = ceil_div(arguments_.out_features, kGroupRows);
    for (int i = 0; i < 2; ++i) {
      lines[i] = group + i >= groups ? nullptr : direct_ ? packed_ + (group + i) * bytes_ : unpack(group + i, i);
    }
  }

  const uint8_t* lines[2];

 private:
  const uint8_t* unpack(int64_t group, int slot) {
    uint8_t* out = unpacked_.get() + slot * bytes_;
    const bool easy = arguments_.format == TernaryFormat::t2 || arguments_.format == TernaryFormat::t5 ||
                      arguments_.format == TernaryFormat::t5x16;
    if (easy) {
      if (!kernels_.lines(arguments_.format, packed_, arguments_.out_features, arguments_.in_features, group, out)) {
        bad_.store(true, std::memory_order_relaxed);
      }
      return out;
    }
    const int64_t padded = ceil_div(arguments_.in_features, 16) * 16;
    Scratch<uint8_t> codes(padded);
    for (int64_t r = 0; r < kGroupRows; ++r) {
      std::memset(codes.get(), 1, size_t(padded));
      const int64_t n = group * kGroupRows + r;
      if (n < arguments_.out_features) {
        kernels_.read_row(arguments_.format, packed_, arguments_.in_features, n, codes.get());
        for (int64_t k = 0; k < arguments_.in_features; ++k) {
          if (codes[k] > 2) {
            bad_.store(true, std::memory_order_relaxed);
            codes[k] = 1;
          }
        }
      }
      kernels_.write_row(TernaryFormat::t2x16, codes.get(), arguments_.in_features, r, out);
    }
    return out;
  }

  const LinearArguments& arguments_;
  const uint8_t* packed_;
  std::atomic<bool>& bad_;
  const RepackKernels& kernels_;
  int64_t bytes_;
  bool direct_;
  Scratch<uint8_t> unpacked_;
};

// Tokens cut into tiles of nearly equal size.
struct Tiles {
  int64_t tokens, count;
  Tiles(int64_t tokens_, int most) : tokens(tokens_), count(ceil_div(tokens_, most)) {}
  int64_t begin(int64_t tile) const { return tile * (tokens / count) + std::min(tile, tokens % count); }
  int size(int64_t tile) const { return int(begin(tile + 1) - begin(tile)); }
};

// The integers of all tokens in the order in which they are used: blocks of steps of 4 k, in each the tiles, in each
// [step][tokens of the tile][4]; k is padded with zeros to chunks.
class TokenPanels {
 public:
  TokenPanels(const QuantizedTokens& tokens, const Tiles& tiles, int64_t in_features, int64_t chunk = 16,
              int64_t block_steps = std::numeric_limits<int64_t>::max())
      : steps_(ceil_div(in_features, chunk) * (chunk / 4)),
        block_(std::min(block_steps, at_least_1(steps_))),
        panels_(tiles.tokens * steps_ * 4),
        tiles_(tiles) {
    torch::stable::parallel_for(0, tiles.count, grain(in_features * 16), [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) {
        for (int64_t step = 0; step < steps_; step += block_) fill(tokens, tile, step, in_features);
      }
    });
  }
  // The panel of a tile that begins with `step`, the first of a block.
  const int8_t* at(int64_t tile, int64_t step = 0) const { return panels_.get() + place(tile, step); }

 private:
  int64_t place(int64_t tile, int64_t step) const {
    return (step * tiles_.tokens + tiles_.begin(tile) * std::min(block_, steps_ - step)) * 4;
  }

  void fill(const QuantizedTokens& tokens, int64_t tile, int64_t begin, int64_t in_features) {
    const int64_t size = tiles_.size(tile), end = std::min(begin + block_, steps_);
    const int64_t whole = std::clamp(in_features / 4, begin, end), last = in_features % 4;
    int8_t* panel = panels_.get() + place(tile, begin);
    const int8_t* q = tokens.q + tiles_.begin(tile) * tokens.stride;
    for (int64_t s = begin; s < whole; ++s) {
      for (int64_t t = 0; t < size; ++t, panel += 4) std::memcpy(panel, q + t * tokens.stride + 4 * s, 4);
    }
    std::memset(panel, 0, size_t((end - whole) * size * 4));
    if (last == 0 || whole == end || whole != in_features / 4) return;
    for (int64_t t = 0; t < size; ++t) std::memcpy(panel + 4 * t, q + t * tokens.stride + 4 * whole, size_t(last));
  }

  int64_t steps_, block_;
  Scratch<int8_t> panels_;
  Tiles tiles_;
};

// One call of integer_product: what all units need.
struct IntegerCall {
  const LinearArguments& arguments;
  const QuantizedTokens& tokens;
  const Tensor& packed;
  const Tensor& gamma;
  const OptionalTensor& bias;
  const Tensor& y;
  const IntegerProductKernels& kernels;
  // Asked for once: mutable_data_ptr and element_bytes per token and unit took 4 % of M = 128 at 2560 x 2560.
  char* const outputs = static_cast<char*>(y.mutable_data_ptr());
  const int64_t output_bytes = element_bytes(arguments.out_dtype);
  std::atomic<bool> bad{false};

  char* output(int64_t token, int64_t begin) const {
    return outputs + (token * arguments.out_features + begin) * output_bytes;
  }
  int64_t units() const { return ceil_div(arguments.out_features, kUnitRows); }
  bool canonical() const { return arguments.format == TernaryFormat::t2 || arguments.format == TernaryFormat::t5; }
  // Whether weights in t5x16 are used as they lie.
  bool fives() const { return arguments.format == TernaryFormat::t5x16 && kernels.gemv_t5 != nullptr; }
  int64_t rows(int64_t unit) const { return std::min<int64_t>(kUnitRows, arguments.out_features - unit * kUnitRows); }
  // The outputs of a unit for tokens in [first, last) from their accumulators.
  void finish(int64_t unit, int64_t first, int64_t last, const int32_t* acc, const UnitScales& scales) const {
    const auto kernel = kernels.finish[int(arguments.out_dtype)];
    for (int64_t token = first; token < last; ++token, acc += kUnitRows) {
      kernel(acc, tokens.sum[token], tokens.step[token], scales.gamma.get(), scales.bias, rows(unit),
             output(token, unit * kUnitRows));
    }
  }
};

// Units with the sums of all tokens at once. `make()` gives what adds up a unit, as (unit, rows, acc), for one thread;
// `work` is what a weight costs, in multiplications.
template <class Make>
void each_unit(IntegerCall& call, int64_t work, Make make) {
  const LinearArguments& arguments = call.arguments;
  const auto run = [&](int64_t begin, int64_t end) {
    auto add_up = make();
    UnitScales scales(1);
    alignas(64) int32_t acc[kMostTileTokens * kUnitRows];
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t rows = call.rows(unit);
      scales.load(arguments, call.gamma, call.bias, unit * kUnitRows, rows);
      std::memset(acc, 0, size_t(arguments.tokens) * kUnitRows * sizeof(int32_t));
      add_up(unit, rows, acc);
      call.finish(unit, 0, arguments.tokens, acc, scales);
    }
  };
  torch::stable::parallel_for(0, call.units(), grain(kUnitRows * arguments.in_features * work), run);
}

// A few tokens, the weights read once as they lie.
void few_tokens(IntegerCall& call) {
  const LinearArguments& arguments = call.arguments;
  const bool fives = call.fives();
  const int64_t chunk = fives ? 20 : 16, chunks = ceil_div(arguments.in_features, chunk), stride = chunks * chunk;
  const int tokens = int(arguments.tokens);
  Scratch<int8_t> padded(tokens * stride);
  for (int t = 0; t < tokens; ++t) {
    std::memcpy(padded.get() + t * stride, call.tokens.q + t * call.tokens.stride, size_t(arguments.in_features));
    std::memset(padded.get() + t * stride + arguments.in_features, 0, size_t(stride - arguments.in_features));
  }
  const auto gemv = fives ? call.kernels.gemv_t5 : call.kernels.gemv_t2;
  each_unit(call, 4, [&] {
    return
        [&, lines = UnitLines(arguments, call.packed, call.bad, fives)](int64_t unit, int64_t, int32_t* acc) mutable {
          lines.load(2 * unit);
          for (int g = 0; g < 2 && lines.lines[g] != nullptr; ++g) {
            gemv(lines.lines[g], chunks, padded.get(), stride, tokens, acc + g * kGroupRows);
          }
        };
  });
}

// The same for weights in their canonical format, as compiled graphs hold them.
void few_tokens_canonical(IntegerCall& call) {
  const LinearArguments& arguments = call.arguments;
  const bool fives = arguments.format == TernaryFormat::t5;
  const int64_t fields = fives ? 5 : 4, row_bytes = ceil_div(arguments.in_features, fields);
  const int64_t plane_bytes = ceil_div(row_bytes, kLineBytes) * kLineBytes;
  const int tokens = int(arguments.tokens);
  Scratch<int8_t> planes(tokens * fields * plane_bytes);
  std::memset(planes.get(), 0, size_t(tokens * fields * plane_bytes));
  for (int t = 0; t < tokens; ++t) {
    const int8_t* q = call.tokens.q + t * call.tokens.stride;
    for (int64_t j = 0; j < fields; ++j) {
      int8_t* plane = planes.get() + (t * fields + j) * plane_bytes;
      for (int64_t b = 0, k = j; k < arguments.in_features; ++b, k += fields) plane[b] = q[k];
    }
  }
  each_unit(call, 4, [&] {
    return [&](int64_t unit, int64_t rows, int32_t* acc) {
      const uint8_t* from = pointer<uint8_t>(call.packed) + unit * kUnitRows * row_bytes;
      if (!call.kernels.gemv_rows(fives, from, rows, arguments.in_features, planes.get(), plane_bytes, tokens, acc)) {
        call.bad.store(true, std::memory_order_relaxed);
      }
    };
  });
}

// Up to a tile of tokens: the weights are decoded in registers, once.
void one_tile(IntegerCall& call) {
  const LinearArguments& arguments = call.arguments;
  const Tiles tiles(arguments.tokens, call.kernels.tile_tokens);
  const TokenPanels panels(call.tokens, tiles, arguments.in_features);
  const int64_t chunks = ceil_div(arguments.in_features, 16);
  each_unit(call, arguments.tokens, [&] {
    return [&, lines = UnitLines(arguments, call.packed, call.bad)](int64_t unit, int64_t, int32_t* acc) mutable {
      lines.load(2 * unit);
      call.kernels.tile_lines(lines.lines[0], lines.lines[1], chunks, panels.at(0), tiles.size(0), acc);
    };
  });
}

// Many tokens: weights of a unit are decoded to bytes, as many k at a time as stay in the first-level cache
// (kBlockSteps of 4 k), and meet all tiles of tokens there.
void many_tokens(IntegerCall& call) {
  constexpr int64_t kBlockSteps = 130;  // 16 KB of codes for two row groups
  const LinearArguments& arguments = call.arguments;
  const bool fives = call.fives();
  const auto decode = fives ? call.kernels.decode_t5 : call.kernels.decode_t2;
  const int64_t line_steps = fives ? 5 : 4, chunks = ceil_div(arguments.in_features, 4 * line_steps);
  const int64_t most_chunks = kBlockSteps / line_steps;
  const Tiles tiles(arguments.tokens, call.kernels.tile_tokens);
  const TokenPanels panels(call.tokens, tiles, arguments.in_features, 4 * line_steps, most_chunks * line_steps);
  const auto work = [&](int64_t begin, int64_t end) {
    UnitLines lines(arguments, call.packed, call.bad, fives);
    UnitScales scales(1);
    Scratch<uint8_t> codes(2 * kBlockSteps * kLineBytes);
    Scratch<int32_t> acc(arguments.tokens * kUnitRows);
    for (int64_t unit = begin; unit < end; ++unit) {
      scales.load(arguments, call.gamma, call.bias, unit * kUnitRows, call.rows(unit));
      lines.load(2 * unit);
      std::memset(acc.get(), 0, size_t(arguments.tokens) * kUnitRows * sizeof(int32_t));
      for (int64_t c = 0; c < chunks; c += most_chunks) {
        const int64_t size = std::min(most_chunks, chunks - c), step = c * line_steps;
        uint8_t* decoded[2] = {codes.get(), lines.lines[1] ? codes.get() + kBlockSteps * kLineBytes : nullptr};
        for (int g = 0; g < 2 && decoded[g] != nullptr; ++g) decode(lines.lines[g] + c * kLineBytes, size, decoded[g]);
        for (int64_t tile = 0; tile < tiles.count; ++tile) {
          call.kernels.tile_codes(decoded[0], decoded[1], size * line_steps, panels.at(tile, step), tiles.size(tile),
                                  acc.get() + tiles.begin(tile) * kUnitRows);
        }
      }
      call.finish(unit, 0, arguments.tokens, acc.get(), scales);
    }
  };
  torch::stable::parallel_for(0, call.units(), grain(kUnitRows * arguments.in_features * arguments.tokens), work);
}

// gamma for each 256 in_features: the sums of one group are integers, those of groups floats.
void grouped(IntegerCall& call) {
  const LinearArguments& arguments = call.arguments;
  const int64_t groups = arguments.in_features / kTernaryGroup, chunks = kTernaryGroup / 16;
  const Tiles tiles(arguments.tokens, call.kernels.tile_tokens);
  const TokenPanels panels(call.tokens, tiles, arguments.in_features);
  Scratch<int32_t> sums(arguments.tokens * groups);
  for (int64_t i = 0; i < arguments.tokens * groups; ++i) {
    const int8_t* q = call.tokens.q + i / groups * call.tokens.stride + i % groups * kTernaryGroup;
    int32_t sum = 0;
    for (int k = 0; k < kTernaryGroup; ++k) sum += q[k];
    sums[i] = sum;
  }
  const auto work = [&](int64_t begin, int64_t end) {
    UnitLines lines(arguments, call.packed, call.bad);
    UnitScales scales(groups);
    alignas(64) int32_t acc[kMostTileTokens * kUnitRows];
    alignas(64) float values[kMostTileTokens * kUnitRows];
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t rows = call.rows(unit);
      scales.load(arguments, call.gamma, call.bias, unit * kUnitRows, rows);
      lines.load(2 * unit);
      for (int64_t tile = 0; tile < tiles.count; ++tile) {
        const int size = tiles.size(tile);
        std::memset(values, 0, size_t(size) * kUnitRows * sizeof(float));
        for (int64_t g = 0; g < groups; ++g) {
          const int64_t offset = g * chunks * kLineBytes;
          std::memset(acc, 0, size_t(size) * kUnitRows * sizeof(int32_t));
          call.kernels.tile_lines(lines.lines[0] + offset, lines.lines[1] ? lines.lines[1] + offset : nullptr, chunks,
                                  panels.at(tile) + g * kTernaryGroup * size, size, acc);
          for (int t = 0; t < size; ++t) {
            call.kernels.add_group(acc + t * kUnitRows, sums[(tiles.begin(tile) + t) * groups + g],
                                   scales.gamma.get() + g * kUnitRows, kUnitRows, values + t * kUnitRows);
          }
        }
        for (int t = 0; t < size; ++t) {
          const int64_t token = tiles.begin(tile) + t;
          call.kernels.finish_groups[int(arguments.out_dtype)](values + t * kUnitRows, call.tokens.step[token],
                                                               scales.bias, rows, call.output(token, unit * kUnitRows));
        }
      }
    }
  };
  torch::stable::parallel_for(0, call.units(), grain(kUnitRows * arguments.in_features * arguments.tokens), work);
}

}  // namespace

void reject_first_bad_code(const char* op, const char* argument, TernaryFormat format, const void* packed,
                           int64_t out_features, int64_t in_features) {
  const RepackKernels& kernels = PYOPS_SELECT(repack_kernels);
  Scratch<uint8_t> codes(in_features);
  for (int64_t n = 0; n < out_features; ++n) {
    kernels.read_row(format, packed, in_features, n, codes.get());
    for (int64_t k = 0; k < in_features; ++k) {
      if (codes[k] <= 2) continue;
      const uint8_t byte = static_cast<const uint8_t*>(packed)[code_place(format, in_features, n, k).byte];
      const bool whole_byte = codes_per_byte(format) == 5;
      reject_code(op, argument, format, n, k,
                  format == TernaryFormat::int8 ? int(int8_t(byte))
                  : whole_byte                  ? int(byte)
                                                : int(codes[k]));
    }
  }
  throw std::logic_error("pyops: weights were changed while they were read");
}

void quantize_tokens(const Tensor& x, DType dtype, float qmax, float eps, const QuantizedTokens& tokens) {
  const auto quantize = PYOPS_SELECT(quantize_activation_kernels).quantize[int(dtype)];
  const int64_t in_features = x.size(1), stride = x.stride(0);
  torch::stable::parallel_for(0, x.size(0), grain(8 * in_features), [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const TokenScale scale =
          quantize(const_row_of(x, dtype, token, stride, 0), in_features, qmax, eps, tokens.q + token * tokens.stride);
      tokens.step[token] = scale.step;
      tokens.sum[token] = scale.sum;
    }
  });
}

void integer_product(const LinearArguments& arguments, const QuantizedTokens& tokens, const Tensor& packed,
                     const Tensor& gamma, const OptionalTensor& bias, const Tensor& y) {
  if (arguments.tokens == 0 || arguments.out_features == 0) return;
  IntegerCall call{arguments, tokens, packed, gamma, bias, y, PYOPS_SELECT_PRODUCT(integer_product_kernels)};
  if (arguments.granularity == Granularity::group) {
    grouped(call);
  } else if (arguments.tokens <= kGemvTokens && call.canonical() && call.kernels.gemv_rows != nullptr) {
    few_tokens_canonical(call);
  } else if (arguments.tokens <= kGemvTokens) {
    few_tokens(call);
  } else if (arguments.tokens <= call.kernels.tile_tokens && !call.fives()) {
    one_tile(call);
  } else {
    many_tokens(call);
  }
  if (call.bad) {
    reject_first_bad_code(arguments.op, "packed", arguments.format, packed.const_data_ptr(), arguments.out_features,
                          arguments.in_features);
  }
}

// ---- products of floats ----------------------------------------------------------------------------------------

namespace {

constexpr int64_t kDepth = 256;                     // of a panel: 32 KB of B per 32 columns
constexpr int64_t kColumns = 128;                   // of C per task
constexpr int64_t kTaskRows = 1020;                 // of C per task: 510 KB of sums
constexpr int64_t kPanelBytes = int64_t(16) << 20;  // of A that is packed at a time
constexpr int64_t kLargeBytes = int64_t(4) << 20;   // of an output that no cache need hold
constexpr int64_t kKeptDepth = 1024;                // up to here B is packed once for all rows: 512 KB

// C = A B from functions that pack panels and take finished stretches of rows. Sums run over the depth in blocks of
// kDepth in order, whatever the number of threads.
//   pack_a(row, rows, a)              all the depth of some rows
//   pack_b(column, begin, depth, b)   one panel of B, as wide as a tile
//   finish(row, rows, column, count, c)   a stretch of some rows of C, kColumns apart
template <class PackA, class PackB, class Finish>
void float_product(int64_t rows, int64_t columns, int64_t depth, const FloatProductKernels& kernels, PackA pack_a,
                   PackB pack_b, Finish finish) {
  const int64_t most = std::max<int64_t>(kPanelBytes / (at_least_1(depth) * int64_t(sizeof(float))), kernels.rows);
  const int64_t block_rows = std::min(rows, most / kernels.rows * kernels.rows);
  Scratch<float> a(ceil_div(block_rows, kernels.rows) * kernels.rows * depth);
  for (int64_t first = 0; first < rows; first += block_rows) {
    const int64_t here = std::min(block_rows, rows - first), tiles = ceil_div(here, kernels.rows);
    torch::stable::parallel_for(0, tiles, grain(depth * 64), [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t row = tile * kernels.rows;
        pack_a(first + row, int(std::min<int64_t>(kernels.rows, here - row)), a.get() + row * depth);
      }
    });
    const int64_t tasks = ceil_div(columns, kColumns);
    torch::stable::parallel_for(0, tasks, grain(here * depth * kColumns), [&](int64_t begin, int64_t end) {
      const int64_t most_rows = std::min(here, kTaskRows / kernels.rows * kernels.rows);
      const bool keep = depth <= kKeptDepth;
      Scratch<float> b((keep ? ceil_div(depth, kDepth) : 1) * kDepth * kColumns), c(most_rows * kColumns);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t column = task * kColumns, width = std::min(kColumns, columns - column);
        for (int64_t top = 0; top < here; top += most_rows) {
          const int64_t bottom = std::min(here, top + most_rows);
          std::memset(c.get(), 0, size_t((bottom - top) * kColumns) * sizeof(float));
          for (int64_t d = 0; d < depth; d += kDepth) {
            const int64_t size = std::min(kDepth, depth - d);
            float* panels = b.get() + (keep ? d * kColumns : 0);
            for (int64_t j = 0; j < width && (top == 0 || !keep); j += kernels.columns) {
              pack_b(column + j, d, size, panels + j * kDepth);
            }
            for (int64_t j = 0; j < width; j += kernels.columns) {
              for (int64_t row = top; row < bottom; row += kernels.rows) {
                const int count = int(std::min<int64_t>(kernels.rows, here - row));
                const float* panel = a.get() + row * depth + d * count;
                kernels.tile(panel, panels + j * kDepth, size, count, c.get() + (row - top) * kColumns + j, kColumns);
              }
            }
          }
          finish(first + top, bottom - top, column, width, c.get());
        }
      }
    });
  }
}

}  // namespace

void float_linear(const LinearArguments& arguments, const Tensor& x, const Tensor& packed, const Tensor& gamma,
                  const OptionalTensor& bias, const Tensor& y) {
  const int64_t out_features = arguments.out_features, in_features = arguments.in_features;
  if (arguments.tokens == 0 || out_features == 0) return;
  const FloatProductKernels& kernels = PYOPS_SELECT_PRODUCT(float_product_kernels);
  const IntegerProductKernels& codes_of = PYOPS_SELECT_PRODUCT(integer_product_kernels);
  // All codes as bytes, a quarter of the size of float weights.
  const int64_t chunks = ceil_div(in_features, 16), groups = ceil_div(out_features, kGroupRows);
  const int64_t group_bytes = 4 * chunks * kLineBytes;
  Scratch<uint8_t> codes(groups * group_bytes);
  std::atomic<bool> bad{false};
  torch::stable::parallel_for(0, ceil_div(groups, 2), grain(in_features * 64), [&](int64_t begin, int64_t end) {
    UnitLines lines(arguments, packed, bad);
    for (int64_t unit = begin; unit < end; ++unit) {
      lines.load(2 * unit);
      for (int g = 0; g < 2 && lines.lines[g] != nullptr; ++g) {
        codes_of.decode_t2(lines.lines[g], chunks, codes.get() + (2 * unit + g) * group_bytes);
      }
    }
  });
  if (bad) {
    reject_first_bad_code(arguments.op, "packed", arguments.format, packed.const_data_ptr(), out_features, in_features);
  }
  const float* scales = pointer<float>(gamma);
  const bool grouped = arguments.granularity == Granularity::group;
  Scratch<float> row_gamma(out_features), row_bias(bias ? out_features : 0);
  for (int64_t n = 0; n < out_features; ++n) {
    row_gamma[n] = arguments.granularity == Granularity::tensor ? scales[0] : grouped ? 1.0f : scales[n];
    if (bias) row_bias[n] = float(read_element(bias->const_data_ptr(), arguments.dtype, n));
  }
  const auto pack_x = kernels.pack_along_depth[int(arguments.dtype)];
  const auto finish = kernels.finish[int(arguments.out_dtype)];
  float_product(
      arguments.tokens, out_features, in_features, kernels,
      [&](int64_t row, int rows, float* a) {
        pack_x(const_row_of(x, arguments.dtype, row, x.stride(0), 0), x.stride(0), rows, in_features, nullptr, a);
      },
      [&](int64_t column, int64_t begin, int64_t depth, float* b) {
        const int64_t group = column / kGroupRows;
        const uint8_t* first = codes.get() + group * group_bytes;
        kernels.decode_columns(first, group + 1 < groups ? first + group_bytes : nullptr, int(column % kGroupRows),
                               begin, depth, b);
        if (!grouped) return;
        const int64_t width = std::min<int64_t>(kernels.columns, out_features - column);
        for (int64_t d = 0; d < depth; ++d) {
          for (int64_t j = 0; j < width; ++j) {
            b[d * kernels.columns + j] *=
                scales[(column + j) * (in_features / kTernaryGroup) + (begin + d) / kTernaryGroup];
          }
        }
      },
      [&](int64_t row, int64_t rows, int64_t column, int64_t count, const float* c) {
        finish(c, kColumns, row_gamma.get() + column, bias ? row_bias.get() + column : nullptr, rows, count,
               row_of(y, arguments.out_dtype, row, out_features, column), out_features, false);
      });
}

void float_backward_input(const LinearArguments& arguments, const Tensor& grad, const Tensor& packed_in,
                          const Tensor& gamma, const Tensor& dx) {
  const int64_t out_features = arguments.out_features, in_features = arguments.in_features;
  if (arguments.tokens == 0 || in_features == 0) return;
  const FloatProductKernels& kernels = PYOPS_SELECT_PRODUCT(float_product_kernels);
  const RepackKernels& repack = PYOPS_SELECT(repack_kernels);
  // Rows of t2 are what the panels are decoded from; other formats are brought there first.
  const int64_t row_bytes = ceil_div(in_features, 4);
  const bool direct = arguments.format == TernaryFormat::t2;
  Scratch<uint8_t> rows(direct ? 0 : out_features * row_bytes);
  std::atomic<bool> bad{false};
  torch::stable::parallel_for(0, out_features, grain(in_features * 4), [&](int64_t begin, int64_t end) {
    Scratch<uint8_t> codes(4 * row_bytes);
    for (int64_t n = begin; n < end; ++n) {
      std::memset(codes.get(), 1, size_t(4 * row_bytes));
      repack.read_row(arguments.format, packed_in.const_data_ptr(), in_features, n, codes.get());
      uint8_t largest = 0;
      for (int64_t k = 0; k < in_features; ++k) largest = std::max(largest, codes[k]);
      if (largest > 2) bad.store(true, std::memory_order_relaxed);
      if (!direct) repack.write_row(TernaryFormat::t2, codes.get(), in_features, n, rows.get());
    }
  });
  if (bad) {
    reject_first_bad_code(arguments.op, "packed", arguments.format, packed_in.const_data_ptr(), out_features,
                          in_features);
  }
  const uint8_t* packed = direct ? pointer<uint8_t>(packed_in) : rows.get();
  const float* scales = pointer<float>(gamma);
  const bool grouped = arguments.granularity == Granularity::group;
  Scratch<float> row_gamma(out_features);
  for (int64_t n = 0; n < out_features; ++n) {
    row_gamma[n] = arguments.granularity == Granularity::tensor ? scales[0] : grouped ? 1.0f : scales[n];
  }
  const auto pack_grad = kernels.pack_along_depth[int(arguments.dtype)];
  const auto finish = kernels.finish[int(arguments.out_dtype)];
  float_product(
      arguments.tokens, in_features, out_features, kernels,
      [&](int64_t row, int rows_here, float* a) {
        pack_grad(const_row_of(grad, arguments.dtype, row, grad.stride(0), 0), grad.stride(0), rows_here, out_features,
                  row_gamma.get(), a);
      },
      [&](int64_t column, int64_t begin, int64_t depth, float* b) {
        const int64_t groups = in_features / kTernaryGroup;
        kernels.decode_rows(packed + begin * row_bytes + column / 4, row_bytes, row_bytes - column / 4, depth,
                            grouped ? scales + begin * groups + column / kTernaryGroup : nullptr, groups, b);
      },
      [&](int64_t row, int64_t rows, int64_t column, int64_t count, const float* c) {
        finish(c, kColumns, nullptr, nullptr, rows, count, row_of(dx, arguments.out_dtype, row, in_features, column),
               in_features, false);
      });
}

void float_backward_weight(const WeightGradientArguments& arguments, const Tensor& grad, const Tensor& q,
                           const Tensor& step, const Tensor& dw) {
  if (arguments.out_features == 0 || arguments.in_features == 0) return;
  const FloatProductKernels& kernels = PYOPS_SELECT_PRODUCT(float_product_kernels);
  const auto pack_grad = kernels.pack_across_depth[int(arguments.dtype)];
  const auto finish = kernels.finish[int(arguments.out_dtype)];
  const int8_t* integers = pointer<int8_t>(q);
  const int64_t q_stride = q.stride(0), in_features = arguments.in_features;
  // Unless the system zeroes its pages in the cache first: 48 instead of 52 ms, 2560 x 2560 and 512 tokens.
  const bool past_caches = !advise_huge_pages(dw) && dw.numel() * element_bytes(arguments.out_dtype) >= kLargeBytes;
  float_product(
      arguments.out_features, arguments.in_features, arguments.tokens, kernels,
      [&](int64_t row, int rows, float* a) {
        pack_grad(const_row_of(grad, arguments.dtype, 0, 0, row), grad.stride(0), rows, arguments.tokens,
                  pointer<float>(step), a);
      },
      [&](int64_t column, int64_t begin, int64_t depth, float* b) {
        kernels.widen_rows(integers + begin * q_stride + column, q_stride, arguments.in_features - column, depth, b);
      },
      [&](int64_t row, int64_t rows, int64_t column, int64_t count, const float* c) {
        finish(c, kColumns, nullptr, nullptr, rows, count, row_of(dw, arguments.out_dtype, row, in_features, column),
               in_features, past_caches);
      });
}

}  // namespace pyops
