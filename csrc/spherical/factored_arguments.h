// What the fronts of the factored layer share on every device: checks of the state and of what a forward left. Mirrored
// by pyops/spherical/_checks.py.
#pragma once

#include "loss_arguments.h"

namespace pyops {

struct FactoredArguments {
  const char* op;
  int64_t rows, classes, targets, features;
  DType state, V;  // dtypes
};

// V and U; `rows` and `targets` come from the target.
FactoredArguments check_factored(const char* op, const Tensor& V, const Tensor& U, const Tensor& target);

// Of the device and dtype of U.
void check_factored_like(const FactoredArguments& arguments, const char* name, const Tensor& tensor, const Tensor& U);

// A vector or square of the state: its device, dtype and shape.
void check_factored_state(const FactoredArguments& arguments, const char* name, const Tensor& tensor,
                          int64_t dimensions, const Tensor& U);

// What is written must not overlap itself.
void check_factored_distinct(const FactoredArguments& arguments, const char* name, const Tensor& tensor);

// [rows, columns] of the given dtype, on the device of U.
void check_factored_rows(const FactoredArguments& arguments, const char* name, const Tensor& tensor, int64_t columns,
                         ScalarType dtype, const Tensor& U);

}  // namespace pyops
