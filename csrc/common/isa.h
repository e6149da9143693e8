// Run-time choice of the CPU kernel level.
//
// Levels are ordered; an op that has no kernel for a level takes the next lower one. `PYOPS_CPU_ISA` caps the
// level that is used; a test hook (bindings.cpp) can cap it too.
#pragma once

namespace pyops::isa {

enum class Level : int { baseline = 0, avx2, avxvnni, avx512, avx512vnni };
constexpr int kLevels = 5;

const char* name(Level level);

// The best level of this processor (and operating system).
Level detected();

// detected(), capped by PYOPS_CPU_ISA and by force(). Throws std::runtime_error on an unknown value.
Level current();

// Caps the level until the next call; -1 lifts the cap. For tests: not thread-safe against running ops.
void force(int level);

// Picks the kernel table of the current level. Tables are plain structs of function pointers, one per level
// that the op was compiled for.
template <class Table>
const Table& select(const Table& baseline, [[maybe_unused]] const Table& avx2, [[maybe_unused]] const Table& avx512) {
  const Level level = current();
  if (level >= Level::avx512) return avx512;
  if (level >= Level::avx2) return avx2;
  return baseline;
}

// The same for kernels that also have the levels of the dot-product instructions.
template <class Table>
const Table& select(const Table& baseline, [[maybe_unused]] const Table& avx2, [[maybe_unused]] const Table& avxvnni,
                    [[maybe_unused]] const Table& avx512, [[maybe_unused]] const Table& avx512vnni) {
  const Level level = current();
  if (level >= Level::avx512vnni) return avx512vnni;
  if (level >= Level::avx512) return avx512;
  if (level >= Level::avxvnni) return avxvnni;
  if (level >= Level::avx2) return avx2;
  return baseline;
}

}  // namespace pyops::isa
