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
constexpr int kHeldColumns = 32;  // that a thread keeps: 16384 for a full block

PYOPS_DEVICE int byte_sum(uint32_t bytes) { return dev::dp4a(bytes, kOnes, 0); }

template <class T>
PYOPS_DEVICE int quantize_vector(const dev::Bits128& bits, const Quantizer& quantizer, int8_t* out, int64_t valid) {
  float values[dev::kVectorElements<T>];
  widen_vector<T>(bits, values);
  const uint32_t low = quantize_four(values, quantizer);
  if constexpr (sizeof(T) == 4) {
    store_bytes(low, out, valid);
    return byte_sum(low);
  } else {
    const uint32_t high = quantize_four(values + 4, quantizer);
    store_bytes(uint64_t(high) << 32 | low, out, valid);
    return byte_sum(low) + byte_sum(high);
  }
}

template <class T>
__global__ void __launch_bounds__(kMaximumThreads) quantize_activation_kernel(QuantizeActivation a, int64_t first) {
  constexpr int width = dev::kVectorElements<T>, kHeld = kHeldColumns / width;
  PYOPS_SHARED(uint32_t, magnitudes, kMaximumThreads / 32);
  PYOPS_SHARED(int, sums, kMaximumThreads / 32);
  const int64_t token = first + blockIdx.x;
  const T* x = static_cast<const T*>(a.x) + token * a.row_stride;
  int8_t* out = a.quantized + token * a.width;
  const int columns = int(a.in_features), written = int(a.width), stride = int(blockDim.x) * width;
  const int begin = int(threadIdx.x) * width;

  dev::Bits128 held[kHeld];
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    held[i] = load_vector(x + begin + i * stride, columns - begin - i * stride);
    largest = largest_magnitude<T>(held[i], largest);
  }
  for (int column = begin + kHeld * stride; column < columns; column += stride) {
    largest = largest_magnitude<T>(load_vector(x + column, columns - column), largest);
  }
  const Quantizer quantizer = quantizer_of(reduce_block(largest, magnitudes, Larger{}), a.qmax, a.eps);

  int sum = 0;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int column = begin + i * stride;
    if (column < written) sum += quantize_vector<T>(held[i], quantizer, out + column, written - column);
  }
  for (int column = begin + kHeld * stride; column < written; column += stride) {
    const dev::Bits128 bits = load_vector(x + column, columns - column);
    sum += quantize_vector<T>(bits, quantizer, out + column, written - column);
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
  // Sixteen columns for each thread: enough loads in flight, and a row of 2560 still fills five warps.
  const int64_t wanted = ceil_div(ceil_div(a.width, 16), 32) * 32;
  const unsigned threads = unsigned(wanted < 32 ? 32 : wanted > kMaximumThreads ? kMaximumThreads : wanted);
  return for_each_grid(a.tokens, [&](int64_t first, unsigned blocks) {
    return with_element_type(a.dtype, [&](auto element) {
      using T = decltype(element);
      return PYOPS_LAUNCH(quantize_activation_kernel<T>, blocks, threads, 0, stream, a, first);
    });
  });
}
