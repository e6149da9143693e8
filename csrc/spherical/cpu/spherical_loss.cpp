// CPU front of spherical_loss and its backward: check, lay out, allocate, choose the ISA, run.
#include <torch/csrc/stable/library.h>

#include "../../common/isa.h"
#include "row_pass.h"
#include "spherical_loss_kernel.h"

namespace pyops {
namespace {

const SphericalLossKernels& kernels() {
#if defined(__x86_64__)
  return isa::select(baseline::spherical_loss_kernels, avx2::spherical_loss_kernels, avx512::spherical_loss_kernels);
#else
  return baseline::spherical_loss_kernels;
#endif
}

// (mean, m2, sum_log) of every row, merged from its stretches in order.
std::vector<RowMoments> all_moments(const LossArguments& arguments, const Tensor& logits,
                                    const SphericalOptions& options) {
  const int64_t per_row = stretches(arguments.classes);
  std::vector<RowMoments> parts(size_t(arguments.rows * per_row));
  const auto moments = kernels().moments[int(arguments.dtype)];
  const RowsView view(logits, arguments.dtype);
  for_each_stretch(arguments, [&](int64_t row, int64_t stretch, int64_t begin, int64_t size) {
    parts[size_t(row * per_row + stretch)] = moments(view.at(row, begin), size, options);
  });
  if (per_row == 1) return parts;
  std::vector<RowMoments> rows(size_t(arguments.rows), RowMoments{});
  for (int64_t row = 0; row < arguments.rows; ++row) {
    double count = 0;
    for (int64_t stretch = 0; stretch < per_row; ++stretch) {
      const int64_t begin = stretch * kStretch;
      const int64_t size = arguments.classes - begin < kStretch ? arguments.classes - begin : kStretch;
      merge_moments(count, rows[size_t(row)], double(size), parts[size_t(row * per_row + stretch)]);
    }
  }
  return rows;
}

// Loss and statistics of one row from its moments and targets.
template <class Real>
double finish_row(const LossArguments& arguments, const RowsView& logits, const SphericalOptions& options,
                  const RowTargets& targets, const RowMoments& moments, int64_t row, double* statistics) {
  const int64_t count = arguments.targets;
  if (targets.ignored(row)) {
    for (int64_t column = 0; column < kTargetGradient + count; ++column) statistics[column] = 0;
    return 0;
  }
  const double classes = double(arguments.classes), scale = inverse_scale(options, moments, classes);
  RowPartials partials{};
  for (int64_t j = 0; j < count; ++j) {
    const int64_t c = targets.index[size_t(row * count + j)];
    double gradient = 0;
    if (c >= 0) {
      const double o = read_element(logits.at(row, c), arguments.dtype, 0);
      gradient = add_target(options, moments, classes, scale, o, targets.omega[size_t(row * count + j)], partials);
    }
    statistics[kTargetGradient + j] = gradient;
  }
  write_row<Real>(options, statistics, moments, scale, partials);
  return partials.loss;
}

template <class Real>
std::vector<double> finish_rows(const LossArguments& arguments, const Tensor& logits, const SphericalOptions& options,
                                const RowTargets& targets, Tensor& statistics) {
  const std::vector<RowMoments> moments =
      arguments.classes ? all_moments(arguments, logits, options) : std::vector<RowMoments>(size_t(arguments.rows));
  std::vector<double> losses(size_t(arguments.rows));
  double* data = static_cast<double*>(statistics.mutable_data_ptr());
  const int64_t width = kTargetGradient + arguments.targets;
  const RowsView view(logits, arguments.dtype);
  torch::stable::parallel_for(0, arguments.rows, 512, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      losses[size_t(row)] =
          finish_row<Real>(arguments, view, options, targets, moments[size_t(row)], row, data + row * width);
    }
  });
  return losses;
}

std::tuple<Tensor, Tensor, Tensor> spherical_loss_cpu(const Tensor& logits_in, const Tensor& target,
                                                      const OptionalTensor& target_weight, const OptionalTensor& weight,
                                                      int64_t loss, double a, double b, double eps,
                                                      double label_smoothing, int64_t ignore_index, int64_t reduction,
                                                      bool safe_mean, std::optional<ScalarType> out_dtype) {
  const SphericalOptions options = check_spherical_options(loss, a, b, eps, label_smoothing);
  const LossArguments arguments = check_loss_arguments(spherical_op_name(options.loss, false), logits_in, target,
                                                       target_weight, weight, label_smoothing, reduction, out_dtype);
  const RowTargets targets = read_targets(arguments, target, target_weight, weight, ignore_index);
  const Tensor logits = rows_dense(logits_in);
  Tensor statistics = new_tensor(logits, {arguments.rows, kTargetGradient + arguments.targets}, ScalarType::Double);
  const std::vector<double> losses = arguments.dtype == DType::float64
                                         ? finish_rows<double>(arguments, logits, options, targets, statistics)
                                         : finish_rows<float>(arguments, logits, options, targets, statistics);
  const double divisor = mean_divisor(reduction, targets.weight_sum, safe_mean);
  Tensor normalizer = new_tensor(logits, {}, ScalarType::Double);
  *static_cast<double*>(normalizer.mutable_data_ptr()) = divisor;
  return {reduce_rows(logits, losses, reduction, divisor, out_dtype), statistics, normalizer};
}

