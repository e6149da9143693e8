// Spherical losses on given logits (m x D): forward with row statistics, and the streaming backward.
//
// Maths: a spherical loss needs of a row only mean, m2 = sum (o - mean)^2, the target logits and, for the smoothed
// softmax kinds, sum log n(o). ../spherical_loss_formula.h turns them into the loss and into `statistics`, from
// which the backward is an elementwise function of o.
//
// Forward tiling: moments_kernel gives a block one row, or one part of a row (grid.y) when rows are few and long
// (split_rows decides), and streams it once; finish_kernel merges the parts of each row in order and does the per-row
// work; total_kernel adds the subtotals of its blocks when there are several.
//
// Ownership: a thread owns the vectors column = (thread + i * threads) * width of its part; partials[row][part] is
// written by thread 0 of its block; statistics and loss of a row by the thread or warp that finishes it.
//
// Precision: per thread sums of d = o - shift and d^2 in float (double for float64 logits) over at most 32 elements,
// from there on in double, with a shift that follows the data; runs of one shift are merged in double by Chan's
// formula, threads and parts in double about their common mean; row formulas in double. Never q/D - mean^2.
//
// Backward: see row_gradient.cuh; one fused multiply-add chain per element in float (double for float64).
#include "row_gradient.cuh"
#include "spherical_loss.cuh"

namespace pyops {
namespace {

PYOPS_DEVICE const char* out_of_range(SphericalLoss loss) {
  switch (loss) {
    case SphericalLoss::z:
      return "pyops::z_loss: target must be in [0, classes) or ignore_index";
    case SphericalLoss::taylor_softmax:
      return "pyops::taylor_softmax_loss: target must be in [0, classes) or ignore_index";
    case SphericalLoss::spherical_softmax:
      return "pyops::spherical_softmax_loss: target must be in [0, classes) or ignore_index";
    case SphericalLoss::mse_onehot:
      return "pyops::mse_onehot_loss: target must be in [0, classes) or ignore_index";
  }
  return "pyops::spherical_loss: target must be in [0, classes) or ignore_index";
}

// ---- sum of log n(o) ------------------------------------------------------------------------------------

// Splits a positive normal number into its mantissa in [1, 2) and its exponent.
PYOPS_DEVICE float mantissa_of(float value, int& exponent) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  exponent = int(bits >> 23) - 127;
  bits = (bits & 0x7fffffu) | 0x3f800000u;
  memcpy(&value, &bits, 4);
  return value;
}

PYOPS_DEVICE double mantissa_of(double value, int& exponent) {
  uint64_t bits;
  memcpy(&bits, &value, 8);
  exponent = int(bits >> 52) - 1023;
  bits = (bits & 0xfffffffffffffull) | 0x3ff0000000000000ull;
  memcpy(&value, &bits, 8);
  return value;
}

template <class Real>
struct NormalRange;
template <>
struct NormalRange<float> {
  static constexpr float smallest = 1.17549435e-38f, largest = 3.4e38f;
};
template <>
struct NormalRange<double> {
  static constexpr double smallest = 2.2250738585072014e-308, largest = 1.79e308;
};

// sum log n(o) with one logarithm for all elements: mantissas are multiplied (at most 32 of them, each below 2) and
// exponents added. Computes in RealOf<T>; false if some n is no positive normal number there.
template <class T, int kA>
PYOPS_DEVICE bool sum_log(const dev::Bits128 (&bits)[kA], int elements, const SphericalOptions& options, double& sum) {
  using Real = RealOf<T>;
  const Real eps = Real(options.eps);
  double product = 1;
  int exponents = 0;
  bool ordinary = true;
#pragma unroll
  for (int a = 0; a < kA; ++a) {
    Real o[dev::kVectorElements<T>], vector_product = 1;
    dev::unpack(bits[a], o, static_cast<const T*>(nullptr));
#pragma unroll
    for (int b = 0; b < dev::kVectorElements<T>; ++b) {
      const Real n = b < elements ? unnormalised(options.loss, o[b], eps) : Real(1);
      ordinary = ordinary && n >= NormalRange<Real>::smallest && n <= NormalRange<Real>::largest;
      int exponent;
      vector_product *= mantissa_of(n, exponent);
      exponents += exponent;
    }
    product *= double(vector_product);
  }
  sum = log(product) + exponents * 0.693147180559945309417;
  return ordinary;
}

// ---- moments of a thread --------------------------------------------------------------------------------

// Sums of d = o - shift and of d^2, in one chain per vector.
template <class T, int kA, class Real>
PYOPS_DEVICE void shifted_sums(const dev::Bits128 (&bits)[kA], int elements, Real shift, Real& sum, Real& squares) {
  sum = squares = 0;
#pragma unroll
  for (int a = 0; a < kA; ++a) {
    RealOf<T> o[dev::kVectorElements<T>];
    Real vector_sum = 0, vector_squares = 0;
    dev::unpack(bits[a], o, static_cast<const T*>(nullptr));
#pragma unroll
    for (int b = 0; b < dev::kVectorElements<T>; ++b) {
      const Real d = b < elements ? Real(o[b]) - shift : Real(0);
      vector_sum += d;
      vector_squares += d * d;
    }
    sum += vector_sum;
    squares += vector_squares;
  }
}

// Whether all elements have this value. They are compared as bits: unpacked, all would be in registers at once.
template <class T, int kA>
PYOPS_DEVICE bool all_equal(const dev::Bits128 (&bits)[kA], int elements, RealOf<T> value) {
  T pattern[dev::kVectorElements<T>];
  dev::narrow(value, pattern[0]);
  if (dev::widen(pattern[0]) != value) return false;
#pragma unroll
  for (int b = 1; b < dev::kVectorElements<T>; ++b) pattern[b] = b < elements ? pattern[0] : T{};
  dev::Bits128 expected;
  memcpy(&expected, pattern, 16);
  uint32_t difference = 0;
#pragma unroll
  for (int a = 0; a < kA; ++a) {
#pragma unroll
    for (int word = 0; word < 4; ++word) difference |= bits[a].word[word] ^ expected.word[word];
  }
  return difference == 0;
}

// Mean and m2 of the elements of one thread. A run keeps (count, sum d, sum d^2) about `shift`; its
// m2 = sum d^2 - (sum d)^2 / count is safe while the second term is at most 4/5 of the first. Elements that would
// break that, or whose squares leave the range of float, end the run and are taken in double, read again from
// memory; their mean becomes the shift of the next run. With a first shift from all over the row this is rare.
// Real is double for float logits where float products would not do: the squared error near its minimum is a small
// difference of sums of squares.
template <class T, bool kWithLog, class Real>
struct MomentSums {
  const T* x;
  const SphericalOptions& options;
  Real shift;
  double count = 0, sum = 0, squares = 0;  // of the run
  double done = 0;                         // elements in the runs that have ended
  RowMoments total = {0, 0, 0};            // of these
  double log_sum = 0;

