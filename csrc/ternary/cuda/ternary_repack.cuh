// Launchers of the changes of format. Each returns 0 or a CUDA error code; nothing waits for the device.
#pragma once

#include <stdint.h>

#include "../ternary_format.h"

namespace pyops {

// What a kernel does with a byte of the source that stands for no weight.
enum class InvalidCode : int {
  count,   // in `invalid`, which the launcher clears
  assert,  // stops the kernel, as an index out of range does: nothing waits for the answer
};

struct RepackTernary {
  const void* source;
  void* out;
  TernaryFormat from, to;
  int64_t out_features, in_features;
  InvalidCode policy;
  unsigned* invalid;
};

// The first weight, row by row, that no code stands for: `place` is out_feature * in_features + in_feature, `value`
// what a message shows. Both are -1 if there is none.
struct InvalidTernary {
  int64_t place, value;
};

}  // namespace pyops

extern "C" int pyops_ternary_repack(const pyops::RepackTernary* arguments, void* stream);

extern "C" int pyops_ternary_find_invalid(const pyops::RepackTernary* arguments, pyops::InvalidTernary* found,
                                          void* stream);
