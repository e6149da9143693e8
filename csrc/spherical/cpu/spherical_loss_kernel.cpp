// Streaming passes over logits, compiled once per ISA level (PYOPS_ISA names the namespace).
//
// Forward: a row stretch is cut into blocks of kBlock elements. Each block takes one pass of shifted sums
// (sum d, sum d^2 with d = x - shift), the shift being the mean so far; m2 = sum d^2 - (sum d)^2 / n is safe
// while the second term is at most half of the first. If it is more (first block, drifting mean), the block is
// still in the first-level cache and is read again with its own mean as shift. Lanes accumulate in float32
// (float64 for float64) over kSteps terms, then in double; blocks are merged in double by Chan's formula.
// Blocks whose squares leave the range of float32 are summed in double, so the result is finite and accurate
// wherever the maths is.
//
// Backward: a streaming fused multiply-add; each element is read once and written once.
#include "spherical_loss_kernel.h"

#include <math.h>

#include <type_traits>

#include "../../common/vector_math.h"
#include "../tiny_row.h"

namespace pyops::PYOPS_ISA {
namespace {

constexpr int64_t kBlock = 4096;  // 16 KiB of float32: half of the smallest first-level cache in use
constexpr int kUnroll = 4;        // independent accumulators hide the latency of add and fma

struct ShiftedSums {
  double sum, squares;
};

// So many steps are added up in float32 before they go on in double: after an outlier of 1e4 the squares of its
// unit-normal neighbours would be rounded away for the rest of the block.
constexpr int kSteps = 16;

template <class T>
PYOPS_INLINE ShiftedSums shifted_sums(const T* x, int64_t n, typename Accumulation<T>::type shift) {
  using Real = typename Accumulation<T>::type;
  constexpr int lanes = kLanes<T>;
  WideSum sum = {}, squares = {};
  int64_t i = 0;
  while (i + kUnroll * lanes <= n) {
    Vector<Real> steps_sum[kUnroll] = {}, steps_squares[kUnroll] = {};
    for (int step = 0; step < kSteps && i + kUnroll * lanes <= n; ++step, i += kUnroll * lanes) {
      for (int u = 0; u < kUnroll; ++u) {
        prefetch_ahead(x + i + u * lanes);
        const auto d = load(x + i + u * lanes) - shift;
        steps_sum[u] += d;
        steps_squares[u] += d * d;
      }
    }
    for (int u = 0; u < kUnroll; ++u) {
      add(sum, steps_sum[u]);
      add(squares, steps_squares[u]);
    }
  }
  for (; i < n; i += lanes) {
    const int64_t left = n - i;
    const auto d = (left >= lanes ? load(x + i) : load_partial(x + i, left, shift)) - shift;
    add(sum, d);
    add(squares, d * d);
  }
  return {sum_lanes(sum), sum_lanes(squares)};
}

// The squared error near its minimum is a small difference of sums of squares, which float products would spoil.
PYOPS_INLINE RowMoments block_moments_wide(const float* x, int64_t n) {
  constexpr int lanes = kLanes<double>;
  Vector<double> sum[kUnroll] = {}, squares[kUnroll] = {};
  int64_t i = 0;
  for (; i + kUnroll * lanes <= n; i += kUnroll * lanes) {
    for (int u = 0; u < kUnroll; ++u) {
      prefetch_ahead(x + i + u * lanes);
      const auto o = load_double(x + i + u * lanes);
      sum[u] += o;
      squares[u] += o * o;
    }
  }
  double all = sum_lanes<double>((sum[0] + sum[1]) + (sum[2] + sum[3]));
  double total = sum_lanes<double>((squares[0] + squares[1]) + (squares[2] + squares[3]));
  for (; i < n; ++i) {
    const double o = double(x[i]);
    all += o;
    total += o * o;
  }
  return {all / double(n), total - all * all / double(n), 0};
}

template <class T>
__attribute__((noinline)) RowMoments block_moments_in_double(const T* x, int64_t n) {
  double sum = 0, squares = 0, rest = 0;
  for (int64_t i = 0; i < n; ++i) sum += widen(x[i]);
  const double mean = sum / double(n);
  if (!finite(mean)) {
    for (int64_t i = 0; i < n; ++i) squares += widen(x[i]) * widen(x[i]);
    return {mean, squares, 0};
  }
  for (int64_t i = 0; i < n; ++i) {
    const double d = widen(x[i]) - mean;
    rest += d;
    squares += d * d;
  }
  return {mean + rest / double(n), squares - rest * rest / double(n), 0};
}

template <class T>
PYOPS_INLINE RowMoments block_moments(const T* x, int64_t n, double guess, SphericalLoss loss) {
  using Real = typename Accumulation<T>::type;
  const double count = double(n);
  if (n <= kTinyRow) return block_moments_in_double(x, n);
  if constexpr (std::is_same_v<T, float>) {
    if (loss == SphericalLoss::mse_onehot) {
      const RowMoments row = block_moments_wide(x, n);
      return finite(row.m2) ? row : block_moments_in_double(x, n);
    }
  }
  Real shift = Real(guess);
  ShiftedSums sums = shifted_sums(x, n, shift);
  for (int again = 0; again < 2 && sums.sum * sums.sum > 0.5 * count * sums.squares; ++again) {
    shift = Real(double(shift) + sums.sum / count);
    sums = shifted_sums(x, n, shift);
  }
  // Squares outside [1e-30, 1e36] per element have lost bits in float32; constant blocks are 0 exactly.
  const bool ordinary = sizeof(Real) == 4 ? sums.squares < 1e36 && (sums.squares >= 1e-30 * count || sums.squares == 0)
                                          : finite(sums.squares);
  if (!ordinary) return block_moments_in_double(x, n);
  const double rest = sums.sum / count;
  return {double(shift) + rest, sums.squares - sums.sum * rest, 0};
}

// sum_k log n(o_k) without a logarithm per element: mantissas are multiplied, exponents added, and one
// logarithm per lane is taken for 64 of them: a product of 64 mantissas in [1, 2) is far from overflow.
template <class T>
PYOPS_INLINE double block_sum_log(const T* x, int64_t n, SphericalLoss loss, double eps_double) {
  using Real = typename Accumulation<T>::type;
  using Types = VectorTypes<Real>;
  constexpr int lanes = kLanes<T>, mantissa_bits = sizeof(Real) == 4 ? 23 : 52;
  constexpr int64_t bias = sizeof(Real) == 4 ? 127 : 1023;
  using Bits = typename Types::bits;
  const Real eps = Real(eps_double);
  const Real smallest = sizeof(Real) == 4 ? Real(1.17549435e-38) : Real(2.2250738585072014e-308);
  const Real largest = sizeof(Real) == 4 ? Real(3.4e38) : Real(1.79e308);
  const auto one = reinterpret<Bits>(broadcast(Real(1)));
  const Bits mantissa_mask = ((Bits{} + 1) << mantissa_bits) - 1;
  auto product = broadcast(Real(1));
  typename Types::integer exponents = {};
  typename Types::integer ordinary = ~typename Types::integer{};
  double total = 0;
  const auto take = [&](Vector<Real> o) {
    const auto value = loss == SphericalLoss::taylor_softmax ? o * (o * Real(0.5) + Real(1)) + Real(1) : o * o + eps;
    ordinary &= (value >= smallest) & (value <= largest);
    const auto bits = reinterpret<Bits>(value);
    exponents += reinterpret<typename Types::integer>(bits >> mantissa_bits) - bias;
    product *= reinterpret<Vector<Real>>((bits & mantissa_mask) | one);
  };
  const auto flush = [&] {
    for (int lane = 0; lane < lanes; ++lane) total += log(double(product[lane]));
    product = broadcast(Real(1));
  };
  int64_t i = 0;
  int pending = 0;
  for (; i + lanes <= n; i += lanes) {
    take(load(x + i));
    if (++pending == 64) {
      flush();
      pending = 0;
    }
  }
  flush();
  for (int lane = 0; lane < lanes; ++lane) total += double(exponents[lane]) * 0.693147180559945309417;
  bool all = true;
  for (int lane = 0; lane < lanes; ++lane) all = all && ordinary[lane] != 0;
  int64_t from = i;
  if (!all) {  // a zero, subnormal, infinity or NaN among them: the obvious way gives the right special value
    total = 0;
    from = 0;
  }
  for (int64_t k = from; k < n; ++k) total += log(unnormalised(loss, double(widen(x[k])), eps_double));
  return total;
}

template <class T>
RowMoments moments(const void* data, int64_t n, const SphericalOptions& options) {
  const T* x = static_cast<const T*>(data);
  const bool with_log = needs_sum_log(options);
  RowMoments total = {n > 0 ? double(widen(x[0])) : 0, 0, 0};
  double count = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t size = n - begin < kBlock ? n - begin : kBlock;
    RowMoments block = block_moments(x + begin, size, total.mean, options.loss);
    if (with_log) block.sum_log = block_sum_log(x + begin, size, options.loss, options.eps);
    merge_moments(count, total, double(size), block);
  }
  return total;
}

template <class T>
void gradient(const void* data, void* out, int64_t n, const SphericalRowGradient& row, const SphericalOptions& options,
              bool nontemporal) {
  using Real = typename Accumulation<T>::type;
  // Logits of 1e30 and more: o - center could overflow although its product with the scale does not. A power of two
  // on both costs no accuracy, and in the fused multiply-add no time.
  const double before = row.inverse_scale < 1e-30 ? 1.0 / (1 << 20) : 1;
  const Real unit = Real(before), center = Real(row.center * before), scale = Real(row.inverse_scale / before),
             slope = Real(row.slope), shift = Real(row.shift), smooth = Real(row.smooth), eps = Real(options.eps);
  const T* x = static_cast<const T*>(data);
  T* result = static_cast<T*>(out);
  const Real* none = nullptr;
  if (row.smooth == 0) {
    stream(x, none, result, n, nontemporal, [=](Vector<Real> o, Vector<Real>) __attribute__((always_inline)) {
      return ((o * unit - center) * scale) * slope + shift;
    });
  } else if (row.inverse_scale != 1) {  // huge logits, whose squares overflow
    const bool taylor = options.loss == SphericalLoss::taylor_softmax;
    const Real one = taylor ? Real(1) : Real(0), e = taylor ? Real(1) : eps;
    stream(x, none, result, n, nontemporal, [=](Vector<Real> o, Vector<Real>) __attribute__((always_inline)) {
      const auto u = o + one;
      return ((o * unit - center) * scale) * slope + shift + smooth * (Real(2) / (u + e / u));
    });
  } else if (options.loss == SphericalLoss::taylor_softmax) {
    stream(x, none, result, n, nontemporal, [=](Vector<Real> o, Vector<Real>) __attribute__((always_inline)) {
      return ((o * unit - center) * scale) * slope + shift +
             smooth * ((o + Real(1)) / (o * (o * Real(0.5) + Real(1)) + Real(1)));
    });
  } else {
    stream(x, none, result, n, nontemporal, [=](Vector<Real> o, Vector<Real>) __attribute__((always_inline)) {
      return ((o * unit - center) * scale) * slope + shift + smooth * ((o + o) / (o * o + eps));
    });
  }
}

}  // namespace

extern const SphericalLossKernels spherical_loss_kernels = {
    {moments<float>, moments<double>, moments<bfloat16>, moments<float16>},
    {gradient<float>, gradient<double>, gradient<bfloat16>, gradient<float16>},
};

}  // namespace pyops::PYOPS_ISA
