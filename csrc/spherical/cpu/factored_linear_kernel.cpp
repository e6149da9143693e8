// See factored_linear_kernel.h. Compiled once per ISA level.
#include "factored_linear_kernel.h"

#include <type_traits>

#include "../../common/simd.h"

namespace pyops::PYOPS_ISA {
namespace {

template <class Real>
constexpr int kWidth = VectorTypes<Real>::lanes;

// A vector of Reals from elements of another type.
template <class Real, class T>
PYOPS_INLINE Vector<Real> load_as(const T* p) {
  if constexpr (std::is_same_v<Real, T>) {
    return load(p);
  } else if constexpr (std::is_same_v<Real, double> && std::is_same_v<T, float>) {
    return load_double(p);
  } else if constexpr (std::is_same_v<Real, float> && sizeof(T) == 2) {
    return load(p);
  } else {
    Vector<Real> v;
    for (int lane = 0; lane < kWidth<Real>; ++lane) v[lane] = Real(widen(p[lane]));
    return v;
  }
}

template <class T, class Real>
PYOPS_INLINE void store_as(T* p, Vector<Real> v) {
  if constexpr (std::is_same_v<Real, T> || (std::is_same_v<Real, float> && sizeof(T) == 2)) {
    store(p, v);
  } else if constexpr (std::is_same_v<Real, float>) {
    for (int lane = 0; lane < kWidth<Real>; ++lane) p[lane] = T(v[lane]);
  } else if constexpr (std::is_same_v<T, float>) {
    typedef float Half __attribute__((vector_size(sizeof(v) / 2)));
    const Half half = __builtin_convertvector(v, Half);
    __builtin_memcpy(p, &half, sizeof(half));
  } else {
    for (int lane = 0; lane < kWidth<Real>; ++lane) pyops::narrow(v[lane], p[lane]);
  }
}

template <class Real, class T>
void widen_row(const void* data, int64_t n, Real* out) {
  const T* x = static_cast<const T*>(data);
  int64_t i = 0;
  for (; i + kWidth<Real> <= n; i += kWidth<Real>) store(out + i, load_as<Real>(x + i));
  for (; i < n; ++i) out[i] = Real(widen(x[i]));
}

template <class Real, class T>
void narrow_row(const Real* x, int64_t n, void* data) {
  T* out = static_cast<T*>(data);
  int64_t i = 0;
  for (; i + kWidth<Real> <= n; i += kWidth<Real>) store_as<T, Real>(out + i, load(x + i));
  for (; i < n; ++i) {
    if constexpr (std::is_same_v<T, double>) {
      out[i] = double(x[i]);
    } else {
      pyops::narrow(x[i], out[i]);
    }
  }
}

template <class Real, class T>
double dot_of(const void* data, const Real* y, int64_t n) {
  const T* x = static_cast<const T*>(data);
  Vector<Real> sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kWidth<Real> <= n; i += 4 * kWidth<Real>) {
    for (int v = 0; v < 4; ++v) {
      sums[v] += load_as<Real>(x + i + v * kWidth<Real>) * load(y + i + v * kWidth<Real>);
    }
  }
  for (; i + kWidth<Real> <= n; i += kWidth<Real>) sums[0] += load_as<Real>(x + i) * load(y + i);
  double sum = sum_lanes<Real>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < n; ++i) sum += double(x[i]) * double(y[i]);
  return sum;
}

template <class Real>
double dot(const Real* x, const Real* y, int64_t n) {
  return dot_of<Real, Real>(x, y, n);
}

template <class Real, class T>
void add_row(const void* data, Real factor, Real* out, int64_t n) {
  const T* x = static_cast<const T*>(data);
  int64_t i = 0;
  for (; i + kWidth<Real> <= n; i += kWidth<Real>) store(out + i, load(out + i) + load_as<Real>(x + i) * factor);
  for (; i < n; ++i) out[i] += Real(x[i]) * factor;
}

template <class Real, class T>
void subtract_row(void* data, const Real* x, Real factor, int64_t n) {
  T* v = static_cast<T*>(data);
  int64_t i = 0;
  for (; i + kWidth<Real> <= n; i += kWidth<Real>) {
    store_as<T, Real>(v + i, load_as<Real>(v + i) - load(x + i) * factor);
  }
  for (; i < n; ++i) v[i] = T(Real(v[i]) - x[i] * factor);
}

template <class Real>
void combine(const Real* x, Real x_factor, const Real* y, Real y_factor, Real* out, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth<Real> <= n; i += kWidth<Real>) store(out + i, load(x + i) * x_factor + load(y + i) * y_factor);
  for (; i < n; ++i) out[i] = x[i] * x_factor + y[i] * y_factor;
}

template <class Real>
double advance(const Real* x, Real factor, Real keep, Real* out, int64_t n) {
  WideSum squares = {};
  int64_t i = 0;
  for (; i + kWidth<Real> <= n; i += kWidth<Real>) {
    const Vector<Real> value = (load(out + i) + load(x + i) * factor) * keep;
    add(squares, value * value);
    store(out + i, value);
  }
  double sum = sum_lanes(squares);
  for (; i < n; ++i) {
    out[i] = (out[i] + x[i] * factor) * keep;
    sum += double(out[i]) * double(out[i]);
  }
  return sum;
}

template <class Real>
bool finite(const Real* x, int64_t n) {
  Vector<Real> sums[2] = {};
  int64_t i = 0;
  for (; i + 2 * kWidth<Real> <= n; i += 2 * kWidth<Real>) {
    for (int v = 0; v < 2; ++v) sums[v] += load(x + i + v * kWidth<Real>) * Real(0);  // 0, or NaN for ever
  }
  Real sum = 0;
  for (; i < n; ++i) sum += x[i] * Real(0);
  for (int lane = 0; lane < kWidth<Real>; ++lane) sum += sums[0][lane] + sums[1][lane];
  return sum == 0;
}

template <class Real>
constexpr FactoredRowKernels<Real> kKernels = {
    {&widen_row<Real, float>, &widen_row<Real, double>, &widen_row<Real, bfloat16>, &widen_row<Real, float16>},
    {&narrow_row<Real, float>, &narrow_row<Real, double>, &narrow_row<Real, bfloat16>, &narrow_row<Real, float16>},
    &dot<Real>,
    {&dot_of<Real, float>, &dot_of<Real, double>},
    {&add_row<Real, float>, &add_row<Real, double>},
    {&subtract_row<Real, float>, &subtract_row<Real, double>},
    &combine<Real>,
    &advance<Real>,
    &finite<Real>,
};

}  // namespace

extern const FactoredRowKernels<float> factored_row_kernels_float32 = kKernels<float>;
extern const FactoredRowKernels<double> factored_row_kernels_float64 = kKernels<double>;

}  // namespace pyops::PYOPS_ISA
