// Streaming passes over logits, compiled once per ISA level (PYOPS_ISA names the namespace).
//
// Forward: a row stretch is cut into blocks of kBlock elements. One pass over a block takes sum exp(x - shift), the
// shift being the maximum of the first block: exact up to rounding while nothing rises far above it. A block whose sum
// says that something did is still in the first-level cache and is read again with its own maximum as the new shift.
// (Taking every block's maximum beside its sum cost a tenth of the time.) Lanes accumulate in float32 (float64 for
// float64) over at most kBlock / lanes terms; blocks are merged in double.
//
// Backward: one exponential per element, read once and written once.
#include "cross_entropy_kernel.h"

#include <math.h>

#include "../../common/vector_math.h"

namespace pyops::PYOPS_ISA {
namespace {

constexpr int64_t kBlock = 4096;
constexpr int kUnroll = 4;
// The largest sum of a block that is taken: no logit is more than 20 above the shift.
constexpr double kLargestSum = 4.85165e8;  // e^20
static_assert(kBlock < kLargestSum);

template <class T>
PYOPS_INLINE double block_maximum(const T* x, int64_t n) {
  using Real = typename Accumulation<T>::type;
  constexpr int lanes = kLanes<T>;
  const Real lowest = -Real(HUGE_VAL);
  Vector<Real> best[kUnroll];
  for (auto& b : best) b = broadcast(lowest);
  int64_t i = 0;
  for (; i + kUnroll * lanes <= n; i += kUnroll * lanes) {
    for (int u = 0; u < kUnroll; ++u) best[u] = maximum(best[u], load(x + i + u * lanes));
  }
  for (; i < n; i += lanes) {
    const int64_t left = n - i;
    best[0] = maximum(best[0], left >= lanes ? load(x + i) : load_partial(x + i, left, lowest));
  }
  return maximum_lane<Real>(maximum(maximum(best[0], best[1]), maximum(best[2], best[3])));
}

template <class T>
PYOPS_INLINE double exponential_sum(const T* x, int64_t n, typename Accumulation<T>::type shift) {
  using Real = typename Accumulation<T>::type;
  constexpr int lanes = kLanes<T>;
  Vector<Real> sum[kUnroll] = {};
  int64_t i = 0;
  for (; i + kUnroll * lanes <= n; i += kUnroll * lanes) {
    for (int u = 0; u < kUnroll; u += 2) {
      prefetch_ahead(x + i + u * lanes);
      if constexpr (sizeof(T) >= 4) prefetch_ahead(x + i + (u + 1) * lanes);
      Vector<Real> first, second;
      load_pair(x + i + u * lanes, first, second);
      sum[u] += exponential_or_huge(first - shift);
      sum[u + 1] += exponential_or_huge(second - shift);
    }
  }
  for (; i < n; i += lanes) {
    const int64_t left = n - i;
    const auto o = left >= lanes ? load(x + i) : load_partial(x + i, left, -Real(HUGE_VAL));
    sum[0] += exponential_or_huge(o - shift);
  }
  return sum_lanes<Real>((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// sum w x as sum w (x - shift) + shift * sum w: small terms in float32, the rest in double.
template <class T>
PYOPS_INLINE double block_weighted_sum(const T* x, const typename Accumulation<T>::type* w, int64_t n, double guess) {
  using Real = typename Accumulation<T>::type;
  constexpr int lanes = kLanes<T>;
  const Real shift = guess - guess == 0 ? Real(guess) : Real(0);
  Vector<Real> sum = {};
  WideSum weights = {};  // in double, like the caller's sum of all w: the two cancel when shift is large
  for (int64_t i = 0; i < n; i += lanes) {
    const int64_t left = n - i;
    const auto o = left >= lanes ? load(x + i) : load_partial(x + i, left, shift);
    const auto weight = !w ? broadcast(Real(1)) : left >= lanes ? load(w + i) : load_partial(w + i, left, Real(0));
    sum += weight * (o - shift);
    if (w) add(weights, weight);
  }
  return sum_lanes<Real>(sum) + double(shift) * (w ? sum_lanes(weights) : double(n));
}

template <class T>
RowExponentials exponentials(const void* data, const void* class_weight, int64_t n, bool weighted_sum) {
  using Real = typename Accumulation<T>::type;
  const T* x = static_cast<const T*>(data);
  const Real* w = static_cast<const Real*>(class_weight);
  RowExponentials total = no_exponentials();
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t size = n - begin < kBlock ? n - begin : kBlock;
    double shift = total.shift;
    if (shift == -HUGE_VAL) shift = block_maximum(x + begin, size);
    // Only -inf (or NaN) so far: exp(o - 0) is 0 for all of them, where exp(-inf + inf) would be NaN.
    double sum = exponential_sum(x + begin, size, Real(shift == -HUGE_VAL ? 0 : shift));
    if (sum > kLargestSum) {
      const double higher = block_maximum(x + begin, size);
      if (higher > shift) {
        shift = higher;
        sum = exponential_sum(x + begin, size, Real(shift));
      }
    }
    const double kept = total.sum == 0 || shift == total.shift ? total.sum : total.sum * exp(total.shift - shift);
    double weighted = total.weighted_sum;
    if (weighted_sum) weighted += block_weighted_sum(x + begin, w ? w + begin : w, size, shift);
    total = {shift, kept + sum, weighted};
  }
  return total;
}

template <class T>
void gradient(const void* data, const void* class_weight, void* out, int64_t n, const CrossEntropyRowGradient& row,
              bool nontemporal) {
  using Real = typename Accumulation<T>::type;
  const Real shift = Real(row.shift), slope = Real(row.slope), smooth = Real(row.smooth);
  const T* x = static_cast<const T*>(data);
  T* result = static_cast<T*>(out);
  const Real* none = nullptr;
  if (class_weight != nullptr && row.smooth != 0) {
    const Real* w = static_cast<const Real*>(class_weight);
    stream(x, w, result, n, nontemporal, [=](Vector<Real> o, Vector<Real> weight) __attribute__((always_inline)) {
      return exponential(o - shift) * slope - weight * smooth;
    });
  } else {
    stream(x, none, result, n, nontemporal, [=](Vector<Real> o, Vector<Real>) __attribute__((always_inline)) {
      return exponential(o - shift) * slope - smooth;
    });
  }
}

}  // namespace

extern const CrossEntropyKernels cross_entropy_kernels = {
    {exponentials<float>, exponentials<double>, exponentials<bfloat16>, exponentials<float16>},
    {gradient<float>, gradient<double>, gradient<bfloat16>, gradient<float16>},
};

}  // namespace pyops::PYOPS_ISA
