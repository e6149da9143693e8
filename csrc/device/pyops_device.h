// Everything a CUDA kernel file uses beyond plain C++: launch and shared-memory macros, wide memory accesses,
// conversions, matrix instructions, asynchronous copies and named barriers. The only header that kernel files include
// besides their own .cuh, and the only place for inline PTX.
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
  ::pyops::dev::launch(false, kernel, grid, block, shared_bytes, stream, __VA_ARGS__)

// All blocks of the grid are resident at once, so that one may wait for another (with dev::spin_yield()).
#define PYOPS_LAUNCH_COOPERATIVE(kernel, grid, block, shared_bytes, stream, ...) \
  ::pyops::dev::launch(true, kernel, grid, block, shared_bytes, stream, __VA_ARGS__)

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
PYOPS_DEVICE void stg128(void* address, const Bits128& bits) { emulator::store128(address, bits); }
PYOPS_DEVICE void spin_yield() { emulator::spin_yield(); }

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
int launch(bool cooperative, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
           const Arguments&... arguments) {
  if (shared_bytes > 48 * 1024) {  // more than every kernel may have without asking
    const auto error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                            cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (error != cudaSuccess) return int(error);
  }
  if (cooperative) {
    const auto launch_with = [&](Parameters... values) {  // converted to what the kernel takes, and with addresses
      void* pointers[] = {static_cast<void*>(&values)..., nullptr};
      return int(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), grid, block, pointers, shared_bytes,
                                             static_cast<cudaStream_t>(stream)));
    };
    return launch_with(arguments...);
  }
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

PYOPS_DEVICE void stg128(void* address, const Bits128& v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.word[0]), "r"(v.word[1]),
               "r"(v.word[2]), "r"(v.word[3])
               : "memory");
}

// Between two looks at memory that another block will write; the launch must be cooperative.
PYOPS_DEVICE void spin_yield() { __nanosleep(32); }

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

// Adds to a counter of a block or of the grid. Integers only: their sum does not depend on the order of arrival.
PYOPS_DEVICE void count(unsigned* counter, unsigned number) { atomicAdd(counter, number); }
PYOPS_DEVICE void count(unsigned long long* counter, unsigned number) {
  atomicAdd(counter, (unsigned long long)number);
}

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

// ---- matrix instructions of a warp ----------------------------------------------------------------------
//
// With g = lane / 4 and t = lane % 4, and element 0 in the low bits of a register:
//   m16n8k16: register r, half h of A is A[g + 8 (r & 1)][2 t + h + 8 (r >> 1)], of B is B[2 t + h + 8 r][g]
//   m16n8k32: register r, byte h of A is A[g + 8 (r & 1)][4 t + h + 16 (r >> 1)], of B is B[4 t + h + 16 r][g]
//   element e of D is D[g + 8 (e >> 1)][2 t + (e & 1)]
// D += A B. The emulation adds the products of one instruction in float32 in the order of k; a GPU aligns and
// truncates, so floats agree to a bound; int8 sums wrap and agree exactly.
//
// ldmatrix: lane 8 m + i gives the address of row i (16 bytes, aligned) of the 8 x 8 matrix m of 16-bit elements;
// register m of a lane is {M[g][2 t], M[g][2 t + 1]}, transposed {M[2 t][g], M[2 t + 1][g]}. With two matrices the
// addresses of lanes 16 to 31 are not used.

#ifdef PYOPS_EMU

struct MmaOperands {
  void* d;
  const uint32_t *a, *b;
};

// These see registers only, so the checker need not watch them: its calls took four fifths of their time.
#define PYOPS_UNCHECKED __attribute__((no_sanitize("thread")))

// Four of the eight columns of D at a time, which any processor has in a register. Per element: products in order of k
// from 0, then C.
typedef float Columns __attribute__((vector_size(16)));
typedef uint32_t IntegerColumns __attribute__((vector_size(16)));

template <class Operand, class Sums, int kDepth, class D>
PYOPS_UNCHECKED inline void multiply_fragments(const Operand (&a)[16][kDepth], const Operand (&b)[kDepth][8],
                                               void* const operands[32]) {
  Operand sums[16][8];
  for (int half = 0; half < 8; half += 4) {
    Sums columns[kDepth];
    for (int k = 0; k < kDepth; ++k) memcpy(&columns[k], &b[k][half], 16);
    for (int row = 0; row < 16; ++row) {
      Sums sum = {};
      for (int k = 0; k < kDepth; ++k) sum += a[row][k] * columns[k];
      memcpy(&sums[row][half], &sum, 16);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    D* d = static_cast<D*>(static_cast<const MmaOperands*>(operands[lane])->d);
    for (int e = 0; e < 4; ++e) d[e] += sums[(lane >> 2) + 8 * (e >> 1)][2 * (lane & 3) + (e & 1)];
  }
}

PYOPS_UNCHECKED inline float widened(uint32_t bits, bfloat16) {
  bits <<= 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
PYOPS_UNCHECKED inline float widened(uint32_t bits, float16) { return pyops::widen(float16{uint16_t(bits)}); }

template <class T>
PYOPS_UNCHECKED inline void emulate_m16n8k16(void* const operands[32], unsigned) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto* mine = static_cast<const MmaOperands*>(operands[lane]);
    const int g = lane >> 2, t = lane & 3;
    for (int h = 0; h < 2; ++h) {
      for (int r = 0; r < 4; ++r) {
        a[g + 8 * (r & 1)][2 * t + h + 8 * (r >> 1)] = widened(mine->a[r] >> 16 * h & 0xffff, T{});
      }
      for (int r = 0; r < 2; ++r) b[2 * t + h + 8 * r][g] = widened(mine->b[r] >> 16 * h & 0xffff, T{});
    }
  }
  multiply_fragments<float, Columns, 16, float>(a, b, operands);
}

