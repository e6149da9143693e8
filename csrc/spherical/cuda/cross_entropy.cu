// Softmax cross-entropy with the log-sum-exp-squared regulariser on given logits (m x D): forward with row
// statistics, and the streaming backward.
//
// Maths: of a row the loss needs (maximum, sum exp(o - maximum)), the target logits and, with label smoothing,
// sum w o. ../cross_entropy_formula.h turns them into the loss, the regulariser and `statistics`, from which the
// backward is an elementwise function of o.
//
// Forward tiling: exponentials_kernel gives a block one row, or one part of a row (grid.y) when rows are few and
// long (split_rows decides), and streams it once; finish_kernel merges the parts of each row in order and does the
// per-row work; total_kernel adds the subtotals of its blocks when there are several.
//
// Ownership: a thread owns the vectors column = (thread + i * threads) * width of its part; partials[row][part] is
// written by thread 0 of its block; statistics and loss of a row by the thread or warp that finishes it.
//
// Precision: a thread adds exp(o - shift) in float (double for float64 logits) over at most 32 elements, from there on
// in double. Its shift is raised to a new maximum only when that is more than kHeadroom above: rescaling is rare, and
// each costs one rounding. Threads and parts are merged in double about the common maximum; row formulas in double.
// -infinity is a legal logit; NaN reaches the sum.
//
// Backward: see row_gradient.cuh; one exponential per element, in float (double for float64).
#include "cross_entropy.cuh"
#include "row_gradient.cuh"

namespace pyops {
namespace {

// exp(kHeadroom) is far from overflow, and an argument of that size costs no accuracy.
constexpr int kHeadroom = 4;

#define PYOPS_CROSS_ENTROPY_RANGE "pyops::cross_entropy: target must be in [0, classes) or ignore_index"

// e^x. For 16-bit elements the approximation of the hardware: its error, 3e-7 relative, is far below theirs.
template <class T>
PYOPS_DEVICE RealOf<T> exponential(RealOf<T> x) {
  if constexpr (sizeof(T) == 8) {
    return exp(x);
  } else if constexpr (sizeof(T) == 4) {
    return expf(x);
  } else {
    return dev::ex2(x * 1.44269504f);
  }
}

// ---- exponentials of a thread ---------------------------------------------------------------------------

// What label smoothing asks for beside the exponentials: nothing, sum o or sum w o.
enum class Smoothing { none, plain, weighted };

template <class T, Smoothing kSmoothing>
struct ExponentialSums {
  using Real = RealOf<T>;
  const T* weight;  // class weights of the columns that are read; Smoothing::weighted only
  Real maximum = -Real(HUGE_VAL);
  Real shift = -Real(HUGE_VAL);  // from maximum - kHeadroom to maximum
  double sum = 0;                // of exp(o - shift)
  double weighted_sum = 0;

  PYOPS_DEVICE explicit ExponentialSums(const T* class_weight) : weight(class_weight) {}

  template <int kA>
  PYOPS_DEVICE void take(const dev::Bits128 (&bits)[kA], int elements, int column, int step) {
    constexpr int width = dev::kVectorElements<T>;
    Real o[kA][width], highest = -Real(HUGE_VAL);
#pragma unroll
    for (int a = 0; a < kA; ++a) {
      Real vector_highest = -Real(HUGE_VAL);
      dev::unpack(bits[a], o[a], static_cast<const T*>(nullptr));
#pragma unroll
      for (int b = 0; b < width; ++b) {
        if (b >= elements) o[a][b] = -Real(HUGE_VAL);
        vector_highest = larger(vector_highest, o[a][b]);
      }
      highest = larger(highest, vector_highest);
    }
    maximum = larger(maximum, highest);
    if (highest > shift + Real(kHeadroom)) raise(highest);
    // Nothing but -infinity (or NaN) so far: exp(o - 0) is 0, where exp(-inf + inf) would be NaN.
    const Real finite_shift = shift == -Real(HUGE_VAL) ? Real(0) : shift;
    Real taken_sum = 0;
#pragma unroll
    for (int a = 0; a < kA; ++a) {
      Real vector_sum = 0;
#pragma unroll
      for (int b = 0; b < width; ++b) vector_sum += exponential<T>(o[a][b] - finite_shift);
      taken_sum += vector_sum;
      if constexpr (kSmoothing != Smoothing::none) {
        weighted_sum += sum_of_weighted(o[a], elements, highest, column + a * step);
      }
    }
    sum += double(taken_sum);
  }

