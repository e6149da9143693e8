// The streaming backward of spherical_loss and cross_entropy: out[r][k] = f_r(logits[r][k]) + target gradients, read
// once and written once, in place or not.
//
// Tiling: a block takes one row (grid.x) and one chunk of its columns (grid.y). Its first warp turns the row's
// statistics, the upstream gradient and the normaliser into the few numbers of f_r, in double, and leaves them in
// shared memory; then every thread streams 16-byte vectors that lie on 16-byte boundaries of the output.
//
// Targets: they cost the stream nothing. Thread j % threads owns target j. Before the stream it fetches the original
// logit of its target, if that column belongs to the chunk, which a barrier protects from being overwritten in
// place; after the stream, and another barrier, it computes f_r plus the sum over duplicate targets in double,
// rounds once and stores the element over what the stream left there. Of duplicates the first one does that.
#pragma once

#include "../tiny_row.h"
#include "row_reduce.cuh"

namespace pyops {
namespace {

constexpr int kGradientThreads = 256;
constexpr int64_t kMaximumChunks = 65535;  // grid.y

struct ColumnSplit {
  int threads;            // of a block
  int chunks;             // blocks per row
  int64_t chunk_columns;  // columns of a chunk (the last one may have fewer)
};

// The one launch decision of a backward pass. A step is kVectorsInFlight vectors of 16 bytes per thread. A chunk is
// two steps of kGradientThreads (32 KiB): that pays for the 1 us in which the row numbers are prepared while
// leaving many blocks per multiprocessor to hide it; one step where the grid would otherwise be small. Chunks of a
// row have equal length. More than kMaximumChunks chunks cannot be launched, so beyond 2^30 bfloat16 columns they
// grow. Estimated, not yet measured on a GPU.
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

// Part of a row that one block writes.
template <class T>
struct Chunk {
  const T* x;
  T* out;
  const T* weight;  // class weights of the columns, or null
  int64_t begin;    // column of x[0] in the row
  int columns;
  int head, body_end;  // whole vectors lie in [head, body_end)
};

template <class T>
PYOPS_DEVICE Chunk<T> chunk_of(const GradientRows& g, const ColumnSplit& split, int64_t row) {
  constexpr int width = dev::kVectorElements<T>;
  const int64_t begin = int64_t(blockIdx.y) * split.chunk_columns, left = g.classes - begin;
  Chunk<T> chunk;
  chunk.begin = begin;
  chunk.columns = int(left < split.chunk_columns ? left : split.chunk_columns);
  chunk.x = static_cast<const T*>(g.logits) + row * g.row_stride + begin;
  chunk.out = static_cast<T*>(g.gradient) + row * g.gradient_row_stride + begin;
  chunk.weight = g.class_weight ? static_cast<const T*>(g.class_weight) + begin : nullptr;
  chunk.head = elements_to_boundary(chunk.out, chunk.columns);
  chunk.body_end = chunk.head + (chunk.columns - chunk.head) / width * width;
  return chunk;
}

// ---- targets --------------------------------------------------------------------------------------------

// The K targets of one row, as one block sees them. A target counts where its saved gradient is not 0.
template <class T>
struct ChunkTargets {
  const GradientRows& g;
  const double* gradients;  // of this row
  T* originals;             // of this row, for the targets beyond the first of each thread
  int64_t row, begin;
  int columns;

  PYOPS_DEVICE double gradient(int64_t j) const { return gradients[j]; }
  PYOPS_DEVICE int64_t column(int64_t j) const { return read_class(g.target, g.target_is_wide, row, j); }

  // Where target j lies within the chunk, or -1.
  PYOPS_DEVICE int offset(int64_t j, const char* message) const {
    if (gradient(j) == 0) return -1;
    const int64_t c = column(j), distance = c - begin;
    PYOPS_DEVICE_ASSERT(c >= 0 && c < g.classes, message);
    return distance >= 0 && distance < columns ? int(distance) : -1;
  }

