// The check build: kernel files are compiled with -fsanitize=thread and linked without its library, so that every
// access of memory by a kernel arrives here. This file is not instrumented itself.
//
// Shared memory: per eight bytes up to four past accesses (thread, clock, bytes, kind) and per byte whether it was
// written or is on its way (cp.async). Two accesses of which one writes must be ordered by barriers: a thread knows of
// another thread's clock from the last barrier of the whole block, from __syncwarp, or from a named barrier. Nothing is
// observed in time, so a race is found whatever the schedule was.
// Global memory: an access must lie in a registered buffer. Per element the last writing and the last reading block;
// blocks are ordered by an atomic after a __threadfence that another block's atomic on the same address sees.
#include <dlfcn.h>
#include <link.h>
#include <stdio.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <unordered_map>

#include "runtime.h"

namespace pyops::emulator {
namespace {

// ---- where code and constants are -----------------------------------------------------------------------

struct Segment {
  uintptr_t begin, end;
};
std::vector<Segment> own_segments;  // of the library that holds the kernels
uintptr_t own_base = 0;

int find_segments(dl_phdr_info* info, size_t, void*) {
  const uintptr_t here = reinterpret_cast<uintptr_t>(&find_segments);
  std::vector<Segment> segments;
  bool mine = false;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    if (info->dlpi_phdr[i].p_type != PT_LOAD) continue;
    const uintptr_t begin = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
    segments.push_back({begin, begin + info->dlpi_phdr[i].p_memsz});
    mine = mine || (here >= segments.back().begin && here < segments.back().end);
  }
  if (!mine) return 0;
  own_segments = segments;
  own_base = info->dlpi_addr;
  return 1;
}

// "+0x1234": an offset into the library, which tests turn into a line.
std::string code(uint32_t offset) {
  char text[32];
  snprintf(text, sizeof(text), "+0x%x", offset);
  return text;
}

uint32_t offset_of(const void* pc) { return uint32_t(reinterpret_cast<uintptr_t>(pc) - own_base - 1); }

// ---- counters -------------------------------------------------------------------------------------------

struct Counters {
  int64_t global_requests, sectors, shared_requests, wavefronts, barriers, warp_barriers, atomics, mma, copy_bytes;
};

struct LaunchRecord {
  std::string kernel;
  uintptr_t function;  // its instance, as an offset into the library
  dim3 grid, block;
  int64_t blocks;  // that ran
  size_t shared;   // bytes of a block, static and dynamic
  Counters counters;
};
std::vector<LaunchRecord> launches;  // since they were last asked for
std::mutex launches_mutex;
constexpr size_t kMostLaunches = 1 << 16;

bool sampling() { return configuration.sampled_blocks != 0; }

struct Request {
  unsigned lanes;
  uintptr_t address[32];
  int size;
  bool shared;
};

// Accesses of one warp at one place of the code: the n-th access of each lane belongs to one request.
struct Place {
  uint32_t pc;
  uint32_t seen[32];
  uint32_t first;
  std::deque<Request> open;
};

// ---- shared memory --------------------------------------------------------------------------------------

constexpr int kCells = 4;
constexpr size_t kWords = kSharedBytes / 8;

// An access of bytes of one 8-byte word: clock 32 bits, thread 11, bytes 8, write 1, atomic 1.
using Cell = uint64_t;
Cell make_cell(uint32_t clock, int thread, unsigned bytes, bool write, bool atomic) {
  return uint64_t(clock) << 32 | uint64_t(thread) << 16 | uint64_t(bytes) << 8 | uint64_t(atomic) << 1 |
         uint64_t(write);
}
uint32_t clock_of(Cell c) { return uint32_t(c >> 32); }
int thread_of(Cell c) { return int(c >> 16 & 0xffff); }
unsigned bytes_of(Cell c) { return unsigned(c >> 8 & 0xff); }
bool writes(Cell c) { return c & 1; }
bool is_atomic(Cell c) { return c & 2; }

enum ByteState : unsigned char { kUninitialised = 0, kInitialised = 1, kPending = 2 };

struct ThreadClock {
  uint32_t clock;
  uint32_t warp[32];           // clocks of the lanes of the own warp that are known
  std::vector<uint32_t> wide;  // of all threads, once named barriers are used
  bool fenced;
};

struct Shadow {
  Cell cells[kWords][kCells];
  uint32_t places[kWords][kCells];
  unsigned char bytes[kSharedBytes];
  size_t used;                   // bytes of shared memory that this block touched
  std::vector<uint32_t> common;  // clocks that every thread knows since the last barrier of the block
  std::vector<ThreadClock> threads;
  std::vector<std::unordered_map<uint32_t, Place>> requests;  // by warp
  Counters counters;
  std::vector<uint32_t> known;  // epochs of other blocks, by block number
  uint32_t epoch;
};

Shadow& shadow_of(Block& block) { return *static_cast<Shadow*>(block.shadow); }

bool knows(const Shadow& shadow, const Thread& me, int other, uint32_t clock) {
  if (clock <= shadow.common[size_t(other)]) return true;
  const ThreadClock& mine = shadow.threads[size_t(me.number)];
  if (other >> 5 == me.warp && clock <= mine.warp[other & 31]) return true;
  return !mine.wide.empty() && clock <= mine.wide[size_t(other)];
}

std::string place_in_shared(const Block& block, size_t offset) {
  for (const SharedArray& array : block.arrays) {
    if (offset >= array.offset && offset < array.offset + array.bytes) {
      return std::string(array.name) + " + " + std::to_string(offset - array.offset);
    }
  }
  return "dynamic shared memory + " + std::to_string(offset);
}

void shared_word(Block& block, Shadow& shadow, Thread& me, size_t word, unsigned bytes, bool write, bool atomic,
                 uint32_t pc) {
  Cell* cells = shadow.cells[word];
  uint32_t* places = shadow.places[word];
  const uint32_t clock = shadow.threads[size_t(me.number)].clock;
  int target = -1, empty = -1, old = -1;
  for (int i = 0; i < kCells; ++i) {
    const Cell cell = cells[i];
    if (cell == 0) {
      if (empty < 0) empty = i;
      continue;
    }
    const int other = thread_of(cell);
    if (other == me.number) {
      // The later access of a thread stands for an earlier one of the same bytes, unless that wrote and this reads.
      if ((bytes_of(cell) & ~bytes) == 0 && (write || !writes(cell)) && is_atomic(cell) == atomic) target = i;
      continue;
    }
    const bool ordered = knows(shadow, me, other, clock_of(cell));
    if (ordered && old < 0) old = i;
    if (ordered || (bytes_of(cell) & bytes) == 0 || !(write || writes(cell)) || (atomic && is_atomic(cell))) continue;
    report("shared race",
           std::string(write ? "write" : "read") + " at " + code(pc) + " and " + (writes(cell) ? "write" : "read") +
               " at " + code(places[i]) + " of " + place_in_shared(block, word * 8) + " by threads " +
               std::to_string(me.number) + " and " + std::to_string(other) + " without a barrier between them",
           uint64_t(std::min(pc, places[i])) << 32 | std::max(pc, places[i]));
  }
  if (target < 0) target = empty >= 0 ? empty : old >= 0 ? old : int((pc ^ uint32_t(me.number)) % kCells);
  cells[target] = make_cell(clock, me.number, bytes, write, atomic);
  places[target] = pc;
}

void shared_access(Block& block, Thread& me, size_t offset, size_t size, bool write, bool atomic, uint32_t pc) {
  Shadow& shadow = shadow_of(block);
  if (offset + size > block.shared_used) {
    report("out of bounds",
           std::string(write ? "write" : "read") + " at " + code(pc) + " of shared bytes " + std::to_string(offset) +
               " to " + std::to_string(offset + size) + ", of which the block has " + std::to_string(block.shared_used),
           pc);
    return;
  }
  shadow.used = std::max(shadow.used, offset + size);
  for (size_t at = offset; at < offset + size;) {
    const size_t word = at / 8, first = at % 8, count = std::min<size_t>(8 - first, offset + size - at);
    shared_word(block, shadow, me, word, unsigned(((1u << count) - 1) << first), write, atomic, pc);
    at += count;
  }
  for (size_t at = offset; at < offset + size; ++at) {
    if (shadow.bytes[at] == kPending) {
      report("pending read",
             std::string(write ? "write" : "read") + " at " + code(pc) + " of " + place_in_shared(block, at) +
                 ", which a cp.async that nobody waited for is filling",
             pc);
      return;
    }
    if (write) {
      shadow.bytes[at] = kInitialised;
    } else if (shadow.bytes[at] == kUninitialised) {
      report("uninitialised read", "at " + code(pc) + " of " + place_in_shared(block, at), pc);
      return;
    }
  }
}

// ---- global memory --------------------------------------------------------------------------------------

struct Buffer {
  uintptr_t begin, end;
  bool writable;
  std::string name;
  size_t grain;                              // bytes that one entry of `words` stands for: an element, at most four
  std::vector<std::atomic<uint64_t>> words;  // last writer and last reader; empty while blocks are sampled
};
std::map<uintptr_t, Buffer*> buffers;  // by the end of the range
std::atomic<int> buffers_generation{0};
std::mutex buffers_mutex;

// Per grain: writer block + 1 (20 bits), its epoch (11), whether atomic (1); the same of the last reader.
struct Access {
  uint32_t block, epoch;
  bool atomic;
};
Access unpack_access(uint32_t bits) { return {bits >> 12, bits >> 1 & 0x7ff, (bits & 1) != 0}; }
uint32_t pack_access(const Block& block, uint32_t epoch, bool atomic) {
  return (uint32_t(block.number + 1) & 0xfffff) << 12 | (epoch & 0x7ff) << 1 | uint32_t(atomic);
}

bool ordered_before(const Shadow& shadow, const Block& block, const Access& access) {
  if (access.block == 0 || access.block == uint32_t(block.number + 1)) return true;
  const size_t other = access.block - 1;
  return other < shadow.known.size() && shadow.known[other] > access.epoch;
}

struct SyncClock {
  std::vector<uint32_t> known;
};
std::unordered_map<uintptr_t, SyncClock> sync_clocks;
std::mutex sync_mutex;

std::string place_in(const Buffer& buffer, uintptr_t address) {
  return buffer.name + " + " + std::to_string(address - buffer.begin);
}

void report_stray(uintptr_t address, size_t size, bool write, uint32_t pc) {
  std::string where = "memory of no buffer";
  int64_t nearest = 1 << 16;
  for (const auto& [end, buffer] : buffers) {
    const int64_t after = int64_t(address) - int64_t(buffer->end) + int64_t(size),
                  before = int64_t(buffer->begin) - int64_t(address);
    if (after > 0 && after < nearest) {
      nearest = after;
      where = std::to_string(after) + " bytes past the end of " + buffer->name;
    }
    if (before > 0 && before < nearest) {
      nearest = before;
      where = std::to_string(before) + " bytes before the start of " + buffer->name;
    }
  }
  report("out of bounds",
         std::string(write ? "write" : "read") + " of " + std::to_string(size) + " bytes at " + code(pc) + ": " + where,
         pc);
}

Buffer* find_buffer(uintptr_t address, size_t size) {
  static thread_local Buffer* last = nullptr;
  static thread_local int of_generation = -1;
  const int generation = buffers_generation.load(std::memory_order_relaxed);
  if (of_generation == generation && last && address >= last->begin && address + size <= last->end) return last;
  const auto found = buffers.upper_bound(address);
  if (found == buffers.end() || address < found->second->begin || address + size > found->second->end) return nullptr;
  last = found->second;
  of_generation = generation;
  return last;
}

void global_access(Block& block, uintptr_t address, size_t size, bool write, bool atomic, uint32_t pc) {
  Buffer* buffer = find_buffer(address, size);
  if (buffer == nullptr) {
    report_stray(address, size, write, pc);
    return;
  }
  if (write && !buffer->writable) {
    report("write to a read-only buffer", "at " + code(pc) + " of " + place_in(*buffer, address), pc);
    return;
  }
  if (buffer->words.empty()) return;
  Shadow& shadow = shadow_of(block);
  const uint32_t mine = pack_access(block, shadow.epoch, atomic);
  const size_t grain = buffer->grain;
  for (uintptr_t at = address / grain * grain; at < address + size; at += grain) {
    std::atomic<uint64_t>& word = buffer->words[at / grain - buffer->begin / grain];
    uint64_t seen = word.load(std::memory_order_relaxed), wanted;
    do {
      wanted = write ? (seen & 0xffffffffu) | uint64_t(mine) << 32 : (seen & ~uint64_t(0xffffffffu)) | mine;
    } while (wanted != seen && !word.compare_exchange_weak(seen, wanted, std::memory_order_relaxed));
    const Access writer = unpack_access(uint32_t(seen >> 32)), reader = unpack_access(uint32_t(seen));
    if (!ordered_before(shadow, block, writer) && !(atomic && writer.atomic)) {
      report(write ? "cross-block write" : "cross-block read",
             "at " + code(pc) + " of " + place_in(*buffer, at) + " by block " + std::to_string(block.number) +
                 ", which block " + std::to_string(writer.block - 1) + " writes without an order between them",
             pc);
    } else if (write && !ordered_before(shadow, block, reader) && !(atomic && reader.atomic)) {
      report("cross-block write",
             "at " + code(pc) + " of " + place_in(*buffer, at) + " by block " + std::to_string(block.number) +
                 ", which block " + std::to_string(reader.block - 1) + " reads without an order between them",
             pc);
    }
  }
}

// ---- counting requests ----------------------------------------------------------------------------------

void close_request(Shadow& shadow, const Request& request) {
  if (!request.shared) {
    uintptr_t sectors[64];
    int count = 0;
    for (int lane = 0; lane < 32; ++lane) {
      if (!(request.lanes >> lane & 1)) continue;
      for (uintptr_t s = request.address[lane] / 32; s <= (request.address[lane] + uintptr_t(request.size) - 1) / 32;
           ++s) {
        if (count < 64) sectors[count++] = s;
      }
    }
    std::sort(sectors, sectors + count);
    shadow.counters.sectors += std::unique(sectors, sectors + count) - sectors;
    ++shadow.counters.global_requests;
    return;
  }
  // The words that meet in a bank follow each other; wide accesses are served for 8 or 16 lanes at a time.
  const int lanes_at_once = request.size >= 16 ? 8 : request.size == 8 ? 16 : 32;
  for (int first = 0; first < 32; first += lanes_at_once) {
    uintptr_t words[64];
    int count = 0;
    for (int lane = first; lane < first + lanes_at_once; ++lane) {
      if (!(request.lanes >> lane & 1)) continue;
      for (uintptr_t w = request.address[lane] / 4; w <= (request.address[lane] + uintptr_t(request.size) - 1) / 4;
           ++w) {
        if (count < 64) words[count++] = w;
      }
    }
    std::sort(words, words + count);
    const auto end = std::unique(words, words + count);
    int banks[32] = {}, most = 0;
    for (const uintptr_t* w = words; w != end; ++w) most = std::max(most, ++banks[*w % 32]);
    shadow.counters.wavefronts += most;
  }
  ++shadow.counters.shared_requests;
}

void count_access(Block& block, const Thread& me, uintptr_t address, size_t size, bool shared, uint32_t pc) {
  Shadow& shadow = shadow_of(block);
  Place& place = shadow.requests[size_t(me.warp)][pc];
  const uint32_t number = place.seen[me.lane]++ - place.first;
  while (place.open.size() <= number) place.open.push_back({0, {}, int(size), shared});
  Request& request = place.open[number];
  request.lanes |= 1u << me.lane;
  request.address[me.lane] = address;
  while (!place.open.empty() && place.open.front().lanes == block.warps[size_t(me.warp)].lanes) {
    close_request(shadow, place.open.front());
    place.open.pop_front();
    ++place.first;
  }
}

// ---- the entry of every access --------------------------------------------------------------------------

void access(void* pointer, size_t size, bool write, const void* return_address) {
  Worker* w = worker;
  if (w == nullptr || w->current == nullptr) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  if (address - reinterpret_cast<uintptr_t>(w->stacks) < w->stack_count * kStackBytes) return;
  if (address - reinterpret_cast<uintptr_t>(&indices) < sizeof(indices)) return;
  if (address - reinterpret_cast<uintptr_t>(w->launch->arguments) < w->launch->arguments_bytes) return;
  Thread& me = *w->current;
  Block& block = *me.block;
  const uint32_t pc = offset_of(return_address);
  const uintptr_t shared = reinterpret_cast<uintptr_t>(block.shared);
  if (address - shared < kSharedBytes) {
    count_access(block, me, address - shared, size, true, pc);
    shared_access(block, me, address - shared, size, write, false, pc);
  } else {
    if (!write) {
      for (const Segment& segment : own_segments) {
        if (address >= segment.begin && address < segment.end) return;
      }
    }
    count_access(block, me, address, size, false, pc);
    global_access(block, address, size, write, false, pc);
  }
  if (configuration.preemption > 0 && double(w->random()) < configuration.preemption * double(w->random.max()))
    preempt();
}

// ---- hooks of the scheduler -----------------------------------------------------------------------------

void launch_begins(const Launch& launch, int64_t blocks) {
  for (const auto& [end, buffer] : buffers) {
    for (auto& word : buffer->words) word.store(0, std::memory_order_relaxed);
  }
  sync_clocks.clear();
  if (launches.size() == kMostLaunches) launches.clear();  // nobody asks
  const uintptr_t function = reinterpret_cast<uintptr_t>(launch.function) - own_base;
  launches.push_back({launch.kernel, function, launch.grid, launch.block, blocks, 0, {}});
}

void block_begins(Block& block) {
  if (block.shadow == nullptr) block.shadow = new Shadow{};
  Shadow& shadow = shadow_of(block);
  const size_t words = (shadow.used + 7) / 8;
  memset(shadow.cells, 0, words * sizeof(shadow.cells[0]));
  memset(shadow.bytes, 0, shadow.used);
  shadow.used = 0;
  shadow.common.assign(block.threads.size(), 0);
  shadow.threads.resize(block.threads.size());
  for (ThreadClock& thread : shadow.threads) {
    thread.clock = 1;
    memset(thread.warp, 0, sizeof(thread.warp));
    thread.wide.clear();
    thread.fenced = false;
  }
  shadow.requests.resize(block.warps.size());
  for (auto& places : shadow.requests) places.clear();
  shadow.counters = {};
  shadow.known.clear();
  shadow.epoch = 1;
}

void block_ends(Block& block) {
  Shadow& shadow = shadow_of(block);
  for (auto& places : shadow.requests) {
    for (auto& [pc, place] : places) {
      for (const Request& request : place.open) close_request(shadow, request);
    }
  }
  const std::lock_guard<std::mutex> lock(launches_mutex);
  LaunchRecord& record = launches.back();
  record.shared = std::max(record.shared, block.shared_used);
  int64_t* to = reinterpret_cast<int64_t*>(&record.counters);
  const int64_t* from = reinterpret_cast<const int64_t*>(&shadow.counters);
  for (size_t i = 0; i < sizeof(Counters) / sizeof(int64_t); ++i) to[i] += from[i];
}

void all_met(Block& block, const std::vector<Thread*>& threads, bool whole_block) {
  Shadow& shadow = shadow_of(block);
  ++shadow.counters.barriers;
  if (whole_block) {
    for (size_t t = 0; t < shadow.threads.size(); ++t) shadow.common[t] = shadow.threads[t].clock++;
    return;
  }
  std::vector<uint32_t> together(shadow.threads.size(), 0);
  for (const Thread* thread : threads) {
    const ThreadClock& clock = shadow.threads[size_t(thread->number)];
    for (size_t u = 0; u < clock.wide.size(); ++u) together[u] = std::max(together[u], clock.wide[u]);
    for (size_t lane = 0; lane < 32 && size_t(thread->warp) * 32 + lane < together.size(); ++lane) {
      uint32_t& known = together[size_t(thread->warp) * 32 + lane];
      known = std::max(known, clock.warp[lane]);
    }
    uint32_t& own = together[size_t(thread->number)];
    own = std::max(own, clock.clock);
  }
  for (const Thread* thread : threads) {
    ThreadClock& clock = shadow.threads[size_t(thread->number)];
    clock.wide = together;
    ++clock.clock;
  }
}

void warp_met(Block& block, int warp, unsigned mask) {
  Shadow& shadow = shadow_of(block);
  ++shadow.counters.warp_barriers;
  uint32_t together[32] = {};
  std::vector<uint32_t> wide;
  for (unsigned left = mask; left; left &= left - 1) {
    const int lane = __builtin_ctz(left);
    const ThreadClock& clock = shadow.threads[size_t(warp * 32 + lane)];
    for (int other = 0; other < 32; ++other) together[other] = std::max(together[other], clock.warp[other]);
    together[lane] = std::max(together[lane], clock.clock);
    if (clock.wide.size() > wide.size()) wide.resize(clock.wide.size(), 0);
    for (size_t u = 0; u < clock.wide.size(); ++u) wide[u] = std::max(wide[u], clock.wide[u]);
  }
  for (unsigned left = mask; left; left &= left - 1) {
    ThreadClock& clock = shadow.threads[size_t(warp * 32 + __builtin_ctz(left))];
    memcpy(clock.warp, together, sizeof(together));
    if (!wide.empty()) clock.wide = wide;
    ++clock.clock;
  }
}

void fenced(Thread& thread, bool whole_grid) {
  if (whole_grid) shadow_of(*thread.block).threads[size_t(thread.number)].fenced = true;
}

void atomic(Thread& thread, void* pointer, size_t bytes, const void* place) {
  Block& block = *thread.block;
  Shadow& shadow = shadow_of(block);
  ++shadow.counters.atomics;
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  const uintptr_t shared = reinterpret_cast<uintptr_t>(block.shared);
  const uint32_t pc = offset_of(place);
  if (address - shared < kSharedBytes) {
    shared_access(block, thread, address - shared, bytes, true, true, pc);
    return;
  }
  {
    const std::lock_guard<std::mutex> lock(sync_mutex);
    SyncClock& clock = sync_clocks[address];
    const size_t blocks = std::max({clock.known.size(), shadow.known.size(), size_t(block.number + 1)});
    clock.known.resize(blocks, 0);
    shadow.known.resize(blocks, 0);
    for (size_t b = 0; b < blocks; ++b) shadow.known[b] = std::max(shadow.known[b], clock.known[b]);
    if (shadow.threads[size_t(thread.number)].fenced) {
      for (size_t b = 0; b < blocks; ++b) clock.known[b] = shadow.known[b];
      clock.known[size_t(block.number)] = ++shadow.epoch;
    }
  }
  global_access(block, address, bytes, true, true, pc);
}

void copy_issued(Thread& thread, const Copy& copy) {
  Block& block = *thread.block;
  const uintptr_t shared = reinterpret_cast<uintptr_t>(block.shared);
  const size_t offset = reinterpret_cast<uintptr_t>(copy.shared) - shared;
  Shadow& shadow = shadow_of(block);
  shadow.counters.copy_bytes += copy.bytes;
  if (offset >= kSharedBytes || offset + size_t(copy.bytes) > block.shared_used) {
    report("out of bounds", "cp.async to memory that is not shared memory of the block");
    return;
  }
  shared_access(block, thread, offset, size_t(copy.bytes), true, false, offset_of(copy.place));
  memset(shadow.bytes + offset, kPending, size_t(copy.bytes));
  if (copy.copy)
    global_access(block, reinterpret_cast<uintptr_t>(copy.global), size_t(copy.bytes), false, false,
                  offset_of(copy.place));
}

void copy_done(Thread& thread, const Copy& copy) {
  Block& block = *thread.block;
  const size_t offset = size_t(static_cast<unsigned char*>(copy.shared) - block.shared);
  if (offset >= kSharedBytes) return;
  Shadow& shadow = shadow_of(block);
  memset(shadow.bytes + offset, kInitialised, size_t(copy.bytes));
  shared_access(block, thread, offset, size_t(copy.bytes), true, false, offset_of(copy.place));
}

void block_deleted(Block& block) { delete static_cast<Shadow*>(block.shadow); }

void matrix_instruction(Thread& thread) { ++shadow_of(*thread.block).counters.mma; }

constexpr Checker table{launch_begins, block_begins, block_ends,  block_deleted, all_met,           warp_met,
                        fenced,        atomic,       copy_issued, copy_done,     matrix_instruction};

const bool installed = [] {
  dl_iterate_phdr(find_segments, nullptr);
  checker = &table;
  return true;
}();

}  // namespace
}  // namespace pyops::emulator