  PYOPS_DEVICE MomentSums(const T* row, Real first_shift, const SphericalOptions& o)
      : x(row), options(o), shift(first_shift) {}

  // Squares of elements that differ from `shift` have not underflowed; no squares at all are those of equal elements.
  template <int kA>
  PYOPS_DEVICE bool in_range(Real d_squares, const dev::Bits128 (&bits)[kA], int elements) const {
    constexpr Real largest = sizeof(Real) == 8 ? Real(1e300) : Real(1e30);
    if (!(d_squares < largest)) return false;
    return d_squares * largest >= Real(1) || all_equal<T>(bits, elements, RealOf<T>(shift));
  }

  template <int kA>
  PYOPS_DEVICE void take(const dev::Bits128 (&bits)[kA], int elements, int column, int step) {
    if constexpr (kWithLog) {
      double logs;
      if (!sum_log<T>(bits, elements, options, logs)) logs = sum_log_one_by_one(kA, elements, column, step);
      log_sum += logs;
    }
    Real d_sum, d_squares;
    shifted_sums<T>(bits, elements, shift, d_sum, d_squares);
    const double new_sum = sum + double(d_sum), new_squares = squares + double(d_squares);
    const double new_count = count + double(kA * elements);
    if (new_sum * new_sum <= 0.8 * new_count * new_squares && in_range(d_squares, bits, elements)) {
      sum = new_sum;
      squares = new_squares;
      count = new_count;
    } else {
      end_run(kA, elements, column, step);
    }
  }