  // Sum of the gradients of all targets that share the column of target j; false if j is not the first of them.
  PYOPS_DEVICE bool sum_of_duplicates(int64_t j, double& sum) const {
    const int64_t c = column(j);
    sum = 0;
#pragma unroll 1
    for (int64_t other = 0; other < g.targets; ++other) {
      const double gradient_there = gradient(other);
      if (gradient_there == 0 || column(other) != c) continue;
      if (other < j) return false;
      sum += gradient_there;
    }
    return true;
  }
};

// The first target of this thread: its place in the chunk, or -1, and the logit that was there.
template <class T>
struct HeldTarget {
  int offset;
  T logit;
};

template <class T>
PYOPS_DEVICE HeldTarget<T> hold_targets(const Chunk<T>& chunk, const ChunkTargets<T>& targets, const char* message) {
  HeldTarget<T> held = {-1, T{}};
#pragma unroll 1
  for (int64_t j = threadIdx.x; j < targets.g.targets; j += blockDim.x) {
    const int offset = targets.offset(j, message);
    if (j < blockDim.x) held.offset = offset;
    if (offset < 0) continue;
    if (j < blockDim.x) {
      held.logit = chunk.x[offset];
    } else {
      targets.originals[j] = chunk.x[offset];
    }
  }
  return held;
}

template <class T, class Loss>
PYOPS_DEVICE void write_targets(const HeldTarget<T>& held, const Chunk<T>& chunk, const ChunkTargets<T>& targets,
                                const Loss& loss, const typename Loss::Numbers& numbers) {
#pragma unroll 1
  for (int64_t j = threadIdx.x; j < targets.g.targets; j += blockDim.x) {
    const bool first = j < blockDim.x;
    const int offset = first ? held.offset : targets.offset(j, loss.message());
    double sum;
    if (offset < 0 || !targets.sum_of_duplicates(j, sum)) continue;
    const double o = double(dev::widen(first ? held.logit : targets.originals[j]));
    const double value = loss.template value<T>(numbers, o, chunk.begin + offset) + numbers.target_scale * sum;
    dev::narrow(value, chunk.out[offset]);
  }
}

// ---- stream ---------------------------------------------------------------------------------------------

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
PYOPS_DEVICE void write_single(int column, const Chunk<T>& chunk, const Formula& formula) {
  const RealOf<T> o = dev::widen(chunk.x[column]);
  if constexpr (Formula::kWeighted) {
    dev::narrow(formula(o, dev::widen(chunk.weight[column])), chunk.out[column]);
  } else {
    dev::narrow(formula(o), chunk.out[column]);
  }
}

// The column of the element outside whole vectors that this thread owns, or -1.
template <class T>
PYOPS_DEVICE int single_of(const Chunk<T>& chunk) {
  const int single = int(threadIdx.x);
  if (single >= chunk.head + chunk.columns - chunk.body_end) return -1;
  return single < chunk.head ? single : chunk.body_end + (single - chunk.head);
}

// Up to kVectorsInFlight vectors, all loads before the first store.
template <class T, class Formula>
PYOPS_DEVICE void stream_step(int column, int step, const Chunk<T>& chunk, const Formula& formula) {
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

template <class T, class Formula>
PYOPS_DEVICE void stream_chunk(const Chunk<T>& chunk, const Formula& formula) {
  constexpr int width = dev::kVectorElements<T>;
  const int step = int(blockDim.x) * width, column = chunk.head + int(threadIdx.x) * width;
  if ((reinterpret_cast<uintptr_t>(chunk.x + chunk.head) & 15u) == 0) {
    for (int at = column; at < chunk.body_end; at += kVectorsInFlight * step) stream_step(at, step, chunk, formula);
  } else {  // logits and gradient differ in alignment: narrow loads, which L1 merges, and wide stores
    for (int at = column; at < chunk.body_end; at += step) {
      write_vector(load_elements(chunk.x + at), at, chunk, formula);
    }
  }
  const int single = single_of(chunk);
  if (single >= 0) write_single(single, chunk, formula);
}

// A tiny row (../tiny_row.h), in double.
template <class T, class Loss>
PYOPS_DEVICE void write_tiny_row(const Chunk<T>& chunk, const Loss& loss, const typename Loss::Numbers& numbers) {
  const int column = int(threadIdx.x);
  if (column >= chunk.columns) return;
  const double o = double(dev::widen(chunk.x[column]));
  dev::narrow(loss.template value<T>(numbers, o, column), chunk.out[column]);
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

// Whether row statistics [first, last) are all 0; for all lanes of a warp.
PYOPS_DEVICE bool all_zero(const double* statistics, int64_t first, int64_t last) {
  bool any = false;
#pragma unroll 1
  for (int64_t column = first + dev::lane(); column < last; column += 32) any = any || statistics[column] != 0;
  return __any_sync(dev::kFullWarp, any) == 0;
}

// ---- kernel body ----------------------------------------------------------------------------------------

// The whole of a backward kernel. `Loss` knows the formula of one loss:
//   Numbers                         of a row, in shared memory: doubles, with `zero` and `target_scale`
//   Numbers numbers(g, row)         from statistics, upstream gradient and normaliser; run by one warp
//   double value<T>(numbers, o, k)  gradient of column k with logit o, without target gradients
//   with_formula<T>(numbers, run)   calls run(formula): formula(o) or, if kWeighted, formula(o, class weight)
// A row with `zero` is ignored: its gradient is exactly 0 and its logits, which may hold anything, do not enter.
template <class T, class Loss>
PYOPS_DEVICE void write_gradient(const GradientRows& g, const ColumnSplit& split, int64_t row, const Loss& loss,
                                 typename Loss::Numbers* shared_numbers) {
  const Chunk<T> chunk = chunk_of<T>(g, split, row);
  const double* gradients = g.statistics + row * (Loss::kRowNumbers + g.targets) + Loss::kRowNumbers;
  T* const originals = g.originals ? static_cast<T*>(g.originals) + row * g.targets : nullptr;
  const ChunkTargets<T> targets{g, gradients, originals, row, chunk.begin, chunk.columns};
  if (threadIdx.x < 32) {
    const typename Loss::Numbers numbers = loss.numbers(g, row);
    if (dev::lane() == 0) shared_numbers[0] = numbers;
  }
  const HeldTarget<T> held = hold_targets(chunk, targets, loss.message());
  __syncthreads();
  const typename Loss::Numbers& numbers = shared_numbers[0];
  if (numbers.zero) {
    zero_chunk(chunk);
    return;
  }
  if (g.classes <= kTinyRow) {
    write_tiny_row(chunk, loss, numbers);
  } else {
    loss.template with_formula<T>(numbers, [&](const auto& formula) { stream_chunk(chunk, formula); });
  }
  __syncthreads();
  write_targets(held, chunk, targets, loss, numbers);
}

}  // namespace
}  // namespace pyops
