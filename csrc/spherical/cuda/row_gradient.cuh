// The streaming backward of spherical_loss and cross_entropy: out[r][k] = f_r(logits[r][k]) + target gradients, read
// once and written once, in place or not.
//
// Tiling: a block takes one row (grid.x) and one chunk of its columns (grid.y). Its first warp turns the row's
// statistics, the upstream gradient and the normaliser into the few numbers of f_r, in double, and leaves them in
// shared memory; then every thread streams 16-byte vectors that lie on 16-byte boundaries of the output.
//
// Targets: the first warp also marks in shared memory which stripes of the chunk (the 32 vectors that one warp
// handles at once) hold a target column. An unmarked stripe, nearly all of them, pays one shared-memory read per
// vector. In a marked one the thread that owns the column still has the original logit in a register, so the same
// code serves the in-place form: it computes f_r plus the sum over duplicate targets in double, rounds once, and
// stores the element over its own vector store.
#pragma once

#include "row_reduce.cuh"

namespace pyops {
namespace {

constexpr int kGradientThreads = 256;
constexpr int kMaximumStripes = 1024;
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

  PYOPS_DEVICE int mark_of(int column) const {
    return column >= head && column < body_end ? (column - head) / kStripeColumns<T> : kSingles;
  }
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
  const int stripes = (chunk.columns + kStripeColumns<T> - 1) / kStripeColumns<T>;
  for (int i = dev::lane(); i < stripes; i += 32) marks[i] = 0;
  if (dev::lane() == 0) marks[kSingles] = 0;
  __syncwarp();
  for (int64_t j = dev::lane(); j < targets.g.targets; j += 32) {
    if (targets.gradient(j) == 0) continue;
    const int64_t column = targets.column(j), offset = column - chunk.begin;
    PYOPS_DEVICE_ASSERT(column >= 0 && column < targets.g.classes, targets.message);
    if (offset >= 0 && offset < chunk.columns) atomicAdd(&marks[chunk.mark_of(int(offset))], 1);
  }
}

// Stores the target columns among the `n` elements that `bits` held before the pass; `first` is the column of the
// first one within the chunk.
template <class T, class Loss>
PYOPS_DEVICE void write_targets(const T (&elements)[dev::kVectorElements<T>], int n, int first, const Chunk<T>& chunk,
                                const RowTargetGradients<T>& targets, const Loss& loss,
                                const typename Loss::Numbers& numbers) {
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
    const double value = loss.value(numbers, double(dev::widen(element)), column) + numbers.target_scale * sum;
    dev::narrow(value, chunk.out[first + int(offset)]);
  }
}

template <bool kAligned, class T>
PYOPS_DEVICE dev::Bits128 load_vector(const T* x) {
  if constexpr (kAligned) {
    return dev::ldg128_stream(x);
  } else {
    T elements[dev::kVectorElements<T>];
#pragma unroll
    for (int i = 0; i < dev::kVectorElements<T>; ++i) elements[i] = x[i];
    dev::Bits128 bits;
    memcpy(&bits, elements, 16);
    return bits;
  }
}

