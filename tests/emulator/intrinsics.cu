// One-warp probes of the intrinsics, on raw registers: run in emulation here, as PTX by an interpreter, and on a GPU.
#include "../../csrc/device/pyops_device.h"

namespace pyops {
namespace {

// Lane l has the registers a[4 l ...], b[2 l ...] and d[4 l ...].
template <class D, class F>
PYOPS_DEVICE void on_registers(const uint32_t* a, const uint32_t* b, D* d, const F& mma) {
  const int l = dev::lane();
  uint32_t ra[4], rb[2];
  D rd[4];
  for (int i = 0; i < 4; ++i) ra[i] = a[4 * l + i];
  for (int i = 0; i < 2; ++i) rb[i] = b[2 * l + i];
  for (int i = 0; i < 4; ++i) rd[i] = d[4 * l + i];
  mma(rd, ra, rb);
  for (int i = 0; i < 4; ++i) d[4 * l + i] = rd[i];
}

__global__ void probe_mma_bf16(const uint32_t* a, const uint32_t* b, float* d) {
  on_registers(a, b, d, [](auto& rd, auto& ra, auto& rb) { dev::mma_m16n8k16_bf16(rd, ra, rb); });
}
__global__ void probe_mma_f16(const uint32_t* a, const uint32_t* b, float* d) {
  on_registers(a, b, d, [](auto& rd, auto& ra, auto& rb) { dev::mma_m16n8k16_f16(rd, ra, rb); });
}
__global__ void probe_mma_s8(const uint32_t* a, const uint32_t* b, int* d) {
  on_registers(a, b, d, [](auto& rd, auto& ra, auto& rb) { dev::mma_m16n8k32_s8(rd, ra, rb); });
}

// 32 rows of 16 bytes; the address of lane l is row `rows[l]`.
template <int kMatrices, bool kTransposed>
__global__ void probe_ldmatrix(const uint32_t* tile, const int* rows, uint32_t* out) {
  PYOPS_SHARED(dev::Bits128, shared, 32);
  const int l = dev::lane();
  shared[l] = dev::ldg128(tile + 4 * l);
  __syncthreads();
  uint32_t r[kMatrices];
  const void* row = shared + rows[l];
  if constexpr (kMatrices == 2 && kTransposed) dev::ldmatrix_x2_trans(r, row);
  if constexpr (kMatrices == 2 && !kTransposed) dev::ldmatrix_x2(r, row);
  if constexpr (kMatrices == 4 && kTransposed) dev::ldmatrix_x4_trans(r, row);
  if constexpr (kMatrices == 4 && !kTransposed) dev::ldmatrix_x4(r, row);
  for (int i = 0; i < kMatrices; ++i) out[kMatrices * l + i] = r[i];
}

// Two groups; the first is read while the second may still be on its way.
__global__ void probe_cp_async(const uint32_t* first, const uint32_t* second, const int* copy, uint32_t* out) {
  PYOPS_SHARED(dev::Bits128, shared, 64);
  const int l = dev::lane();
  dev::cp_async16(shared + l, first + 4 * l, copy[l] != 0);
  dev::cp_async_commit();
  dev::cp_async16(shared + 32 + l, second + 4 * l, copy[l] == 0);
  dev::cp_async_commit();
  dev::cp_async_wait<1>();
  dev::stg128(out + 4 * l, shared[l]);
  dev::cp_async_wait<0>();
  dev::stg128(out + 128 + 4 * l, shared[32 + l]);
}

__global__ void probe_dp4a(const uint32_t* a, const uint32_t* b, const int* c, int* out) {
  const int l = dev::lane();
  out[l] = dev::dp4a(a[l], b[l], c[l]);
}

__global__ void probe_conversions(const float* x, uint32_t* bf16, uint32_t* f16, float* from_bf16, float* from_f16,
                                  float* power) {
  const int l = dev::lane();
  bf16[l] = dev::f_bf16x2(x[2 * l], x[2 * l + 1]);
  f16[l] = dev::f_f16x2(x[2 * l], x[2 * l + 1]);
  from_bf16[l] = dev::bf16_f(bfloat16{uint16_t(bf16[l])});
  from_f16[l] = dev::f16_f(float16{uint16_t(f16[l])});
  power[l] = dev::ex2(x[2 * l]);
}

__global__ void probe_shuffles(const int* x, int* out) {
  const int l = dev::lane();
  out[l] = __shfl_xor_sync(dev::kFullWarp, x[l], 5);
  out[32 + l] = __shfl_down_sync(dev::kFullWarp, x[l], 3, 8);
  out[64 + l] = __shfl_up_sync(dev::kFullWarp, x[l], 2, 16);
  out[96 + l] = __shfl_sync(dev::kFullWarp, x[l], 9, 8);
  out[128 + l] = int(__ballot_sync(dev::kFullWarp, x[l] & 1));
  out[160 + l] = __any_sync(dev::kFullWarp, x[l] > 1000) + 2 * __all_sync(dev::kFullWarp, x[l] < 1000);
}

}  // namespace
}  // namespace pyops

using namespace pyops;

#define PYOPS_PROBE(kernel, ...) return PYOPS_LAUNCH((kernel), 1, 32, 0, nullptr, __VA_ARGS__)

extern "C" int run_mma_bf16(const uint32_t* a, const uint32_t* b, float* d) { PYOPS_PROBE(probe_mma_bf16, a, b, d); }
extern "C" int run_mma_f16(const uint32_t* a, const uint32_t* b, float* d) { PYOPS_PROBE(probe_mma_f16, a, b, d); }
extern "C" int run_mma_s8(const uint32_t* a, const uint32_t* b, int* d) { PYOPS_PROBE(probe_mma_s8, a, b, d); }
extern "C" int run_ldmatrix(int matrices, bool transposed, const uint32_t* tile, const int* rows, uint32_t* out) {
  if (matrices == 2 && transposed) PYOPS_PROBE((probe_ldmatrix<2, true>), tile, rows, out);
  if (matrices == 2) PYOPS_PROBE((probe_ldmatrix<2, false>), tile, rows, out);
  if (transposed) PYOPS_PROBE((probe_ldmatrix<4, true>), tile, rows, out);
  PYOPS_PROBE((probe_ldmatrix<4, false>), tile, rows, out);
}
extern "C" int run_cp_async(const uint32_t* first, const uint32_t* second, const int* copy, uint32_t* out) {
  PYOPS_PROBE(probe_cp_async, first, second, copy, out);
}
extern "C" int run_dp4a(const uint32_t* a, const uint32_t* b, const int* c, int* out) {
  PYOPS_PROBE(probe_dp4a, a, b, c, out);
}
extern "C" int run_conversions(const float* x, uint32_t* bf16, uint32_t* f16, float* from_bf16, float* from_f16,
                               float* power) {
  PYOPS_PROBE(probe_conversions, x, bf16, f16, from_bf16, from_f16, power);
}
extern "C" int run_shuffles(const int* x, int* out) { PYOPS_PROBE(probe_shuffles, x, out); }