PYOPS_UNCHECKED inline void emulate_m16n8k32(void* const operands[32], unsigned) {
  uint32_t a[16][32], b[32][8];  // sign-extended; sums wrap
  for (int lane = 0; lane < 32; ++lane) {
    const auto* mine = static_cast<const MmaOperands*>(operands[lane]);
    const int g = lane >> 2, t = lane & 3;
    for (int h = 0; h < 4; ++h) {
      for (int r = 0; r < 4; ++r) {
        a[g + 8 * (r & 1)][4 * t + h + 16 * (r >> 1)] = uint32_t(int8_t(mine->a[r] >> 8 * h));
      }
      for (int r = 0; r < 2; ++r) b[4 * t + h + 16 * r][g] = uint32_t(int8_t(mine->b[r] >> 8 * h));
    }
  }
  multiply_fragments<uint32_t, IntegerColumns, 32, uint32_t>(a, b, operands);
}

struct MatrixRow {
  alignas(16) uint16_t row[8];
  uint32_t* registers;
  int matrices;
  bool transposed;
};

PYOPS_UNCHECKED inline void emulate_ldmatrix(void* const operands[32], unsigned) {
  const auto row_of = [&](int lane) PYOPS_UNCHECKED { return static_cast<const MatrixRow*>(operands[lane])->row; };
  for (int lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<const MatrixRow*>(operands[lane]);
    const int g = lane >> 2, t = lane & 3;
    for (int m = 0; m < mine.matrices; ++m) {
      const uint16_t low = mine.transposed ? row_of(8 * m + 2 * t)[g] : row_of(8 * m + g)[2 * t];
      const uint16_t high = mine.transposed ? row_of(8 * m + 2 * t + 1)[g] : row_of(8 * m + g)[2 * t + 1];
      mine.registers[m] = uint32_t(low) | uint32_t(high) << 16;
    }
  }
}

// Each lane reads its own row, so that the checker sees who reads what.
template <int kMatrices>
inline void ldmatrix(const char* name, uint32_t (&r)[kMatrices], const void* row, bool transposed,
                     emulator::Line line) {
  MatrixRow mine{{}, r, kMatrices, transposed};
  if (lane() < 8 * kMatrices) {
    const Bits128 bits = emulator::load128<Bits128>(row);
    memcpy(mine.row, &bits, 16);
  }
  emulator::collective(name, kFullWarp, &mine, emulate_ldmatrix, line, false);
}

inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], emulator::Line line = {}) {
  MmaOperands mine{d, a, b};
  emulator::matrix_instruction("mma_m16n8k16_bf16", &mine, emulate_m16n8k16<bfloat16>, line);
}
inline void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], emulator::Line line = {}) {
  MmaOperands mine{d, a, b};
  emulator::matrix_instruction("mma_m16n8k16_f16", &mine, emulate_m16n8k16<float16>, line);
}
inline void mma_m16n8k32_s8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], emulator::Line line = {}) {
  MmaOperands mine{d, a, b};
  emulator::matrix_instruction("mma_m16n8k32_s8", &mine, emulate_m16n8k32, line);
}

inline void ldmatrix_x2(uint32_t (&r)[2], const void* row, emulator::Line line = {}) {
  ldmatrix("ldmatrix_x2", r, row, false, line);
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, emulator::Line line = {}) {
  ldmatrix("ldmatrix_x4", r, row, false, line);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row, emulator::Line line = {}) {
  ldmatrix("ldmatrix_x2_trans", r, row, true, line);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, emulator::Line line = {}) {
  ldmatrix("ldmatrix_x4_trans", r, row, true, line);
}

PYOPS_DEVICE int dp4a(uint32_t a, uint32_t b, int c) {
  uint32_t sum = uint32_t(c);
  for (int i = 0; i < 32; i += 8) sum += uint32_t(int(int8_t(a >> i)) * int(int8_t(b >> i)));
  return int(sum);
}

PYOPS_DEVICE void cp_async16(void* shared, const void* global, bool copy) {
  emulator::cp_async(shared, global, 16, copy);
}
PYOPS_DEVICE void cp_async_commit() { emulator::cp_async_commit(); }
template <int kGroupsLeft>
PYOPS_DEVICE void cp_async_wait() {
  emulator::cp_async_wait(kGroupsLeft);
}
inline void barrier_sync(int id, int threads, emulator::Line line = {}) { emulator::block_barrier(id, threads, line); }

#else

PYOPS_DEVICE void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
PYOPS_DEVICE void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
PYOPS_DEVICE void mma_m16n8k32_s8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

PYOPS_DEVICE uint32_t shared_address(const void* pointer) { return uint32_t(__cvta_generic_to_shared(pointer)); }

PYOPS_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
PYOPS_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
PYOPS_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
PYOPS_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// c + the four products of signed bytes.
PYOPS_DEVICE int dp4a(uint32_t a, uint32_t b, int c) {
  int sum;
  asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
  return sum;
}

// 16 bytes from global to shared memory in the background, zeros where `copy` is false (the source is not read then).
// They are there after the cp_async_wait that covers their group, for other threads after a barrier that follows it.
PYOPS_DEVICE void cp_async16(void* shared, const void* global, bool copy) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(copy ? 16 : 0)
               : "memory");
}
PYOPS_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroupsLeft>
PYOPS_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
}

// A barrier of `threads` threads (a multiple of 32) of the block; id 1 to 15, 0 being that of __syncthreads.
PYOPS_DEVICE void barrier_sync(int id, int threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

#endif

}  // namespace pyops::dev