  // Adds the run to the total and then the elements x[column + a * step + b], if any, taken in double.
  PYOPS_DEVICE void end_run(int vectors, int width, int column, int step) {
    double mean = double(shift);
#pragma unroll 1
    for (int part = 0; part < 2; ++part) {
      const double m2 = finite(squares) ? squares - sum * sum / count : squares;  // rounding may leave it below 0
      if (count != 0) merge_moments(done, total, count, {mean + sum / count, m2 < 0 ? 0 : m2, 0});
      if (part == 1 || vectors == 0) break;
      sums_in_double(vectors, width, column, step, mean);
    }
    shift = mean - mean == 0 ? Real(mean) : Real(0);
    count = sum = squares = 0;
  }

  // Two passes: a mean, then sums about it. Equal elements have exactly that mean and sum = squares = 0; with an
  // infinity and no NaN, squares is infinite and not NaN.
  PYOPS_DEVICE void sums_in_double(int vectors, int width, int column, int step, double& mean) {
    mean = double(dev::widen(x[column]));
    count = double(vectors * width);
    sum = 0;
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) {
      mean += sum / count;
      const double origin = finite(mean) ? mean : 0;
      sum = squares = 0;
#pragma unroll 1
      for (int a = 0; a < vectors; ++a) {
#pragma unroll 1
        for (int b = 0; b < width; ++b) {
          const double d = double(dev::widen(x[column + a * step + b])) - origin;
          sum += d;
          squares += d * d;
        }
      }
    }
  }

  // sum log n where some n is zero, subnormal, infinite or NaN.
  PYOPS_DEVICE double sum_log_one_by_one(int vectors, int width, int column, int step) const {
    double logs = 0;
#pragma unroll 1
    for (int a = 0; a < vectors; ++a) {
#pragma unroll 1
      for (int b = 0; b < width; ++b) {
        logs += log(unnormalised(options.loss, double(dev::widen(x[column + a * step + b])), options.eps));
      }
    }
    return logs;
  }
};

// One of 8 elements spread over x[0, columns), and the first one. Every warp samples for itself, a sector of memory for
// each element: 32 of them were 13 % of what a row of 4096 bfloat16 moves.
template <class T>
struct Sample {
  RealOf<T> first, own;

  PYOPS_DEVICE Sample(const T* x, int columns)
      : first(dev::widen(x[0])), own(dev::widen(x[int64_t(columns) * (dev::lane() / 4) / 8])) {}

  // The mean of the 8, the same for all lanes; exact where all elements are equal.
  PYOPS_DEVICE RealOf<T> mean() const {
    const RealOf<T> value = first + warp_sum(own - first) / RealOf<T>(32);
    return value - value == 0 ? value : RealOf<T>(0);
  }
};

// Sum of squares of `count` elements about the mean of the row; where that is not finite, m2 says all there is to say.
PYOPS_DEVICE double about_mean(double count, const RowMoments& own, double mean) {
  if (count == 0) return 0;
  const double delta = own.mean - mean;
  return finite(mean) ? own.m2 + count * (delta * delta) : own.m2;
}

// Merges the moments of all threads, which together hold `columns` elements. Chan's formula about one common mean,
// without a division per step; `pivot`, near the data, keeps the sum of means exact where all of them are equal.
PYOPS_DEVICE RowMoments merge_in_block(double count, const RowMoments& own, double columns, double first_element,
                                       double* scratch) {
  const double pivot = finite(first_element) ? first_element : 0;
  double first[1] = {count == 0 ? 0.0 : count * (own.mean - pivot)};
  block_sum(first, scratch);
  const double mean = pivot + first[0] / columns;
  double second[2] = {about_mean(count, own, mean), own.sum_log};
  block_sum(second, scratch + kMaximumWarps);
  return {mean, second[0], second[1]};
}

// ---- forward --------------------------------------------------------------------------------------------

constexpr int kColumns = 2;  // of the row results: loss, row weight
constexpr int kFinishScratch = kMaximumWarps * kColumns;

struct Workspace {
  RowMoments* partials;  // rows x parts
  double* subtotals;     // blocks x kColumns
  int64_t doubles;

  Workspace(const LossRows& rows, const RowSplit& split, const RowFinish& finish) {
    const int64_t partial_doubles = rows.rows * split.parts * int64_t(sizeof(RowMoments) / sizeof(double));
    partials = reinterpret_cast<RowMoments*>(rows.workspace);
    subtotals = rows.workspace + partial_doubles;
    doubles = partial_doubles + int64_t(finish.blocks) * kColumns;
  }
};

