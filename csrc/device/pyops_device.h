// Everything a CUDA kernel file uses beyond plain C++: launch and shared-memory macros, wide memory accesses,
// conversions and the approximate exponential. The only header that kernel files include besides their own .cuh,
// and the only place for inline PTX.
//
// Two implementations of one list. Under nvcc: PTX. Under PYOPS_EMU the kernel file is compiled by the host
// compiler: ../emulator/cuda_emulator.h supplies the CUDA names (threadIdx, __syncthreads, __shfl_xor_sync, ...)
// and the three macros, the portable bodies below supply the rest. No kernel file tests PYOPS_EMU.
//
// Rules for kernel files: shared memory only through PYOPS_SHARED / PYOPS_DYN_SHARED, launches only through
// PYOPS_LAUNCH, 16-byte global accesses only through ldg128 / stg128 and their relatives.
#pragma once

#include <stdint.h>
#include <string.h>

#include "../common/dtype.h"

#ifdef PYOPS_EMU

#include "../emulator/cuda_emulator.h"

#else

#include <assert.h>
#include <cuda_runtime.h>

#define PYOPS_SHARED(type, name, count) __shared__ type name[count]

#define PYOPS_DYN_SHARED(type, name)                                    \
  extern __shared__ __align__(16) unsigned char pyops_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(pyops_dynamic_shared)

// The CUDA error of the launch, 0 for success. A kernel template with several arguments goes in parentheses.
#define PYOPS_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::pyops::dev::launch(kernel, grid, block, shared_bytes, stream, __VA_ARGS__)

#endif

#define PYOPS_DEVICE __device__ __forceinline__

// Stops the kernel, with `message` on stderr and cudaErrorAssert at the next synchronisation, when a condition on
// data fails that the host cannot check without waiting for the device. The message says "pyops::<op>: ...".
#define PYOPS_DEVICE_ASSERT(condition, message)                        \
  do {                                                                 \
    if (!(condition)) ::pyops::dev::fail(message, __FILE__, __LINE__); \
  } while (false)

namespace pyops::dev {

// 16 bytes as they travel between memory and registers.
struct alignas(16) Bits128 {
  uint32_t word[4];
};

constexpr unsigned kFullWarp = 0xffffffffu;

PYOPS_DEVICE int lane() { return int(threadIdx.x & 31u); }

#ifdef PYOPS_EMU

[[noreturn]] inline void fail(const char* message, const char* file, int line) { emulator::fail(message, file, line); }

PYOPS_DEVICE Bits128 ldg128(const void* address) { return emulator::load128<Bits128>(address); }
PYOPS_DEVICE Bits128 ldg128_stream(const void* address) { return emulator::load128<Bits128>(address); }
PYOPS_DEVICE void stg128_stream(void* address, const Bits128& bits) { emulator::store128(address, bits); }

PYOPS_DEVICE float bf16_f(bfloat16 value) { return pyops::widen(value); }
PYOPS_DEVICE float f16_f(float16 value) { return pyops::widen(value); }

PYOPS_DEVICE uint32_t f_bf16x2(float low, float high) {
  bfloat16 pair[2];
  pyops::narrow(low, pair[0]);
  pyops::narrow(high, pair[1]);
  return uint32_t(pair[0].bits) | uint32_t(pair[1].bits) << 16;
}

PYOPS_DEVICE uint32_t f_f16x2(float low, float high) {
  float16 pair[2];
  pyops::narrow(low, pair[0]);
  pyops::narrow(high, pair[1]);
  return uint32_t(pair[0].bits) | uint32_t(pair[1].bits) << 16;
}

PYOPS_DEVICE float ex2(float x) {
  const float power = exp2f(x);
  return power < 1.17549435e-38f ? 0.0f : power;
}

#else

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
           const Arguments&... arguments) {
  // clang-format off
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  // clang-format on
  return int(cudaGetLastError());
}

PYOPS_DEVICE void fail(const char* message, const char* file, int line) {
  __assert_fail(message, file, unsigned(line), "pyops");
  __trap();  // never reached; tells the compiler that nothing needs to survive the call
}

// Memory that nobody writes while the kernel runs; read once, so it does not displace anything in L1.
PYOPS_DEVICE Bits128 ldg128(const void* address) {
  Bits128 v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
      : "l"(address));
  return v;
}

