// The streaming backward of spherical_loss and cross_entropy: out[r][k] = f_r(logits[r][k]) + target gradients, read
// once and written once, in place or not.
//
// Tiling: a block takes one row (grid.x) and one chunk of its columns (grid.y). Its first warp turns the row's
// statistics, the upstream gradient and the normaliser into the few numbers of f_r, in double, and leaves them in
// shared memory; then every thread streams 16-byte vectors that lie on 16-byte boundaries of the output.
//
// Targets: the first warp also marks in shared memory which stripes of the chunk (the 32 vectors that one warp
// handles at once) hold a target column. Unmarked stripes, nearly all of them, pay one shared-memory read per vector.
// In a marked one the thread that owns the column still has the original logit in a register after its vector store,
// so the same code serves the in-place form: it computes f_r plus the sum over duplicate targets in double, rounds
// once, and stores the element over what it has just stored.
#pragma once

#include "row_reduce.cuh"

namespace pyops {
namespace {

constexpr int kGradientThreads = 256;
constexpr int kMaximumStripes = 1024;
constexpr int kStepStripes = kVectorsInFlight * kGradientThreads / 32;  // of one step of a block
constexpr int kSingles = kMaximumStripes;  // the mark of the elements outside whole vectors
constexpr int kMarks = kMaximumStripes + 1;
constexpr int64_t kMaximumChunks = 65535;  // grid.y

template <class T>
constexpr int kStripeColumns = 32 * dev::kVectorElements<T>;

struct ColumnSplit {
  int threads;            // of a block
  int chunks;             // blocks per row
  int64_t chunk_columns;  // columns of a chunk (the last one may have fewer)
};

// The one launch decision of a backward pass. A step is kVectorsInFlight vectors of 16 bytes per thread. A chunk is
// two steps of kGradientThreads (32 KiB): that pays for the 1 us in which the row numbers are prepared while
// leaving many blocks per multiprocessor to hide it; one step where the grid would otherwise be small. Chunks of a
// row have equal length. More than kMaximumChunks chunks cannot be launched, so beyond 2^30 bfloat16 columns they
// grow.
inline ColumnSplit split_columns(int64_t rows, int64_t columns, int64_t element_bytes) {
  const int64_t step_columns = kVectorsInFlight * 16 / element_bytes;
  int threads = 32;
  while (threads < kGradientThreads && threads * step_columns < columns) threads *= 2;
  const int64_t long_chunk = 2 * kGradientThreads * step_columns;
  const bool many = rows * divide_up(columns, long_chunk) >= 1024;
  const int64_t limit = many ? long_chunk : long_chunk / 2;
  int64_t chunks = divide_up(columns, limit);
  chunks = chunks < kMaximumChunks ? chunks : kMaximumChunks;
  const int64_t chunk_columns = divide_up(divide_up(columns, chunks), step_columns) * step_columns;
  return {threads, int(divide_up(columns, chunk_columns)), chunk_columns};
}

// The K targets of one row, as the backward sees them: one counts where its saved gradient is not 0.
template <class T>
struct RowTargetGradients {
  const GradientRows& g;
  const StatisticOf<T>* gradients;  // of this row
  int64_t row;
  const char* message;

  PYOPS_DEVICE double gradient(int64_t j) const { return double(gradients[j]); }
  PYOPS_DEVICE int64_t column(int64_t j) const { return read_class(g.target, g.target_is_wide, row, j); }
};

// Part of a row that one block writes.
template <class T>
struct Chunk {
  const T* x;
  T* out;
  const T* weight;  // class weights of the columns, or null
  int64_t begin;    // column of x[0] in the row
  int columns, head, body_end;  // whole vectors lie in [head, body_end)

