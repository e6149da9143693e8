// Activations to 8 bits, one step per token: s = qmax / max(absmax, eps), q = clip(round(x s), -128, 127).
//
// A block owns a token. It reads the token once into registers (what does not fit is read a second time), finds the
// largest magnitude by comparing bits as integers, which also finds NaN and infinities, then rounds, stores and sums.
// Precision: float32 with IEEE rounding in each operation; the sum is an int32.
#include "activation_quantizer.cuh"
#include "quantize_activation.cuh"

namespace pyops {
namespace {

constexpr int kMaximumThreads = 512;
constexpr int kHeld = 4;  // vectors of eight that a thread keeps: 16384 columns for a full block

PYOPS_DEVICE void store_bytes(uint32_t low, uint32_t high, int8_t* out, int64_t valid) {
  const uint64_t bits = uint64_t(high) << 32 | low;
  if (valid >= 8 && is_aligned(out, 8)) {
    *reinterpret_cast<uint64_t*>(out) = bits;
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < valid) out[i] = int8_t(bits >> 8 * i);
    }
  }
}

template <class T>
PYOPS_DEVICE int quantize_eight(const Eight<T>& eight, const Quantizer& quantizer, int8_t* out, int64_t valid) {
  float values[8];
  widen_eight(eight, values);
  const uint32_t low = quantize_four(values, quantizer), high = quantize_four(values + 4, quantizer);
  store_bytes(low, high, out, valid);
  return dev::dp4a(high, kOnes, dev::dp4a(low, kOnes, 0));
}

template <class T>
__global__ void __launch_bounds__(kMaximumThreads) quantize_activation_kernel(QuantizeActivation a, int64_t first) {
  PYOPS_SHARED(uint32_t, magnitudes, kMaximumThreads / 32);
  PYOPS_SHARED(int, sums, kMaximumThreads / 32);
  const int64_t token = first + blockIdx.x;
  const T* x = static_cast<const T*>(a.x) + token * a.row_stride;
  int8_t* out = a.quantized + token * a.width;
  const int columns = int(a.in_features), width = int(a.width), stride = int(blockDim.x) * 8;
  const int begin = int(threadIdx.x) * 8;

  Eight<T> held[kHeld];
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    held[i] = load_eight(x + begin + i * stride, columns - begin - i * stride);
    largest = largest_magnitude(held[i], largest);
  }
  for (int column = begin + kHeld * stride; column < columns; column += stride) {
    largest = largest_magnitude(load_eight(x + column, columns - column), largest);
  }
  const Quantizer quantizer = quantizer_of(reduce_block(largest, magnitudes, Larger{}), a.qmax, a.eps);

  int sum = 0;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int column = begin + i * stride;
    if (column < width) sum += quantize_eight(held[i], quantizer, out + column, width - column);
  }
  for (int column = begin + kHeld * stride; column < width; column += stride) {
    sum += quantize_eight(load_eight(x + column, columns - column), quantizer, out + column, width - column);
  }
  sum = reduce_block(sum, sums, Sum{});
  if (threadIdx.x != 0) return;
  a.step[token] = quantizer.step;
  if (a.sum) a.sum[token] = sum;
}

}  // namespace
}  // namespace pyops

using namespace pyops;

extern "C" int pyops_ternary_quantize_activation(const QuantizeActivation* arguments, void* stream) {
  const QuantizeActivation a = *arguments;
  // Two vectors of eight for each thread: enough loads in flight, and a row of 2560 still fills five warps.
  const int64_t wanted = ceil_div(ceil_div(a.width, 16), 32) * 32;
  const unsigned threads = unsigned(wanted < 32 ? 32 : wanted > kMaximumThreads ? kMaximumThreads : wanted);
  return for_each_grid(a.tokens, [&](int64_t first, unsigned blocks) {
    return with_element_type(a.dtype, [&](auto element) {
      using T = decltype(element);
      return PYOPS_LAUNCH(quantize_activation_kernel<T>, blocks, threads, 0, stream, a, first);
    });
  });
}
