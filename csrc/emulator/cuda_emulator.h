// The CUDA names that kernel files use, for the host compiler: each CUDA thread is a fiber (runtime.cpp), warp
// collectives and barriers are meeting points of fibers, and every meeting point knows the source line that called it.
// Included by ../device/pyops_device.h under PYOPS_EMU, and by nothing else.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <tuple>
#include <type_traits>
#include <utility>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

namespace pyops::emulator {

// What a fiber knows of the CUDA thread that it runs.
struct ThreadIndices {
  uint3 thread, block;
  dim3 block_size, grid_size;
};

extern thread_local ThreadIndices indices;

// A source line, taken where a CUDA name is called: an argument `Line line = {}` is evaluated there.
struct Line {
  const char* file;
  int number;
  constexpr Line(const char* file_ = __builtin_FILE(), int number_ = __builtin_LINE()) : file(file_), number(number_) {}
};

[[noreturn]] void fail(const char* message, const char* file, int line);

// ---- launches -------------------------------------------------------------------------------------------

struct Launch {
  const char* kernel;
  dim3 grid, block;
  size_t shared_bytes;
  bool cooperative;
  void (*run)(const void* arguments);  // one CUDA thread
  const void* arguments;
  size_t arguments_bytes;
  const void* function;  // the instance of the kernel
};

// Runs a whole grid; the number of reports, 0 when all is well.
int run(const Launch& launch);

template <class... Parameters, class... Arguments>
int launch(const char* name, bool cooperative, void (*kernel)(Parameters...), dim3 grid, dim3 block,
           size_t shared_bytes, void*, const Arguments&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<std::remove_cv_t<Parameters>...> values;
  } call{kernel, {arguments...}};
  const auto thread = [](const void* data) {
    const Call& call = *static_cast<const Call*>(data);
    std::apply(call.kernel, call.values);
  };
  return run({name, grid, block, shared_bytes, cooperative, thread, &call, sizeof(call),
              reinterpret_cast<const void*>(kernel)});
}

#define PYOPS_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::pyops::emulator::launch(#kernel, false, kernel, grid, block, shared_bytes, stream, __VA_ARGS__)

