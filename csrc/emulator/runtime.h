// What the scheduler (runtime.cpp) and the checker (checker.cpp) share. Kernel files do not see it.
#pragma once

#include <atomic>
#include <deque>
#include <random>
#include <string>
#include <vector>

#include "cuda_emulator.h"

// Entry points for tests, which call them through ctypes.
#define PYOPS_EMULATOR_EXPORT extern "C" __attribute__((visibility("default")))

namespace pyops::emulator {

constexpr size_t kSharedBytes = 227 << 10;  // of a block
constexpr size_t kStackBytes = 64 << 10;    // of a fiber
constexpr int kBarriers = 16;
constexpr unsigned char kPoison = 0xff;  // NaN in every float format

struct Block;
struct Worker;

struct Copy {  // one cp.async
  void* shared;
  const void* global;
  int bytes, group;
  bool copy;
  const void* place;  // in the kernel's code
};

struct Fiber {
  size_t number;
  void* stack_pointer;
  struct Thread* thread;
};

enum class State : unsigned char { unstarted, ready, waiting, exited };

struct Thread {
  ThreadIndices indices;
  Block* block;
  Fiber* fiber;
  int number, lane, warp;  // within the block; within the warp; of the warp within the block
  State state;
  const char* waits_for;
  Line line;
  int group;  // of cp.async that is open
  std::vector<Copy> copies;
};

struct Meeting {  // a warp operation that not all lanes have reached
  const char* operation;
  Line line;
  unsigned mask, arrived;
  void* operands[32];
};

struct Warp {
  unsigned lanes, exited;  // lanes that exist; that have left the kernel
  std::vector<Meeting> open;
};

struct Barrier {
  std::vector<Thread*> waiting;
  std::vector<int*> results;
  int trues;
  Line line;
  int expected;
};

struct SharedArray {
  const void* site;
  const char* name;
  size_t offset, bytes;
};

struct Block {
  uint3 index;
  int64_t number;  // within the grid
  int alive;
  unsigned char* shared;
  size_t shared_used;
  std::vector<SharedArray> arrays;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Barrier barriers[kBarriers];
  void* shadow;  // of the checker
};

// One host thread: the blocks that it runs at present (one, or all of a cooperative grid) and their fibers.
struct Worker {
  const Launch* launch;
  std::vector<Block*> blocks;
  std::vector<Thread*> unstarted;  // in reverse: the next one is at the back
  std::deque<Thread*> ready;
  std::vector<Fiber*> fibers, idle;
  Thread* current;
  Fiber* fiber;  // that runs, null in the scheduler's own context
  void* main_stack_pointer;
  std::minstd_rand random;
  bool shuffles;
  unsigned char* stacks;
  size_t stack_count;
};

extern thread_local Worker* worker;

// Adds a report, once per launch, kind and non-zero key; a fatal one ends the launch as soon as every worker has
// noticed.
void report(const char* kind, const std::string& text, uint64_t key = 0);
[[noreturn]] void fatal(const char* kind, const std::string& text);
// Lines into `text` of `capacity` bytes, with a final 0; returns the bytes that all of them need.
size_t write_lines(const std::vector<std::string>& lines, char* text, size_t capacity);
std::string text_of(Line line);
std::string text_of(const Thread& thread);

// What the check build hooks into the scheduler; null in the fast build.
struct Checker {
  void (*launch_begins)(const Launch& launch, int64_t blocks);  // how many of them will run
  void (*block_begins)(Block& block);
  void (*block_ends)(Block& block);
  void (*block_deleted)(Block& block);
  void (*all_met)(Block& block, const std::vector<Thread*>& threads, bool whole_block);  // at a barrier
  void (*warp_met)(Block& block, int warp, unsigned mask);                               // at a __syncwarp
  void (*fenced)(Thread& thread, bool whole_grid);
  void (*atomic)(Thread& thread, void* address, size_t bytes, const void* place);
  void (*copy_issued)(Thread& thread, const Copy& copy);
  void (*copy_done)(Thread& thread, const Copy& copy);
  void (*matrix_instruction)(Thread& thread);
};
extern const Checker* checker;

struct Configuration {
  unsigned seed;
  double preemption;
  int host_threads;
  int64_t sampled_blocks;  // of every grid, evenly spaced; 0: all of them
};
extern Configuration configuration;

// Gives another fiber a turn (check build, at memory accesses).
void preempt();

}  // namespace pyops::emulator
