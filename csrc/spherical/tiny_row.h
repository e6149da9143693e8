// Rows of so few logits are computed in double throughout: their terms cancel to what rounding would hide.
#pragma once

#include <stdint.h>

namespace pyops {

constexpr int64_t kTinyRow = 4;

}  // namespace pyops
