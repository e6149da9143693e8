// Value tests of the torch-free CPU kernels, for processors that torch is not installed for: compiled with a cross
// compiler and run under its user-mode emulator (test_kernel_values.py). Each kernel is compared with the plain sum
// in double or wider; the last line counts the cases.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "../../csrc/spherical/cpu/cross_entropy_kernel.h"
#include "../../csrc/spherical/cpu/spherical_loss_kernel.h"

using namespace pyops;

namespace {

int cases = 0, failures = 0;

void expect(bool holds, const char* what, int dtype, int64_t n, double value, double exact) {
  ++cases;
  if (holds) return;
  ++failures;
  std::printf("FAILED %s dtype %d n %ld: %.17g, exact %.17g\n", what, dtype, long(n), value, exact);
}

// |value - exact| <= relative * scale: float32 sums over blocks, so a few units in the last place of the scale.
void expect_near(const char* what, int dtype, int64_t n, double value, double exact, double relative, double scale) {
  expect(std::fabs(value - exact) <= relative * scale, what, dtype, n, value, exact);
}

double unit(int dtype) {  // half an ulp at 1 of the element type
  const double units[4] = {6e-8, 1.2e-16, 4e-3, 5e-4};
  return units[dtype];
}

struct Sample {
  std::vector<char> bytes;
  std::vector<double> exact;  // the rounded elements, as the kernel sees them
};

Sample make_sample(int dtype, int64_t n, double offset) {
  std::mt19937_64 generator(uint64_t(n) * 7919 + uint64_t(dtype));
  std::normal_distribution<double> normal(offset, 2);
  Sample sample{std::vector<char>(size_t(n) * 8 + 8), std::vector<double>(size_t(n))};
  for (int64_t i = 0; i < n; ++i) {
    write_element(sample.bytes.data(), DType(dtype), i, normal(generator));
    sample.exact[size_t(i)] = read_element(sample.bytes.data(), DType(dtype), i);
  }
  return sample;
}

void check_moments(int dtype, int64_t n, double offset) {
  const Sample sample = make_sample(dtype, n, offset);
  long double sum = 0, squares = 0;  // wider than the float64 kernel under test
  for (double x : sample.exact) sum += x;
  for (double x : sample.exact) squares += (x - sum / n) * (x - sum / n);
  const double mean = double(sum / n), m2 = double(squares);
  const double relative = dtype == 1 ? 1e-13 : 2e-6;
  for (const SphericalLoss loss : {SphericalLoss::z, SphericalLoss::taylor_softmax, SphericalLoss::spherical_softmax}) {
    const SphericalOptions options{loss, 1, 0, 0.1, 0.1};
    const RowMoments got = baseline::spherical_loss_kernels.moments[dtype](sample.bytes.data(), n, options);
    expect_near("mean", dtype, n, got.mean, mean, relative, 2);
    expect_near("m2", dtype, n, got.m2, m2, relative, m2 + 1e-300);
    if (loss == SphericalLoss::z) continue;
    double sum_log = 0, scale = 0;
    for (double x : sample.exact) {
      sum_log += std::log(unnormalised(loss, x, 0.1));
      scale += std::fabs(std::log(unnormalised(loss, x, 0.1)));
    }
    expect_near("sum_log", dtype, n, got.sum_log, sum_log, dtype == 1 ? 1e-13 : 1e-5, scale);
  }
}

void check_spherical_gradient(int dtype, int64_t n) {
  const Sample sample = make_sample(dtype, n, 1);
  const SphericalRowGradient row{0.75, 1.25, 0.5, -0.25, 0.125};
  for (const SphericalLoss loss : {SphericalLoss::taylor_softmax, SphericalLoss::spherical_softmax}) {
    const SphericalOptions options{loss, 1, 0, 0.1, 0.1};
    for (const bool nontemporal : {false, true}) {
      std::vector<char> out(size_t(n) * 8 + 8);
      baseline::spherical_loss_kernels.gradient[dtype](sample.bytes.data(), out.data(), n, row, options, nontemporal);
      for (int64_t i = 0; i < n; ++i) {
        const double x = sample.exact[size_t(i)];
        const double exact =
            row.slope * ((x - row.center) * row.inverse_scale) + row.shift + row.smooth * smooth_term(loss, x, 0.1);
        expect_near("spherical gradient", dtype, n, read_element(out.data(), DType(dtype), i), exact, 4 * unit(dtype),
                    std::fabs(exact) + 1);
      }
    }
  }
}

void check_exponentials(int dtype, int64_t n) {
  Sample sample = make_sample(dtype, n, 3);
  if (n > 3) {  // a masked class, and a block that starts with nothing but masked classes
    write_element(sample.bytes.data(), DType(dtype), 0, -HUGE_VAL);
    sample.exact[0] = -HUGE_VAL;
  }
  double maximum = -HUGE_VAL, sum = 0;
  for (double x : sample.exact) maximum = x > maximum ? x : maximum;
  const RowExponentials got =
      baseline::cross_entropy_kernels.exponentials[dtype](sample.bytes.data(), nullptr, n, false);
  for (double x : sample.exact) sum += std::exp(x - got.shift);
  expect(std::fabs(got.shift - maximum) <= 20, "shift", dtype, n, got.shift, maximum);
  expect_near("sum of exponentials", dtype, n, got.sum, sum, dtype == 1 ? 1e-13 : 1e-6, sum);
  const CrossEntropyRowGradient row{maximum, 0.5, 0.25};
  std::vector<char> out(size_t(n) * 8 + 8);
  baseline::cross_entropy_kernels.gradient[dtype](sample.bytes.data(), nullptr, out.data(), n, row, true);
  for (int64_t i = 0; i < n; ++i) {
    const double exact = 0.5 * std::exp(sample.exact[size_t(i)] - maximum) - 0.25;
    expect_near("softmax gradient", dtype, n, read_element(out.data(), DType(dtype), i), exact, 4 * unit(dtype), 1);
  }
}

void check_conversions() {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    float16 half{uint16_t(bits)}, half_back{};
    narrow(widen(half), half_back);
    bfloat16 brain{uint16_t(bits)}, brain_back{};
    narrow(widen(brain), brain_back);
    const bool half_nan = widen(half) != widen(half), brain_nan = widen(brain) != widen(brain);
    expect(half_nan || half_back.bits == bits, "float16 round trip", 3, bits, half_back.bits, bits);
    expect(brain_nan || brain_back.bits == bits, "bfloat16 round trip", 2, bits, brain_back.bits, bits);
  }
}

}  // namespace

int main() {
  for (int dtype = 0; dtype < 4; ++dtype) {
    for (const int64_t n : {1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 63, 64, 65, 1000, 4095, 4096, 4097, 10007}) {
      check_moments(dtype, n, 1);
      if (dtype < 2) check_moments(dtype, n, 1000);
      check_spherical_gradient(dtype, n);
      check_exponentials(dtype, n);
    }
  }
  check_conversions();
  std::printf("%d cases, %d failures\n", cases, failures);
  return failures != 0 || cases == 0;
}
