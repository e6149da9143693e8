// CPU front of cross_entropy and its backward: check, lay out, allocate, choose the ISA, run.
#include <torch/csrc/stable/library.h>

#include "../../common/isa.h"
#include "cross_entropy_kernel.h"
#include "row_pass.h"

namespace pyops {
namespace {

constexpr const char* kForward = "cross_entropy";
constexpr const char* kBackward = "cross_entropy_backward";

const CrossEntropyKernels& kernels() {
#if defined(__x86_64__)
  return isa::select(baseline::cross_entropy_kernels, avx2::cross_entropy_kernels, avx512::cross_entropy_kernels);
#else
  return baseline::cross_entropy_kernels;
#endif
}

// The class weights in the type that the kernels of `dtype` read, or null without weights.
struct KernelWeights {
  std::vector<double> wide;
  std::vector<float> narrow;
  bool is_wide;

  KernelWeights(const OptionalTensor& weight, DType dtype)
      : wide(read_class_weights(weight)), is_wide(dtype == DType::float64) {
    if (!is_wide) narrow.assign(wide.begin(), wide.end());
  }
  const void* at(int64_t k) const {
    if (wide.empty()) return nullptr;
    return is_wide ? static_cast<const void*>(wide.data() + k) : narrow.data() + k;
  }
  double sum(int64_t classes) const {
    if (wide.empty()) return double(classes);
    double total = 0;
    for (const double w : wide) total += w;
    return total;
  }
};

// (shift, sum, weighted_sum) of every row, merged from its stretches in order.
std::vector<RowExponentials> all_exponentials(const LossArguments& arguments, const Tensor& logits,
                                              const KernelWeights& weights, bool weighted_sum) {
  const int64_t per_row = stretches(arguments.classes);
  std::vector<RowExponentials> parts(size_t(arguments.rows * per_row));
  const auto exponentials = kernels().exponentials[int(arguments.dtype)];
  const RowsView view(logits, arguments.dtype);
  for_each_stretch(arguments, [&](int64_t row, int64_t stretch, int64_t begin, int64_t size) {
    parts[size_t(row * per_row + stretch)] = exponentials(view.at(row, begin), weights.at(begin), size, weighted_sum);
  });
  if (per_row == 1) return parts;
  std::vector<RowExponentials> rows(size_t(arguments.rows), no_exponentials());
  for (int64_t part = 0; part < arguments.rows * per_row; ++part) {
    merge_exponentials(rows[size_t(part / per_row)], parts[size_t(part)]);
  }
  return rows;
}

struct RowLosses {
  std::vector<double> loss, z_term;
};

// Loss, regulariser and statistics of every row from its exponentials and targets.
RowLosses finish_rows(const LossArguments& arguments, const CrossEntropyOptions& options, const Tensor& logits,
                      const RowTargets& targets, const KernelWeights& weights, Tensor& statistics) {
  const int64_t count = arguments.targets, width = kTargetGradientCe + count;
  const std::vector<RowExponentials> rows =
      arguments.classes ? all_exponentials(arguments, logits, weights, options.label_smoothing != 0)
                        : std::vector<RowExponentials>(size_t(arguments.rows), no_exponentials());
  const double weight_sum = weights.sum(arguments.classes);
  RowLosses losses{std::vector<double>(size_t(arguments.rows)), std::vector<double>(size_t(arguments.rows))};
  double* data = static_cast<double*>(statistics.mutable_data_ptr());
  const RowsView view(logits, arguments.dtype);
  torch::stable::parallel_for(0, arguments.rows, 512, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      double* out = data + row * width;
      for (int64_t column = 0; column < width; ++column) out[column] = 0;
      if (targets.ignored(row)) continue;
      const RowExponentials& exponentials = rows[size_t(row)];
      const double log_sum = log(exponentials.sum);
      CrossEntropyPartials partials{};
      for (int64_t j = 0; j < count; ++j) {
        const size_t slot = size_t(row * count + j);
        const int64_t c = targets.index[slot];
        if (c < 0) continue;
        const double o = read_element(view.at(row, c), arguments.dtype, 0);
        out[kTargetGradientCe + j] = add_target(options, exponentials, log_sum, double(arguments.classes), o,
                                                targets.own[slot], targets.omega[slot], partials);
      }
      losses.z_term[size_t(row)] =
          finish_row(options, exponentials, log_sum, double(arguments.classes), weight_sum, partials, out);
      losses.loss[size_t(row)] = partials.loss;
    }
  });
  return losses;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy_cpu(const Tensor& logits_in, const Tensor& target,
                                                             const OptionalTensor& target_weight,
                                                             const OptionalTensor& weight, double label_smoothing,
                                                             double lse_square_scale, int64_t ignore_index,
                                                             int64_t reduction, bool safe_mean,
                                                             std::optional<ScalarType> out_dtype) {
  const LossArguments arguments =
      check_loss_arguments(kForward, logits_in, target, target_weight, weight, label_smoothing, reduction, out_dtype);
  PYOPS_CHECK(lse_square_scale >= 0, kForward, "lse_square_scale", "be at least 0", lse_square_scale);
  const RowTargets targets = read_targets(arguments, target, target_weight, weight, ignore_index);
  const Tensor logits = rows_dense(logits_in);
  const KernelWeights weights(weight, arguments.dtype);
  const CrossEntropyOptions options{label_smoothing, lse_square_scale};
  Tensor statistics = new_tensor(logits, {arguments.rows, kTargetGradientCe + arguments.targets}, ScalarType::Double);
  RowLosses losses = finish_rows(arguments, options, logits, targets, weights, statistics);
  Tensor normalizer = new_tensor(logits, {2}, ScalarType::Double);
  double* divisor = static_cast<double*>(normalizer.mutable_data_ptr());
  divisor[0] = mean_divisor(reduction, targets.weight_sum, safe_mean);
  divisor[1] = mean_divisor(reduction, targets.counted_rows, safe_mean);
  // The two parts have different divisors: bring the regulariser to that of the loss, then reduce the sum.
  Tensor z_term = reduce_rows(logits, losses.z_term, reduction, divisor[1], out_dtype);
  if (lse_square_scale != 0) {
    for (size_t row = 0; row < losses.loss.size(); ++row) {
      losses.loss[row] += losses.z_term[row] * (divisor[0] / divisor[1]);
    }
  }
  return {reduce_rows(logits, losses.loss, reduction, divisor[0], out_dtype), z_term, statistics, normalizer};
}

// The row formula of the backward for run_backward.
struct CrossEntropyRows {
  const LossArguments& arguments;
  const KernelWeights& weights;
  const double* statistics;
  const double* divisor;
  CrossEntropyKernels::Gradient kernel;

