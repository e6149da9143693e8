#include "factored_product.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "../../common/cpu/gemm.h"
#include "../../common/cpu/workspace.h"
#include "../../common/isa.h"
#include "factored_linear_kernel.h"

namespace pyops {
namespace {

template <class Real>
const FactoredRowKernels<Real>& kernels();

template <>
const FactoredRowKernels<float>& kernels<float>() {
#if defined(__x86_64__)
  return isa::select(baseline::factored_row_kernels_float32, avx2::factored_row_kernels_float32,
                     avx512::factored_row_kernels_float32);
#else
  return baseline::factored_row_kernels_float32;
#endif
}

template <>
const FactoredRowKernels<double>& kernels<double>() {
#if defined(__x86_64__)
  return isa::select(baseline::factored_row_kernels_float64, avx2::factored_row_kernels_float64,
                     avx512::factored_row_kernels_float64);
#else
  return baseline::factored_row_kernels_float64;
#endif
}

// Rows of this many numbers are worth a thread.
template <class Function>
void for_each_row(int64_t rows, int64_t numbers, const Function& f) {
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, (int64_t(1) << 15) / std::max<int64_t>(numbers, 1)),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t row = begin; row < end; ++row) f(row);
                              });
}

// One target with a gradient. Sorted by class, so that each row of V is read and written once.
struct Entry {
  int64_t c, row;
  double gradient;
};

std::vector<Entry> sorted_entries(const FactoredTargets& targets, const double* partials) {
  const int64_t width = kFactoredTargets + targets.targets;
  std::vector<Entry> entries;
  entries.reserve(size_t(targets.rows * targets.targets));
  for (int64_t row = 0; row < targets.rows; ++row) {
    for (int64_t j = 0; j < targets.targets; ++j) {
      const double gradient = partials[row * width + kFactoredTargets + j];
      const int64_t c = targets.index[row * targets.targets + j];
      if (c >= 0 && gradient != 0) entries.push_back({c, row, gradient});
    }
  }
  std::stable_sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) { return a.c < b.c; });
  return entries;
}

// Where each class begins, and the end.
std::vector<int64_t> class_borders(const std::vector<Entry>& entries) {
  std::vector<int64_t> borders;
  for (size_t i = 0; i < entries.size(); ++i) {
    if (i == 0 || entries[i].c != entries[i - 1].c) borders.push_back(int64_t(i));
  }
  borders.push_back(int64_t(entries.size()));
  return borders;
}

}  // namespace

template <class Real>
void widen_rows(const void* x, DType dtype, int64_t stride, int64_t rows, int64_t columns, Real* out,
                int64_t out_stride) {
  const auto widen = kernels<Real>().widen[int(dtype)];
  const int64_t bytes = dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
  for (int64_t row = 0; row < rows; ++row) {
    widen(static_cast<const char*>(x) + row * stride * bytes, columns, out + row * out_stride);
  }
}

template <class Real>
void narrow_rows(const Real* x, int64_t stride, int64_t rows, int64_t columns, void* out, DType dtype) {
  const auto narrow = kernels<Real>().narrow[int(dtype)];
  const int64_t bytes = dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
  for (int64_t row = 0; row < rows; ++row) {
    narrow(x + row * stride, columns, static_cast<char*>(out) + row * columns * bytes);
  }
}