  PYOPS_DEVICE int stripe_of(int column) const { return int(unsigned(column - head) / unsigned(kStripeColumns<T>)); }
};

template <class T>
PYOPS_DEVICE Chunk<T> chunk_of(const GradientRows& g, const ColumnSplit& split, int64_t row) {
  const int64_t begin = int64_t(blockIdx.y) * split.chunk_columns, left = g.classes - begin;
  Chunk<T> chunk;
  chunk.begin = begin;
  chunk.columns = int(left < split.chunk_columns ? left : split.chunk_columns);
  chunk.x = static_cast<const T*>(g.logits) + row * g.row_stride + begin;
  chunk.out = static_cast<T*>(g.gradient) + row * g.gradient_row_stride + begin;
  chunk.weight = g.class_weight ? static_cast<const T*>(g.class_weight) + begin : nullptr;
  chunk.head = elements_to_boundary(chunk.out, chunk.columns);
  constexpr int width = dev::kVectorElements<T>;
  chunk.body_end = chunk.head + (chunk.columns - chunk.head) / width * width;
  return chunk;
}

// Run by the first warp: counts the targets of each stripe.
template <class T>
PYOPS_DEVICE void mark_targets(const Chunk<T>& chunk, const RowTargetGradients<T>& targets, int* marks) {
  // Also those past the end, which the last step asks for.
  const int stripes = chunk.columns / kStripeColumns<T> + kStepStripes;
  for (int i = dev::lane(); i < stripes; i += 32) marks[i] = 0;
  if (dev::lane() == 0) marks[kSingles] = 0;
  __syncwarp();
  for (int64_t j = dev::lane(); j < targets.g.targets; j += 32) {
    if (targets.gradient(j) == 0) continue;
    const int64_t column = targets.column(j), offset = column - chunk.begin;
    PYOPS_DEVICE_ASSERT(column >= 0 && column < targets.g.classes, targets.message);
    if (offset < 0 || offset >= chunk.columns) continue;
    const bool in_vector = offset >= chunk.head && offset < chunk.body_end;
    atomicAdd(&marks[in_vector ? chunk.stripe_of(int(offset)) : kSingles], 1);
  }
}

// Stores the target columns among the first `n` elements that `bits` held before the pass; `first` is the column of
// the first one within the chunk.
template <class T, class Loss>
PYOPS_DEVICE void write_targets(const dev::Bits128& bits, int n, int first, const Chunk<T>& chunk,
                                const RowTargetGradients<T>& targets, const Loss& loss,
                                const typename Loss::Numbers& numbers) {
  T elements[dev::kVectorElements<T>];
  memcpy(elements, &bits, 16);
#pragma unroll 1
  for (int64_t j = 0; j < targets.g.targets; ++j) {
    if (targets.gradient(j) == 0) continue;
    const int64_t column = targets.column(j), offset = column - chunk.begin - first;
    if (offset < 0 || offset >= n) continue;
    T element = elements[0];  // a chain of selects: an indexed register array would live in memory
#pragma unroll
    for (int i = 1; i < dev::kVectorElements<T>; ++i) element = offset == i ? elements[i] : element;
    double sum = 0;
#pragma unroll 1
    for (int64_t other = 0; other < targets.g.targets; ++other) {
      if (targets.column(other) == column) sum += targets.gradient(other);
    }
    const double value = loss.template value<T>(numbers, double(dev::widen(element)), column);
    dev::narrow(value + numbers.target_scale * sum, chunk.out[first + int(offset)]);
  }
}

template <class T>
PYOPS_DEVICE dev::Bits128 load_elements(const T* x) {
  T elements[dev::kVectorElements<T>];
#pragma unroll
  for (int i = 0; i < dev::kVectorElements<T>; ++i) elements[i] = x[i];
  dev::Bits128 bits;
  memcpy(&bits, elements, 16);
  return bits;
}

template <class T, class Formula>
PYOPS_DEVICE void write_vector(const dev::Bits128& bits, int column, const Chunk<T>& chunk, const Formula& formula) {
  constexpr int width = dev::kVectorElements<T>;
  RealOf<T> o[width], result[width];
  dev::unpack(bits, o, chunk.x);
  if constexpr (Formula::kWeighted) {
    RealOf<T> weight[width];
    load_weights(chunk.weight + column, weight);
#pragma unroll
    for (int i = 0; i < width; ++i) result[i] = formula(o[i], weight[i]);
  } else {
#pragma unroll
    for (int i = 0; i < width; ++i) result[i] = formula(o[i]);
  }
  dev::Bits128 out;
  dev::pack(result, out, chunk.x);
  dev::stg128_stream(chunk.out + column, out);
}

template <class T, class Formula>
PYOPS_DEVICE void write_single(const dev::Bits128& bits, int column, const Chunk<T>& chunk, const Formula& formula) {
  RealOf<T> o[dev::kVectorElements<T>];
  dev::unpack(bits, o, chunk.x);
  if constexpr (Formula::kWeighted) {
    dev::narrow(formula(o[0], dev::widen(chunk.weight[column])), chunk.out[column]);
  } else {
    dev::narrow(formula(o[0]), chunk.out[column]);
  }
}

// The column of the element outside whole vectors that this thread owns, or -1.
template <class T>
PYOPS_DEVICE int single_of(const Chunk<T>& chunk) {
  const int single = int(threadIdx.x);
  if (single >= chunk.head + chunk.columns - chunk.body_end) return -1;
  return single < chunk.head ? single : chunk.body_end + (single - chunk.head);
}

// The common case: up to kVectorsInFlight vectors without a target, all loads before the first store.
template <class T, class Formula>
PYOPS_DEVICE void stream_vectors(int column, int step, const Chunk<T>& chunk, const Formula& formula) {
  dev::Bits128 bits[kVectorsInFlight];
#pragma unroll
  for (int a = 0; a < kVectorsInFlight; ++a) {
    if (column + a * step < chunk.body_end) bits[a] = dev::ldg128_stream(chunk.x + column + a * step);
  }
#pragma unroll
  for (int a = 0; a < kVectorsInFlight; ++a) {
    if (column + a * step < chunk.body_end) write_vector(bits[a], column + a * step, chunk, formula);
  }
}

template <class T, class Loss, class Formula>
PYOPS_DEVICE void stream_chunk(const Chunk<T>& chunk, const RowTargetGradients<T>& targets, const Loss& loss,
                               const typename Loss::Numbers& numbers, const Formula& formula, const int* marks) {
  constexpr int width = dev::kVectorElements<T>;
  const int step = int(blockDim.x) * width;
  // Where logits and gradient differ in alignment, loads are narrow (L1 merges them) and stores wide.
  const bool aligned = (reinterpret_cast<uintptr_t>(chunk.x + chunk.head) & 15u) == 0;
  int column = chunk.head + int(threadIdx.x) * width;
  for (; column < chunk.body_end; column += kVectorsInFlight * step) {
    const int stripe = chunk.stripe_of(column);
    int marked = 0;
#pragma unroll
    for (int a = 0; a < kVectorsInFlight; ++a) marked |= marks[stripe + a * int(blockDim.x / 32)];
    if (aligned && marked == 0) {
      stream_vectors(column, step, chunk, formula);
      continue;
    }
#pragma unroll 1
    for (int at = column; at < chunk.body_end && at < column + kVectorsInFlight * step; at += step) {
      const dev::Bits128 bits = aligned ? dev::ldg128_stream(chunk.x + at) : load_elements(chunk.x + at);
      write_vector(bits, at, chunk, formula);
      if (marks[chunk.stripe_of(at)]) write_targets(bits, width, at, chunk, targets, loss, numbers);
    }
  }
  const int single = single_of(chunk);
  if (single < 0) return;
  const dev::Bits128 bits = dev::first_element(chunk.x[single]);
  write_single(bits, single, chunk, formula);
  if (marks[kSingles]) write_targets(bits, 1, single, chunk, targets, loss, numbers);
}

template <class T>
PYOPS_DEVICE void zero_chunk(const Chunk<T>& chunk) {
  constexpr int width = dev::kVectorElements<T>;
  for (int column = chunk.head + int(threadIdx.x) * width; column < chunk.body_end; column += int(blockDim.x) * width) {
    dev::stg128_stream(chunk.out + column, dev::Bits128{});
  }
  const int single = single_of(chunk);
  if (single >= 0) dev::narrow(RealOf<T>(0), chunk.out[single]);
}

// The whole of a backward kernel. `Loss` knows the formula of one loss:
//   Numbers                         of a row, in shared memory: doubles, with `zero` and `target_scale`
//   Numbers numbers<T>(g, row)      from statistics, upstream gradient and normaliser
//   double value<T>(numbers, o, k)  gradient of column k with logit o, without target gradients
//   with_formula<T>(numbers, run)   calls run(formula): formula(o) or, if kWeighted, formula(o, class weight)
// A row with `zero` is ignored: its gradient is exactly 0 and its logits, which may hold anything, are not read.
template <class T, class Loss>
PYOPS_DEVICE void write_gradient(const GradientRows& g, const ColumnSplit& split, int64_t row, const Loss& loss,
                                 typename Loss::Numbers* shared_numbers, int* marks) {
  const Chunk<T> chunk = chunk_of<T>(g, split, row);
  const RowTargetGradients<T> targets{
      g, static_cast<const StatisticOf<T>*>(g.statistics) + row * (Loss::kRowNumbers + g.targets) + Loss::kRowNumbers,
      row, loss.message()};
  if (threadIdx.x < 32) {
    const typename Loss::Numbers numbers = loss.template numbers<T>(g, row);
    if (dev::lane() == 0) shared_numbers[0] = numbers;
    mark_targets(chunk, targets, marks);
  }
  __syncthreads();
  const typename Loss::Numbers& numbers = shared_numbers[0];
  if (numbers.zero) {
    zero_chunk(chunk);
    return;
  }
  loss.template with_formula<T>(numbers, [&](const auto& formula) {
    stream_chunk(chunk, targets, loss, numbers, formula, marks);
  });
}

}  // namespace
}  // namespace pyops
