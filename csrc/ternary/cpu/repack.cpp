// CPU front of ternary_repack: check, lay out, allocate, run.
#include <atomic>
#include <cstring>

#include "ternary_product.h"

namespace pyops {
namespace {

// 16 rows at a time, the most that a format stores together.
void repack_rows(const RepackArguments& arguments, const void* source, void* target, int64_t begin, int64_t end,
                 std::atomic<bool>& bad) {
  const RepackKernels& kernels = PYOPS_SELECT(repack_kernels);
  const int64_t padded = ceil_div(arguments.in_features, block_columns(arguments.to)) * block_columns(arguments.to);
  Scratch<uint8_t> codes(padded);
  const int64_t rows =
      block_rows(arguments.to) == 16 ? ceil_div(arguments.out_features, 16) * 16 : arguments.out_features;
  for (int64_t n = begin * 16; n < std::min(end * 16, rows); ++n) {
    std::memset(codes.get(), 1, size_t(padded));
    if (n < arguments.out_features) {
      kernels.read_row(arguments.from, source, arguments.in_features, n, codes.get());
      uint8_t largest = 0;
      for (int64_t k = 0; k < arguments.in_features; ++k) largest = std::max(largest, codes[k]);
      if (largest > 2) {
        bad.store(true, std::memory_order_relaxed);
        return;
      }
    }
    kernels.write_row(arguments.to, codes.get(), arguments.in_features, n, target);
  }
}

Tensor new_packed(const Tensor& like, const RepackArguments& arguments) {
  const std::vector<int64_t> shape = packed_shape(arguments.to, arguments.out_features, arguments.in_features);
  const ScalarType dtype = arguments.to == TernaryFormat::int8 ? ScalarType::Char : ScalarType::Byte;
  return shape.size() == 2 ? new_tensor(like, {shape[0], shape[1]}, dtype)
                           : new_tensor(like, {shape[0], shape[1], shape[2], shape[3]}, dtype);
}

Tensor ternary_repack_cpu(const Tensor& source_in, int64_t from_format, int64_t to_format, int64_t out_features,
                          int64_t in_features) {
  const RepackArguments arguments = check_repack(source_in, from_format, to_format, out_features, in_features);
  const Tensor source = as_contiguous(source_in);
  Tensor target = new_packed(source, arguments);
  advise_huge_pages(target);  // products stream it: see bench/results/ternary.md
  if (target.numel() == 0) return target;
  const int64_t groups = ceil_div(out_features, 16), line_bytes = ceil_div(in_features, 16) * kLineBytes;
  const bool direct = arguments.to == TernaryFormat::t2x16 &&
                      (arguments.from == TernaryFormat::t2 || arguments.from == TernaryFormat::t5 ||
                       arguments.from == TernaryFormat::t5x16);
  const auto* from = static_cast<const uint8_t*>(source.const_data_ptr());
  auto* to = static_cast<uint8_t*>(target.mutable_data_ptr());
  std::atomic<bool> bad{false};
  const int64_t grain = std::max<int64_t>(1, (1 << 16) / (16 * in_features + 1));
  torch::stable::parallel_for(0, groups, grain, [&](int64_t begin, int64_t end) {
    if (!direct) return repack_rows(arguments, from, to, begin, end, bad);
    const RepackKernels& kernels = PYOPS_SELECT(repack_kernels);
    for (int64_t group = begin; group < end; ++group) {
      if (!kernels.lines(arguments.from, from, out_features, in_features, group, to + group * line_bytes)) bad = true;
    }
  });
  if (bad) reject_first_bad_code("ternary_repack", "source", arguments.from, from, out_features, in_features);
  return target;
}

}  // namespace
}  // namespace pyops

STABLE_TORCH_LIBRARY_IMPL(pyops, CPU, m) { m.impl("ternary_repack", TORCH_BOX(&pyops::ternary_repack_cpu)); }