  double statistic(int64_t row, int64_t column) const {
    return statistics[row * (kTargetGradientCe + arguments.targets) + column];
  }
  bool zero(int64_t row) const {
    for (int64_t column = kSlopeCe; column < kTargetGradientCe + arguments.targets; ++column) {
      if (statistic(row, column) != 0) return false;
    }
    return true;
  }
  CrossEntropyRowGradient scaled(int64_t row, double upstream) const {
    const double z_slope = statistic(row, kZSlope);
    return {statistic(row, kLogitShift),
            upstream * (statistic(row, kSlopeCe) / divisor[0] + (z_slope == 0 ? 0 : z_slope / divisor[1])),
            upstream * statistic(row, kSmoothCe) / divisor[0]};
  }
  double value(const CrossEntropyRowGradient& gradient, double o, int64_t k) const {
    const double weight = weights.wide.empty() ? 1 : weights.wide[size_t(k)];
    return gradient.slope * exp(o - gradient.shift) - gradient.smooth * weight;
  }
  double target(int64_t row, int64_t j, double upstream) const {
    return upstream / divisor[0] * statistic(row, kTargetGradientCe + j);
  }
  void run(const char* x, char* out, int64_t begin, int64_t size, const CrossEntropyRowGradient& gradient,
           bool nontemporal) const {
    kernel(x, weights.at(begin), out, size, gradient, nontemporal);
  }
};

void backward_into(const LossArguments& arguments, const Tensor& grad_loss, const Tensor& logits, const Tensor& target,
                   const OptionalTensor& weight, const Tensor& statistics_in, const Tensor& normalizer_in, Tensor& out,
                   bool nontemporal) {
  const Tensor statistics = as_contiguous(statistics_in);
  const Tensor normalizer = as_contiguous(normalizer_in);
  const KernelWeights weights(weight, arguments.dtype);
  const CrossEntropyRows rows{arguments, weights, static_cast<const double*>(statistics.const_data_ptr()),
                              static_cast<const double*>(normalizer.const_data_ptr()),
                              kernels().gradient[int(arguments.dtype)]};
  run_backward(arguments, rows, read_target_indices(arguments, target, statistics, kTargetGradientCe),
               read_row_gradients(arguments, grad_loss), logits, out, nontemporal);
}

LossArguments check_backward(const Tensor& grad_loss, const Tensor& logits, const Tensor& target,
                             const OptionalTensor& weight, const Tensor& statistics, const Tensor& normalizer) {
  const LossArguments arguments =
      check_backward_arguments(kBackward, grad_loss, logits, target, statistics, normalizer, kTargetGradientCe, 2);
  if (weight) check_class_weight(arguments, *weight, logits);
  return arguments;
}

Tensor cross_entropy_backward_cpu(const Tensor& grad_loss, const Tensor& logits_in, const Tensor& target,
                                  const OptionalTensor& weight, const Tensor& statistics, const Tensor& normalizer) {
  const LossArguments arguments = check_backward(grad_loss, logits_in, target, weight, statistics, normalizer);
  const Tensor logits = rows_dense(logits_in);
  LargeOutput out = new_large_output(logits, arguments.rows, arguments.classes);
  backward_into(arguments, grad_loss, logits, target, weight, statistics, normalizer, out.tensor,
                use_nontemporal(arguments, out));
  return out.tensor;
}

void cross_entropy_backward_cpu_(const Tensor& grad_loss, Tensor logits, const Tensor& target,
                                 const OptionalTensor& weight, const Tensor& statistics, const Tensor& normalizer) {
  const LossArguments arguments = check_backward(grad_loss, logits, target, weight, statistics, normalizer);
  check_rows_distinct(arguments, logits);
  Tensor dense = rows_dense(logits);
  backward_into(arguments, grad_loss, dense, target, weight, statistics, normalizer, dense, false);
  if (dense.const_data_ptr() != logits.const_data_ptr()) torch::stable::copy_(logits, dense);
}

}  // namespace
}  // namespace pyops

STABLE_TORCH_LIBRARY_IMPL(pyops, CPU, m) {
  m.impl("cross_entropy", TORCH_BOX(&pyops::cross_entropy_cpu));
  m.impl("cross_entropy_backward", TORCH_BOX(&pyops::cross_entropy_backward_cpu));
  m.impl("cross_entropy_backward_", TORCH_BOX(&pyops::cross_entropy_backward_cpu_));
}
