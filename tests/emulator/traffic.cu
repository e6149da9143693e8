// Kernels whose memory traffic is known by counting on fingers; speed.py times some of them.
#include "../../csrc/device/pyops_device.h"

namespace pyops {
namespace {

__global__ void copy_vectors(const float* x, float* out) {
  const int at = 4 * int(blockIdx.x * blockDim.x + threadIdx.x);
  dev::stg128(out + at, dev::ldg128(x + at));
}

// Every eighth float: a sector of 32 bytes for each.
__global__ void copy_strided(const float* x, float* out) {
  const int at = int(blockIdx.x * blockDim.x + threadIdx.x);
  out[at] = x[8 * at];
}

// A tile of 32 x 32 through shared memory, written by rows and read by columns, with kPadding floats after each row.
template <int kPadding>
__global__ void transpose(const float* x, float* out) {
  PYOPS_SHARED(float, tile, 32 * (32 + kPadding));
  const int lane = dev::lane();
  for (int row = 0; row < 32; ++row) tile[row * (32 + kPadding) + lane] = x[32 * row + lane];
  __syncthreads();
  for (int row = 0; row < 32; ++row) out[32 * row + lane] = tile[lane * (32 + kPadding) + row];
}

// C = A B^T of bf16, 16 x 8 x 16 per warp and step of k: the speed of matrix instructions in emulation.
__global__ void multiply(const uint32_t* a, const uint32_t* b, float* c, int steps) {
  const int lane = dev::lane();
  float d[4] = {};
  for (int k = 0; k < steps; ++k) {
    uint32_t ra[4], rb[2];
    for (int i = 0; i < 4; ++i) ra[i] = a[(k % 4) * 128 + 4 * lane + i];
    for (int i = 0; i < 2; ++i) rb[i] = b[(k % 4) * 64 + 2 * lane + i];
    dev::mma_m16n8k16_bf16(d, ra, rb);
  }
  for (int i = 0; i < 4; ++i) c[4 * (blockIdx.x * blockDim.x + threadIdx.x) + i] = d[i];
}

// y = W x of int8, a warp per row of `columns` (a multiple of 512): 16-byte loads and dp4a.
__global__ void multiply_vector(const uint32_t* w, const uint32_t* x, int* y, int columns) {
  const int lane = dev::lane(), row = int(blockIdx.x * blockDim.x + threadIdx.x) / 32;
  const uint32_t* own = w + int64_t(row) * (columns / 4);
  int sum = 0;
  for (int at = 4 * lane; at < columns / 4; at += 128) {
    const dev::Bits128 a = dev::ldg128(own + at), b = dev::ldg128(x + at);
    for (int i = 0; i < 4; ++i) sum = dev::dp4a(a.word[i], b.word[i], sum);
  }
  for (int lanes = 16; lanes; lanes /= 2) sum += __shfl_xor_sync(dev::kFullWarp, sum, lanes);
  if (lane == 0) y[row] = sum;
}

}  // namespace
}  // namespace pyops

using namespace pyops;

extern "C" int run_copy_vectors(int blocks, const float* x, float* out) {
  return PYOPS_LAUNCH(copy_vectors, blocks, 256, 0, nullptr, x, out);
}
extern "C" int run_copy_strided(int blocks, const float* x, float* out) {
  return PYOPS_LAUNCH(copy_strided, blocks, 256, 0, nullptr, x, out);
}
extern "C" int run_transpose(bool padded, const float* x, float* out) {
  return padded ? PYOPS_LAUNCH(transpose<1>, 1, 32, 0, nullptr, x, out)
                : PYOPS_LAUNCH(transpose<0>, 1, 32, 0, nullptr, x, out);
}
extern "C" int run_multiply(int blocks, const uint32_t* a, const uint32_t* b, float* c, int steps) {
  return PYOPS_LAUNCH(multiply, blocks, 128, 0, nullptr, a, b, c, steps);
}
extern "C" int run_multiply_vector(int rows, const uint32_t* w, const uint32_t* x, int* y, int columns) {
  return PYOPS_LAUNCH(multiply_vector, rows / 4, 128, 0, nullptr, w, x, y, columns);
}
