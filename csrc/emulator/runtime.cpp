// Runs CUDA threads as fibers. A host thread works on one block at a time (on all blocks of a cooperative grid) and
// switches to another fiber where a thread must wait: at a barrier, a warp operation, a spin. Threads that never wait
// share one fiber, one after the other, so a simple kernel pays for no switch at all.
#include "runtime.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <algorithm>
#include <mutex>
#include <set>
#include <thread>

#if !defined(__x86_64__) || defined(PYOPS_EMU_UCONTEXT)
#include <ucontext.h>
#endif

namespace pyops::emulator {

thread_local ThreadIndices indices{};
thread_local Worker* worker = nullptr;
Configuration configuration{};
const Checker* checker = nullptr;

namespace {

std::mutex reports_mutex;
std::vector<std::string> reports;
std::set<std::pair<std::string, uint64_t>> reported_keys;
std::atomic<bool> aborting{false};
std::atomic<bool> asserted{false};
size_t found = 0;  // by the launch that runs, whether there was room to keep it or not
std::mutex launches_mutex;
constexpr size_t kMostReports = 50;
constexpr int kDeviceAssert = 710;  // cudaErrorAssert

// ---- switching ------------------------------------------------------------------------------------------

#if defined(__x86_64__) && !defined(PYOPS_EMU_UCONTEXT)

// Saves the six registers that a call preserves, stores the stack pointer at *save and goes on at `to`.
extern "C" void pyops_emulator_switch(void** save, void* to);
asm(R"(
.text
.hidden pyops_emulator_switch
.globl pyops_emulator_switch
.type pyops_emulator_switch, @function
pyops_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size pyops_emulator_switch, . - pyops_emulator_switch
)");

void* new_context(unsigned char* stack, size_t bytes, void (*entry)(), void*) {
  void** top = reinterpret_cast<void**>(stack + bytes);
  *--top = nullptr;  // a return address that nobody uses keeps the alignment of a call
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  return top;
}

void switch_context(void** save, void* to) { pyops_emulator_switch(save, to); }
void delete_context(void*) {}

#else

// `old`, if any, is what this stack ran before.
void* new_context(unsigned char* stack, size_t bytes, void (*entry)(), void* old) {
  auto* context = old ? static_cast<ucontext_t*>(old) : new ucontext_t;  // lives as long as the pool of fibers
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = bytes;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  return context;
}

void switch_context(void** save, void* to) {
  if (*save == nullptr) *save = new ucontext_t;
  swapcontext(static_cast<ucontext_t*>(*save), static_cast<ucontext_t*>(to));
}

void delete_context(void* context) { delete static_cast<ucontext_t*>(context); }

#endif

// ---- fibers ---------------------------------------------------------------------------------------------

void fiber_entry();

// The stacks' first bytes are spread over the sets of the first-level cache, which 64 KiB steps would share.
unsigned char* stack_of(Worker& w, size_t number) { return w.stacks + number * kStackBytes; }
size_t stack_use(size_t number) { return kStackBytes - (number % 61) * 192; }

Fiber* take_fiber(Worker& w) {
  if (!w.idle.empty()) {
    Fiber* fiber = w.idle.back();
    w.idle.pop_back();
    return fiber;
  }
  const size_t number = w.fibers.size();
  if (number == w.stack_count) fatal("too many threads wait at once", std::to_string(number));
  mprotect(stack_of(w, number), 4096, PROT_NONE);  // an overflow faults instead of spoiling a neighbour
  w.fibers.push_back(
      new Fiber{number, new_context(stack_of(w, number), stack_use(number), fiber_entry, nullptr), nullptr});
  return w.fibers.back();
}

// Forgets what a fiber was doing: its stack holds frames that nobody returns to.
void reset_fiber(Worker& w, Fiber& fiber) {
  fiber.stack_pointer =
      new_context(stack_of(w, fiber.number), stack_use(fiber.number), fiber_entry, fiber.stack_pointer);
  fiber.thread = nullptr;
}

// After a block: the fibers in `idle` wait in fiber_entry for their next thread, the last one to run has left for the
// scheduler; after an abort any of them may have been in the middle of a kernel.
void collect_fibers(Worker& w) {
  if (!aborting) {
    reset_fiber(w, *w.fiber);
    w.idle.push_back(w.fiber);
    return;
  }
  w.idle.clear();
  for (Fiber* fiber : w.fibers) {
    reset_fiber(w, *fiber);
    w.idle.push_back(fiber);
  }
}

// Mostly one and the same string; the same text from another place is the same, too.
bool same_text(const char* a, const char* b) { return a == b || strcmp(a, b) == 0; }
bool same_place(Line a, Line b) { return a.number == b.number && same_text(a.file, b.file); }

// ---- choosing what runs next ----------------------------------------------------------------------------

// In thread order, or with a seed at random among those that can run.
Thread* choose(Worker& w) {
  const size_t fresh = w.unstarted.size(), ready = w.ready.size();
  if (fresh + ready == 0) return nullptr;
  if (!w.shuffles) {
    if (fresh) {
      Thread* next = w.unstarted.back();
      w.unstarted.pop_back();
      return next;
    }
    Thread* next = w.ready.front();
    w.ready.pop_front();
    return next;
  }
  const size_t at = w.random() % (fresh + ready);
  if (at < fresh) {
    std::swap(w.unstarted[at], w.unstarted.back());
    Thread* next = w.unstarted.back();
    w.unstarted.pop_back();
    return next;
  }
  std::swap(w.ready[at - fresh], w.ready.back());
  Thread* next = w.ready.back();
  w.ready.pop_back();
  return next;
}

void make_current(Worker& w, Thread* thread) {
  w.current = thread;
  indices = thread->indices;
}

[[noreturn]] void to_scheduler(Worker& w) {
  static thread_local void* nowhere = nullptr;  // nobody goes back there
  switch_context(&nowhere, w.main_stack_pointer);
  abort();
}

void report_deadlock(Worker& w) {
  struct Place {
    const char* what;
    Line line;
    int threads;
  };
  std::vector<Place> places;
  for (const Block* block : w.blocks) {
    for (const Thread& thread : block->threads) {
      if (thread.state != State::waiting) continue;
      const auto same = [&](const Place& p) { return same_place(p.line, thread.line); };
      const auto found = std::find_if(places.begin(), places.end(), same);
      if (found == places.end()) {
        places.push_back({thread.waits_for, thread.line, 1});
      } else {
        ++found->threads;
      }
    }
  }
  std::string text;
  for (const Place& p : places) {
    text += (text.empty() ? "" : "; ") + std::to_string(p.threads) + " threads wait in " + p.what + " at " +
            text_of(p.line);
  }
  report("deadlock", text);
  aborting = true;
}

// Leaves the current fiber for whoever can run; comes back when the current thread is ready again.
void wait_here(const char* what, Line line) {
  Worker& w = *worker;
  Thread* me = w.current;
  Fiber* mine = w.fiber;
  me->state = State::waiting;
  me->waits_for = what;
  me->line = line;
  Thread* next = aborting ? nullptr : choose(w);
  if (next == nullptr) {
    if (!aborting) report_deadlock(w);
    to_scheduler(w);
  }
  if (next == me) {  // it was made ready before it waited (a spin)
    me->state = State::ready;
    return;
  }
  if (next->fiber == nullptr) {
    next->fiber = take_fiber(w);
    next->fiber->thread = next;
  }
  make_current(w, next);
  next->state = State::ready;
  w.fiber = next->fiber;
  switch_context(&mine->stack_pointer, next->fiber->stack_pointer);
  worker->fiber = mine;
}

void wake(Thread* thread) {
  thread->state = State::ready;
  worker->ready.push_back(thread);
}

void finish_copies(Thread& thread, int groups_left) {
  size_t kept = 0;
  for (const Copy& copy : thread.copies) {
    if (copy.group >= thread.group - groups_left) {
      thread.copies[kept++] = copy;
      continue;
    }
    if (copy.copy) {
      memcpy(copy.shared, copy.global, size_t(copy.bytes));
    } else {
      memset(copy.shared, 0, size_t(copy.bytes));
    }
    if (checker) checker->copy_done(thread, copy);
  }
  thread.copies.resize(kept);
}

// Lets everybody who waits at a barrier go on; `last`, who completed it, runs already.
void release(Barrier& barrier, Block& block, bool whole_block, const Thread* last) {
  std::vector<Thread*> met;
  met.swap(barrier.waiting);
  barrier.results.clear();
  barrier.trues = 0;
  if (checker) checker->all_met(block, met, whole_block);
  for (Thread* thread : met) {
    if (thread != last) wake(thread);
  }
}

void leave_kernel(Thread& thread) {
  Block& block = *thread.block;
  thread.state = State::exited;
  ++thread.group;
  finish_copies(thread, 0);
  --block.alive;
  Warp& warp = block.warps[size_t(thread.warp)];
  warp.exited |= 1u << thread.lane;
  for (const Meeting& meeting : warp.open) {
    if (meeting.mask & (1u << thread.lane)) {
      fatal("exited lane", text_of(thread) + " left the kernel while others wait for it in " + meeting.operation +
                               " at " + text_of(meeting.line));
    }
  }
  Barrier& barrier = block.barriers[0];
  if (!barrier.waiting.empty() && barrier.expected == 0 && int(barrier.waiting.size()) == block.alive) {
    release(barrier, block, true, nullptr);
  }
}

void fiber_entry() {
  for (;;) {
    Worker& w = *worker;
    Thread* thread = w.current;
    w.launch->run(w.launch->arguments);
    leave_kernel(*thread);
    Thread* next = aborting ? nullptr : choose(w);
    if (next == nullptr) {
      int64_t alive = 0;
      for (const Block* block : w.blocks) alive += block->alive;
      if (alive && !aborting) report_deadlock(w);
      to_scheduler(w);
    }
    Fiber* mine = w.fiber;
    make_current(w, next);
    next->state = State::ready;
    if (next->fiber == nullptr) {  // runs on this very stack
      next->fiber = mine;
      mine->thread = next;
      continue;
    }
    w.idle.push_back(mine);
    w.fiber = next->fiber;
    switch_context(&mine->stack_pointer, next->fiber->stack_pointer);
    worker->fiber = mine;  // reused for a thread that had not started
  }
}

// ---- blocks ---------------------------------------------------------------------------------------------

Block* new_block() {
  Block* block = new Block{};
  block->shared = static_cast<unsigned char*>(aligned_alloc(1024, kSharedBytes + 1024));
  return block;
}

void delete_block(Block* block) {
  if (block == nullptr) return;
  if (checker) checker->block_deleted(*block);
  free(block->shared);
  delete block;
}

void begin_block(Block& block, const Launch& launch, int64_t number) {
  const unsigned x = launch.grid.x, y = launch.grid.y;
  block.number = number;
  block.index = {unsigned(number % x), unsigned(number / x % y), unsigned(number / x / y)};
  const int threads = int(launch.block.x * launch.block.y * launch.block.z);
  const size_t poisoned = std::max(block.shared_used, launch.shared_bytes);
  block.shared_used = (launch.shared_bytes + 15) / 16 * 16;
  memset(block.shared, kPoison, std::min(std::max(poisoned, block.shared_used), kSharedBytes));
  block.arrays.clear();
  block.alive = threads;
  block.threads.resize(size_t(threads));
  block.warps.resize(size_t((threads + 31) / 32));
  for (size_t w = 0; w < block.warps.size(); ++w) {
    const int lanes = std::min(32, threads - int(w) * 32);
    block.warps[w].lanes = lanes == 32 ? 0xffffffffu : (1u << lanes) - 1;
    block.warps[w].exited = 0;
    block.warps[w].open.clear();
  }
  for (Barrier& barrier : block.barriers) {
    barrier.waiting.clear();
    barrier.results.clear();
    barrier.trues = barrier.expected = 0;
  }
  const unsigned bx = launch.block.x, by = launch.block.y;
  for (int t = 0; t < threads; ++t) {
    Thread& thread = block.threads[size_t(t)];
    thread.indices = {
        {unsigned(t) % bx, unsigned(t) / bx % by, unsigned(t) / bx / by}, block.index, launch.block, launch.grid};
    thread.block = &block;
    thread.fiber = nullptr;
    thread.number = t;
    thread.lane = t & 31;
    thread.warp = t >> 5;
    thread.state = State::unstarted;
    thread.group = 0;
    thread.copies.clear();
  }
  if (checker) checker->block_begins(block);
}

// Runs the blocks of the worker to their end.
void run_blocks(Worker& w) {
  w.unstarted.clear();
  w.ready.clear();
  for (size_t b = w.blocks.size(); b-- > 0;) {
    for (size_t t = w.blocks[b]->threads.size(); t-- > 0;) w.unstarted.push_back(&w.blocks[b]->threads[t]);
  }
  if (w.unstarted.empty()) return;
  Thread* first = choose(w);
  first->fiber = take_fiber(w);
  first->fiber->thread = first;
  first->state = State::ready;
  make_current(w, first);
  w.fiber = first->fiber;
  switch_context(&w.main_stack_pointer, first->fiber->stack_pointer);
  collect_fibers(w);
  w.fiber = nullptr;
  w.current = nullptr;
  if (checker) {
    for (Block* block : w.blocks) checker->block_ends(*block);
  }
}

Worker* new_worker(size_t stacks) {
  Worker* w = new Worker{};
  w->stack_count = stacks;
  void* memory =
      mmap(nullptr, stacks * kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    fprintf(stderr, "pyops emulator: no address space for %zu stacks\n", stacks);
    abort();
  }
  w->stacks = static_cast<unsigned char*>(memory);
  return w;
}

void delete_worker(Worker* w) {
  if (w == nullptr) return;
  for (Fiber* fiber : w->fibers) {
    delete_context(fiber->stack_pointer);
    delete fiber;
  }
  delete_context(w->main_stack_pointer);
  munmap(w->stacks, w->stack_count * kStackBytes);
  delete w;
}

constexpr size_t kOrdinaryStacks = 1024 + 1, kCooperativeStacks = 16384;

// Every host thread keeps its workers and its block for the next launch. Most host threads end with their launch.
struct OwnedByThread {
  Worker *ordinary = nullptr, *large = nullptr;
  Block* block = nullptr;
  ~OwnedByThread() {
    delete_worker(ordinary);
    delete_worker(large);
    delete_block(block);
  }
};
thread_local OwnedByThread owned;

Worker& own_worker(bool cooperative) {
  Worker*& w = cooperative ? owned.large : owned.ordinary;
  if (w == nullptr) w = new_worker(cooperative ? kCooperativeStacks : kOrdinaryStacks);
  return *w;
}

void prepare_worker(Worker& w, const Launch& launch, unsigned stream) {
  w.launch = &launch;
  w.shuffles = configuration.seed != 0;
  w.random.seed(configuration.seed * 7919u + stream + 1);
  worker = &w;
}

// Block number `position` of the order in which `count` blocks of the grid's `all` run. Of a sample each stands for as
// many blocks, among which its place varies: with equal distances all of them would meet the same alignment.
int64_t ordered(int64_t position, int64_t count, int64_t all) {
  const int64_t number = configuration.seed == 0 ? position : count - 1 - position;
  const int64_t each = all / count;
  return count == all ? number : number * each + number * 7919 % each;
}

void work(const Launch& launch, std::atomic<int64_t>& next, int64_t count, int64_t all) {
  if (owned.block == nullptr) owned.block = new_block();
  Block* const block = owned.block;
  Worker& w = own_worker(false);
  w.blocks = {block};
  for (int64_t position = next++; position < count && !aborting; position = next++) {
    prepare_worker(w, launch, unsigned(position));
    begin_block(*block, launch, ordered(position, count, all));
    run_blocks(w);
  }
  worker = nullptr;
}

void work_cooperatively(const Launch& launch, int64_t count) {
  Worker& w = own_worker(true);
  prepare_worker(w, launch, 0);
  w.blocks.clear();
  for (int64_t number = 0; number < count; ++number) {
    w.blocks.push_back(new_block());
    begin_block(*w.blocks.back(), launch, ordered(number, count, count));
  }
  run_blocks(w);
  for (Block* block : w.blocks) delete_block(block);
  w.blocks.clear();
  worker = nullptr;
}

std::string launch_error(const Launch& launch) {
  const int64_t threads = int64_t(launch.block.x) * launch.block.y * launch.block.z;
  const auto text = [](dim3 d) {
    std::string numbers = std::to_string(d.x);
    for (const unsigned number : {d.y, d.z}) numbers.append(" x ").append(std::to_string(number));
    return numbers;
  };
  if (threads < 1 || threads > 1024 || launch.block.z > 64) return "block " + text(launch.block);
  if (launch.grid.x < 1 || launch.grid.x > 2147483647u || launch.grid.y < 1 || launch.grid.y > 65535 ||
      launch.grid.z < 1 || launch.grid.z > 65535) {
    return "grid " + text(launch.grid);
  }
  if (launch.shared_bytes > kSharedBytes) return std::to_string(launch.shared_bytes) + " bytes of shared memory";
  const int64_t blocks = int64_t(launch.grid.x) * launch.grid.y * launch.grid.z;
  if (launch.cooperative && blocks * threads > int64_t(kCooperativeStacks)) {
    return "a cooperative grid of " + std::to_string(blocks * threads) + " threads";
  }
  return "";
}

}  // namespace

// ---- reports --------------------------------------------------------------------------------------------

std::string text_of(Line line) {
  const char* name = strrchr(line.file, '/');
  return std::string(name ? name + 1 : line.file) + ":" + std::to_string(line.number);
}

std::string text_of(const Thread& thread) {
  return "thread " + std::to_string(thread.number) + " of block " + std::to_string(thread.block->number);
}

size_t write_lines(const std::vector<std::string>& lines, char* text, size_t capacity) {
  std::string all;
  for (const std::string& line : lines) all += line + "\n";
  if (capacity) {
    const size_t length = std::min(all.size(), capacity - 1);
    memcpy(text, all.data(), length);
    text[length] = 0;
  }
  return all.size() + 1;
}

void report(const char* kind, const std::string& text, uint64_t key) {
  const std::lock_guard<std::mutex> lock(reports_mutex);
  if (key != 0 && !reported_keys.insert({kind, key}).second) return;
  ++found;
  const Launch* launch = worker ? worker->launch : nullptr;
  const std::string whole = std::string(kind) + ": " + text + (launch ? std::string(" [") + launch->kernel + "]" : "");
  if (reports.size() >= kMostReports || std::find(reports.begin(), reports.end(), whole) != reports.end()) return;
  reports.push_back(whole);
}

void fatal(const char* kind, const std::string& text) {
  report(kind, text);
  aborting = true;
  to_scheduler(*worker);
}

void fail(const char* message, const char* file, int line) {
  asserted = true;
  fprintf(stderr, "%s:%d: %s\n", file, line, message);
  aborting = true;
  to_scheduler(*worker);
}

// ---- what kernels call ----------------------------------------------------------------------------------

int run(const Launch& launch) {
  const std::lock_guard<std::mutex> one_at_a_time(launches_mutex);  // like the kernels of one stream
  {
    const std::lock_guard<std::mutex> lock(reports_mutex);
    reported_keys.clear();
    found = 0;
  }
  aborting = asserted = false;
  const std::string wrong = launch_error(launch);
  if (!wrong.empty()) {
    report("invalid launch", wrong + " [" + launch.kernel + "]");
    return 1;
  }
  const int64_t all = int64_t(launch.grid.x) * launch.grid.y * launch.grid.z;
  const int64_t sampled = launch.cooperative ? 0 : configuration.sampled_blocks;
  const int64_t blocks = sampled ? std::min(sampled, all) : all;
  if (checker) checker->launch_begins(launch, blocks);
  if (launch.cooperative) {
    work_cooperatively(launch, blocks);
  } else {
    std::atomic<int64_t> next{0};
    const int64_t host =
        configuration.host_threads ? configuration.host_threads : int(std::thread::hardware_concurrency());
    std::vector<std::thread> others;
    for (int64_t i = 1; i < std::min(host, blocks / 4); ++i)
      others.emplace_back([&] { work(launch, next, blocks, all); });
    work(launch, next, blocks, all);
    for (std::thread& other : others) other.join();
  }
  return asserted ? kDeviceAssert : int(found);
}

void* shared_array(const void* site, const char* name, size_t bytes, size_t alignment) {
  Block& block = *worker->current->block;
  for (const SharedArray& array : block.arrays) {
    if (array.site == site) return block.shared + array.offset;
  }
  const size_t grain = std::max<size_t>(alignment, 16);
  const size_t offset = (block.shared_used + grain - 1) / grain * grain;
  if (offset + bytes > kSharedBytes) {
    fatal("shared memory", std::string(name) + " ends at byte " + std::to_string(offset + bytes) + " of " +
                               std::to_string(kSharedBytes));
  }
  memset(block.shared + offset, kPoison, bytes);
  block.arrays.push_back({site, name, offset, bytes});
  block.shared_used = offset + bytes;
  return block.shared + offset;
}

void* dynamic_shared() { return worker->current->block->shared; }

void collective(const char* operation, unsigned mask, void* operands, Compute compute, Line line, bool orders_memory) {
  Thread& me = *worker->current;
  Block& block = *me.block;
  Warp& warp = block.warps[size_t(me.warp)];
  const unsigned mine = 1u << me.lane;
  const auto here = [&] { return std::string(" in ") + operation + " at " + text_of(line); };
  if ((mask & mine) == 0) {
    fatal("divergent collective", text_of(me) + " calls with a mask that does not name it" + here());
  }
  if (mask & ~warp.lanes) fatal("divergent collective", "the mask names lanes that do not exist" + here());
  if (mask & warp.exited) fatal("exited lane", "the mask names a lane that has left the kernel" + here());
  Meeting* meeting = nullptr;
  for (Meeting& open : warp.open) {
    if ((open.mask & mask) == 0) continue;
    const bool same = open.mask == mask && same_text(open.operation, operation) && same_place(open.line, line);
    if (!same || (open.arrived & mine)) {
      fatal("divergent collective",
            text_of(me) + here() + ", other lanes of its warp in " + open.operation + " at " + text_of(open.line));
    }
    meeting = &open;
  }
  if (meeting == nullptr) {
    warp.open.push_back({operation, line, mask, 0, {}});
    meeting = &warp.open.back();
  }
  meeting->arrived |= mine;
  meeting->operands[me.lane] = operands;
  if (meeting->arrived != mask) {
    wait_here(operation, line);
    return;
  }
  void* brought[32];  // on this fiber's stack, where the checker lets kernel code read
  memcpy(brought, meeting->operands, sizeof(brought));
  compute(brought, mask);
  if (orders_memory && checker) checker->warp_met(block, me.warp, mask);
  warp.open.erase(warp.open.begin() + (meeting - warp.open.data()));
  for (unsigned others = mask & ~mine; others; others &= others - 1) {
    wake(&block.threads[size_t(me.warp * 32 + __builtin_ctz(others))]);
  }
}

void matrix_instruction(const char* operation, void* operands, Compute compute, Line line) {
  Thread& me = *worker->current;
  if (me.lane == 0 && checker) checker->matrix_instruction(me);
  collective(operation, 0xffffffffu, operands, compute, line, false);
}

int barrier_reduce(int id, int predicate, int operation, Line line) {
  Thread& me = *worker->current;
  Block& block = *me.block;
  Barrier& barrier = block.barriers[id];
  if (!barrier.waiting.empty() && !same_place(barrier.line, line)) {
    fatal("divergent barrier",
          text_of(me) + " is at " + text_of(line) + ", others of its block at " + text_of(barrier.line));
  }
  barrier.line = line;
  barrier.expected = 0;
  barrier.trues += predicate != 0;
  int result = 0;
  if (int(barrier.waiting.size()) + 1 < block.alive) {
    barrier.waiting.push_back(&me);
    barrier.results.push_back(&result);
    wait_here("__syncthreads", line);
    return result;
  }
  const int all = block.alive, trues = barrier.trues;
  result = operation == 0 ? trues != 0 : operation == 1 ? trues == all : trues;
  for (int* other : barrier.results) *other = result;
  barrier.waiting.push_back(&me);
  release(barrier, block, true, &me);
  return result;
}

void block_barrier(int id, int threads, Line line) {
  if (threads == 0) {
    barrier_reduce(id, 0, 0, line);
    return;
  }
  Thread& me = *worker->current;
  Block& block = *me.block;
  if (id < 0 || id >= kBarriers || threads % 32 != 0) {
    fatal("barrier",
          "barrier " + std::to_string(id) + " of " + std::to_string(threads) + " threads at " + text_of(line));
  }
  Barrier& barrier = block.barriers[id];
  if (!barrier.waiting.empty() && barrier.expected != threads) {
    fatal("barrier", "barrier " + std::to_string(id) + " is awaited by " + std::to_string(threads) + " threads at " +
                         text_of(line) + " and by " + std::to_string(barrier.expected) + " at " +
                         text_of(barrier.line));
  }
  barrier.expected = threads;
  barrier.line = line;
  barrier.waiting.push_back(&me);
  if (int(barrier.waiting.size()) < threads) {
    wait_here("barrier_sync", line);
    return;
  }
  release(barrier, block, false, &me);
}

void spin_yield() {
  wake(worker->current);
  wait_here("spin_yield", {"", 0});
}

void preempt() {
  Worker& w = *worker;
  if (w.ready.empty() && w.unstarted.empty()) return;
  wake(w.current);
  wait_here("memory access", {"", 0});
}

void check_alignment(const void* address, size_t bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(address) % bytes == 0) return;
  char text[64];
  snprintf(text, sizeof(text), "%s of %p", what, address);
  fatal("misaligned access", text);
}