template <class T, bool kWithLog, class Real>
__global__ void __launch_bounds__(kMaximumThreads, kWithLog || sizeof(Real) == 8 ? 2 : 3)
    moments_kernel(SphericalLossForward f, RowSplit split, int64_t first_row, RowMoments* partials) {
  PYOPS_SHARED(double, scratch, 3 * kMaximumWarps);
  const LossRows& rows = f.rows;
  const int64_t row = first_row + blockIdx.x;
  const int64_t begin = int64_t(blockIdx.y) * split.part_columns, left = rows.classes - begin;
  const int columns = int(left < split.part_columns ? left : split.part_columns);
  const T* x = static_cast<const T*>(rows.logits) + row * rows.row_stride + begin;
  const Sample<T> sample(x, columns);  // on its way while the targets are looked up
  if (!row_counts<T>(rows, row)) return;
  MomentSums<T, kWithLog, Real> sums(x, Real(sample.mean()), f.options);
  read_row(x, columns, sums);
  sums.end_run(0, 0, 0, 0);
  const RowMoments own = {sums.total.mean, sums.total.m2, sums.log_sum};
  const RowMoments moments = merge_in_block(sums.done, own, double(columns), double(sample.first), scratch);
  if (threadIdx.x == 0) partials[row * split.parts + blockIdx.y] = moments;
}

// Moments of a row from its parts, for the 1 or 32 threads that finish it.
PYOPS_DEVICE RowMoments merge_parts(const RowMoments* partials, const RowSplit& split, int64_t classes, int lane,
                                    int lanes) {
  if (split.parts == 1) return partials[0];
  RowMoments own = {0, 0, 0};
  double count = 0;
  for (int part = lane; part < split.parts; part += lanes) {
    const int64_t left = classes - part * split.part_columns;
    merge_moments(count, own, double(left < split.part_columns ? left : split.part_columns), partials[part]);
  }
  const double pivot = finite(partials[0].mean) ? partials[0].mean : 0;
  const double mean = pivot + row_sum(count == 0 ? 0.0 : count * (own.mean - pivot), lanes) / double(classes);
  return {mean, row_sum(about_mean(count, own, mean), lanes), row_sum(own.sum_log, lanes)};
}

// What the threads of a row add up over its targets.
struct TargetSums {
  RowPartials partials;
  double class_weight, counted;
};

template <class T>
PYOPS_DEVICE TargetSums add_targets(const SphericalLossForward& f, int64_t row, const RowMoments& moments, double scale,
                                    int lane, int lanes) {
  const LossRows& rows = f.rows;
  const T* logits = static_cast<const T*>(rows.logits) + row * rows.row_stride;
  double* gradients = rows.statistics + row * (kTargetGradient + rows.targets) + kTargetGradient;
  TargetSums own{};
  for (int64_t j = lane; j < rows.targets; j += lanes) {
    const Target target = read_target<T>(rows, row, j, out_of_range(f.options.loss));
    double gradient = 0;
    if (target.counts) {
      const double o = double(dev::widen(logits[target.index])), omega = target.own * target.class_weight;
      gradient = add_target(f.options, moments, double(rows.classes), scale, o, omega, own.partials);
      own.class_weight += target.class_weight;
      own.counted += 1;
    }
    gradients[j] = gradient;
  }
  return {{row_sum(own.partials.loss, lanes), row_sum(own.partials.slope, lanes), row_sum(own.partials.shift, lanes),
           row_sum(own.partials.smooth, lanes)},
          row_sum(own.class_weight, lanes),
          row_sum(own.counted, lanes)};
}

// Targets, loss and statistics of one row, by its 1 or 32 threads; adds its results to `totals`.
template <class T>
PYOPS_DEVICE void finish_one_row(const SphericalLossForward& f, const RowSplit& split, const RowMoments* partials,
                                 int64_t row, int lane, int lanes, double (&totals)[kColumns]) {
  const LossRows& rows = f.rows;
  const bool counts = any_counts<T>(rows, row, lane, lanes);
  RowMoments moments = {0, 0, 0};
  if (counts) moments = merge_parts(partials + row * split.parts, split, rows.classes, lane, lanes);
  const double scale = counts ? inverse_scale(f.options, moments, double(rows.classes)) : 0;
  const TargetSums sums = add_targets<T>(f, row, moments, scale, lane, lanes);
  if (lane != 0) return;
  double* statistics = rows.statistics + row * (kTargetGradient + rows.targets);
  if (counts) {
    write_row<RealOf<T>>(f.options, statistics, moments, scale, sums.partials);
    totals[0] += sums.partials.loss;
    totals[1] += sums.class_weight / sums.counted;
  } else {
    for (int column = 0; column < kTargetGradient; ++column) statistics[column] = 0;
  }
  if (rows.reduction == RowReduction::none) write_number(rows.loss, rows.loss_dtype, row, sums.partials.loss);
}