using namespace pyops::emulator;

// ---- what the compiler calls ----------------------------------------------------------------------------

#define PYOPS_TSAN(bytes)                                                                                         \
  extern "C" void __tsan_read##bytes(void* p) { access(p, bytes, false, __builtin_return_address(0)); }           \
  extern "C" void __tsan_write##bytes(void* p) { access(p, bytes, true, __builtin_return_address(0)); }           \
  extern "C" void __tsan_unaligned_read##bytes(void* p) { access(p, bytes, false, __builtin_return_address(0)); } \
  extern "C" void __tsan_unaligned_write##bytes(void* p) { access(p, bytes, true, __builtin_return_address(0)); } \
  extern "C" void __tsan_volatile_read##bytes(void* p) { access(p, bytes, false, __builtin_return_address(0)); }  \
  extern "C" void __tsan_volatile_write##bytes(void* p) { access(p, bytes, true, __builtin_return_address(0)); }  \
  extern "C" void __tsan_unaligned_volatile_read##bytes(void* p) {                                                \
    access(p, bytes, false, __builtin_return_address(0));                                                         \
  }                                                                                                               \
  extern "C" void __tsan_unaligned_volatile_write##bytes(void* p) {                                               \
    access(p, bytes, true, __builtin_return_address(0));                                                          \
  }
