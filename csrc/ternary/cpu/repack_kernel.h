// From one packed format to another: plain pointers, one table per ISA level, no torch header.
#pragma once

#include "../ternary_format.h"

namespace pyops {

struct RepackKernels {
  // Codes of row n as bytes, `in_features` of them; above 2 where what is stored stands for no weight.
  void (*read_row)(TernaryFormat format, const void* packed, int64_t in_features, int64_t n, uint8_t* codes);
  // The inverse. Codes reach to a whole block of the format, padded with 1; row n may lie in the padding.
  void (*write_row)(TernaryFormat format, const uint8_t* codes, int64_t in_features, int64_t n, void* packed);
  // The lines of t2x16 of one row group from t2, t5 or t5x16; false if something stands for no weight.
  bool (*lines)(TernaryFormat format, const uint8_t* packed, int64_t out_features, int64_t in_features, int64_t group,
                uint8_t* lines);
};

namespace baseline {
extern const RepackKernels repack_kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const RepackKernels repack_kernels;
}
namespace avx512 {
extern const RepackKernels repack_kernels;
}
#endif

}  // namespace pyops