PYOPS_DEVICE void write_result(const LossRows& rows, const double (&totals)[kColumns]) {
  const double divisor = mean_divisor(rows, totals[1]);
  rows.normalizer[0] = divisor;
  if (rows.reduction != RowReduction::none) write_number(rows.loss, rows.loss_dtype, 0, totals[0] / divisor);
}

template <class T>
__global__ void __launch_bounds__(kFinishThreads, 4)
    finish_kernel(SphericalLossForward f, RowSplit split, int lanes, const RowMoments* partials, double* subtotals) {
  PYOPS_SHARED(double, scratch, kFinishScratch);
  double totals[kColumns];
  for_each_finished_row(f.rows.rows, lanes, totals, scratch, [&](int64_t row, int lane, double (&sums)[kColumns]) {
    finish_one_row<T>(f, split, partials, row, lane, lanes, sums);
  });
  if (threadIdx.x != 0) return;
  if (gridDim.x == 1) {
    write_result(f.rows, totals);
  } else {
    store_subtotals(totals, subtotals);
  }
}

__global__ void __launch_bounds__(kTotalThreads) total_kernel(LossRows rows, const double* subtotals, int blocks) {
  PYOPS_SHARED(double, scratch, kFinishScratch);
  double totals[kColumns];
  sum_subtotals(subtotals, blocks, totals, scratch);
  if (threadIdx.x == 0) write_result(rows, totals);
}

template <class T>
int launch_forward(const SphericalLossForward& f, const RowSplit& split, const RowFinish& finish, void* stream) {
  const LossRows& rows = f.rows;
  const Workspace workspace(rows, split, finish);
  using Real = RealOf<T>;
  auto moments = needs_sum_log(f.options) ? moments_kernel<T, true, Real> : moments_kernel<T, false, Real>;
  if constexpr (std::is_same_v<T, float>) {
    if (f.options.loss == SphericalLoss::mse_onehot) moments = moments_kernel<T, false, double>;
  }
  int error = rows.classes == 0 ? 0 : for_each_row_slice(rows.rows, [&](int64_t first, int64_t count) {
    return PYOPS_LAUNCH(moments, dim3(unsigned(count), unsigned(split.parts)), dim3(unsigned(split.threads)), 0, stream,
                        f, split, first, workspace.partials);
  });
  if (error) return error;
  error = PYOPS_LAUNCH(finish_kernel<T>, dim3(unsigned(finish.blocks)), dim3(kFinishThreads), 0, stream, f, split,
                       finish.lanes, static_cast<const RowMoments*>(workspace.partials), workspace.subtotals);
  if (error || finish.blocks == 1) return error;
  return PYOPS_LAUNCH(total_kernel, dim3(1), dim3(kTotalThreads), 0, stream, rows,
                      static_cast<const double*>(workspace.subtotals), finish.blocks);
}

// ---- backward -------------------------------------------------------------------------------------------

struct SphericalNumbers {
  double center, inverse_scale, slope, shift, smooth, target_scale;
  bool zero;
};

// Logits of 1e30 and more: o - center could overflow although its product with the scale does not. A power of two on
// both costs no accuracy, and in the fused multiply-add no time.
template <class Real>
struct LinearFormula {
  static constexpr bool kWeighted = false;
  Real unit, center, inverse_scale, slope, shift;

  PYOPS_DEVICE explicit LinearFormula(const SphericalNumbers& n) {
    const double before = n.inverse_scale < 1e-30 ? 0x1p-20 : 1;
    unit = Real(before);
    center = Real(n.center * before);
    inverse_scale = Real(n.inverse_scale / before);
    slope = Real(n.slope);
    shift = Real(n.shift);
  }
  PYOPS_DEVICE Real operator()(Real o) const { return ((o * unit - center) * inverse_scale) * slope + shift; }
};

template <class Real, SphericalLoss kLoss>
struct SmoothedFormula {
  static constexpr bool kWeighted = false;
  LinearFormula<Real> linear;
  Real smooth, eps;
  PYOPS_DEVICE Real operator()(Real o) const { return linear(o) + smooth * smooth_term(kLoss, o, eps); }
};

