// What this processor can do at most, for benchmarks to stand beside: 8-bit dot products from registers, and reading
// memory in a stream. Used by bindings.cpp alone.
#pragma once

#include <time.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <stdexcept>
#include <string>

namespace pyops::probes {

// The loops are assembly: compilers put so many accumulators written with intrinsics into memory. `.irp` repeats its
// line for every register named.
#if defined(__x86_64__)

constexpr int64_t kMacsPerStep512 = 24 * 64;  // 24 accumulators of 16 lanes of 4 products

__attribute__((target("avx512f"))) inline void dots_avx512vnni(int64_t steps) {
  asm volatile(
      "vpbroadcastd %1, %%zmm0\n\t"
      "1:\n\t"
      ".irp r,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31\n\t"
      "vpdpbusd %%zmm0, %%zmm0, %%zmm\\r\n\t"
      ".endr\n\t"
      "dec %0\n\t"
      "jnz 1b\n\t"
      : "+r"(steps)
      : "r"(0x01020102)
      : "cc", "xmm0", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18",
        "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25", "xmm26", "xmm27", "xmm28", "xmm29", "xmm30",
        "xmm31");
}

// Without a dot product: pairs to int16, and their sum. Widening to int32, needed every 64 of them, is not counted.
__attribute__((target("avx512f,avx512bw"))) inline void dots_avx512(int64_t steps) {
  asm volatile(
      "vpbroadcastd %1, %%zmm0\n\t"
      "1:\n\t"
      ".irp r,8,9,10,11,12,13,14,15,16,17,18,19\n\t"
      "vpmaddubsw %%zmm0, %%zmm0, %%zmm1\n\t"
      "vpaddw %%zmm1, %%zmm\\r, %%zmm\\r\n\t"
      ".endr\n\t"
      ".irp r,20,21,22,23,24,25,26,27,28,29,30,31\n\t"
      "vpmaddubsw %%zmm0, %%zmm0, %%zmm2\n\t"
      "vpaddw %%zmm2, %%zmm\\r, %%zmm\\r\n\t"
      ".endr\n\t"
      "dec %0\n\t"
      "jnz 1b\n\t"
      : "+r"(steps)
      : "r"(0x01020102)
      : "cc", "xmm0", "xmm1", "xmm2", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "xmm16",
        "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25", "xmm26", "xmm27", "xmm28",
        "xmm29", "xmm30", "xmm31");
}

constexpr int64_t kMacsPerStep256 = 12 * 32;

__attribute__((target("avx2"))) inline void dots_avxvnni(int64_t steps) {
  asm volatile(
      "vmovd %1, %%xmm0\n\t"
      "vpbroadcastd %%xmm0, %%ymm0\n\t"
      "1:\n\t"
      ".irp r,4,5,6,7,8,9,10,11,12,13,14,15\n\t"
      "%{vex%} vpdpbusd %%ymm0, %%ymm0, %%ymm\\r\n\t"
      ".endr\n\t"
      "dec %0\n\t"
      "jnz 1b\n\t"
      : "+r"(steps)
      : "r"(0x01020102)
      : "cc", "xmm0", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14",
        "xmm15");
}

__attribute__((target("avx2"))) inline void dots_avx2(int64_t steps) {
  asm volatile(
      "vmovd %1, %%xmm0\n\t"
      "vpbroadcastd %%xmm0, %%ymm0\n\t"
      "1:\n\t"
      ".irp r,4,5,6,7,8,9,10,11,12,13,14,15\n\t"
      "vpmaddubsw %%ymm0, %%ymm0, %%ymm1\n\t"
      "vpaddw %%ymm1, %%ymm\\r, %%ymm\\r\n\t"
      ".endr\n\t"
      "dec %0\n\t"
      "jnz 1b\n\t"
      : "+r"(steps)
      : "r"(0x01020102)
      : "cc", "xmm0", "xmm1", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13",
        "xmm14", "xmm15");
}

struct Dots {
  void (*run)(int64_t steps);
  int64_t macs_per_step;
};

inline Dots dots_of(const std::string& level) {
  if (level == "avx512vnni") return {dots_avx512vnni, kMacsPerStep512};
  if (level == "avx512") return {dots_avx512, kMacsPerStep512};
  if (level == "avxvnni") return {dots_avxvnni, kMacsPerStep256};
  if (level == "avx2") return {dots_avx2, kMacsPerStep256};
  throw std::runtime_error("no probe of 8-bit dot products at level " + level);
}

#else

struct Dots {
  void (*run)(int64_t steps);
  int64_t macs_per_step;
};

inline Dots dots_of(const std::string& level) {
  throw std::runtime_error("no probe of 8-bit dot products at level " + level);
}

#endif

// Of this thread.
inline double cpu_seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return double(now.tv_sec) + 1e-9 * double(now.tv_nsec);
}

