// Weights to T gamma: gamma from the mean or the lower median of |W|, then T = sign(W) where |W / gamma| > 1/2, as t2.
//
// A segment is what shares a gamma: a row, or the whole tensor.
//  - Mean: a row is summed by a block (mean_kernel). The whole tensor is cut into parts, one block each, whose sums
//    (part_sum_kernel) one more block adds in order. Sums are double, so that gamma is that of float64 to the last bit
//    but for rare ties.
//  - Lower median, the element of rank floor((n - 1) / 2): a radix select on the 31 bits of the magnitudes, 11 + 10 +
//  10
//    of them, in three passes that count digits and one choice of a digit after each. The result is an element, exact.
//    A row is one block's work (row_median_kernel); the whole tensor is counted by many blocks (count_kernel) and one
//    chooses (choose_kernel). Counters are integers, so the order of arrival does not matter.
//  - A weight that is not finite makes gamma NaN: the mean's sum becomes NaN; of the median the first digit tells.
//  - pack_kernel rounds: W * (1 / gamma), IEEE float32, as bytes of four codes.
#include "quantize_weight.cuh"
#include "ternary_device.cuh"

namespace pyops {
namespace {

constexpr int kThreads = 256;
constexpr int kParts = 1024;  // blocks that share a tensor, at most
constexpr int64_t kPartElements = 1 << 14;

// ---- gamma ----------------------------------------------------------------------------------------------

PYOPS_DEVICE float not_a_number() { return __uint_as_float(0x7fc00000u); }

// gamma' of segment `at` from what was measured, NaN included.
PYOPS_DEVICE float effective_gamma(const QuantizeWeight& a, float measured, int64_t at) {
  const float found = measured == measured && a.scale ? a.scale[at] : measured;
  if (a.add_eps) return __fadd_rn(found, a.eps);
  return found < a.eps ? a.eps : found;
}

// The sum of |w[0, n)| over the block; NaN if one is not finite.
template <class T>
PYOPS_DEVICE double sum_magnitudes(const T* w, int64_t n, double* scratch) {
  constexpr int width = dev::kVectorElements<T>;
  double sum = 0;
  uint32_t largest = 0;
#pragma unroll 4
  for (int64_t at = int64_t(threadIdx.x) * width; at < n; at += kThreads * width) {
    const dev::Bits128 bits = load_vector(w + at, n - at);
    largest = largest_magnitude<T>(bits, largest);
    float values[width];
    widen_vector<T>(bits, values);
#pragma unroll
    for (int i = 0; i < width; ++i) sum += double(fabsf(values[i]));
  }
  if (largest >= kInfinity) sum = double(not_a_number());
  return reduce_block(sum, scratch, Sum{});
}

PYOPS_DEVICE float mean_of(double sum, int64_t n) { return n ? float(sum / double(n)) : 0.0f; }

// A block per row.
template <class T>
__global__ void __launch_bounds__(kThreads) mean_kernel(QuantizeWeight a, int64_t first) {
  PYOPS_SHARED(double, scratch, kThreads / 32);
  const int64_t row = first + blockIdx.x;
  const double sum = sum_magnitudes(static_cast<const T*>(a.weight) + row * a.in_features, a.in_features, scratch);
  if (threadIdx.x == 0) a.gamma[row] = effective_gamma(a, mean_of(sum, a.in_features), row);
}

template <class T>
__global__ void __launch_bounds__(kThreads) part_sum_kernel(QuantizeWeight a, int64_t part, double* sums) {
  PYOPS_SHARED(double, scratch, kThreads / 32);
  const int64_t begin = int64_t(blockIdx.x) * part, left = a.out_features * a.in_features - begin;
  const double sum = sum_magnitudes(static_cast<const T*>(a.weight) + begin, left < part ? left : part, scratch);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads) total_kernel(QuantizeWeight a, const double* sums, int parts) {
  PYOPS_SHARED(double, scratch, kThreads / 32);
  double sum = 0;
  for (int part = int(threadIdx.x); part < parts; part += kThreads) sum += sums[part];
  sum = reduce_block(sum, scratch, Sum{});
  if (threadIdx.x == 0) *a.gamma = effective_gamma(a, mean_of(sum, a.out_features * a.in_features), 0);
}

// ---- lower median ---------------------------------------------------------------------------------------

// The digits of a magnitude, from the top.
constexpr int kPasses = 3, kBins = 1 << 11;
PYOPS_DEVICE int shift_of(int pass) { return pass == 0 ? 20 : pass == 1 ? 10 : 0; }
PYOPS_DEVICE uint32_t mask_of(int pass) { return pass == 0 ? 0x7ffu : 0x3ffu; }

// What is known after some passes: the digits chosen so far, in place, and the rank among the elements that have them.
struct Selection {
  uint64_t rank;
  uint32_t digits;
  uint32_t not_finite;
};

// Counts the digits of a pass of those of w[0, n) whose higher digits are those chosen.
template <class T>
PYOPS_DEVICE void count_digits(const T* w, int64_t n, int pass, uint32_t chosen, unsigned* bins) {
  constexpr int width = dev::kVectorElements<T>;
  const int shift = shift_of(pass), above = pass == 0 ? 31 : shift_of(pass - 1);
  for (int64_t at = int64_t(threadIdx.x) * width; at < n; at += kThreads * width) {
    float values[width];
    widen_vector<T>(load_vector(w + at, n - at), values);
#pragma unroll
    for (int i = 0; i < width; ++i) {
      const uint32_t bits = __float_as_uint(values[i]) & kMagnitude;
      if (at + i < n && bits >> above == chosen >> above) dev::count(&bins[bits >> shift & mask_of(pass)], 1);
    }
  }
}

// The first bin at which the running count exceeds the rank, and the rank within it; all threads of the block get it.
// `scratch` holds a number per warp and one more, then the bin.
template <class Count>
PYOPS_DEVICE void choose_digit(const Count* bins, int pass, Selection& selection, uint64_t* scratch) {
  constexpr int per_thread = kBins / kThreads, warps = kThreads / 32;
  const int first = int(threadIdx.x) * per_thread, warp = int(threadIdx.x) / 32;
  uint64_t own = 0;
#pragma unroll
  for (int i = 0; i < per_thread; ++i) own += bins[first + i];
  uint64_t running = own;  // of this warp, up to this thread
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const uint64_t below = __shfl_up_sync(dev::kFullWarp, running, lanes);
    if (dev::lane() >= lanes) running += below;
  }
  if (dev::lane() == 31) scratch[warp] = running;
  __syncthreads();
  for (int other = 0; other < warp; ++other) running += scratch[other];
  uint64_t before = running - own;
  if (before <= selection.rank && selection.rank < running) {
    int bin = first;
    for (; selection.rank >= before + bins[bin]; ++bin) before += bins[bin];
    scratch[warps] = selection.rank - before;
    scratch[warps + 1] = uint64_t(bin);
  }
  if (pass == 0) {  // those of exponent 255
    for (int bin = kBins - 8; bin < kBins; ++bin) selection.not_finite |= bins[bin] != 0;
  }
  __syncthreads();
  selection.rank = scratch[warps];
  selection.digits |= uint32_t(scratch[warps + 1]) << shift_of(pass);
}

PYOPS_DEVICE float median_of(const Selection& selection) {
  return selection.not_finite ? not_a_number() : __uint_as_float(selection.digits);
}

constexpr int kChoiceScratch = kThreads / 32 + 2;

// A block per row of at least one column.
template <class T>
__global__ void __launch_bounds__(kThreads) row_median_kernel(QuantizeWeight a, int64_t first) {
  PYOPS_SHARED(unsigned, bins, kBins);
  PYOPS_SHARED(uint64_t, scratch, kChoiceScratch);
  const int64_t row = first + blockIdx.x;
  Selection selection{uint64_t(a.in_features - 1) / 2, 0, 0};
  for (int pass = 0; pass < kPasses; ++pass) {
    for (int bin = int(threadIdx.x); bin < kBins; bin += kThreads) bins[bin] = 0;
    __syncthreads();
    count_digits(static_cast<const T*>(a.weight) + row * a.in_features, a.in_features, pass, selection.digits, bins);
    __syncthreads();
    choose_digit(bins, pass, selection, scratch);
  }
  if (threadIdx.x == 0) a.gamma[row] = effective_gamma(a, median_of(selection), row);
}

// A tensor's counters and its selection, in the workspace.
struct Counters {
  Selection selection;
  unsigned long long bins[kBins];
};

__global__ void __launch_bounds__(kThreads) clear_kernel(QuantizeWeight a, Counters* counters) {
  for (int bin = int(threadIdx.x); bin < kBins; bin += kThreads) counters->bins[bin] = 0;
  if (threadIdx.x == 0) counters->selection = {uint64_t(a.out_features * a.in_features - 1) / 2, 0, 0};
}

template <class T>
__global__ void __launch_bounds__(kThreads) count_kernel(QuantizeWeight a, int64_t part, int pass, Counters* counters) {
  PYOPS_SHARED(unsigned, bins, kBins);
  for (int bin = int(threadIdx.x); bin < kBins; bin += kThreads) bins[bin] = 0;
  __syncthreads();
  const int64_t begin = int64_t(blockIdx.x) * part, left = a.out_features * a.in_features - begin;
  count_digits(static_cast<const T*>(a.weight) + begin, left < part ? left : part, pass, counters->selection.digits,
               bins);
  __syncthreads();
  for (int bin = int(threadIdx.x); bin < kBins; bin += kThreads) {
    if (bins[bin]) dev::count(&counters->bins[bin], bins[bin]);
  }
}

// One block; leaves the counters at 0 for the next pass, and gamma after the last.
__global__ void __launch_bounds__(kThreads, 1) choose_kernel(QuantizeWeight a, int pass, Counters* counters) {
  PYOPS_SHARED(uint64_t, scratch, kChoiceScratch);
  Selection selection = counters->selection;
  choose_digit(counters->bins, pass, selection, scratch);
  for (int bin = int(threadIdx.x); bin < kBins; bin += kThreads) counters->bins[bin] = 0;
  if (threadIdx.x != 0) return;
  counters->selection = selection;
  if (pass == kPasses - 1) *a.gamma = effective_gamma(a, median_of(selection), 0);
}

// Where there is nothing to select from.
__global__ void __launch_bounds__(kThreads) empty_kernel(QuantizeWeight a, int64_t gammas) {
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (at < gammas) a.gamma[at] = effective_gamma(a, 0.0f, at);
}

// ---- T --------------------------------------------------------------------------------------------------

// The code of one weight: 1 + sign(w) where |w inverse| > 1/2, ties to 0. What is not finite counts as 0, and so does
// everything where the inverse is NaN.
PYOPS_DEVICE uint32_t code_of(float w, float inverse) {
  const bool counts = (__float_as_uint(w) & kMagnitude) < kInfinity && fabsf(__fmul_rn(w, inverse)) > 0.5f;
  return counts ? (w > 0 ? 2u : 0u) : 1u;
}

// A vector of weights per thread, one or two bytes; padding is code 1, which load_vector's zeros become.
template <class T>
__global__ void __launch_bounds__(kThreads) pack_kernel(QuantizeWeight a, int64_t per_row) {
  constexpr int width = dev::kVectorElements<T>;
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x, row = at / per_row;
  if (row >= a.out_features) return;
  const int64_t k = (at - row * per_row) * width, bytes = ceil_div(a.in_features, 4);
  const float inverse = __fdiv_rn(1.0f, a.gamma[a.per_row ? row : 0]);
  float w[width];
  widen_vector<T>(load_vector(static_cast<const T*>(a.weight) + row * a.in_features + k, a.in_features - k), w);
  uint32_t codes = 0;
#pragma unroll
  for (int i = 0; i < width; ++i) codes |= code_of(w[i], inverse) << 2 * i;
  uint8_t* out = a.packed + row * bytes + k / 4;
  if constexpr (width == 8) {
    store_bytes(uint16_t(codes), out, bytes - k / 4);
  } else {
    *out = uint8_t(codes);
  }
}

// ---- launches -------------------------------------------------------------------------------------------

// Elements of a part of the whole tensor: a multiple of eight, so that all parts are aligned alike.
int64_t part_elements(int64_t elements) {
  const int64_t part = ceil_div(ceil_div(elements, kParts), 8) * 8;
  return part > kPartElements ? part : kPartElements;
}

// Of each row: the mean serves a given scale too, for it tells whether the weights are finite.
template <class T>
int measure_rows(const QuantizeWeight& a, bool median, void* stream) {
  return for_each_grid(a.out_features, [&](int64_t first, unsigned blocks) {
    return median ? PYOPS_LAUNCH(row_median_kernel<T>, blocks, kThreads, 0, stream, a, first)
                  : PYOPS_LAUNCH(mean_kernel<T>, blocks, kThreads, 0, stream, a, first);
  });
}

template <class T>
int measure_tensor(const QuantizeWeight& a, bool median, void* stream) {
  const int64_t elements = a.out_features * a.in_features, part = part_elements(elements);
  const unsigned parts = unsigned(ceil_div(elements, part));
  if (!median) {
    auto* sums = static_cast<double*>(a.workspace);
    const int error = PYOPS_LAUNCH(part_sum_kernel<T>, parts, kThreads, 0, stream, a, part, sums);
    return error ? error : PYOPS_LAUNCH(total_kernel, 1, kThreads, 0, stream, a, sums, int(parts));
  }
  auto* counters = static_cast<Counters*>(a.workspace);
  int error = PYOPS_LAUNCH(clear_kernel, 1, kThreads, 0, stream, a, counters);
  for (int pass = 0; pass < kPasses && !error; ++pass) {
    error = PYOPS_LAUNCH(count_kernel<T>, parts, kThreads, 0, stream, a, part, pass, counters);
    if (!error) error = PYOPS_LAUNCH(choose_kernel, 1, kThreads, 0, stream, a, pass, counters);
  }
  return error;
}

template <class T>
int measure(const QuantizeWeight& a, void* stream) {
  const int64_t gammas = a.per_row ? a.out_features : 1;
  if (a.out_features == 0 || a.in_features == 0) {
    if (gammas == 0) return 0;
    return PYOPS_LAUNCH(empty_kernel, unsigned(ceil_div(gammas, kThreads)), kThreads, 0, stream, a, gammas);
  }
  const bool median = a.median && !a.scale;
  return a.per_row ? measure_rows<T>(a, median, stream) : measure_tensor<T>(a, median, stream);
}

template <class T>
int pack(const QuantizeWeight& a, void* stream) {
  const int64_t per_row = ceil_div(a.in_features, dev::kVectorElements<T>),
                blocks = ceil_div(a.out_features * per_row, kThreads);
  if (blocks == 0) return 0;
  return PYOPS_LAUNCH(pack_kernel<T>, unsigned(blocks), kThreads, 0, stream, a, per_row);
}

}  // namespace
}  // namespace pyops

using namespace pyops;

extern "C" int64_t pyops_ternary_quantize_weight_workspace(const QuantizeWeight* arguments) {
  const QuantizeWeight& a = *arguments;
  if (a.per_row) return 0;
  return a.median && !a.scale ? int64_t(sizeof(Counters)) : kParts * int64_t(sizeof(double));
}

extern "C" int pyops_ternary_quantize_weight(const QuantizeWeight* arguments, void* stream) {
  return with_element_type(arguments->dtype, [&](auto element) {
    using T = decltype(element);
    const int error = measure<T>(*arguments, stream);
    return error ? error : pack<T>(*arguments, stream);
  });
}
