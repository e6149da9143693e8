// What the forward kernels of spherical_loss and cross_entropy share: how rows are cut into blocks, reading a row,
// reductions over a block, targets, and the reduction of row losses. One thread block works on one row or one part
// of a row; every merge has a fixed order that depends on shapes and pointer alignment only, so two runs agree
// bitwise. No atomics.
#pragma once

#include <math.h>

#include "../../device/pyops_device.h"
#include "row_arguments.cuh"

namespace pyops {
namespace {

// The type a kernel computes in, element by element.
template <class T>
using RealOf = typename Accumulation<T>::type;

// ---- how rows are cut -----------------------------------------------------------------------------------

// Kernels say with __launch_bounds__(threads, 3) or (threads, 2) how many blocks of 256 threads a multiprocessor must
// be able to hold: 768 threads with four loads of 16 bytes each are 48 KiB in flight, several times what an H100 needs
// to hide the latency of its memory (estimated: 13 bytes per clock and multiprocessor, about 900 clocks). A bound
// without the second number lets the compiler aim for more blocks and spill.
constexpr int kVectorsInFlight = 4;                   // independent 16-byte loads of a thread
constexpr int kMaximumThreads = 256;                  // of a forward block
constexpr int64_t kFilledThreads = int64_t(1) << 17;  // 1024 on each of 128 multiprocessors
constexpr int64_t kLongestPart = int64_t(1) << 26;    // columns; keeps offsets within a part in 32 bits
constexpr int64_t kLargestGrid = (int64_t(1) << 31) - 1;

inline int64_t divide_up(int64_t dividend, int64_t divisor) { return (dividend + divisor - 1) / divisor; }
inline int64_t element_bytes(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

struct RowSplit {
  int threads;           // of a block
  int parts;             // blocks per row
  int64_t part_columns;  // columns of a part (the last one may have fewer)
};

// The one launch decision of a forward pass; a function of the shape alone, so that results do not depend on the
// device. A step is what one thread reads at once: kVectorsInFlight vectors of 16 bytes. The times are estimates; none
// of this has been measured on a GPU yet.
//  - Many rows: about eight steps per thread. That pays for the start of a block (target lookup, 1 us) and its end
//    (merge and row formula, 1 to 2 us), and blocks stay small enough that the last wave of blocks costs little.
//    A row of 4096 bfloat16 is then the work of one warp, a row of 64k and more of 256 threads.
//  - Few rows: more threads per row, down to one step each, until kFilledThreads have work; beyond
//    kMaximumThreads the row is cut into parts whose results a second kernel merges in order.
inline RowSplit split_rows(int64_t rows, int64_t columns, int64_t element_bytes) {
  const int64_t step_columns = kVectorsInFlight * 16 / element_bytes;
  const int64_t steps = divide_up(columns, step_columns);
  int64_t wanted = divide_up(kFilledThreads, rows > 0 ? rows : 1);
  wanted = wanted < steps ? wanted : steps;
  const int64_t comfortable = steps / 8 > wanted ? steps / 8 : wanted;
  int threads = 32;
  while (threads < kMaximumThreads && threads < comfortable) threads *= 2;
  int64_t parts = divide_up(wanted, threads);
  const int64_t shortest = divide_up(columns, kLongestPart);
  parts = parts > shortest ? parts : shortest;
  if (parts <= 1) return {threads, 1, columns};
  const int64_t part_columns = divide_up(divide_up(columns, parts), step_columns) * step_columns;
  return {threads, int(divide_up(columns, part_columns)), part_columns};
}

// Runs launch(first_row, rows) for slices of rows that fit grid.x; stops at the first error.
template <class Launch>
int for_each_row_slice(int64_t rows, const Launch& launch) {
  for (int64_t first = 0; first < rows; first += kLargestGrid) {
    const int64_t left = rows - first;
    const int error = launch(first, left < kLargestGrid ? left : kLargestGrid);
    if (error) return error;
  }
  return 0;
}

// Calls f with a value of the element type that `dtype` names.
template <class Function>
int with_element_type(DType dtype, const Function& f) {
  switch (dtype) {
    case DType::float32:
      return f(float());
    case DType::float64:
      return f(double());
    case DType::bfloat16:
      return f(bfloat16());
    case DType::float16:
      return f(float16());
  }
  return 0;
}

// ---- reading a row --------------------------------------------------------------------------------------

// Elements before the first 16-byte boundary, at most `columns`.
template <class T>
PYOPS_DEVICE int elements_to_boundary(const T* x, int columns) {
  const int misaligned = int(reinterpret_cast<uintptr_t>(x) & 15u);
  const int head = misaligned ? (16 - misaligned) / int(sizeof(T)) : 0;
  return head < columns ? head : columns;
}

// Streams x[0, columns) through the block: each thread hands its elements to taker.take(bits, n, column, step), where
// element b < n of bits[a] is x[column + a * step + b]. Vectors lie on 16-byte boundaries whatever the alignment of x
// and have all their elements; the few before the first and after the last one come singly (n = 1).
template <int kVectors = kVectorsInFlight, class T, class Taker>
PYOPS_DEVICE void read_row(const T* x, int columns, Taker& taker) {
  constexpr int width = dev::kVectorElements<T>;
  const int head = elements_to_boundary(x, columns);
  const int body_end = head + (columns - head) / width * width;
  const int step = int(blockDim.x) * width;
  int column = head + int(threadIdx.x) * width;
  for (; column + (kVectors - 1) * step < body_end; column += kVectors * step) {
    dev::Bits128 bits[kVectors];
#pragma unroll
    for (int a = 0; a < kVectors; ++a) bits[a] = dev::ldg128(x + column + a * step);
    taker.take(bits, width, column, step);
  }
  // What is left: at most kVectors - 1 vectors of this thread, then one of the single elements, of which
  // there are at most 2 * (width - 1), fewer than a warp has lanes.
  const int single = int(threadIdx.x), singles = head + columns - body_end;
  const int single_column = single < head ? single : body_end + (single - head);
  for (bool vectors = true; vectors; column += step) {
    vectors = column < body_end;
    if (!vectors && single >= singles) break;
    const dev::Bits128 bits[1] = {vectors ? dev::ldg128(x + column) : dev::first_element(x[single_column])};
    taker.take(bits, vectors ? width : 1, vectors ? column : single_column, step);
  }
}

// The class weights that belong to a vector of logits; they share its alignment only by chance.
template <class T>
PYOPS_DEVICE void load_weights(const T* weight, RealOf<T> (&values)[dev::kVectorElements<T>]) {
  if ((reinterpret_cast<uintptr_t>(weight) & 15u) == 0) {
    dev::unpack(dev::ldg128(weight), values, weight);
  } else {
#pragma unroll
    for (int i = 0; i < dev::kVectorElements<T>; ++i) values[i] = dev::widen(weight[i]);
  }
}

// ---- reductions over a block ----------------------------------------------------------------------------

constexpr int kMaximumWarps = 32;

template <class Value>
PYOPS_DEVICE Value warp_sum(Value value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(dev::kFullWarp, value, distance);
  }
  return value;
}

// The larger one; a NaN is passed over (callers see it in the sum that they also take).
PYOPS_DEVICE float larger(float left, float right) { return fmaxf(left, right); }
PYOPS_DEVICE double larger(double left, double right) { return fmax(left, right); }

template <class Real>
PYOPS_DEVICE Real warp_maximum(Real value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    value = larger(value, __shfl_xor_sync(dev::kFullWarp, value, distance));
  }
  return value;
}

// Sums each of `values` over the block; every thread gets the totals. `scratch` holds kMaximumWarps * kValues
// doubles and must not be written again before the next barrier: callers give each reduction its own.
template <int kValues>
PYOPS_DEVICE void block_sum(double (&values)[kValues], double* scratch) {
#pragma unroll
  for (int i = 0; i < kValues; ++i) values[i] = warp_sum(values[i]);
  const int warps = int(blockDim.x / 32), warp = int(threadIdx.x / 32), lane = dev::lane();
  if (warps == 1) return;
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) scratch[i * kMaximumWarps + warp] = values[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kValues; ++i) values[i] = warp_sum(lane < warps ? scratch[i * kMaximumWarps + lane] : 0.0);
}