template <class Real>
void factored_forward(const FactoredState<Real>& state, const FactoredTargets& targets, const double* omega,
                      const SphericalOptions& options, const Real* H, Real* HC, Real* P, double* partials,
                      double* losses) {
  const FactoredRowKernels<Real>& kernel = kernels<Real>();
  const int64_t d = state.features, count = targets.targets, width = kFactoredTargets + count;
  const double classes = double(state.classes);
  gemm<Real>(targets.rows, d, d, dense(H, d), dense<Real>(state.C, d), HC, d);
  gemm<Real>(targets.rows, d, d, dense(H, d), dense<Real>(state.U, d).transposed(), P, d);
  for_each_row(targets.rows, d * (3 + count), [&](int64_t row) {
    const int64_t* index = targets.index + row * count;
    double* out = partials + row * width;
    std::fill(out, out + width, 0.0);
    losses[row] = 0;
    if (std::all_of(index, index + count, [](int64_t c) { return c < 0; })) return;
    for (int64_t j = 0; j < count; ++j) {
      if (index[j] >= 0) __builtin_prefetch(state.row(index[j]));
    }
    const Real* h = H + row * d;
    const double squares = kernel.dot(h, HC + row * d, d);
    const RowMoments moments = {kernel.dot(h, state.wbar, d) / classes, squares < 0 ? 0 : squares, 0};
    const double offset = kernel.dot(h, state.omega, d), scale = inverse_scale(options, moments, classes);
    RowPartials sums{};
    for (int64_t j = 0; j < count; ++j) {
      if (index[j] < 0) continue;
      const double o = kernel.dot_row[state.wide_V](state.row(index[j]), P + row * d, d) + offset;
      out[kFactoredTargets + j] = add_target(options, moments, classes, scale, o, omega[row * count + j], sums);
    }
    out[kBeta] = sums.slope * scale;
    out[kFactoredShift] = options.loss == SphericalLoss::z ? sums.shift : sums.shift + out[kBeta] * moments.mean;
    losses[row] = sums.loss;
  });
}

template <class Real>
void factored_gradient(const FactoredState<Real>& state, const FactoredTargets& targets, const double* partials,
                       const Real* HC, Real* Z, Real* dH) {
  const FactoredRowKernels<Real>& kernel = kernels<Real>();
  const int64_t d = state.features, count = targets.targets, width = kFactoredTargets + count;
  Workspace workspace(Workspace::kStep);
  Real* R = workspace.take<Real>(targets.rows * d);  // sum_j g_j V[c_j]
  for_each_row(targets.rows, d * (2 + count), [&](int64_t row) {
    const double* g = partials + row * width + kFactoredTargets;
    std::fill(R + row * d, R + (row + 1) * d, Real(0));
    double sum = 0;
    for (int64_t j = 0; j < count; ++j) {
      const int64_t c = targets.index[row * count + j];
      if (c < 0 || g[j] == 0) continue;
      kernel.add_row[state.wide_V](state.row(c), Real(g[j]), R + row * d, d);
      sum += g[j];
    }
    for (int64_t k = 0; k < d; ++k) Z[row * d + k] = Real(sum) * state.omega[k];
  });
  gemm<Real>(targets.rows, d, d, dense<Real>(R, d), dense<Real>(state.U, d), Z, d, {.accumulate = true});
  for_each_row(targets.rows, 2 * d, [&](int64_t row) {
    const double* p = partials + row * width;
    kernel.combine(HC + row * d, Real(p[kBeta]), Z + row * d, Real(1), dH + row * d, d);
    kernel.add_row[sizeof(Real) == 8](state.wbar, Real(p[kFactoredShift]), dH + row * d, d);
  });
}

namespace {

// One step: its inputs, its workspace, its parts in the order in which they run.
template <class Real>
class Step {
 public:
  Step(const FactoredState<Real>& state, const FactoredTargets& targets, const double* partials, const Real* H,
       const Real* HC, const Real* P, const Real* Z, double rate, double keep)
      : state_(state),
        kernel_(kernels<Real>()),
        m_(targets.rows),
        d_(state.features),
        width_(kFactoredTargets + targets.targets),
        count_(targets.targets),
        partials_(partials),
        H_(H),
        HC_(HC),
        P_(P),
        Z_(Z),
        rate_(Real(rate)),
        keep_(Real(keep)),
        workspace_(Workspace::kStep),
        entries_(sorted_entries(targets, partials)),
        borders_(class_borders(entries_)),
        by_rows_(m_ <= d_),
        n_(std::min(m_, d_)),
        pivots_(size_t(n_)) {
    const int64_t tall = m_ * d_, square = d_ * d_;
    // Two more squares where the sums go through d x d matrices.
    Real* next =
        workspace_.take<Real>(3 * tall + 3 * square + n_ * n_ + (by_rows_ ? n_ * n_ : 3 * square) + 2 * m_ + 4 * d_);
    const auto take = [&](int64_t size) {
      Real* begin = next;
      next += size;
      return begin;
    };
    T_ = take(tall), X_ = take(tall), rows_ = take(tall);
    A_ = take(square), dU_ = take(square), dU_inv_ = take(square);
    factor_ = take(n_ * n_);
    extra_ = take(by_rows_ ? n_ * n_ : 3 * square);
    beta_ = take(m_), y_ = take(m_);
    omega_step_ = take(d_), wbar_step_ = take(d_), yH_ = take(d_), sum_ = take(d_);
  }

