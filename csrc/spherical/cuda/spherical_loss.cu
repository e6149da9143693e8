// Spherical losses on given logits (m x D): forward with row statistics, and the streaming backward.
//
// Maths: a spherical loss needs of a row only mean, m2 = sum (o - mean)^2, the target logits and, for the smoothed
// softmax kinds, sum log n(o). ../spherical_loss_formula.h turns them into the loss and into `statistics`, from
// which the backward is an elementwise function of o.
//
// Forward tiling: a block streams one row, or one part of a row (grid.y) when rows are few and long; split_rows
// decides. The first warp of the block that has the whole row then reads the targets and writes loss, statistics
// and row weight; split rows get there through merge_kernel, whose one warp per row merges the parts in order. A
// last kernel reduces over rows and writes `loss` and `normalizer`.
//
// Ownership: a thread owns the vectors column = (thread + i * threads) * width of its part; statistics of a row
// belong to the warp that finishes it; partials[row][part], row_results[column][row] are written by one thread.
//
// Precision: per thread sums of d = o - shift and d^2 in float (double for float64 logits) over at most kLongestRun
// elements, with a shift that follows the data; runs are merged in double by Chan's formula, threads and parts in
// double about their common mean; row formulas in double. Never q/D - mean^2.
//
// Backward: see row_gradient.cuh; one fused multiply-add chain per element in float (double for float64).
#include "spherical_loss.cuh"

#include "row_gradient.cuh"