template <class Real>
PYOPS_DEVICE Real block_maximum(Real value, double* scratch) {
  value = warp_maximum(value);
  const int warps = int(blockDim.x / 32), warp = int(threadIdx.x / 32), lane = dev::lane();
  if (warps == 1) return value;
  if (lane == 0) scratch[warp] = double(value);
  __syncthreads();
  return warp_maximum(Real(scratch[lane < warps ? lane : 0]));
}

// ---- single numbers whose type is known at run time -----------------------------------------------------

PYOPS_DEVICE double read_number(const void* data, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::float32:
      return static_cast<const float*>(data)[index];
    case DType::float64:
      return static_cast<const double*>(data)[index];
    case DType::bfloat16:
      return dev::widen(static_cast<const bfloat16*>(data)[index]);
    case DType::float16:
      return dev::widen(static_cast<const float16*>(data)[index]);
  }
  return 0;
}

PYOPS_DEVICE void write_number(void* data, DType dtype, int64_t index, double value) {
  switch (dtype) {
    case DType::float32:
      dev::narrow(value, static_cast<float*>(data)[index]);
      break;
    case DType::float64:
      dev::narrow(value, static_cast<double*>(data)[index]);
      break;
    case DType::bfloat16:
      dev::narrow(value, static_cast<bfloat16*>(data)[index]);
      break;
    case DType::float16:
      dev::narrow(value, static_cast<float16*>(data)[index]);
      break;
  }
}