// All blocks of the grid are alive at once, so that one may wait for another.
#define PYOPS_LAUNCH_COOPERATIVE(kernel, grid, block, shared_bytes, stream, ...) \
  ::pyops::emulator::launch(#kernel, true, kernel, grid, block, shared_bytes, stream, __VA_ARGS__)

// ---- shared memory --------------------------------------------------------------------------------------

// The same memory for every thread of a block and every execution of the declaration, which `site` identifies.
void* shared_array(const void* site, const char* name, size_t bytes, size_t alignment);
void* dynamic_shared();

#define PYOPS_SHARED(type, name, count)              \
  static constexpr char name##_declaration = 0;      \
  type(&name)[count] = *static_cast<type(*)[count]>( \
      ::pyops::emulator::shared_array(&name##_declaration, #name, sizeof(type) * (count), alignof(type)))

#define PYOPS_DYN_SHARED(type, name) type* const name = static_cast<type*>(::pyops::emulator::dynamic_shared())

// ---- meeting points -------------------------------------------------------------------------------------

// A warp operation: every lane of `mask` brings operands and blocks; the last one computes for all.
using Compute = void (*)(void* const operands[32], unsigned mask);
void collective(const char* operation, unsigned mask, void* operands, Compute compute, Line line, bool orders_memory);

void matrix_instruction(const char* operation, void* operands, Compute compute, Line line);

void block_barrier(int id, int threads, Line line);  // threads 0: all of the block that have not exited
int barrier_reduce(int id, int predicate, int operation, Line line);

template <class T>
struct Shuffle {
  T value, result;
  int source;  // lane; out of range: own value
};

template <class T>
inline T shuffle(const char* operation, unsigned mask, T value, int source, Line line) {
  Shuffle<T> mine{value, value, source};
  collective(
      operation, mask, &mine,
      [](void* const operands[32], unsigned) {
        for (int lane = 0; lane < 32; ++lane) {
          auto* to = static_cast<Shuffle<T>*>(operands[lane]);
          if (to == nullptr || to->source < 0) continue;
          const auto* from = static_cast<const Shuffle<T>*>(operands[to->source]);
          if (from != nullptr) to->result = from->value;  // a lane outside the mask gives nothing defined
        }
      },
      line, false);
  return mine.result;
}

struct Vote {
  int predicate;
  unsigned ballot;
};

inline unsigned ballot(const char* operation, unsigned mask, int predicate, Line line) {
  Vote mine{predicate, 0};
  collective(
      operation, mask, &mine,
      [](void* const operands[32], unsigned) {
        unsigned votes = 0;
        for (int lane = 0; lane < 32; ++lane) {
          const auto* vote = static_cast<const Vote*>(operands[lane]);
          if (vote != nullptr && vote->predicate) votes |= 1u << lane;
        }
        for (int lane = 0; lane < 32; ++lane) {
          if (operands[lane] != nullptr) static_cast<Vote*>(operands[lane])->ballot = votes;
        }
      },
      line, false);
  return mine.ballot;
}

inline int own_lane() {
  const auto& i = indices;
  return int((i.thread.x + i.block_size.x * (i.thread.y + i.block_size.y * i.thread.z)) & 31u);
}

// ---- memory ---------------------------------------------------------------------------------------------

void fence(bool whole_grid);

// Atomics live in the runtime: the checker sees them as atomics and not as a read and a write.
uint32_t atomic_add_u32(uint32_t* address, uint32_t value);
uint64_t atomic_add_u64(uint64_t* address, uint64_t value);
float atomic_add_f32(float* address, float value);
double atomic_add_f64(double* address, double value);
uint32_t atomic_max_u32(uint32_t* address, uint32_t value, bool is_signed);
uint32_t atomic_cas_u32(uint32_t* address, uint32_t compare, uint32_t value);
uint64_t atomic_cas_u64(uint64_t* address, uint64_t compare, uint64_t value);
uint32_t atomic_exchange_u32(uint32_t* address, uint32_t value);

// 16-byte accesses: alignment checked, counted as one request.
void check_alignment(const void* address, size_t bytes, const char* what);

typedef uint32_t Vector128 __attribute__((vector_size(16), may_alias));

template <class T>
inline T load128(const void* address) {
  check_alignment(address, 16, "ldg128");
  const Vector128 bits = *static_cast<const Vector128*>(address);
  T value;
  memcpy(&value, &bits, 16);
  return value;
}

template <class T>
inline void store128(void* address, const T& value) {
  check_alignment(address, 16, "stg128");
  Vector128 bits;
  memcpy(&bits, &value, 16);
  *static_cast<Vector128*>(address) = bits;
}

void cp_async(void* shared, const void* global, int bytes, bool copy);
void cp_async_commit();
void cp_async_wait(int groups_left);

void spin_yield();

}  // namespace pyops::emulator

#define threadIdx (::pyops::emulator::indices.thread)
#define blockIdx (::pyops::emulator::indices.block)
#define blockDim (::pyops::emulator::indices.block_size)
#define gridDim (::pyops::emulator::indices.grid_size)
constexpr int warpSize = 32;

inline void __syncthreads(pyops::emulator::Line line = {}) { pyops::emulator::block_barrier(0, 0, line); }
inline int __syncthreads_or(int predicate, pyops::emulator::Line line = {}) {
  return pyops::emulator::barrier_reduce(0, predicate, 0, line);
}
inline int __syncthreads_and(int predicate, pyops::emulator::Line line = {}) {
  return pyops::emulator::barrier_reduce(0, predicate, 1, line);
}
inline int __syncthreads_count(int predicate, pyops::emulator::Line line = {}) {
  return pyops::emulator::barrier_reduce(0, predicate, 2, line);
}

inline void __syncwarp(unsigned mask = 0xffffffffu, pyops::emulator::Line line = {}) {
  char nothing;
  pyops::emulator::collective("__syncwarp", mask, &nothing, [](void* const*, unsigned) {}, line, true);
}

template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, pyops::emulator::Line line = {}) {
  const int lane = pyops::emulator::own_lane();
  const int segment = lane & ~(width - 1);
  return pyops::emulator::shuffle("__shfl_sync", mask, value, segment | (source & (width - 1)), line);
}

template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, pyops::emulator::Line line = {}) {
  const int lane = pyops::emulator::own_lane(), source = lane ^ lanes;
  const bool inside = source < ((lane & ~(width - 1)) + width);
  return pyops::emulator::shuffle("__shfl_xor_sync", mask, value, inside ? source : lane, line);
}