// kLoss is z also for mse_onehot: what they share is that the gradient is linear in o. The other two are linear
// unless smoothed.
template <SphericalLoss kLoss>
struct SphericalGradient {
  using Numbers = SphericalNumbers;
  static constexpr int kRowNumbers = kTargetGradient;
  const SphericalLossBackward& b;

  PYOPS_DEVICE const char* message() const { return out_of_range(b.loss); }

  PYOPS_DEVICE Numbers numbers(const GradientRows& g, int64_t row) const {
    const double* s = g.statistics + row * (kTargetGradient + g.targets);
    const double upstream = read_number(g.grad_loss, g.grad_dtype, row * g.grad_stride);
    const double scale = upstream / g.normalizer[0];
    const bool zero = all_zero(s, kSlope, kTargetGradient + g.targets);
    return {s[kCenter], s[kInverseScale], scale * s[kSlope], scale * s[kShift], scale * s[kSmooth], scale, zero};
  }

  template <class T>
  PYOPS_DEVICE double value(const Numbers& n, double o, int64_t) const {
    const double linear = n.slope * ((o - n.center) * n.inverse_scale) + n.shift;
    if (kLoss == SphericalLoss::z || n.smooth == 0) return linear;
    return linear + n.smooth * smooth_term(kLoss, o, b.eps);
  }

  template <class T, class Run>
  PYOPS_DEVICE void with_formula(const Numbers& n, const Run& run) const {
    using Real = RealOf<T>;
    const LinearFormula<Real> linear(n);
    if constexpr (kLoss == SphericalLoss::z) {
      run(linear);
    } else if (n.smooth == 0) {
      run(linear);
    } else {
      run(SmoothedFormula<Real, kLoss>{linear, Real(n.smooth), Real(b.eps)});
    }
  }
};

template <class T, SphericalLoss kLoss>
__global__ void __launch_bounds__(kGradientThreads, kLoss != SphericalLoss::z || sizeof(T) == 8 ? 2 : 3)
    gradient_kernel(SphericalLossBackward b, ColumnSplit split, int64_t first_row) {
  PYOPS_SHARED(SphericalNumbers, numbers, 1);
  write_gradient<T>(b.rows, split, first_row + blockIdx.x, SphericalGradient<kLoss>{b}, numbers);
}

template <class T>
auto gradient_kernel_of(SphericalLoss loss) {
  switch (loss) {
    case SphericalLoss::taylor_softmax:
      return gradient_kernel<T, SphericalLoss::taylor_softmax>;
    case SphericalLoss::spherical_softmax:
      return gradient_kernel<T, SphericalLoss::spherical_softmax>;
    default:
      return gradient_kernel<T, SphericalLoss::z>;
  }
}

}  // namespace
}  // namespace pyops

using namespace pyops;

extern "C" int64_t pyops_spherical_loss_workspace(const SphericalLossForward* arguments) {
  const LossRows& rows = arguments->rows;
  const RowSplit split = split_rows(rows.rows, rows.classes, element_bytes(rows.dtype));
  return Workspace(rows, split, finish_rows(rows.rows, rows.targets, split.parts)).doubles;
}

extern "C" int pyops_spherical_loss(const SphericalLossForward* arguments, void* stream) {
  const LossRows& rows = arguments->rows;
  const RowSplit split = split_rows(rows.rows, rows.classes, element_bytes(rows.dtype));
  const RowFinish finish = finish_rows(rows.rows, rows.targets, split.parts);
  return with_element_type(
      rows.dtype, [&](auto element) { return launch_forward<decltype(element)>(*arguments, split, finish, stream); });
}

extern "C" int pyops_spherical_loss_backward(const SphericalLossBackward* arguments, void* stream) {
  const SphericalLossBackward& b = *arguments;
  if (b.rows.classes == 0) return 0;
  const ColumnSplit split = split_columns(b.rows.rows, b.rows.classes, element_bytes(b.rows.dtype));
  return with_element_type(b.rows.dtype, [&](auto element) {
    const auto kernel = gradient_kernel_of<decltype(element)>(b.loss);
    return for_each_row_slice(b.rows.rows, [&](int64_t first, int64_t count) {
      return PYOPS_LAUNCH(kernel, dim3(unsigned(count), unsigned(split.chunks)), dim3(unsigned(split.threads)), 0,
                          stream, b, split, first);
    });
  });
}
