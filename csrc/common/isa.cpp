#include "isa.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace pyops::isa {
namespace {

constexpr const char* kNames[kLevels] = {"baseline", "avx2", "avxvnni", "avx512", "avx512vnni"};
std::atomic<int> forced{-1};

Level cap_from_environment() {
  const char* text = std::getenv("PYOPS_CPU_ISA");
  if (text == nullptr || *text == '\0') return Level::avx512vnni;
  for (int level = 0; level < kLevels; ++level) {
    if (std::string(kNames[level]) == text) return static_cast<Level>(level);
  }
  throw std::runtime_error(
      std::string("PYOPS_CPU_ISA must be one of baseline, avx2, avxvnni, avx512, avx512vnni, got '") + text + "'");
}

// CPUID 7.1 EAX bit 4; older compilers have no name for it.
bool has_avx_vnni() {
#if defined(__x86_64__)
  unsigned eax = 7, ebx, ecx = 1, edx;
  __asm__("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  return (eax & 16u) != 0;
#else
  return false;
#endif
}

Level detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("bmi2");
  if (avx512) {
    const bool vnni = __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
                      __builtin_cpu_supports("avx512bf16");
    return vnni ? Level::avx512vnni : Level::avx512;
  }
  if (avx2) return has_avx_vnni() ? Level::avxvnni : Level::avx2;
#endif
  return Level::baseline;
}

// Processors with AVX-512 need not have AVX-VNNI (Zen 4 has not): a cap there may ask for what they lack.
Level runnable(Level level) {
  static const bool avx_vnni = detected() >= Level::avxvnni && has_avx_vnni();
  return level == Level::avxvnni && !avx_vnni ? Level::avx2 : level;
}

}  // namespace

const char* name(Level level) { return kNames[static_cast<int>(level)]; }

Level detected() {
  static const Level level = detect();
  return level;
}

Level current() {
  static const Level allowed = [] {
    const Level cap = cap_from_environment();
    return cap < detected() ? cap : detected();
  }();
  const int cap = forced.load(std::memory_order_relaxed);
  return runnable(cap >= 0 && cap < static_cast<int>(allowed) ? static_cast<Level>(cap) : allowed);
}

void force(int level) { forced.store(level, std::memory_order_relaxed); }

}  // namespace pyops::isa

// Hooks for _native, which looks them up by name: no C++ symbol crosses between the two libraries.
extern "C" {

__attribute__((visibility("default"))) const char* pyops_detected_isa() {
  return pyops::isa::name(pyops::isa::detected());
}

__attribute__((visibility("default"))) const char* pyops_current_isa(char* error, int capacity) {
  try {
    return pyops::isa::name(pyops::isa::current());
  } catch (const std::exception& failure) {
    std::snprintf(error, size_t(capacity), "%s", failure.what());
    return nullptr;
  }
}

// "" lifts the cap; returns 0, or 1 for an unknown name.
__attribute__((visibility("default"))) int pyops_force_isa(const char* level) {
  if (*level == '\0') {
    pyops::isa::force(-1);
    return 0;
  }
  for (int candidate = 0; candidate < pyops::isa::kLevels; ++candidate) {
    if (std::string(level) == pyops::isa::name(static_cast<pyops::isa::Level>(candidate))) {
      pyops::isa::force(candidate);
      return 0;
    }
  }
  return 1;
}

}  // extern "C"