// ---- targets --------------------------------------------------------------------------------------------

PYOPS_DEVICE int64_t read_class(const StridedMatrix& target, bool wide, int64_t row, int64_t position) {
  const int64_t at = row * target.row_stride + position * target.column_stride;
  return wide ? static_cast<const int64_t*>(target.data)[at] : int64_t(static_cast<const int32_t*>(target.data)[at]);
}

struct Target {
  int64_t index;
  double own;           // target weight
  double class_weight;  // 1 without class weights
  bool counts;          // neither ignore_index nor of weight 0; the index of another one is never followed
};

// Index, weight and whether it counts; the index may be out of range.
template <class T>
PYOPS_DEVICE Target read_unchecked_target(const LossRows& rows, int64_t row, int64_t position) {
  Target target{read_class(rows.target, rows.target_is_wide, row, position), 1, 1, false};
  if (target.index == rows.ignore_index) return target;
  if (rows.target_weight.data) {
    const int64_t at = row * rows.target_weight.row_stride + position * rows.target_weight.column_stride;
    target.own = double(dev::widen(static_cast<const T*>(rows.target_weight.data)[at]));
  }
  target.counts = target.own != 0;
  return target;
}

// `message` is what a class out of range stops the kernel with, whether it counts or not, as on the CPU.
template <class T>
PYOPS_DEVICE Target read_target(const LossRows& rows, int64_t row, int64_t position, const char* message) {
  Target target = read_unchecked_target<T>(rows, row, position);
  PYOPS_DEVICE_ASSERT(target.index == rows.ignore_index || (target.index >= 0 && target.index < rows.classes), message);
  if (target.counts && rows.class_weight) {
    target.class_weight = double(dev::widen(static_cast<const T*>(rows.class_weight)[target.index]));
  }
  return target;
}