PYOPS_TSAN(1)
PYOPS_TSAN(2)
PYOPS_TSAN(4)
PYOPS_TSAN(8)
PYOPS_TSAN(16)

extern "C" void __tsan_read_range(void* p, unsigned long bytes) {
  access(p, bytes, false, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* p, unsigned long bytes) {
  access(p, bytes, true, __builtin_return_address(0));
}
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_vptr_read(void**) {}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit(void*) {}

// ---- for tests ------------------------------------------------------------------------------------------

// Memory that kernels may touch from now on; the same range again replaces it.
PYOPS_EMULATOR_EXPORT void pyops_emulator_register(void* begin, size_t bytes, size_t element_bytes, bool writable,
                                                   const char* name) {
  const std::lock_guard<std::mutex> lock(buffers_mutex);
  if (bytes == 0) return;
  ++buffers_generation;
  const uintptr_t first = reinterpret_cast<uintptr_t>(begin);
  const size_t grain = element_bytes < 4 ? element_bytes : 4;
  Buffer* buffer = new Buffer{first, first + bytes, writable, name, grain, {}};
  if (!sampling())
    buffer->words = std::vector<std::atomic<uint64_t>>((first + bytes + grain - 1) / grain - first / grain);
  Buffer*& place = buffers[first + bytes];
  delete place;
  place = buffer;
}

PYOPS_EMULATOR_EXPORT void pyops_emulator_forget_buffers() {
  const std::lock_guard<std::mutex> lock(buffers_mutex);
  ++buffers_generation;
  for (const auto& [end, buffer] : buffers) delete buffer;
  buffers.clear();
}

// The launches since they were last cleared, one a line: kernel, offset of its instance in the library, grid, threads
// of a block, bytes of its shared memory, blocks that ran, and of all of them global requests, sectors, shared
// requests, wavefronts, barriers, warp barriers, atomics, mma and cp.async bytes; separated by tabs. `text` as in
// pyops_emulator_reports.
PYOPS_EMULATOR_EXPORT size_t pyops_emulator_launches(char* text, size_t capacity, bool clear) {
  const std::lock_guard<std::mutex> lock(launches_mutex);
  std::vector<std::string> lines;
  for (const LaunchRecord& one : launches) {
    std::string line = one.kernel;
    const auto add = [&](int64_t number) { line.append("\t").append(std::to_string(number)); };
    add(int64_t(one.function));
    for (const unsigned size : {one.grid.x, one.grid.y, one.grid.z}) add(size);
    add(int64_t(one.block.x) * one.block.y * one.block.z);
    add(int64_t(one.shared));
    add(one.blocks);
    const int64_t* counters = reinterpret_cast<const int64_t*>(&one.counters);
    for (size_t i = 0; i < sizeof(Counters) / sizeof(int64_t); ++i) add(counters[i]);
    lines.push_back(line);
  }
  if (clear) launches.clear();
  return write_lines(lines, text, capacity);
}