// The row formula of the backward for run_backward.
struct SphericalRows {
  const LossArguments& arguments;
  const SphericalOptions& options;
  const double* statistics;
  double divisor;
  SphericalLossKernels::Gradient kernel;

  double statistic(int64_t row, int64_t column) const {
    return statistics[row * (kTargetGradient + arguments.targets) + column];
  }
  bool zero(int64_t row) const {
    for (int64_t column = kSlope; column < kTargetGradient + arguments.targets; ++column) {
      if (statistic(row, column) != 0) return false;
    }
    return true;
  }
  SphericalRowGradient scaled(int64_t row, double upstream) const {
    const double scale = upstream / divisor;
    return {statistic(row, kCenter), statistic(row, kInverseScale), scale * statistic(row, kSlope),
            scale * statistic(row, kShift), scale * statistic(row, kSmooth)};
  }
  double value(const SphericalRowGradient& gradient, double o, int64_t) const {
    double value = gradient.slope * ((o - gradient.center) * gradient.inverse_scale) + gradient.shift;
    if (gradient.smooth != 0) value += gradient.smooth * smooth_term(options.loss, o, options.eps);
    return value;
  }
  double target(int64_t row, int64_t j, double upstream) const {
    return upstream / divisor * statistic(row, kTargetGradient + j);
  }
  void run(const char* x, char* out, int64_t, int64_t size, const SphericalRowGradient& gradient,
           bool nontemporal) const {
    kernel(x, out, size, gradient, options, nontemporal);
  }
};

void backward_into(const LossArguments& arguments, const SphericalOptions& options, const Tensor& grad_loss,
                   const Tensor& logits, const Tensor& target, const Tensor& statistics_in, const Tensor& normalizer,
                   Tensor& out, bool nontemporal) {
  const Tensor statistics = as_contiguous(statistics_in);
  const SphericalRows rows{arguments, options, static_cast<const double*>(statistics.const_data_ptr()),
                           *static_cast<const double*>(normalizer.const_data_ptr()),
                           kernels().gradient[int(arguments.dtype)]};
  run_backward(arguments, rows, read_target_indices(arguments, target, statistics, kTargetGradient),
               read_row_gradients(arguments, grad_loss), logits, out, nontemporal);
}

Tensor spherical_loss_backward_cpu(const Tensor& grad_loss, const Tensor& logits_in, const Tensor& target,
                                   const Tensor& statistics, const Tensor& normalizer, int64_t loss, double eps) {
  const SphericalOptions options{check_spherical_loss(loss), 1, 0, eps, 0};
  const LossArguments arguments = check_backward_arguments(spherical_op_name(options.loss, true), grad_loss, logits_in,
                                                           target, statistics, normalizer, kTargetGradient, 1);
  const Tensor logits = rows_dense(logits_in);
  LargeOutput out = new_large_output(logits, arguments.rows, arguments.classes);
  backward_into(arguments, options, grad_loss, logits, target, statistics, normalizer, out.tensor,
                use_nontemporal(arguments, out));
  return out.tensor;
}

void spherical_loss_backward_cpu_(const Tensor& grad_loss, Tensor logits, const Tensor& target,
                                  const Tensor& statistics, const Tensor& normalizer, int64_t loss, double eps) {
  const SphericalOptions options{check_spherical_loss(loss), 1, 0, eps, 0};
  const LossArguments arguments = check_backward_arguments(spherical_op_name(options.loss, true), grad_loss, logits,
                                                           target, statistics, normalizer, kTargetGradient, 1);
  check_rows_distinct(arguments, logits);
  Tensor dense = rows_dense(logits);
  backward_into(arguments, options, grad_loss, dense, target, statistics, normalizer, dense, false);
  if (dense.const_data_ptr() != logits.const_data_ptr()) torch::stable::copy_(logits, dense);
}

}  // namespace
}  // namespace pyops

STABLE_TORCH_LIBRARY_IMPL(pyops, CPU, m) {
  m.impl("spherical_loss", TORCH_BOX(&pyops::spherical_loss_cpu));
  m.impl("spherical_loss_backward", TORCH_BOX(&pyops::spherical_loss_backward_cpu));
  m.impl("spherical_loss_backward_", TORCH_BOX(&pyops::spherical_loss_backward_cpu_));
}