  PYOPS_DEVICE void raise(Real highest) {
    sum *= double(exponential<T>(shift - highest));
    shift = highest;
  }

  // sum w o as sum w (o - reference) + reference * sum w: small terms in float, the rest in double. A large
  // reference must cancel against the sum of all weights, which is taken in double as well.
  PYOPS_DEVICE double sum_of_weighted(const Real (&o)[dev::kVectorElements<T>], int elements, Real highest,
                                      int column) const {
    constexpr int width = dev::kVectorElements<T>;
    const Real reference = highest - highest == 0 ? highest : Real(0);
    Real products = 0;
    double weights = double(elements);
    if constexpr (kSmoothing == Smoothing::weighted) {
      Real w[width];
      weights = 0;
      if (elements == width) {
        load_weights(weight + column, w);
      } else {
        w[0] = dev::widen(weight[column]);
      }
#pragma unroll
      for (int b = 0; b < width; ++b) {
        products += b < elements ? w[b] * (o[b] - reference) : Real(0);
        weights += b < elements ? double(w[b]) : 0.0;
      }
    } else {
#pragma unroll
      for (int b = 0; b < width; ++b) products += b < elements ? o[b] - reference : Real(0);
    }
    return double(products) + double(reference) * weights;
  }
};

// Merges the threads of a block about their common maximum; every thread gets the result.
template <class T, Smoothing kSmoothing>
PYOPS_DEVICE RowExponentials merge_in_block(const ExponentialSums<T, kSmoothing>& own, double* scratch) {
  const RealOf<T> maximum = block_maximum(own.maximum, scratch);
  const RealOf<T> distance = own.shift - maximum;
  const double scale = sizeof(T) == 8 ? exp(distance) : expf(float(distance));
  // Without an element above -infinity the sum is 0 and the scale may be exp(-inf + inf).
  double sums[2] = {own.sum == 0 ? 0 : own.sum * scale, own.weighted_sum};
  block_sum(sums, scratch + kMaximumWarps);
  return {double(maximum), sums[0], sums[1]};
}

// ---- forward --------------------------------------------------------------------------------------------

constexpr int kColumns = 4;  // of the row results: loss, row weight, regulariser, rows that count
constexpr int kFinishScratch = kMaximumWarps * kColumns;

struct Workspace {
  RowExponentials* partials;  // rows x parts
  double* subtotals;          // blocks x kColumns
  double* class_weight_sum;   // 1
  int64_t doubles;