// The last read of data that the same thread may overwrite: evicted first.
PYOPS_DEVICE Bits128 ldg128_stream(const void* address) {
  Bits128 v;
  asm volatile("ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(address));
  return v;
}

// Written once and not read again by this kernel.
PYOPS_DEVICE void stg128_stream(void* address, const Bits128& v) {
  asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.word[0]), "r"(v.word[1]),
               "r"(v.word[2]), "r"(v.word[3])
               : "memory");
}

PYOPS_DEVICE float bf16_f(bfloat16 value) { return __uint_as_float(uint32_t(value.bits) << 16); }

PYOPS_DEVICE float f16_f(float16 value) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
}

// Round to nearest even, NaN stays NaN; the first argument ends in the low half.
PYOPS_DEVICE uint32_t f_bf16x2(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

PYOPS_DEVICE uint32_t f_f16x2(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// 2^x to 2 ulp; results below the smallest normal number are 0.
PYOPS_DEVICE float ex2(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

#endif

PYOPS_DEVICE bfloat16 f_bf16(float value) { return {uint16_t(f_bf16x2(value, 0.0f))}; }
PYOPS_DEVICE float16 f_f16(float value) { return {uint16_t(f_f16x2(value, 0.0f))}; }

// ---- one element ----------------------------------------------------------------------------------------

PYOPS_DEVICE float widen(float value) { return value; }
PYOPS_DEVICE double widen(double value) { return value; }
PYOPS_DEVICE float widen(bfloat16 value) { return bf16_f(value); }
PYOPS_DEVICE float widen(float16 value) { return f16_f(value); }

// A double goes through float on its way to 16 bits: two roundings that differ from one only in ties that need more
// than 24 bits to see.
PYOPS_DEVICE void narrow(double value, double& out) { out = value; }
PYOPS_DEVICE void narrow(double value, float& out) { out = float(value); }
PYOPS_DEVICE void narrow(double value, bfloat16& out) { out = f_bf16(float(value)); }
PYOPS_DEVICE void narrow(double value, float16& out) { out = f_f16(float(value)); }
PYOPS_DEVICE void narrow(float value, float& out) { out = value; }
PYOPS_DEVICE void narrow(float value, bfloat16& out) { out = f_bf16(value); }
PYOPS_DEVICE void narrow(float value, float16& out) { out = f_f16(value); }

// ---- 16 bytes of elements -------------------------------------------------------------------------------

template <class T>
constexpr int kVectorElements = int(16 / sizeof(T));

// A vector whose first element is `element`, the others 0.
template <class T>
PYOPS_DEVICE Bits128 first_element(T element) {
  T elements[kVectorElements<T>] = {element};
  Bits128 bits;
  memcpy(&bits, elements, 16);
  return bits;
}

PYOPS_DEVICE void unpack(const Bits128& bits, float (&values)[4], const float*) { memcpy(values, &bits, 16); }
PYOPS_DEVICE void unpack(const Bits128& bits, double (&values)[2], const double*) { memcpy(values, &bits, 16); }

PYOPS_DEVICE void unpack(const Bits128& bits, float (&values)[8], const bfloat16*) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[2 * i] = bf16_f({uint16_t(bits.word[i])});
    values[2 * i + 1] = bf16_f({uint16_t(bits.word[i] >> 16)});
  }
}

PYOPS_DEVICE void unpack(const Bits128& bits, float (&values)[8], const float16*) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[2 * i] = f16_f({uint16_t(bits.word[i])});
    values[2 * i + 1] = f16_f({uint16_t(bits.word[i] >> 16)});
  }
}

PYOPS_DEVICE void pack(const float (&values)[4], Bits128& bits, const float*) { memcpy(&bits, values, 16); }
PYOPS_DEVICE void pack(const double (&values)[2], Bits128& bits, const double*) { memcpy(&bits, values, 16); }

PYOPS_DEVICE void pack(const float (&values)[8], Bits128& bits, const bfloat16*) {
#pragma unroll
  for (int i = 0; i < 4; ++i) bits.word[i] = f_bf16x2(values[2 * i], values[2 * i + 1]);
}

PYOPS_DEVICE void pack(const float (&values)[8], Bits128& bits, const float16*) {
#pragma unroll
  for (int i = 0; i < 4; ++i) bits.word[i] = f_f16x2(values[2 * i], values[2 * i + 1]);
}

}  // namespace pyops::dev