namespace pyops {
namespace {

constexpr int kLongestRun = 2048;

PYOPS_DEVICE const char* out_of_range(SphericalLoss loss) {
  switch (loss) {
    case SphericalLoss::z: return "pyops::z_loss: target must be in [0, classes) or ignore_index";
    case SphericalLoss::taylor_softmax:
      return "pyops::taylor_softmax_loss: target must be in [0, classes) or ignore_index";
    case SphericalLoss::spherical_softmax:
      return "pyops::spherical_softmax_loss: target must be in [0, classes) or ignore_index";
    case SphericalLoss::mse_onehot: return "pyops::mse_onehot_loss: target must be in [0, classes) or ignore_index";
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
template <class T, int kB, int kA>
PYOPS_DEVICE bool sum_log(const dev::Bits128 (&bits)[kA], const SphericalOptions& options, double& sum) {
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
    for (int b = 0; b < kB; ++b) {
      const Real n = unnormalised(options.loss, o[b], eps);
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

// The same for elements of which some n is zero, subnormal, infinite or NaN in RealOf<T>: in double, and each special
// value gives what its logarithm would, also 0 (eps = 0) its -infinity.
template <class T, int kB, int kA>
PYOPS_DEVICE double sum_log_special(const dev::Bits128 (&bits)[kA], const SphericalOptions& options) {
  double special = 0, product = 1;
  int exponents = 0;
#pragma unroll
  for (int a = 0; a < kA; ++a) {
    RealOf<T> o[dev::kVectorElements<T>];
    dev::unpack(dev::reread(bits[a]), o, static_cast<const T*>(nullptr));
#pragma unroll
    for (int b = 0; b < kB; ++b) {
      double n = unnormalised(options.loss, double(o[b]), options.eps);
      if (n == 0) special -= HUGE_VAL;
      if (!(n <= NormalRange<double>::largest)) special += n;
      const bool subnormal = n < NormalRange<double>::smallest;
      if (subnormal) n *= 0x1p54;
      int exponent;
      product *= mantissa_of(n, exponent);
      exponents += exponent - (subnormal ? 54 : 0);
    }
  }
  return special != 0 ? special : log(product) + exponents * 0.693147180559945309417;
}

// ---- moments of a thread --------------------------------------------------------------------------------

// Sums of d = scale * o - shift and of d^2, in one chain per vector.
template <class T, int kB, int kA, class Real>
PYOPS_DEVICE void shifted_sums(const dev::Bits128 (&bits)[kA], Real scale, Real shift, Real& sum, Real& squares) {
  sum = squares = 0;
#pragma unroll
  for (int a = 0; a < kA; ++a) {
    Real o[dev::kVectorElements<T>], vector_sum = 0, vector_squares = 0;
    dev::unpack(bits[a], o, static_cast<const T*>(nullptr));
#pragma unroll
    for (int b = 0; b < kB; ++b) {
      const Real d = o[b] * scale - shift;
      vector_sum += d;
      vector_squares += d * d;
    }
    sum += vector_sum;
    squares += vector_squares;
  }
}

// Mean and m2 of the elements of one thread. A run keeps (count, sum d, sum d^2) about `shift`; its
// m2 = sum d^2 - (sum d)^2 / count is safe while the second term is at most half of the first. When the next
// elements would break that, or the squares leave the range of float, the run is closed and a new one starts about
// the mean of those elements: at the first elements of a thread, rarely afterwards.
template <class T, bool kWithLog>
struct MomentSums {
  using Real = RealOf<T>;
  const SphericalOptions& options;
  Real shift = 0, sum = 0, squares = 0;
  Real scale = 1;   // the run holds scale * o; other than 1 for the elements of one take() at most
  int count = 0;    // elements in the run
  double done = 0;  // elements in the runs that are closed, their mean and m2
  double mean = 0, m2 = 0;
  double log_sum = 0;

  PYOPS_DEVICE explicit MomentSums(const SphericalOptions& o) : options(o) {}

  PYOPS_DEVICE static bool in_range(Real squares, int count) {
    if constexpr (sizeof(Real) == 8) {
      return squares == squares;
    } else {
      return squares < Real(1e30) && (squares >= Real(1e-30) * Real(count) || squares == 0);
    }
  }

  template <int kB, int kA>
  PYOPS_DEVICE void take(const dev::Bits128 (&bits)[kA], int, int) {
    if constexpr (kWithLog) {
      double logs;
      if (!sum_log<T, kB>(bits, options, logs)) logs = sum_log_special<T, kB>(bits, options);
      log_sum += logs;
    }
    constexpr int n = kA * kB;
    Real d_sum, d_squares;
    shifted_sums<T, kB>(bits, Real(1), shift, d_sum, d_squares);
    const Real new_sum = sum + d_sum, new_squares = squares + d_squares;
    const int new_count = count + n;
    if (new_sum * new_sum <= Real(0.5) * Real(new_count) * new_squares && in_range(new_squares, new_count) &&
        scale == 1 && new_count <= kLongestRun) {
      sum = new_sum;
      squares = new_squares;
      count = new_count;
    } else {
      close();
      restart<kB>(bits);
    }
  }

  // A new run of these elements about their mean. If their squares do not fit float they are taken scaled by a power
  // of two, and the run ends with them.
  template <int kB, int kA>
  PYOPS_DEVICE void restart(const dev::Bits128 (&taken)[kA]) {
    constexpr int n = kA * kB;
    dev::Bits128 bits[kA];
#pragma unroll
    for (int a = 0; a < kA; ++a) bits[a] = taken[a];
    Real o[dev::kVectorElements<T>];
    dev::unpack(bits[0], o, static_cast<const T*>(nullptr));
    const Real first = o[0];
    scale = 1;
    count = n;
#pragma unroll 1
    for (int attempt = 0; attempt < 2; ++attempt) {
      shift = first * scale;  // equal elements get exactly this mean, and m2 = 0
#pragma unroll 1
      for (int pass = 0; pass < 2; ++pass) {
        if (pass == 1) shift += sum * Real(1.0 / n);
#pragma unroll
        for (int a = 0; a < kA; ++a) bits[a] = dev::reread(bits[a]);
        shifted_sums<T, kB>(bits, scale, shift, sum, squares);
      }
      if (attempt == 1 || in_range(squares, n)) return;
      scale = squares < 1 ? Real(0x1p100) : Real(0x1p-70);
    }
  }

  PYOPS_DEVICE void close() {
    if (count == 0) return;
    const double n = double(count), rest = double(sum) / n, unscale = 1 / double(scale);
    const double run_m2 = double(squares) - double(sum) * rest;
    RowMoments total = {mean, m2, 0};
    merge_moments(done, total, n, {(double(shift) + rest) * unscale, run_m2 * unscale * unscale, 0});
    mean = total.mean;
    m2 = total.m2;
    count = 0;
  }
};

// Merges the moments of all threads, which together hold `columns` elements. Chan's formula about one common mean,
// without a division per step; `pivot`, near the data, keeps the sum of means exact where all of them are equal.
PYOPS_DEVICE RowMoments merge_in_block(double count, const RowMoments& own, double columns, double pivot,
                                       double* scratch) {
  double first[1] = {count == 0 ? 0.0 : count * (own.mean - pivot)};
  block_sum(first, scratch);
  const double mean = pivot + first[0] / columns, delta = own.mean - mean;
  double second[2] = {count == 0 ? 0.0 : own.m2 + count * (delta * delta), own.sum_log};
  block_sum(second, scratch + kMaximumWarps);
  return {mean, second[0], second[1]};
}

// ---- forward --------------------------------------------------------------------------------------------

constexpr int kColumns = 2;  // of the row results: loss, row weight

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

template <class T, bool kWithLog>
__global__ void __launch_bounds__(kMaximumThreads, 2)
    moments_kernel(SphericalLossForward f, RowSplit split, int64_t first_row, RowMoments* partials) {
  PYOPS_SHARED(double, scratch, 3 * kMaximumWarps);
  const LossRows& rows = f.rows;
  const int64_t row = first_row + blockIdx.x;
  if (!row_counts<T>(rows, row, out_of_range(f.options.loss))) return;
  const int64_t begin = int64_t(blockIdx.y) * split.part_columns, left = rows.classes - begin;
  const int columns = int(left < split.part_columns ? left : split.part_columns);
  const T* x = static_cast<const T*>(rows.logits) + row * rows.row_stride + begin;
  MomentSums<T, kWithLog> sums(f.options);
  read_row(x, columns, sums);
  sums.close();
  const double pivot = double(dev::widen(x[0]));
  const RowMoments moments = merge_in_block(sums.done, {sums.mean, sums.m2, sums.log_sum}, double(columns), pivot, scratch);
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
  const double pivot = partials[0].mean;
  const double mean = pivot + row_sum(count == 0 ? 0.0 : count * (own.mean - pivot), lanes) / double(classes);
  const double delta = own.mean - mean;
  return {mean, row_sum(count == 0 ? 0.0 : own.m2 + count * (delta * delta), lanes), row_sum(own.sum_log, lanes)};
}

// Targets, loss and statistics of one row, by its 1 or 32 threads; adds loss and row weight to `totals`.
template <class T>
PYOPS_DEVICE void finish_row(const SphericalLossForward& f, const RowSplit& split, const RowMoments* partials,
                             int64_t row, int lane, int lanes, double (&totals)[kColumns]) {
  using Statistic = StatisticOf<T>;
  const LossRows& rows = f.rows;
  const T* logits = static_cast<const T*>(rows.logits) + row * rows.row_stride;
  Statistic* statistics = static_cast<Statistic*>(rows.statistics) + row * (kTargetGradient + rows.targets);
  const double classes = double(rows.classes);
  RowMoments moments = {0, 0, 0};
  RowPartials sums{};
  double class_weight_sum = 0, counted = 0, scale = 0;
  for (int64_t j = lane; j < rows.targets; j += lanes) {
    counted += read_target<T>(rows, row, j, out_of_range(f.options.loss)).counts;
  }
  counted = row_sum(counted, lanes);
  if (counted != 0) {
    moments = merge_parts(partials + row * split.parts, split, rows.classes, lane, lanes);
    scale = inverse_scale(f.options, moments, classes);
  }
  for (int64_t j = lane; j < rows.targets; j += lanes) {
    const Target target = read_target<T>(rows, row, j, out_of_range(f.options.loss));
    double gradient = 0;
    if (target.counts) {
      const double o = double(dev::widen(logits[target.index]));
      gradient = add_target(f.options, moments, classes, scale, o, target.own * target.class_weight, sums);
      class_weight_sum += target.class_weight;
    }
    statistics[kTargetGradient + j] = Statistic(gradient);
  }
  sums = {row_sum(sums.loss, lanes), row_sum(sums.slope, lanes), row_sum(sums.shift, lanes),
          row_sum(sums.smooth, lanes)};
  class_weight_sum = row_sum(class_weight_sum, lanes);
  if (lane != 0) return;
  if (counted != 0) {
    write_row(statistics, moments, scale, sums);
    totals[0] += sums.loss;
    totals[1] += class_weight_sum / counted;
  } else {
    for (int column = 0; column < kTargetGradient; ++column) statistics[column] = 0;
  }
  if (rows.reduction == RowReduction::none) write_number(rows.loss, rows.loss_dtype, row, sums.loss);
}

PYOPS_DEVICE void write_result(const LossRows& rows, const double (&totals)[kColumns]) {
  const double divisor = mean_divisor(rows, totals[1]);
  rows.normalizer[0] = divisor;
  if (rows.reduction != RowReduction::none) write_number(rows.loss, rows.loss_dtype, 0, totals[0] / divisor);
}

template <class T>
__global__ void __launch_bounds__(kFinishThreads)
    finish_kernel(SphericalLossForward f, RowSplit split, int lanes, const RowMoments* partials, double* subtotals) {
  PYOPS_SHARED(double, scratch, kMaximumWarps * kColumns);
  double totals[kColumns];
  for_each_finished_row(f.rows.rows, lanes, totals, scratch, [&](int64_t row, int lane, double(&sums)[kColumns]) {
    finish_row<T>(f, split, partials, row, lane, lanes, sums);
  });
  if (threadIdx.x != 0) return;
  if (gridDim.x == 1) {
    write_result(f.rows, totals);
  } else {
    store_subtotals(totals, subtotals);
  }
}

__global__ void __launch_bounds__(kTotalThreads) total_kernel(LossRows rows, const double* subtotals, int blocks) {
  PYOPS_SHARED(double, scratch, kMaximumWarps * kColumns);
  double totals[kColumns];
  sum_subtotals(subtotals, blocks, totals, scratch);
  if (threadIdx.x == 0) write_result(rows, totals);
}

template <class T>
int launch_forward(const SphericalLossForward& f, const RowSplit& split, const RowFinish& finish, void* stream) {
  const LossRows& rows = f.rows;
  const Workspace workspace(rows, split, finish);
  const auto moments = needs_sum_log(f.options) ? moments_kernel<T, true> : moments_kernel<T, false>;
  int error = for_each_row_slice(rows.rows, [&](int64_t first, int64_t count) {
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

template <class Real>
struct LinearFormula {
  static constexpr bool kWeighted = false;
  Real center, inverse_scale, slope, shift;
  PYOPS_DEVICE Real operator()(Real o) const { return ((o - center) * inverse_scale) * slope + shift; }
};

template <class Real, SphericalLoss kLoss>
struct SmoothedFormula {
  static constexpr bool kWeighted = false;
  LinearFormula<Real> linear;
  Real smooth, eps;
  PYOPS_DEVICE Real operator()(Real o) const { return linear(o) + smooth * smooth_term(kLoss, o, eps); }
};

struct SphericalNumbers {
  double center, inverse_scale, slope, shift, smooth, target_scale;
  bool zero;
};

// kLoss is z also for mse_onehot: what they share is that the gradient is linear in o. The other two are linear
// unless smoothed.
template <SphericalLoss kLoss>
struct SphericalGradient {
  using Numbers = SphericalNumbers;
  static constexpr int kRowNumbers = kTargetGradient;
  const SphericalLossBackward& b;

  PYOPS_DEVICE const char* message() const { return out_of_range(b.loss); }

  template <class T>
  PYOPS_DEVICE Numbers numbers(const GradientRows& g, int64_t row) const {
    const StatisticOf<T>* s = static_cast<const StatisticOf<T>*>(g.statistics) + row * (kTargetGradient + g.targets);
    const double upstream = read_number(g.grad_loss, g.grad_dtype, row * g.grad_stride);
    const double scale = upstream / g.normalizer[0];
    const bool zero = s[kSlope] == 0 && s[kShift] == 0 && s[kSmooth] == 0;
    return {double(s[kCenter]), double(s[kInverseScale]), scale * s[kSlope], scale * s[kShift], scale * s[kSmooth],
            scale, zero};
  }

  PYOPS_DEVICE double value(const Numbers& n, double o, int64_t) const {
    const double linear = n.slope * ((o - n.center) * n.inverse_scale) + n.shift;
    if (kLoss == SphericalLoss::z || n.smooth == 0) return linear;
    return linear + n.smooth * smooth_term(kLoss, o, b.eps);
  }

  template <class Real, class Run>
  PYOPS_DEVICE void with_formula(const Numbers& n, const Run& run) const {
    const LinearFormula<Real> linear{Real(n.center), Real(n.inverse_scale), Real(n.slope), Real(n.shift)};
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
__global__ void __launch_bounds__(kGradientThreads) gradient_kernel(SphericalLossBackward b, ColumnSplit split,
                                                                    int64_t first_row) {
  PYOPS_SHARED(SphericalNumbers, numbers, 1);
  PYOPS_SHARED(int, marks, kMarks);
  write_gradient<T>(b.rows, split, first_row + blockIdx.x, SphericalGradient<kLoss>{b}, numbers, marks);
}

template <class T>
auto gradient_kernel_of(SphericalLoss loss) {
  switch (loss) {
    case SphericalLoss::taylor_softmax: return gradient_kernel<T, SphericalLoss::taylor_softmax>;
    case SphericalLoss::spherical_softmax: return gradient_kernel<T, SphericalLoss::spherical_softmax>;
    default: return gradient_kernel<T, SphericalLoss::z>;
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
  return with_element_type(rows.dtype, [&](auto element) {
    return launch_forward<decltype(element)>(*arguments, split, finish, stream);
  });
}

extern "C" int pyops_spherical_loss_backward(const SphericalLossBackward* arguments, void* stream) {
  const SphericalLossBackward& b = *arguments;
  if (b.rows.classes == 0) return 0;
  const ColumnSplit split = split_columns(b.rows.rows, b.rows.classes, element_bytes(b.rows.dtype));
  return with_element_type(b.rows.dtype, [&](auto element) {
    const auto kernel = gradient_kernel_of<decltype(element)>(b.loss);
    return for_each_row_slice(b.rows.rows, [&](int64_t first, int64_t count) {
      return PYOPS_LAUNCH(kernel, dim3(unsigned(count), unsigned(split.chunks)), dim3(unsigned(split.threads)), 0, stream,
                          b, split, first);
    });
  });
}