  FactoredStep run(bool shift_invariant) {
    vectors();
    second_order_rows();
    if (by_rows_) {
      change_of_C_by_rows();
      factor_by_rows();
    } else {
      factor_by_features();
      change_of_C_by_features();
    }
    const Pivots pivots = lu_factor(factor_, n_, n_, pivots_.data());
    if (!(finite(A_, d_ * d_) && finite(omega_step_, d_) && finite(wbar_step_, d_) &&
          pivots.largest == pivots.largest)) {
      return {FactoredOutcome::skipped, 0, 0};
    }
    if (!(pivots.smallest > kSmallestPivotRatio * std::max(pivots.largest, 1.0)))
      return {FactoredOutcome::singular, 0, 0};
    solve();
    if (!(finite(dU_, d_ * d_) && finite(dU_inv_, d_ * d_) && finite(X_, m_ * d_))) {
      return {FactoredOutcome::singular, 0, 0};
    }
    return apply(shift_invariant);
  }

 private:
  static constexpr double kSmallestPivotRatio = 1e-6;  // as in factored_reference.py

  double partial(int64_t row, int column) const { return partials_[row * width_ + column]; }
  bool finite(const Real* x, int64_t n) const { return kernel_.finite(x, n); }
  void add(const Real* x, Real factor, Real* out) const { kernel_.add_row[sizeof(Real) == 8](x, factor, out, d_); }
  void product(int64_t rows, int64_t columns, int64_t depth, MatrixView<Real> a, MatrixView<Real> b, Real* c,
               const GemmOptions<Real>& options = {}) const {
    gemm<Real>(rows, columns, depth, a, b, c, columns, options);
  }
  MatrixView<Real> H() const { return dense(H_, d_); }

  // beta, y = the sums of the targets' gradients, and what is added to omega and wbar.
  void vectors() {
    const double classes = double(state_.classes);
    std::fill(omega_step_, omega_step_ + d_, Real(0));
    std::fill(wbar_step_, wbar_step_ + d_, Real(0));
    std::fill(yH_, yH_ + d_, Real(0));
    for (int64_t row = 0; row < m_; ++row) {
      double y = 0;
      for (int64_t j = 0; j < count_; ++j) y += partial(row, kFactoredTargets + int(j));
      beta_[row] = Real(partial(row, kBeta));
      y_[row] = Real(y);
      const Real* h = H_ + row * d_;
      const double shift = partial(row, kFactoredShift), mean = kernel_.dot(h, state_.wbar, d_) / classes;
      add(h, Real(partial(row, kBeta) * (kernel_.dot(h, state_.omega, d_) - mean) + shift), omega_step_);
      add(h, Real(classes * shift + y), wbar_step_);
      add(h, y_[row], yH_);
    }
  }

  // rows <- what the targets that rows share add to the second-order term, half the rate times it: sums of G_Y H and
  // of y y^T H / D.
  void second_order_rows() {
    const Real share = Real(1 / double(state_.classes));
    for (int64_t row = 0; row < m_; ++row) {
      for (int64_t k = 0; k < d_; ++k) rows_[row * d_ + k] = -y_[row] * share * yH_[k];
    }
    for (size_t segment = 0; segment + 1 < borders_.size(); ++segment) {
      sum_of_rows(segment, H_);
      for (int64_t i = borders_[segment]; i < borders_[segment + 1]; ++i) {
        add(sum_, Real(entries_[size_t(i)].gradient), rows_ + entries_[size_t(i)].row * d_);
      }
    }
  }

  // sum <- the rows of a matrix that have a class as a target, times their gradients.
  void sum_of_rows(size_t segment, const Real* matrix) {
    std::fill(sum_, sum_ + d_, Real(0));
    for (int64_t i = borders_[segment]; i < borders_[segment + 1]; ++i) {
      add(matrix + entries_[size_t(i)].row * d_, Real(entries_[size_t(i)].gradient), sum_);
    }
  }

