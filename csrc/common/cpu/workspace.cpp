#include "workspace.h"

#include <cstdlib>
#include <new>

namespace pyops {
namespace {

constexpr int64_t kKept = int64_t(64) << 20;  // more than this is given back after use

struct Block {
  void* memory = nullptr;
  int64_t size = 0;

  void release() {
    std::free(memory);
    memory = nullptr;
    size = 0;
  }
  ~Block() { release(); }
};

thread_local Block blocks[Workspace::kPurposes];

}  // namespace

void* Workspace::bytes(int64_t count) {
  Block& block = blocks[purpose_];
  if (block.size < count) {
    block.release();
    const int64_t rounded = (count + 4095) / 4096 * 4096;
    block.memory = std::aligned_alloc(4096, size_t(rounded));
    if (block.memory == nullptr) throw std::bad_alloc();
    block.size = rounded;
  }
  return block.memory;
}

Workspace::~Workspace() {
  if (blocks[purpose_].size > kKept) blocks[purpose_].release();
}

}  // namespace pyops