  Workspace(const LossRows& rows, const RowSplit& split, const RowFinish& finish) {
    const int64_t partial_doubles = rows.rows * split.parts * int64_t(sizeof(RowExponentials) / sizeof(double));
    const int64_t subtotal_doubles = int64_t(finish.blocks) * kColumns;
    partials = reinterpret_cast<RowExponentials*>(rows.workspace);
    subtotals = rows.workspace + partial_doubles;
    class_weight_sum = subtotals + subtotal_doubles;
    doubles = partial_doubles + subtotal_doubles + 1;
  }
};

// Sum of the class weights, for label smoothing; one block.
template <class T>
__global__ void __launch_bounds__(kTotalThreads) class_weight_kernel(const T* weight, int64_t classes, double* sum) {
  PYOPS_SHARED(double, scratch, kMaximumWarps);
  double total[1] = {0};
  for (int64_t k = int64_t(threadIdx.x); k < classes; k += kTotalThreads) total[0] += double(dev::widen(weight[k]));
  block_sum(total, scratch);
  if (threadIdx.x == 0) *sum = total[0];
}

// Smoothing and double take registers; class weights also loads, so that fewer logits are in flight.
template <class T, Smoothing kSmoothing>
__global__ void __launch_bounds__(kMaximumThreads, sizeof(T) == 8 || kSmoothing != Smoothing::none ? 2 : 3)
    exponentials_kernel(CrossEntropyForward f, RowSplit split, int64_t first_row, RowExponentials* partials) {
  PYOPS_SHARED(double, scratch, 3 * kMaximumWarps);
  const LossRows& rows = f.rows;
  const int64_t row = first_row + blockIdx.x;
  if (!row_counts<T>(rows, row)) return;
  const int64_t begin = int64_t(blockIdx.y) * split.part_columns, left = rows.classes - begin;
  const int columns = int(left < split.part_columns ? left : split.part_columns);
  const T* x = static_cast<const T*>(rows.logits) + row * rows.row_stride + begin;
  const T* weight = nullptr;
  if constexpr (kSmoothing == Smoothing::weighted) weight = static_cast<const T*>(rows.class_weight) + begin;
  ExponentialSums<T, kSmoothing> sums(weight);
  read_row<kSmoothing == Smoothing::weighted ? 2 : kVectorsInFlight>(x, columns, sums);
  const RowExponentials merged = merge_in_block(sums, scratch);
  if (threadIdx.x == 0) partials[row * split.parts + blockIdx.y] = merged;
}

// Exponentials of a row from its parts, for the 1 or 32 threads that finish it.
PYOPS_DEVICE RowExponentials merge_parts(const RowExponentials* partials, int parts, int lane, int lanes) {
  if (parts == 1) return partials[0];
  RowExponentials own = no_exponentials();
  for (int part = lane; part < parts; part += lanes) merge_exponentials(own, partials[part]);
  const double shift = row_maximum(own.shift, lanes);
  const double sum = own.sum == 0 ? 0 : own.sum * exp(own.shift - shift);
  return {shift, row_sum(sum, lanes), row_sum(own.weighted_sum, lanes)};
}

// What the threads of a row add up over its targets.
struct TargetSums {
  CrossEntropyPartials partials;
  double class_weight, counted;
};

template <class T>
PYOPS_DEVICE TargetSums add_targets(const CrossEntropyForward& f, int64_t row, const RowExponentials& exponentials,
                                    double log_sum, int lane, int lanes) {
  const LossRows& rows = f.rows;
  const T* logits = static_cast<const T*>(rows.logits) + row * rows.row_stride;
  double* gradients = rows.statistics + row * (kTargetGradientCe + rows.targets) + kTargetGradientCe;
  TargetSums own{};
  for (int64_t j = lane; j < rows.targets; j += lanes) {
    const Target target = read_target<T>(rows, row, j, PYOPS_CROSS_ENTROPY_RANGE);
    double gradient = 0;
    if (target.counts) {
      const double o = double(dev::widen(logits[target.index]));
      const double omega = target.own * target.class_weight;
      gradient =
          add_target(f.options, exponentials, log_sum, double(f.rows.classes), o, target.own, omega, own.partials);
      own.class_weight += target.class_weight;
      own.counted += 1;
    }
    gradients[j] = gradient;
  }
  return {{row_sum(own.partials.loss, lanes), row_sum(own.partials.slope, lanes),
           row_sum(own.partials.target_weight, lanes)},
          row_sum(own.class_weight, lanes),
          row_sum(own.counted, lanes)};
}

// Targets, losses and statistics of one row, by its 1 or 32 threads; adds its results to `totals`.
template <class T>
PYOPS_DEVICE void finish_one_row(const CrossEntropyForward& f, const RowSplit& split, const Workspace& workspace,
                                 int64_t row, int lane, int lanes, double (&totals)[kColumns]) {
  const LossRows& rows = f.rows;
  const bool counts = any_counts<T>(rows, row, lane, lanes);
  RowExponentials exponentials = no_exponentials();
  if (counts) exponentials = merge_parts(workspace.partials + row * split.parts, split.parts, lane, lanes);
  const double log_sum = counts ? log(exponentials.sum) : 0;
  TargetSums sums = add_targets<T>(f, row, exponentials, log_sum, lane, lanes);
  if (lane != 0) return;
  double* statistics = rows.statistics + row * (kTargetGradientCe + rows.targets);
  double z_term = 0;
  if (counts) {
    const bool weighted = rows.class_weight && f.options.label_smoothing != 0;
    const double classes = double(rows.classes), weight_sum = weighted ? *workspace.class_weight_sum : classes;
    z_term = finish_row(f.options, exponentials, log_sum, classes, weight_sum, sums.partials, statistics);
    totals[0] += sums.partials.loss;
    totals[1] += sums.class_weight / sums.counted;
    totals[2] += z_term;
    totals[3] += 1;
  } else {
    for (int column = 0; column < kTargetGradientCe; ++column) statistics[column] = 0;
  }
  if (rows.reduction == RowReduction::none) {
    write_number(rows.loss, rows.loss_dtype, row, sums.partials.loss + z_term);
    write_number(rows.z_term, rows.loss_dtype, row, z_term);
  }
}

// The two parts have different divisors: the regulariser is divided by the number of rows that count.
PYOPS_DEVICE void write_result(const CrossEntropyForward& f, const double (&totals)[kColumns]) {
  const LossRows& rows = f.rows;
  const double divisor = mean_divisor(rows, totals[1]), z_divisor = mean_divisor(rows, totals[3]);
  rows.normalizer[0] = divisor;
  rows.normalizer[1] = z_divisor;
  if (rows.reduction == RowReduction::none) return;
  const double z_term = totals[2] / z_divisor, loss = totals[0] / divisor;
  write_number(rows.loss, rows.loss_dtype, 0, f.options.lse_square_scale == 0 ? loss : loss + z_term);
  write_number(rows.z_term, rows.loss_dtype, 0, z_term);
}

template <class T>
__global__ void __launch_bounds__(kFinishThreads, 4)
    finish_kernel(CrossEntropyForward f, RowSplit split, int lanes, Workspace workspace) {
  PYOPS_SHARED(double, scratch, kFinishScratch);
  double totals[kColumns];
  for_each_finished_row(f.rows.rows, lanes, totals, scratch, [&](int64_t row, int lane, double (&sums)[kColumns]) {
    finish_one_row<T>(f, split, workspace, row, lane, lanes, sums);
  });
  if (threadIdx.x != 0) return;
  if (gridDim.x == 1) {
    write_result(f, totals);
  } else {
    store_subtotals(totals, workspace.subtotals);
  }
}

__global__ void __launch_bounds__(kTotalThreads)
    total_kernel(CrossEntropyForward f, const double* subtotals, int blocks) {
  PYOPS_SHARED(double, scratch, kFinishScratch);
  double totals[kColumns];
  sum_subtotals(subtotals, blocks, totals, scratch);
  if (threadIdx.x == 0) write_result(f, totals);
}

// Streams all rows; nothing to do without classes.
template <class T>
int launch_exponentials(const CrossEntropyForward& f, const RowSplit& split, const Workspace& workspace, void* stream) {
  const LossRows& rows = f.rows;
  const bool smoothed = f.options.label_smoothing != 0;
  if (rows.classes == 0) return 0;
  if (smoothed && rows.class_weight) {
    const int error = PYOPS_LAUNCH(class_weight_kernel<T>, dim3(1), dim3(kTotalThreads), 0, stream,
                                   static_cast<const T*>(rows.class_weight), rows.classes, workspace.class_weight_sum);
    if (error) return error;
  }
  const auto kernel = !smoothed           ? exponentials_kernel<T, Smoothing::none>
                      : rows.class_weight ? exponentials_kernel<T, Smoothing::weighted>
                                          : exponentials_kernel<T, Smoothing::plain>;
  return for_each_row_slice(rows.rows, [&](int64_t first, int64_t count) {
    return PYOPS_LAUNCH(kernel, dim3(unsigned(count), unsigned(split.parts)), dim3(unsigned(split.threads)), 0, stream,
                        f, split, first, workspace.partials);
  });
}

template <class T>
int launch_forward(const CrossEntropyForward& f, const RowSplit& split, const RowFinish& finish, void* stream) {
  const Workspace workspace(f.rows, split, finish);
  int error = launch_exponentials<T>(f, split, workspace, stream);
  if (error) return error;
  error = PYOPS_LAUNCH(finish_kernel<T>, dim3(unsigned(finish.blocks)), dim3(kFinishThreads), 0, stream, f, split,
                       finish.lanes, workspace);
  if (error || finish.blocks == 1) return error;
  return PYOPS_LAUNCH(total_kernel, dim3(1), dim3(kTotalThreads), 0, stream, f,
                      static_cast<const double*>(workspace.subtotals), finish.blocks);
}

// ---- backward -------------------------------------------------------------------------------------------

template <class T>
struct SoftmaxFormula {
  using Real = RealOf<T>;
  static constexpr bool kWeighted = false;
  Real shift, slope, smooth;
  PYOPS_DEVICE Real operator()(Real o) const { return exponential<T>(o - shift) * slope - smooth; }
};

template <class T>
struct WeightedSoftmaxFormula {
  using Real = RealOf<T>;
  static constexpr bool kWeighted = true;
  Real shift, slope, smooth;
  PYOPS_DEVICE Real operator()(Real o, Real weight) const {
    return exponential<T>(o - shift) * slope - weight * smooth;
  }
};

struct CrossEntropyNumbers {
  double shift, slope, smooth, target_scale;
  bool zero;
};

template <bool kClassWeight>
struct CrossEntropyGradient {
  using Numbers = CrossEntropyNumbers;
  static constexpr int kRowNumbers = kTargetGradientCe;
  const void* class_weight;