  // out <- beta_share * beta HC + Z - y wbar^T / D, one row of T.
  void centred_row(int64_t row, Real beta_share, Real* out) const {
    kernel_.combine(HC_ + row * d_, beta_share * beta_[row], Z_ + row * d_, Real(1), out + row * d_, d_);
    add(state_.wbar, Real(-double(y_[row]) / double(state_.classes)), out + row * d_);
  }

  // A <- T^T H with T = beta HC + Z - rate / 2 (M H): C loses rate (A + A^T). M = N + G_Y - y y^T / D, and with
  // F = (beta HC / 2 + Z) H^T it is N = F B + (F B)^T.
  void change_of_C_by_rows() {
    Real* F = extra_;
    for_each_row(m_, 2 * d_, [&](int64_t row) { centred_row(row, Real(0.5), T_); });
    product(m_, m_, d_, dense<Real>(T_, d_), H().transposed(), F);
    for (int64_t i = 0; i < m_; ++i) {
      for (int64_t j = 0; j <= i; ++j) {
        const Real value = F[i * m_ + j] * beta_[j] + F[j * m_ + i] * beta_[i];
        F[i * m_ + j] = F[j * m_ + i] = value;
      }
    }
    for_each_row(m_, 3 * d_, [&](int64_t row) {
      centred_row(row, Real(1), T_);
      add(rows_ + row * d_, -rate_ / 2, T_ + row * d_);
    });
    product(m_, d_, m_, dense<Real>(F, m_), H(), T_, {.alpha = -rate_ / 2, .accumulate = true});
    product(d_, d_, m_, dense<Real>(T_, d_).transposed(), H(), A_);
  }

  // factor <- I - rate H H^T B
  void factor_by_rows() {
    product(m_, m_, d_, H(), H().transposed(), factor_, {.lower = true});
    mirror_lower(factor_, m_, m_);
    for (int64_t i = 0; i < m_; ++i) {
      for (int64_t j = 0; j < m_; ++j) factor_[i * m_ + j] *= -rate_ * beta_[j];
      factor_[i * m_ + i] += 1;
    }
  }

  // S = H^T B H, and factor <- I - rate S
  void factor_by_features() {
    Real* S = extra_;
    product(d_, d_, m_, H().transposed(), H(), S, {.lower = true, .depth_scale = beta_});
    mirror_lower(S, d_, d_);
    for (int64_t i = 0; i < d_ * d_; ++i) factor_[i] = -rate_ * S[i];
    for (int64_t i = 0; i < d_; ++i) factor_[i * d_ + i] += 1;
  }

  // The same A up to what its symmetric part does not see: with L = Z^T H it is T^T H = C S + L before the second-order
  // term, and H^T N H = S (C S / 2 + L) and its transpose.
  void change_of_C_by_features() {
    Real *S = extra_, *L = extra_ + d_ * d_, *CS = extra_ + 2 * d_ * d_;
    for_each_row(m_, 2 * d_, [&](int64_t row) { centred_row(row, Real(0), T_); });
    product(d_, d_, m_, dense<Real>(T_, d_).transposed(), H(), L);
    product(d_, d_, d_, dense<Real>(state_.C, d_), dense<Real>(S, d_), CS);
    kernel_.combine(CS, Real(1), L, Real(1), A_, d_ * d_);
    kernel_.combine(CS, Real(0.5), L, Real(1), L, d_ * d_);
    product(d_, d_, d_, dense<Real>(S, d_), dense<Real>(L, d_), A_, {.alpha = -rate_, .accumulate = true});
    product(d_, d_, m_, dense<Real>(rows_, d_).transposed(), H(), A_, {.alpha = -rate_ / 2, .accumulate = true});
  }

