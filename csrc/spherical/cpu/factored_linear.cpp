// CPU front of the factored layer: check, lay out, allocate, run.
#include <torch/csrc/stable/library.h>

#include "../factored_arguments.h"
#include "factored_product.h"
#include "row_pass.h"

namespace pyops {
namespace {

// f(Real()) for the state's type.
template <class Function>
auto by_state(const FactoredArguments& arguments, const Function& f) {
  return arguments.state == DType::float64 ? f(double()) : f(float());
}

template <class Real>
FactoredState<Real> state_of(const FactoredArguments& arguments, const Tensor& V, const Tensor& U, const Tensor* U_inv,
                             const Tensor& omega, const Tensor& wbar, const Tensor* C) {
  const auto data = [](const Tensor* tensor) { return tensor ? static_cast<Real*>(tensor->data_ptr()) : nullptr; };
  return {V.data_ptr(),
          arguments.V == DType::float64,
          V.numel() ? V.stride(0) : arguments.features,
          data(&U),
          data(U_inv),
          data(&omega),
          data(&wbar),
          data(C),
          arguments.classes,
          arguments.features};
}

LossArguments loss_arguments(const FactoredArguments& arguments) {
  return {arguments.op, arguments.rows, arguments.classes, arguments.targets, arguments.state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> factored_linear_cpu(
    const Tensor& h_in, const Tensor& target, const OptionalTensor& target_weight, const OptionalTensor& weight,
    const Tensor& V_in, const Tensor& U_in, const Tensor& omega_in, const Tensor& wbar_in, const Tensor& C_in,
    double bias_scale, int64_t loss, double a, double b, double eps, double label_smoothing, int64_t ignore_index,
    int64_t reduction, bool safe_mean) {
  const char* op = "factored_linear";
  const SphericalOptions options = check_spherical_options(loss, a, b, eps, label_smoothing);
  const FactoredArguments arguments = check_factored(op, V_in, U_in, target);
  check_strided(op, "h", h_in);
  const DType h_dtype = check_floating(op, "h", h_in);
  check_device(op, "h", h_in, U_in, "U");
  const int64_t d = arguments.features, own = d - (bias_scale != 0);
  PYOPS_CHECK(h_in.dim() == 2 && h_in.size(0) == arguments.rows && h_in.size(1) == own, op, "h",
              "have shape [" + std::to_string(arguments.rows) + ", " + std::to_string(own) + "]", shape_name(h_in));
  check_factored_state(arguments, "omega", omega_in, 1, U_in);
  check_factored_state(arguments, "wbar", wbar_in, 1, U_in);
  check_factored_state(arguments, "C", C_in, 2, U_in);
  PYOPS_CHECK(!needs_sum_log(options), op, "label_smoothing", "be 0 for this loss, which would need all logits",
              label_smoothing);
  PYOPS_CHECK(label_smoothing >= 0 && label_smoothing <= 1, op, "label_smoothing", "be in [0, 1]", label_smoothing);
  PYOPS_CHECK(reduction >= kReductionNone && reduction <= kReductionSum, op, "reduction",
              "be 0 (none), 1 (mean) or 2 (sum)", reduction);
  const ScalarType state = scalar_type_of(arguments.state);
  if (target_weight) {
    check_factored_like(arguments, "target_weight", *target_weight, U_in);
    const bool same = target_weight->dim() == target.dim() && target_weight->size(0) == target.size(0) &&
                      (target.dim() == 1 || target_weight->size(1) == target.size(1));
    PYOPS_CHECK(same, op, "target_weight", "have the shape of target, " + shape_name(target),
                shape_name(*target_weight));
  }
  if (weight) {
    check_factored_like(arguments, "weight", *weight, U_in);
    PYOPS_CHECK(weight->dim() == 1 && weight->size(0) == arguments.classes, op, "weight",
                "have shape [" + std::to_string(arguments.classes) + "]", shape_name(*weight));
  }
  const LossArguments rows = loss_arguments(arguments);
  const RowTargets targets = read_targets(rows, target, target_weight, weight, ignore_index);
  const Tensor h = rows_dense(h_in), U = as_contiguous(U_in), omega = as_contiguous(omega_in);
  const Tensor wbar = as_contiguous(wbar_in), C = as_contiguous(C_in), V = rows_dense(V_in);
  Tensor partials = new_tensor(U, {arguments.rows, kFactoredTargets + arguments.targets}, ScalarType::Double);
  Tensor H = new_tensor(U, {arguments.rows, d}, state), HC = new_tensor(U, {arguments.rows, d}, state);
  Tensor P = new_tensor(U, {arguments.rows, d}, state);
  std::vector<double> losses(size_t(arguments.rows));
  by_state(arguments, [&]<class Real>(Real) {
    Real* features = static_cast<Real*>(H.mutable_data_ptr());
    widen_rows<Real>(h.const_data_ptr(), h_dtype, h.numel() ? h.stride(0) : 0, arguments.rows, own, features, d);
    for (int64_t row = 0; row < arguments.rows; ++row) {
      if (targets.ignored(row)) {  // may hold anything
        std::fill(features + row * d, features + (row + 1) * d, Real(0));
      } else if (own < d) {
        features[row * d + own] = Real(bias_scale);
      }
    }
    factored_forward<Real>(state_of<Real>(arguments, V, U, nullptr, omega, wbar, &C),
                           {targets.index.data(), arguments.rows, arguments.targets}, targets.omega.data(), options,
                           features, static_cast<Real*>(HC.mutable_data_ptr()),
                           static_cast<Real*>(P.mutable_data_ptr()), static_cast<double*>(partials.mutable_data_ptr()),
                           losses.data());
  });
  const double divisor = mean_divisor(reduction, targets.weight_sum, safe_mean);
  Tensor normalizer = new_tensor(U, {}, ScalarType::Double);
  *static_cast<double*>(normalizer.mutable_data_ptr()) = divisor;
  const ScalarType loss_dtype = h_dtype == DType::float64 ? ScalarType::Double : ScalarType::Float;
  return {reduce_rows(U, losses, reduction, divisor, loss_dtype), partials, normalizer, H, HC, P};
}

std::tuple<Tensor, Tensor, Tensor> factored_linear_gradient_cpu(const Tensor& grad_loss, const Tensor& target,
                                                                const Tensor& partials_in, const Tensor& normalizer,
                                                                const Tensor& HC_in, const Tensor& V_in,
                                                                const Tensor& U_in, const Tensor& omega_in,
                                                                const Tensor& wbar_in) {
  const char* op = "factored_linear_gradient";
  const FactoredArguments arguments = check_factored(op, V_in, U_in, target);
  const int64_t rows = arguments.rows, d = arguments.features, width = kFactoredTargets + arguments.targets;
  const ScalarType state = scalar_type_of(arguments.state);
  check_strided(op, "grad_loss", grad_loss);
  check_device(op, "grad_loss", grad_loss, U_in, "U");
  check_floating(op, "grad_loss", grad_loss);
  PYOPS_CHECK(grad_loss.dim() == 0 || (grad_loss.dim() == 1 && grad_loss.size(0) == rows), op, "grad_loss",
              "have shape [] or [" + std::to_string(rows) + "]", shape_name(grad_loss));
  check_factored_rows(arguments, "partials", partials_in, width, ScalarType::Double, U_in);
  check_strided(op, "normalizer", normalizer);
  check_device(op, "normalizer", normalizer, U_in, "U");
  PYOPS_CHECK(is_dtype(normalizer, ScalarType::Double) && normalizer.numel() == 1, op, "normalizer",
              "be one float64 number", dtype_name(normalizer), " ", shape_name(normalizer));
  check_factored_rows(arguments, "HC", HC_in, d, state, U_in);
  check_factored_state(arguments, "omega", omega_in, 1, U_in);
  check_factored_state(arguments, "wbar", wbar_in, 1, U_in);
  const Tensor partials = as_contiguous(partials_in), HC = as_contiguous(HC_in), U = as_contiguous(U_in);
  const Tensor omega = as_contiguous(omega_in), wbar = as_contiguous(wbar_in), V = rows_dense(V_in);
  const LossArguments loss = loss_arguments(arguments);
  const std::vector<int64_t> index = read_target_indices(loss, target, partials, kFactoredTargets);
  const std::vector<double> upstream = read_row_gradients(loss, grad_loss);
  Tensor scaled = new_tensor(U, {rows, width}, ScalarType::Double);
  const double divisor = *static_cast<const double*>(normalizer.const_data_ptr());
  const double* from = static_cast<const double*>(partials.const_data_ptr());
  double* to = static_cast<double*>(scaled.mutable_data_ptr());
  for (int64_t row = 0; row < rows; ++row) {
    const double* p = from + row * width;
    const bool counts = std::any_of(p, p + width, [](double value) { return value != 0; });
    const double scale = counts ? upstream[size_t(row)] / divisor : 0;
    for (int64_t k = 0; k < width; ++k) to[row * width + k] = p[k] * scale;
  }
  Tensor grad = new_tensor(U, {rows, d}, state), Z = new_tensor(U, {rows, d}, state);
  by_state(arguments, [&]<class Real>(Real) {
    factored_gradient<Real>(state_of<Real>(arguments, V, U, nullptr, omega, wbar, nullptr),
                            {index.data(), rows, arguments.targets}, to, static_cast<const Real*>(HC.const_data_ptr()),
                            static_cast<Real*>(Z.mutable_data_ptr()), static_cast<Real*>(grad.mutable_data_ptr()));
  });
  return {grad, Z, scaled};
}

// A tensor to work on in place of one that is written: itself where its layout allows, else a copy that goes back.
class Written {
 public:
  Written(const Tensor& tensor, bool any_row_stride)
      : tensor_(tensor), work_(any_row_stride ? rows_dense(tensor) : as_contiguous(tensor)) {}
  const Tensor& work() const { return work_; }
  void give_back() {
    if (work_.const_data_ptr() != tensor_.const_data_ptr()) torch::stable::copy_(tensor_, work_);
  }

 private:
  Tensor tensor_, work_;
};

Tensor factored_linear_step_cpu(Tensor V_in, Tensor U_in, Tensor U_inv_in, Tensor omega_in, Tensor wbar_in, Tensor C_in,
                                const Tensor& target, const Tensor& partials_in, const Tensor& H_in,
                                const Tensor& HC_in, const Tensor& P_in, const Tensor& Z_in, double rate, double keep,
                                bool shift_invariant) {
  const char* op = "factored_linear_step";
  const FactoredArguments arguments = check_factored(op, V_in, U_in, target);
  const int64_t d = arguments.features;
  const ScalarType state = scalar_type_of(arguments.state);
  check_factored_distinct(arguments, "V", V_in);
  const std::initializer_list<std::tuple<const char*, const Tensor*, int64_t>> parts = {
      {"U", &U_in, 2}, {"U_inv", &U_inv_in, 2}, {"omega", &omega_in, 1}, {"wbar", &wbar_in, 1}, {"C", &C_in, 2}};
  for (const auto& [name, tensor, dimensions] : parts) {
    check_factored_state(arguments, name, *tensor, dimensions, U_in);
    check_factored_distinct(arguments, name, *tensor);
  }
  check_factored_rows(arguments, "partials", partials_in, kFactoredTargets + arguments.targets, ScalarType::Double,
                      U_in);
  const std::initializer_list<std::pair<const char*, const Tensor*>> rows = {
      {"H", &H_in}, {"HC", &HC_in}, {"P", &P_in}, {"Z", &Z_in}};
  for (const auto& [name, tensor] : rows) check_factored_rows(arguments, name, *tensor, d, state, U_in);
  PYOPS_CHECK(rate >= 0 && rate < HUGE_VAL, op, "rate", "be finite and at least 0", rate);
  PYOPS_CHECK(keep > 0 && keep <= 1, op, "keep", "be in (0, 1]", keep);
  const Tensor partials = as_contiguous(partials_in), H = as_contiguous(H_in), HC = as_contiguous(HC_in);
  const Tensor P = as_contiguous(P_in), Z = as_contiguous(Z_in);
  const std::vector<int64_t> index = read_target_indices(loss_arguments(arguments), target, partials, kFactoredTargets);
  Written V(V_in, true), U(U_in, false), U_inv(U_inv_in, false), omega(omega_in, false), wbar(wbar_in, false);
  Written C(C_in, false);
  Tensor outcome = new_tensor(U_in, {3}, ScalarType::Double);
  const FactoredStep step = by_state(arguments, [&]<class Real>(Real) {
    const auto data = [](const Tensor& tensor) { return static_cast<const Real*>(tensor.const_data_ptr()); };
    return factored_step<Real>(
        state_of<Real>(arguments, V.work(), U.work(), &U_inv.work(), omega.work(), wbar.work(), &C.work()),
        {index.data(), arguments.rows, arguments.targets}, static_cast<const double*>(partials.const_data_ptr()),
        data(H), data(HC), data(P), data(Z), rate, keep, shift_invariant);
  });
  if (step.outcome == FactoredOutcome::factored) {
    for (Written* written : {&V, &U, &U_inv, &omega, &wbar, &C}) written->give_back();
  }
  double* result = static_cast<double*>(outcome.mutable_data_ptr());
  result[0] = double(step.outcome);
  result[1] = step.norm;
  result[2] = step.inverse_norm;
  return outcome;
}

}  // namespace
}  // namespace pyops

STABLE_TORCH_LIBRARY_IMPL(pyops, CPU, m) {
  m.impl("factored_linear", TORCH_BOX(&pyops::factored_linear_cpu));
  m.impl("factored_linear_gradient", TORCH_BOX(&pyops::factored_linear_gradient_cpu));
  m.impl("factored_linear_step_", TORCH_BOX(&pyops::factored_linear_step_cpu));
}