template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, pyops::emulator::Line line = {}) {
  const int lane = pyops::emulator::own_lane(), source = lane + int(delta);
  const bool inside = (lane & (width - 1)) + int(delta) < width;
  return pyops::emulator::shuffle("__shfl_down_sync", mask, value, inside ? source : lane, line);
}

template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, pyops::emulator::Line line = {}) {
  const int lane = pyops::emulator::own_lane(), source = lane - int(delta);
  const bool inside = (lane & (width - 1)) >= int(delta);
  return pyops::emulator::shuffle("__shfl_up_sync", mask, value, inside ? source : lane, line);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, pyops::emulator::Line line = {}) {
  return pyops::emulator::ballot("__ballot_sync", mask, predicate, line);
}
inline int __any_sync(unsigned mask, int predicate, pyops::emulator::Line line = {}) {
  return pyops::emulator::ballot("__any_sync", mask, predicate, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, pyops::emulator::Line line = {}) {
  return pyops::emulator::ballot("__all_sync", mask, predicate, line) == mask;
}

inline void __threadfence() { pyops::emulator::fence(true); }
inline void __threadfence_block() { pyops::emulator::fence(false); }

inline int atomicAdd(int* address, int value) {
  return int(pyops::emulator::atomic_add_u32(reinterpret_cast<uint32_t*>(address), uint32_t(value)));
}
inline unsigned atomicAdd(unsigned* address, unsigned value) { return pyops::emulator::atomic_add_u32(address, value); }
inline unsigned long long atomicAdd(unsigned long long* address, unsigned long long value) {
  return pyops::emulator::atomic_add_u64(reinterpret_cast<uint64_t*>(address), value);
}
inline float atomicAdd(float* address, float value) { return pyops::emulator::atomic_add_f32(address, value); }
inline double atomicAdd(double* address, double value) { return pyops::emulator::atomic_add_f64(address, value); }
inline int atomicMax(int* address, int value) {
  return int(pyops::emulator::atomic_max_u32(reinterpret_cast<uint32_t*>(address), uint32_t(value), true));
}
inline unsigned atomicMax(unsigned* address, unsigned value) {
  return pyops::emulator::atomic_max_u32(address, value, false);
}
inline int atomicCAS(int* address, int compare, int value) {
  return int(pyops::emulator::atomic_cas_u32(reinterpret_cast<uint32_t*>(address), uint32_t(compare), uint32_t(value)));
}
inline unsigned atomicCAS(unsigned* address, unsigned compare, unsigned value) {
  return pyops::emulator::atomic_cas_u32(address, compare, value);
}
inline unsigned long long atomicCAS(unsigned long long* address, unsigned long long compare, unsigned long long value) {
  return pyops::emulator::atomic_cas_u64(reinterpret_cast<uint64_t*>(address), compare, value);
}
inline unsigned atomicExch(unsigned* address, unsigned value) {
  return pyops::emulator::atomic_exchange_u32(address, value);
}

// Bit casts and arithmetic helpers of CUDA that kernels may use by name.
inline float __uint_as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}
// One rounding each: the emulated kernels are compiled without contraction of products and sums.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline int __float2int_rn(float value) { return int(rintf(value)); }
// The bytes of (high, low) that the nibbles of `selector` name; the top bit of a nibble is not emulated.
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = uint64_t(high) << 32 | low;
  uint32_t chosen = 0;
  for (int i = 0; i < 4; ++i) chosen |= uint32_t(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return chosen;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __clz(int bits) { return bits ? __builtin_clz(unsigned(bits)) : 32; }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