  // dU, dU_inv and X = H U_new^-1.
  void solve() {
    if (by_rows_) {
      product(m_, d_, d_, H(), dense<Real>(state_.U_inv, d_), X_);
      lu_solve(factor_, m_, m_, pivots_.data(), X_, d_, d_);
      product(d_, d_, m_, H().transposed(), dense<Real>(X_, d_), dU_inv_, {.depth_scale = beta_});
      product(d_, d_, m_, dense(P_, d_).transposed(), H(), dU_, {.depth_scale = beta_});
    } else {
      Real *S = extra_, *inverse = extra_ + d_ * d_;
      std::copy(state_.U_inv, state_.U_inv + d_ * d_, inverse);
      lu_solve(factor_, d_, d_, pivots_.data(), inverse, d_, d_);
      product(d_, d_, d_, dense<Real>(S, d_), dense<Real>(inverse, d_), dU_inv_);
      product(d_, d_, d_, dense<Real>(state_.U, d_), dense<Real>(S, d_), dU_);
      product(m_, d_, d_, H(), dense<Real>(inverse, d_), X_);
    }
  }

  FactoredStep apply(bool shift_invariant) {
    const int64_t square = d_ * d_;
    constexpr int64_t kBlock = 16;  // A is read by columns too
    for (int64_t i0 = 0; i0 < d_; i0 += kBlock) {
      for (int64_t j0 = 0; j0 <= i0; j0 += kBlock) {
        for (int64_t i = i0; i < std::min(d_, i0 + kBlock); ++i) {
          for (int64_t j = j0; j < std::min(i + 1, j0 + kBlock); ++j) {
            const Real sum = A_[i * d_ + j] + A_[j * d_ + i];
            const Real value = (state_.C[i * d_ + j] - rate_ * sum) * (keep_ * keep_);
            state_.C[i * d_ + j] = state_.C[j * d_ + i] = value;
          }
        }
      }
    }
    const double squares = kernel_.advance(dU_, -rate_, keep_, state_.U, square);
    const double inverse_squares = kernel_.advance(dU_inv_, rate_, 1 / keep_, state_.U_inv, square);
    kernel_.advance(omega_step_, -rate_, keep_, state_.omega, d_);
    kernel_.advance(wbar_step_, shift_invariant ? Real(0) : -rate_, keep_, state_.wbar, d_);
    for (size_t segment = 0; segment + 1 < borders_.size(); ++segment) {
      sum_of_rows(segment, X_);
      kernel_.subtract_row[state_.wide_V](state_.row(entries_[size_t(borders_[segment])].c), sum_, rate_, d_);
    }
    return {FactoredOutcome::factored, std::sqrt(squares), std::sqrt(inverse_squares)};
  }

  const FactoredState<Real>& state_;
  const FactoredRowKernels<Real>& kernel_;
  int64_t m_, d_, width_, count_;
  const double* partials_;
  const Real *H_, *HC_, *P_, *Z_;
  Real rate_, keep_;
  Workspace workspace_;
  std::vector<Entry> entries_;
  std::vector<int64_t> borders_;
  bool by_rows_;
  int64_t n_;  // of the matrix that is factored
  std::vector<int64_t> pivots_;
  Real *T_, *X_, *rows_, *A_, *dU_, *dU_inv_, *factor_, *extra_, *beta_, *y_, *omega_step_, *wbar_step_, *yH_, *sum_;
};

}  // namespace

template <class Real>
FactoredStep factored_step(const FactoredState<Real>& state, const FactoredTargets& targets, const double* partials,
                           const Real* H, const Real* HC, const Real* P, const Real* Z, double rate, double keep,
                           bool shift_invariant) {
  return Step<Real>(state, targets, partials, H, HC, P, Z, rate, keep).run(shift_invariant);
}

#define PYOPS_INSTANTIATE(Real)                                                                                       \
  template void widen_rows(const void*, DType, int64_t, int64_t, int64_t, Real*, int64_t);                            \
  template void narrow_rows(const Real*, int64_t, int64_t, int64_t, void*, DType);                                    \
  template void factored_forward(const FactoredState<Real>&, const FactoredTargets&, const double*,                   \
                                 const SphericalOptions&, const Real*, Real*, Real*, double*, double*);               \
  template void factored_gradient(const FactoredState<Real>&, const FactoredTargets&, const double*, const Real*,     \
                                  Real*, Real*);                                                                      \
  template FactoredStep factored_step(const FactoredState<Real>&, const FactoredTargets&, const double*, const Real*, \
                                      const Real*, const Real*, const Real*, double, double, bool);
PYOPS_INSTANTIATE(float)
PYOPS_INSTANTIATE(double)
#undef PYOPS_INSTANTIATE

}  // namespace pyops