// At least `macs` multiplications and additions; how many.
inline int64_t dot_products(const Dots& dots, int64_t macs) {
  const int64_t steps = macs / dots.macs_per_step + 1;
  dots.run(steps);
  return steps * dots.macs_per_step;
}

// Multiplications and additions per second: the best stretch within the time given.
inline double dot_rate(const Dots& dots, double milliseconds) {
  constexpr int64_t kSteps = 20000;  // some 0.1 ms
  const double end = cpu_seconds() + 1e-3 * milliseconds;
  double best = 0;
  for (double start = cpu_seconds(); start < end;) {
    dots.run(kSteps);
    const double now = cpu_seconds();
    const double rate = double(kSteps * dots.macs_per_step) / (now - start);
    if (rate > best) best = rate;
    start = now;
  }
  return best;
}

// Reads memory once, in lines of 64 bytes. The prefetch keeps enough of them under way for a single core, whose own
// prefetcher stops at the end of a page.
constexpr int64_t kAhead = 4096;

inline uint64_t read_plain(const char* data, int64_t bytes) {
  uint64_t seen = 0;
  for (int64_t i = 0; i + 64 <= bytes; i += 64) {
    __builtin_prefetch(data + i + kAhead);
    for (int word = 0; word < 64; word += 8) seen |= *reinterpret_cast<const uint64_t*>(data + i + word);
  }
  return seen;
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) inline uint64_t read_avx2(const char* data, int64_t bytes) {
  __m256i low = _mm256_setzero_si256(), high = low;
  for (int64_t i = 0; i + 64 <= bytes; i += 64) {
    __builtin_prefetch(data + i + kAhead);
    low = _mm256_or_si256(low, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data + i)));
    high = _mm256_or_si256(high, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data + i + 32)));
  }
  return uint64_t(_mm256_extract_epi64(_mm256_or_si256(low, high), 0));
}

__attribute__((target("avx512f"))) inline uint64_t read_avx512(const char* data, int64_t bytes) {
  __m512i seen = _mm512_setzero_si512();
  for (int64_t i = 0; i + 64 <= bytes; i += 64) {
    __builtin_prefetch(data + i + kAhead);
    seen = _mm512_or_si512(seen, _mm512_loadu_si512(data + i));
  }
  uint64_t words[8];
  _mm512_storeu_si512(words, seen);
  return words[0];
}

inline uint64_t read_stream(const char* data, int64_t bytes) {
  if (__builtin_cpu_supports("avx512f")) return read_avx512(data, bytes);
  return __builtin_cpu_supports("avx2") ? read_avx2(data, bytes) : read_plain(data, bytes);
}
#else
inline uint64_t read_stream(const char* data, int64_t bytes) { return read_plain(data, bytes); }
#endif

// Bytes per second.
inline double read_rate(const void* data, int64_t bytes) {
  const double start = cpu_seconds();
  volatile uint64_t kept = read_stream(static_cast<const char*>(data), bytes);
  (void)kept;
  return double(bytes) / (cpu_seconds() - start);
}

}  // namespace pyops::probes
