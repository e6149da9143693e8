// CPU front of ternary_quantize_weight: check, lay out, allocate, measure, encode.
#include <math.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "quantize_weight_kernel.h"
#include "ternary_product.h"

namespace pyops {
namespace {

constexpr int32_t kInfinity = 0x7f800000;
constexpr int64_t kStretch = 1 << 16;    // weights per partial sum: the sum does not depend on threads
constexpr int64_t kSample = 1 << 14;     // weights that bracket the median
constexpr int64_t kSelectAll = 1 << 17;  // up to here all magnitudes are selected from, in the caches
constexpr float kNaN = __builtin_nanf("");

// Rows of a matrix with one dense dimension, as stretches of at most kStretch weights.
struct Stretches {
  const char* data;
  int64_t rows, columns, stride, bytes, per_row;

  Stretches(const char* data_, int64_t rows_, int64_t columns_, int64_t stride_, DType dtype)
      : data(data_), bytes(element_bytes(dtype)) {
    // Dense rows without gaps are one long row.
    const bool whole = rows_ <= 1 || stride_ == columns_;
    rows = whole ? 1 : rows_;
    columns = whole ? rows_ * columns_ : columns_;
    stride = whole ? 0 : stride_;
    per_row = ceil_div(columns, kStretch);
  }
  int64_t count() const { return rows * per_row; }
  const char* at(int64_t stretch) const {
    return data + (stretch / per_row * stride + stretch % per_row * kStretch) * bytes;
  }
  int64_t size(int64_t stretch) const { return std::min(kStretch, columns - stretch % per_row * kStretch); }
  const char* element(int64_t i) const { return data + (i / columns * stride + i % columns) * bytes; }
};

double mean(const Stretches& stretches, int64_t n, double (*sum)(const void*, int64_t)) {
  std::vector<double> parts(size_t(stretches.count()));
  torch::stable::parallel_for(0, stretches.count(), 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) parts[size_t(i)] = sum(stretches.at(i), stretches.size(i));
  });
  double total = 0;
  for (const double part : parts) total += part;
  return total / double(n);
}

// The magnitudes between which the median lies, almost surely, from a sample at equal distances.
std::pair<int32_t, int32_t> bracket(const Stretches& stretches, int64_t n, DType dtype) {
  std::vector<int32_t> sample(static_cast<size_t>(kSample));
  uint64_t state = 0x9e3779b97f4a7c15u;
  for (int64_t i = 0; i < kSample; ++i) {
    // One weight at a random place of each of kSample equal parts: immune to patterns in the weights.
    state = state * 6364136223846793005u + 1442695040888963407u;
    const double place = (double(i) + double(state >> 11) * 0x1p-53) * (double(n) / double(kSample));
    const int64_t at = std::min<int64_t>(int64_t(place), n - 1);
    const float value = float(read_element(stretches.element(at), dtype, 0));
    sample[size_t(i)] = int32_t(float_to_bits(value) & 0x7fffffffu);
  }
  // The rank of the median in a sample of s has a standard deviation of at most sqrt(s) / 2 = 64: take six.
  const size_t low = size_t(kSample / 2 - 6 * 64), high = size_t(kSample / 2 + 6 * 64);
  std::nth_element(sample.begin(), sample.begin() + ptrdiff_t(low), sample.end());
  std::nth_element(sample.begin() + ptrdiff_t(low) + 1, sample.begin() + ptrdiff_t(high), sample.end());
  return {sample[low], sample[high]};
}

// The magnitude of that rank among all weights; at least kInfinity if a weight is not finite.
int32_t select_rank(const Stretches& stretches, int64_t n, int64_t rank, DType dtype,
                    const QuantizeWeightKernels& kernels) {
  const int type = int(dtype);
  if (n <= kSelectAll) {
    Scratch<int32_t> magnitudes(n);
    int32_t largest = 0;
    int64_t done = 0;
    for (int64_t i = 0; i < stretches.count(); ++i) {
      const int64_t size = stretches.size(i);
      largest = std::max(largest, kernels.magnitudes[type](stretches.at(i), size, magnitudes.get() + done));
      done += size;
    }
    return largest >= kInfinity ? largest : kernels.select(magnitudes.get(), n, rank);
  }
  auto [low, high] = bracket(stretches, n, dtype);
  const int64_t count = stretches.count();
  for (int64_t room = kStretch / 8;; room = kStretch + 64) {
    // Each stretch writes what lies in the bracket into its own part; memory that is not written costs nothing.
    Scratch<int32_t> found(count * room);
    std::vector<MagnitudeCount> counts(static_cast<size_t>(count));
    std::atomic<int32_t> largest{0};
    torch::stable::parallel_for(0, count, 4, [&](int64_t begin, int64_t end) {
      int32_t highest = 0;
      for (int64_t i = begin; i < end; ++i) {
        // A bracket of one value needs no list: all in it are equal.
        counts[size_t(i)] = kernels.collect[type](stretches.at(i), stretches.size(i), low, high, found.get() + i * room,
                                                  low == high ? 0 : room, highest);
      }
      int32_t seen = largest.load();
      while (highest > seen && !largest.compare_exchange_weak(seen, highest)) {
      }
    });
    if (largest >= kInfinity) return largest;
    int64_t below = 0, inside = 0;
    bool complete = true;
    for (const MagnitudeCount& part : counts) {
      below += part.below;
      inside += part.total;
      complete = complete && part.collected >= 0;
    }
    if (rank < below) {  // the sample misled: look at everything under the bracket, then above it
      high = low - 1;
      low = 0;
      continue;
    }
    if (rank >= below + inside) {
      low = high + 1;
      high = kInfinity - 1;
      continue;
    }
    if (low == high) return low;
    if (!complete) continue;  // with room for everything
    Scratch<int32_t> together(inside);
    int64_t done = 0;
    for (int64_t i = 0; i < count; ++i) {
      std::copy_n(found.get() + i * room, counts[size_t(i)].total, together.get() + done);
      done += counts[size_t(i)].total;
    }
    return kernels.select(together.get(), inside, rank - below);
  }
}