void fence(bool whole_grid) {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
  if (checker) checker->fenced(*worker->current, whole_grid);
}

// Where in the kernel's code the runtime was called: these are not inlined into kernels.
#define PYOPS_CALLER __builtin_return_address(0)

namespace {

void note_atomic(void* address, size_t bytes, const void* place) {
  check_alignment(address, bytes, "atomic");
  if (checker) checker->atomic(*worker->current, address, bytes, place);
}

template <class Bits, class Value>
Value add_by_exchange(Value* address, Value value, const void* place) {
  note_atomic(address, sizeof(Value), place);
  Bits* bits = reinterpret_cast<Bits*>(address);
  Bits seen = __atomic_load_n(bits, __ATOMIC_RELAXED);
  for (;;) {
    Value old;
    memcpy(&old, &seen, sizeof(old));
    const Value sum = old + value;
    Bits wanted;
    memcpy(&wanted, &sum, sizeof(wanted));
    if (__atomic_compare_exchange_n(bits, &seen, wanted, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) return old;
  }
}

template <class Bits>
Bits compare_and_swap(Bits* address, Bits compare, Bits value, const void* place) {
  note_atomic(address, sizeof(Bits), place);
  __atomic_compare_exchange_n(address, &compare, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return compare;
}

}  // namespace

uint32_t atomic_add_u32(uint32_t* address, uint32_t value) {
  note_atomic(address, 4, PYOPS_CALLER);
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
uint64_t atomic_add_u64(uint64_t* address, uint64_t value) {
  note_atomic(address, 8, PYOPS_CALLER);
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
float atomic_add_f32(float* address, float value) { return add_by_exchange<uint32_t>(address, value, PYOPS_CALLER); }
double atomic_add_f64(double* address, double value) { return add_by_exchange<uint64_t>(address, value, PYOPS_CALLER); }
uint32_t atomic_max_u32(uint32_t* address, uint32_t value, bool is_signed) {
  note_atomic(address, 4, PYOPS_CALLER);
  uint32_t seen = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (is_signed ? int32_t(value) > int32_t(seen) : value > seen) {
    if (__atomic_compare_exchange_n(address, &seen, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) break;
  }
  return seen;
}
uint32_t atomic_cas_u32(uint32_t* address, uint32_t compare, uint32_t value) {
  return compare_and_swap(address, compare, value, PYOPS_CALLER);
}
uint64_t atomic_cas_u64(uint64_t* address, uint64_t compare, uint64_t value) {
  return compare_and_swap(address, compare, value, PYOPS_CALLER);
}
uint32_t atomic_exchange_u32(uint32_t* address, uint32_t value) {
  note_atomic(address, 4, PYOPS_CALLER);
  return __atomic_exchange_n(address, value, __ATOMIC_RELAXED);
}

void cp_async(void* shared, const void* global, int bytes, bool copy) {
  Thread& me = *worker->current;
  check_alignment(shared, size_t(bytes), "cp.async destination");
  check_alignment(global, size_t(bytes), "cp.async source");
  me.copies.push_back({shared, global, bytes, me.group, copy, PYOPS_CALLER});
  memset(shared, kPoison, size_t(bytes));
  if (checker) checker->copy_issued(me, me.copies.back());
}

void cp_async_commit() { ++worker->current->group; }

void cp_async_wait(int groups_left) { finish_copies(*worker->current, groups_left); }

}  // namespace pyops::emulator

// ---- for tests ------------------------------------------------------------------------------------------

using namespace pyops::emulator;

PYOPS_EMULATOR_EXPORT void pyops_emulator_configure(unsigned seed, double preemption, int host_threads) {
  configuration.seed = seed;
  configuration.preemption = preemption;
  configuration.host_threads = host_threads;
}

// Runs only that many blocks of every grid (0: all): for counting what a large launch would do. Outputs are then not
// all written, and accesses of global memory are checked for their bounds only.
PYOPS_EMULATOR_EXPORT void pyops_emulator_sample(int64_t blocks) { configuration.sampled_blocks = blocks; }

// The reports so far, one a line, at most `capacity` bytes with the final 0; returns the bytes needed.
PYOPS_EMULATOR_EXPORT size_t pyops_emulator_reports(char* text, size_t capacity, bool clear) {
  const std::lock_guard<std::mutex> lock(reports_mutex);
  const size_t bytes = write_lines(reports, text, capacity);
  if (clear) reports.clear();
  return bytes;
}
