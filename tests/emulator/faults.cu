// Small kernels, clean and with one planted fault each, that the checker must tell apart. Every kernel has a template
// parameter: with false it is clean.
#include "../../csrc/device/pyops_device.h"

namespace pyops {
namespace {

using dev::kFullWarp;

constexpr int kThreads = 64;

// Sums 64 floats by partial sums in shared memory.
template <bool kFault>
__global__ void missing_barrier(const float* x, float* out) {
  PYOPS_SHARED(float, part, kThreads);
  part[threadIdx.x] = x[threadIdx.x];
  if (!kFault) __syncthreads();
  if (threadIdx.x == 0) {
    float sum = 0;
    for (int i = 0; i < kThreads; ++i) sum += part[i];
    *out = sum;
  }
}

// Double-buffered: the next round overwrites what the slowest thread may still read, unless there is a second barrier.
template <bool kFault>
__global__ void missing_second_barrier(const float* x, float* out, int rounds) {
  PYOPS_SHARED(float, tile, kThreads);
  float sum = 0;
  for (int r = 0; r < rounds; ++r) {
    tile[threadIdx.x] = x[r * kThreads + int(threadIdx.x)];
    __syncthreads();
    sum += tile[(threadIdx.x + 1) % kThreads];
    if (!kFault) __syncthreads();
  }
  out[threadIdx.x] = sum;
}

template <bool kFault>
__global__ void missing_wait(const float* x, float* out) {
  PYOPS_SHARED(float, tile, 4 * kThreads);
  dev::cp_async16(tile + 4 * threadIdx.x, x + 4 * threadIdx.x, true);
  dev::cp_async_commit();
  if (!kFault) dev::cp_async_wait<0>();
  __syncthreads();
  out[threadIdx.x] = tile[(4 * threadIdx.x + 5) % (4 * kThreads)];
}

template <bool kFault>
__global__ void half_warp_shuffle(const float* x, float* out) {
  float value = x[threadIdx.x];
  if (!kFault || dev::lane() < 16) value += __shfl_xor_sync(kFullWarp, value, 1);
  out[threadIdx.x] = value;
}

template <bool kFault>
__global__ void divergent_barrier(const float* x, float* out) {
  PYOPS_SHARED(float, tile, kThreads);
  tile[threadIdx.x] = x[threadIdx.x];
  if (kFault) {
    if (threadIdx.x < 32) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
}

// Rows of n columns, one block each; the fault writes one column more.
template <bool kFault>
__global__ void one_past_the_end(const float* x, float* out, int n) {
  for (int k = int(threadIdx.x); k < n + int(kFault); k += kThreads)
    out[blockIdx.x * n + k] = 2 * x[blockIdx.x * n + (k % n)];
}

template <bool kFault>
__global__ void uninitialised(const float* x, float* out) {
  PYOPS_SHARED(float, tile, kThreads + 1);
  tile[threadIdx.x] = x[threadIdx.x];
  if (!kFault && threadIdx.x == 0) tile[kThreads] = 0;
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x + 1];
}

template <bool kFault>
__global__ void blocks_add(const float* x, float* out) {
  if (threadIdx.x == 0) {
    if (kFault) {
      *out += x[blockIdx.x];
    } else {
      atomicAdd(out, x[blockIdx.x]);
    }
  }
}

// The last block to arrive adds up what all blocks left: ordered by the fence and the counter. The fault is the fence.
template <bool kFault>
__global__ void last_block(const float* x, float* partial, unsigned* counter, float* out) {
  PYOPS_SHARED(bool, last, 1);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = 3 * x[blockIdx.x];
    if (!kFault) __threadfence();
    last[0] = atomicAdd(counter, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (last[0] && threadIdx.x == 0) {
    __threadfence();
    float sum = 0;
    for (unsigned b = 0; b < gridDim.x; ++b) sum += partial[b];
    *out = sum;
    *counter = 0;
  }
}

// Lanes pass values through shared memory within a warp: __syncwarp orders them, a shuffle would not.
template <bool kFault>
__global__ void within_a_warp(const float* x, float* out) {
  PYOPS_SHARED(float, tile, kThreads);
  tile[threadIdx.x] = x[threadIdx.x];
  float other = 0;
  if (kFault) {
    other = __shfl_xor_sync(kFullWarp, other, 1);
  } else {
    __syncwarp();
  }
  out[threadIdx.x] = tile[threadIdx.x ^ 1] + other;
}

// Two warps wait for each other's named barrier; the fault is that one asks for another number of threads.
template <bool kFault>
__global__ void deadlock(const float* x, float* out) {
  if (kFault && threadIdx.x >= 32) {
    out[threadIdx.x] = x[threadIdx.x];
    dev::barrier_sync(2, kThreads);
  } else {
    dev::barrier_sync(1, kFault ? kThreads : 32);
    out[threadIdx.x] = x[threadIdx.x];
  }
}

// Every block waits for the one before it.
__global__ void chain(const float* x, float* sum, unsigned* turn) {
  if (threadIdx.x == 0) {
    while (atomicAdd(turn, 0u) != blockIdx.x) dev::spin_yield();
    __threadfence();
    *sum += x[blockIdx.x];
    __threadfence();
    atomicAdd(turn, 1u);
  }
}

}  // namespace
}  // namespace pyops

using namespace pyops;

#define PYOPS_PAIR(name, grid, ...)                                          \
  (fault ? PYOPS_LAUNCH(name<true>, grid, kThreads, 0, nullptr, __VA_ARGS__) \
         : PYOPS_LAUNCH(name<false>, grid, kThreads, 0, nullptr, __VA_ARGS__))

extern "C" int run_missing_barrier(bool fault, const float* x, float* out) {
  return PYOPS_PAIR(missing_barrier, 1, x, out);
}
extern "C" int run_missing_second_barrier(bool fault, const float* x, float* out, int rounds) {
  return PYOPS_PAIR(missing_second_barrier, 1, x, out, rounds);
}
extern "C" int run_missing_wait(bool fault, const float* x, float* out) { return PYOPS_PAIR(missing_wait, 1, x, out); }
extern "C" int run_half_warp_shuffle(bool fault, const float* x, float* out) {
  return PYOPS_PAIR(half_warp_shuffle, 1, x, out);
}
extern "C" int run_divergent_barrier(bool fault, const float* x, float* out) {
  return PYOPS_PAIR(divergent_barrier, 1, x, out);
}
extern "C" int run_one_past_the_end(bool fault, const float* x, float* out, int rows, int n) {
  return PYOPS_PAIR(one_past_the_end, rows, x, out, n);
}
extern "C" int run_uninitialised(bool fault, const float* x, float* out) {
  return PYOPS_PAIR(uninitialised, 1, x, out);
}
extern "C" int run_blocks_add(bool fault, const float* x, float* out) { return PYOPS_PAIR(blocks_add, 4, x, out); }
extern "C" int run_last_block(bool fault, const float* x, float* partial, unsigned* counter, float* out) {
  return PYOPS_PAIR(last_block, 4, x, partial, counter, out);
}
extern "C" int run_within_a_warp(bool fault, const float* x, float* out) {
  return PYOPS_PAIR(within_a_warp, 1, x, out);
}
extern "C" int run_deadlock(bool fault, const float* x, float* out) { return PYOPS_PAIR(deadlock, 1, x, out); }
extern "C" int run_chain(const float* x, float* sum, unsigned* turn) {
  return PYOPS_LAUNCH_COOPERATIVE(chain, 4, kThreads, 0, nullptr, x, sum, turn);
}