// Whether any target of the row counts: if not, the row is ignored. For the `lanes` threads of a row, 1 or 32.
template <class T>
PYOPS_DEVICE bool any_counts(const LossRows& rows, int64_t row, int lane, int lanes) {
  bool counts = false;
#pragma unroll 1
  for (int64_t j = lane; j < rows.targets; j += lanes) {
    counts = counts || read_unchecked_target<T>(rows, row, j).counts;
  }
  return lanes == 1 ? counts : __any_sync(dev::kFullWarp, counts) != 0;
}

// For a block: the logits of an ignored row are not read. Every warp asks for itself, which is cheaper than a barrier.
// Unchecked, because the call that reports a class out of range would cost the streaming kernels up to 18 registers
// (sm_100): the kernel that finishes the row checks.
template <class T>
PYOPS_DEVICE bool row_counts(const LossRows& rows, int64_t row) {
  return any_counts<T>(rows, row, dev::lane(), 32);
}

// ---- finishing rows -------------------------------------------------------------------------------------

// The second kernel of a forward pass: merges the parts of each row, reads its targets, writes loss and statistics,
// and leaves one subtotal per block and column; a single block writes the reduced loss itself, several leave that to
// a third kernel of one block. Row formulas are long and in double: one thread per row keeps them off most of the
// machine, one warp per row is for rows with many parts or many targets.
constexpr int kFinishThreads = 128;
constexpr int64_t kFinishBlocks = 2048;
constexpr int kTotalThreads = 1024;  // of the third kernel

struct RowFinish {
  int lanes;  // threads per row: 1 or 32
  int blocks;
};

inline RowFinish finish_rows(int64_t rows, int64_t targets, int parts) {
  const int lanes = parts > 1 || targets > 8 ? 32 : 1;
  int64_t blocks = divide_up(rows * lanes, kFinishThreads);
  blocks = blocks < 1 ? 1 : blocks < kFinishBlocks ? blocks : kFinishBlocks;
  return {lanes, int(blocks)};
}

// Sum and maximum over the `lanes` threads of a row: 1 or 32.
PYOPS_DEVICE double row_sum(double value, int lanes) { return lanes == 1 ? value : warp_sum(value); }
PYOPS_DEVICE double row_maximum(double value, int lanes) { return lanes == 1 ? value : warp_maximum(value); }

// Calls finish(row, lane, totals) for the rows of this block, in a fixed order, and sums `totals` over the block.
template <int kColumns, class Finish>
PYOPS_DEVICE void for_each_finished_row(int64_t rows, int lanes, double (&totals)[kColumns], double* scratch,
                                        const Finish& finish) {
  const int64_t per_block = kFinishThreads / lanes;
  const int group = int(threadIdx.x) / lanes, lane = int(threadIdx.x) % lanes;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) totals[c] = 0;
  for (int64_t row = per_block * blockIdx.x + group; row < rows; row += per_block * gridDim.x) {
    finish(row, lane, totals);
  }
  block_sum(totals, scratch);
}

template <int kColumns>
PYOPS_DEVICE void store_subtotals(const double (&totals)[kColumns], double* subtotals) {
#pragma unroll
  for (int c = 0; c < kColumns; ++c) subtotals[int64_t(blockIdx.x) * kColumns + c] = totals[c];
}

// The totals of all blocks, in every thread of the one block that runs this.
template <int kColumns>
PYOPS_DEVICE void sum_subtotals(const double* subtotals, int blocks, double (&totals)[kColumns], double* scratch) {
#pragma unroll
  for (int c = 0; c < kColumns; ++c) totals[c] = 0;
  for (int block = int(threadIdx.x); block < blocks; block += kTotalThreads) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) totals[c] += subtotals[block * kColumns + c];
  }
  block_sum(totals, scratch);
}

PYOPS_DEVICE double mean_divisor(const LossRows& rows, double sum) {
  if (rows.reduction != RowReduction::mean) return 1;
  return rows.safe_mean && sum == 0 ? 1 : sum;
}

}  // namespace
}  // namespace pyops