// Class weights share the alignment of the chunk only by chance.
template <class T>
PYOPS_DEVICE void load_weights(const T* weight, RealOf<T> (&values)[dev::kVectorElements<T>]) {
  if ((reinterpret_cast<uintptr_t>(weight) & 15u) == 0) {
    dev::unpack(dev::ldg128(weight), values, weight);
  } else {
#pragma unroll
    for (int i = 0; i < dev::kVectorElements<T>; ++i) values[i] = dev::widen(weight[i]);
  }
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

// kVectors vectors of this thread, `step` columns apart: all loads, then all stores, then the rare targets.
template <int kVectors, bool kAligned, class T, class Loss, class Formula>
PYOPS_DEVICE void write_vectors(int column, int step, const Chunk<T>& chunk, const RowTargetGradients<T>& targets,
                                const Loss& loss, const typename Loss::Numbers& numbers, const Formula& formula,
                                const int* marks) {
  dev::Bits128 bits[kVectors];
  int marked = 0;
#pragma unroll
  for (int a = 0; a < kVectors; ++a) bits[a] = load_vector<kAligned>(chunk.x + column + a * step);
#pragma unroll
  for (int a = 0; a < kVectors; ++a) {
    write_vector(bits[a], column + a * step, chunk, formula);
    marked |= marks[(column + a * step - chunk.head) / kStripeColumns<T>];
  }
  if (marked == 0) return;
#pragma unroll 1
  for (int a = 0; a < kVectors; ++a) {
    dev::Bits128 chosen = bits[0];
#pragma unroll
    for (int i = 1; i < kVectors; ++i) {
#pragma unroll
      for (int word = 0; word < 4; ++word) chosen.word[word] = a == i ? bits[i].word[word] : chosen.word[word];
    }
    T elements[dev::kVectorElements<T>];
    memcpy(elements, &chosen, 16);
    write_targets(elements, dev::kVectorElements<T>, column + a * step, chunk, targets, loss, numbers);
  }
}

template <class T, class Loss, class Formula>
PYOPS_DEVICE void write_single(int column, const Chunk<T>& chunk, const RowTargetGradients<T>& targets,
                               const Loss& loss, const typename Loss::Numbers& numbers, const Formula& formula,
                               const int* marks) {
  const T elements[dev::kVectorElements<T>] = {chunk.x[column]};
  const RealOf<T> o = dev::widen(elements[0]);
  if constexpr (Formula::kWeighted) {
    dev::narrow(formula(o, dev::widen(chunk.weight[column])), chunk.out[column]);
  } else {
    dev::narrow(formula(o), chunk.out[column]);
  }
  if (marks[kSingles]) write_targets(elements, 1, column, chunk, targets, loss, numbers);
}

// The column of the element outside whole vectors that this thread owns, or -1.
template <class T>
PYOPS_DEVICE int single_of(const Chunk<T>& chunk) {
  const int single = int(threadIdx.x);
  if (single >= chunk.head + chunk.columns - chunk.body_end) return -1;
  return single < chunk.head ? single : chunk.body_end + (single - chunk.head);
}

template <class T, class Loss, class Formula>
PYOPS_DEVICE void stream_chunk(const Chunk<T>& chunk, const RowTargetGradients<T>& targets, const Loss& loss,
                               const typename Loss::Numbers& numbers, const Formula& formula, const int* marks) {
  constexpr int width = dev::kVectorElements<T>;
  const int step = int(blockDim.x) * width;
  const bool aligned = (reinterpret_cast<uintptr_t>(chunk.x + chunk.head) & 15u) == 0;
  int column = chunk.head + int(threadIdx.x) * width;
  if (aligned) {
    for (; column + (kVectorsInFlight - 1) * step < chunk.body_end; column += kVectorsInFlight * step) {
      write_vectors<kVectorsInFlight, true>(column, step, chunk, targets, loss, numbers, formula, marks);
    }
    for (; column < chunk.body_end; column += step) {
      write_vectors<1, true>(column, step, chunk, targets, loss, numbers, formula, marks);
    }
  } else {  // logits and gradient differ in alignment: narrow loads, which L1 merges, and wide stores
    for (; column < chunk.body_end; column += step) {
      write_vectors<1, false>(column, step, chunk, targets, loss, numbers, formula, marks);
    }
  }
  const int single = single_of(chunk);
  if (single >= 0) write_single(single, chunk, targets, loss, numbers, formula, marks);
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
//   Numbers                      of a row, in shared memory: doubles, with `zero` and `target_scale`
//   Numbers numbers(g, row)      from statistics, upstream gradient and normaliser
//   double value(numbers, o, k)  gradient of column k with logit o, without target gradients
//   with_formula<Real>(numbers, run)   calls run(formula): formula(o) or formula(o, weight) in Real
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
  loss.template with_formula<RealOf<T>>(numbers, [&](const auto& formula) {
    stream_chunk(chunk, targets, loss, numbers, formula, marks);
  });
}

}  // namespace
}  // namespace pyops