  PYOPS_DEVICE const char* message() const {
    return "pyops::cross_entropy_backward: target must be in [0, classes) where it has a gradient";
  }

  PYOPS_DEVICE Numbers numbers(const GradientRows& g, int64_t row) const {
    const double* s = g.statistics + row * (kTargetGradientCe + g.targets);
    const double upstream = read_number(g.grad_loss, g.grad_dtype, row * g.grad_stride);
    const double slope = s[kSlopeCe] / g.normalizer[0];
    const double z_slope = s[kZSlope] == 0 ? 0 : s[kZSlope] / g.normalizer[1];
    const bool zero = all_zero(s, kSlopeCe, kTargetGradientCe + g.targets);
    return {s[kLogitShift], upstream * (slope + z_slope), upstream * s[kSmoothCe] / g.normalizer[0],
            upstream / g.normalizer[0], zero};
  }

  template <class T>
  PYOPS_DEVICE double value(const Numbers& n, double o, int64_t column) const {
    double weight = 1;
    if constexpr (kClassWeight) weight = double(dev::widen(static_cast<const T*>(class_weight)[column]));
    return n.slope * exp(o - n.shift) - n.smooth * weight;
  }

  template <class T, class Run>
  PYOPS_DEVICE void with_formula(const Numbers& n, const Run& run) const {
    using Real = RealOf<T>;
    if (kClassWeight && n.smooth != 0) {
      if constexpr (kClassWeight) run(WeightedSoftmaxFormula<T>{Real(n.shift), Real(n.slope), Real(n.smooth)});
    } else {
      run(SoftmaxFormula<T>{Real(n.shift), Real(n.slope), Real(n.smooth)});
    }
  }
};

template <class T, bool kClassWeight>
__global__ void __launch_bounds__(kGradientThreads, kClassWeight || sizeof(T) == 8 ? 2 : 3)
    gradient_kernel(CrossEntropyBackward b, ColumnSplit split, int64_t first_row) {
  PYOPS_SHARED(CrossEntropyNumbers, numbers, 1);
  const CrossEntropyGradient<kClassWeight> loss{b.rows.class_weight};
  write_gradient<T>(b.rows, split, first_row + blockIdx.x, loss, numbers);
}

}  // namespace
}  // namespace pyops

