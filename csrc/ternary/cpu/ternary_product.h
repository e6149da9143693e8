// What the CPU fronts of ternary_linear and bitlinear share: tokens, products over row groups, scratch memory.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <memory>
#include <new>

#include "../../common/isa.h"
#include "../ternary_arguments.h"
#include "float_product_kernel.h"
#include "integer_product_kernel.h"
#include "quantize_activation_kernel.h"
#include "repack_kernel.h"

namespace pyops {

// The kernels of the level in use. With the dot-product levels, and without.
#if defined(__x86_64__)
#define PYOPS_SELECT(table) isa::select(baseline::table, avx2::table, avx512::table)
#define PYOPS_SELECT_PRODUCT(table) \
  isa::select(baseline::table, avx2::table, avxvnni::table, avx512::table, avx512vnni::table)
#else
#define PYOPS_SELECT(table) baseline::table
#define PYOPS_SELECT_PRODUCT(table) baseline::table
#endif

// Memory of a call, aligned to cache lines, not initialised.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : data_(allocate(count)) {}
  T* get() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  static T* allocate(int64_t count) {
    const size_t bytes = (size_t(count > 0 ? count : 1) * sizeof(T) + 63) / 64 * 64;
    void* memory = std::aligned_alloc(64, bytes);
    if (memory == nullptr) throw std::bad_alloc();
    return static_cast<T*>(memory);
  }
  struct Free {
    void operator()(T* memory) const { std::free(memory); }
  };
  std::unique_ptr<T, Free> data_;
};

// Activations as integers, in whatever memory `q` is; rows are `stride` bytes apart and hold in_features each.
struct QuantizedTokens {
  int8_t* q;
  int64_t stride;
  float* step;
  int32_t* sum;
};

// Rows of x, rounded; x has dense rows.
void quantize_tokens(const Tensor& x, DType dtype, float qmax, float eps, const QuantizedTokens& tokens);

// y = (q @ T^T) * (step * gamma) + bias.
void integer_product(const LinearArguments& arguments, const QuantizedTokens& tokens, const Tensor& packed,
                     const Tensor& gamma, const OptionalTensor& bias, const Tensor& y);

// y = x @ (T * gamma)^T + bias, summed in float32; x has dense rows.
void float_linear(const LinearArguments& arguments, const Tensor& x, const Tensor& packed, const Tensor& gamma,
                  const OptionalTensor& bias, const Tensor& y);

// dx = grad @ (T * gamma); grad has dense rows.
void float_backward_input(const LinearArguments& arguments, const Tensor& grad, const Tensor& packed,
                          const Tensor& gamma, const Tensor& dx);

// dW = (step * grad)^T @ q; grad and q have dense rows.
void float_backward_weight(const WeightGradientArguments& arguments, const Tensor& grad, const Tensor& q,
                           const Tensor& step, const Tensor& dw);

// Throws for the first weight, row by row, that the packed bytes do not stand for.
[[noreturn]] void reject_first_bad_code(const char* op, const char* argument, TernaryFormat format, const void* packed,
                                        int64_t out_features, int64_t in_features);

}  // namespace pyops