float median(const Stretches& stretches, int64_t n, DType dtype, const QuantizeWeightKernels& kernels) {
  const int32_t found = select_rank(stretches, n, (n - 1) / 2, dtype, kernels);
  return found >= kInfinity ? kNaN : bits_to_float(uint32_t(found));
}

struct ScaleOptions {
  bool use_median;
  float eps;
  bool add_eps;
};

float effective_scale(float gamma, const ScaleOptions& options) {
  return options.add_eps ? gamma + options.eps : gamma < options.eps ? options.eps : gamma;
}

// gamma of one matrix (or row): the given one, or measured. The encoding, which sees all weights in any case, replaces
// it by NaN if one is not finite.
float measure(const Stretches& stretches, int64_t n, DType dtype, const float* given, const ScaleOptions& options) {
  const auto& kernels = PYOPS_SELECT(quantize_weight_kernels);
  if (given || n == 0) return effective_scale(given ? *given : 0.0f, options);
  if (options.use_median) return effective_scale(median(stretches, n, dtype, kernels), options);
  return effective_scale(float(mean(stretches, n, kernels.sum[int(dtype)])), options);
}

std::tuple<Tensor, Tensor> ternary_quantize_weight_cpu(const Tensor& weight_in, const OptionalTensor& scale_in,
                                                       int64_t measure_code, bool per_row, double eps, bool add_eps) {
  const WeightArguments arguments = check_quantize_weight(weight_in, scale_in, measure_code, per_row, eps);
  const Tensor weight = rows_dense(weight_in);
  const Tensor scale = scale_in ? as_contiguous(*scale_in) : weight;  // weight: anything, for want of no tensor
  const int64_t rows = arguments.out_features, columns = arguments.in_features, row_bytes = ceil_div(columns, 4);
  Tensor packed = new_tensor(weight, {rows, row_bytes}, ScalarType::Byte);
  Tensor gamma = per_row ? new_tensor(weight, {rows}, ScalarType::Float) : new_tensor(weight, {}, ScalarType::Float);
  auto* gammas = static_cast<float*>(gamma.mutable_data_ptr());
  const auto* given = scale_in ? static_cast<const float*>(scale.const_data_ptr()) : nullptr;
  const ScaleOptions options{measure_code == 1, float(eps), add_eps};
  const DType dtype = arguments.dtype;
  const char* data = static_cast<const char*>(weight.const_data_ptr());
  if (!per_row) {
    gammas[0] = measure(Stretches(data, rows, columns, weight.stride(0), dtype), rows * columns, dtype, given, options);
  }
  const auto encode = PYOPS_SELECT(quantize_weight_kernels).encode[int(dtype)];
  auto* codes = static_cast<uint8_t*>(packed.mutable_data_ptr());
  const int64_t stride = weight.stride(0) * element_bytes(dtype);
  const int64_t grain = std::max<int64_t>(1, kStretch / (columns + 1));
  constexpr int kZeroCodes = 0x55;
  std::atomic<bool> finite{true};
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      if (per_row) {
        gammas[n] = measure(Stretches(data + n * stride, 1, columns, 0, dtype), columns, dtype,
                            given ? given + n : nullptr, options);
      }
      const float inverse = 1.0f / gammas[per_row ? n : 0];
      if (encode(data + n * stride, columns, inverse, codes + n * row_bytes) < kInfinity) continue;
      if (per_row) {
        gammas[n] = kNaN;
        std::memset(codes + n * row_bytes, kZeroCodes, size_t(row_bytes));
      } else {
        finite.store(false, std::memory_order_relaxed);
      }
    }
  });
  if (!finite) {
    gammas[0] = kNaN;
    std::memset(codes, kZeroCodes, size_t(rows * row_bytes));
  }
  return {packed, gamma};
}

}  // namespace
}  // namespace pyops

STABLE_TORCH_LIBRARY_IMPL(pyops, CPU, m) {
  m.impl("ternary_quantize_weight", TORCH_BOX(&pyops::ternary_quantize_weight_cpu));
}