using namespace pyops;

extern "C" int64_t pyops_cross_entropy_workspace(const CrossEntropyForward* arguments) {
  const LossRows& rows = arguments->rows;
  const RowSplit split = split_rows(rows.rows, rows.classes, element_bytes(rows.dtype));
  return Workspace(rows, split, finish_rows(rows.rows, rows.targets, split.parts)).doubles;
}

extern "C" int pyops_cross_entropy(const CrossEntropyForward* arguments, void* stream) {
  const LossRows& rows = arguments->rows;
  const RowSplit split = split_rows(rows.rows, rows.classes, element_bytes(rows.dtype));
  const RowFinish finish = finish_rows(rows.rows, rows.targets, split.parts);
  return with_element_type(
      rows.dtype, [&](auto element) { return launch_forward<decltype(element)>(*arguments, split, finish, stream); });
}

extern "C" int pyops_cross_entropy_backward(const CrossEntropyBackward* arguments, void* stream) {
  const CrossEntropyBackward& b = *arguments;
  if (b.rows.classes == 0) return 0;
  const ColumnSplit split = split_columns(b.rows.rows, b.rows.classes, element_bytes(b.rows.dtype));
  return with_element_type(b.rows.dtype, [&](auto element) {
    using T = decltype(element);
    const auto kernel = b.rows.class_weight ? gradient_kernel<T, true> : gradient_kernel<T, false>;
    return for_each_row_slice(b.rows.rows, [&](int64_t first, int64_t count) {
      return PYOPS_LAUNCH(kernel, dim3(unsigned(count), unsigned(split.chunks)), dim3(unsigned(split.threads)), 0,
                          stream, b, split, first);
    });
  });
}
