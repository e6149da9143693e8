# ruff: noqa: E501  (a mutant is one line)
"""Breaks the kernels one line at a time and counts how many breakages the tests notice. By hand: make mutation.

Each mutant is a text replacement in one file of a copy of the tree. C++ mutants are rebuilt; then the self-test and,
if that passes, the family's tests run. A mutant that survives both is printed. The run fails below 95 % caught.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
CPU = "csrc/spherical/cpu"
FAMILY = ["tests/spherical/test_spherical_loss.py", "tests/spherical/test_cross_entropy.py"]
# Per group of mutants the tests that may notice, the quick ones first.
TESTS = {
    "cpp": (FAMILY, ["tests/contract.py", "-k", "(cpu and not fuzz) or backward_of_another"]),
    "emulated": (["tests/contract.py", "tests/spherical", "-k", "cuda-emulated"],),
    "python": (
        [*FAMILY, "tests/spherical/test_factored_linear.py", "tests/spherical/test_linear_loss.py"],
        ["tests/contract.py", "-k", "not triton and not cpu"],
    ),
    "triton": (
        ["tests/contract.py", "-k", "triton-interpreted and not fuzz"],
        ["tests/spherical/test_triton_kernels.py"],
    ),
    "factored": (["tests/spherical/test_factored_ops.py"], ["tests/spherical/test_factored_linear.py"]),
    "ternary": (["tests/ternary", "-k", "not triton"], ["tests/contract.py", "-k", "linear or ternary"]),
    "ternary-python": (["tests/ternary", "-k", "not triton"], ["tests/contract.py", "-k", "linear or ternary"]),
}
COMPILED = ("cpp", "factored", "emulated", "ternary")


class Mutant(NamedTuple):
    """Replaces the `which`-th occurrence of `old` by `new` in `file`."""

    file: str
    old: str
    new: str
    which: int = 0


FORMULA = "csrc/spherical/spherical_loss_formula.h"
SOFTMAX = "csrc/spherical/cross_entropy_formula.h"
MOMENTS = f"{CPU}/spherical_loss_kernel.cpp"
EXPONENTIALS = f"{CPU}/cross_entropy_kernel.cpp"
FRONT = f"{CPU}/row_pass.cpp"
FRAME = f"{CPU}/row_pass.h"
REFERENCE = "pyops/spherical/reference_ops.py"
FORMULAS = "pyops/spherical/reference.py"
FACTORED = "pyops/spherical/factored_reference.py"
FACTORED_LAYER = "pyops/spherical/factored_linear.py"
LINEAR_LOSS = "pyops/spherical/linear_loss_reference.py"

CPP = [
    # formulas: a factor, a sign, a dropped term
    Mutant(FORMULA, "total.mean += delta * share;", "total.mean += delta * share * 1.001;"),
    Mutant(FORMULA, "total.m2 += other.m2 + delta * delta * count * share;", "total.m2 += other.m2;"),
    Mutant(FORMULA, "total.sum_log += other.sum_log;", ""),
    Mutant(FORMULA, "x > 0 ? x + log1p(exp(-x))", "x > 0 ? x + log1p(exp(x))"),
    Mutant(FORMULA, "partials.slope += rho * z * scale / classes;", "partials.slope += 1.001 * rho * z * scale / classes;"),
    Mutant(FORMULA, "partials.shift += rho * scale / classes;", ""),
    Mutant(FORMULA, "return -rho * scale;", "return rho * scale;"),
    Mutant(FORMULA, "partials.shift += omega / total;", ""),
    Mutant(FORMULA, "partials.smooth -= omega * smoothing / classes;", "", 0),
    Mutant(FORMULA, "partials.smooth -= omega * smoothing / classes;", "", 1),
    Mutant(FORMULA, "return -2 * omega * keep * o / n;", "return -2 * omega * o / n;"),
    Mutant(FORMULA, "(2 * keep + smoothing) * smoothing / classes", "(2 * keep) * smoothing / classes"),
    Mutant(FORMULA, "if (omega == 0) return 0;", ""),
    Mutant(FORMULA, "sigma == 0 || classes == 1 ? 0 : 1 / sigma", "1 / sigma"),
    Mutant(FORMULA, " - partials.slope * ((mean - center) * scale)", ""),
    Mutant(FORMULA, "partials.slope += omega / total / scale;", "partials.slope += omega / total;"),
    Mutant(FORMULA, "row.m2 == HUGE_VAL ? row.m2 : ", ""),
    Mutant(SOFTMAX, "total.sum * exp(total.shift - shift)", "total.sum"),
    Mutant(SOFTMAX, "other.sum * exp(other.shift - shift)", "other.sum * 1.001 * exp(other.shift - shift)"),
    Mutant(SOFTMAX, "total.weighted_sum + other.weighted_sum", "other.weighted_sum"),
    Mutant(SOFTMAX, "partials.loss += share * ((row.shift - o) + log_sum);", "partials.loss += share * (row.shift - o);"),
    Mutant(SOFTMAX, "partials.slope += smooth * class_weight_sum;", ""),
    Mutant(SOFTMAX, "2 * lambda * lse / row.sum", "lambda * lse / row.sum"),
    Mutant(SOFTMAX, "lambda * lse * lse;", "lambda * lse;"),
    # kernels: masks, tails, shifts
    Mutant(MOMENTS, "add(squares, d * d);", ""),
    Mutant(MOMENTS, "step < kSteps && ", ""),
    Mutant(MOMENTS, "total += o * o;", ""),
    Mutant(MOMENTS, "load_partial(x + i, left, shift)) - shift", "load_partial(x + i, left, shift + 1)) - shift"),
    Mutant(MOMENTS, "sums.sum * sums.sum > 0.5 * count * sums.squares", "false"),
    Mutant(MOMENTS, "return {double(shift) + rest, sums.squares - sums.sum * rest, 0};", "return {double(shift) + rest, sums.squares, 0};"),
    Mutant(MOMENTS, "if (!ordinary) return", "if (false) return"),
    Mutant(MOMENTS, "if (n <= kTinyRow) return", "if (false) return"),
    Mutant(MOMENTS, "Real(2) / (u + e / u)", "Real(2) / u"),
    Mutant(MOMENTS, "exponents += ", "exponents -= "),
    Mutant(MOMENTS, "if (!all) {", "if (false) {"),
    Mutant(MOMENTS, "(o * o + eps));", "(o * o + Real(1.5) * eps));"),
    Mutant(EXPONENTIALS, "if (sum > kLargestSum) {", "if (false) {"),
    Mutant(EXPONENTIALS, "total.sum * exp(total.shift - shift)", "total.sum"),
    Mutant(EXPONENTIALS, "shift == -HUGE_VAL ? 0 : shift", "shift"),
    Mutant(EXPONENTIALS, "load_partial(x + i, left, -Real(HUGE_VAL))", "load_partial(x + i, left, Real(0))"),
    Mutant("csrc/common/vector_math.h", "r * 0.5f + 1.0000147f", "r * 0.5f + 1.0000247f"),
    Mutant("csrc/common/vector_math.h", "x > 88.0f ? broadcast(88.0f) : x", "x"),
    Mutant("csrc/common/simd.h", "bits & 0xffff0000u", "bits"),
    Mutant(EXPONENTIALS, "slope - weight * smooth", "slope - smooth"),
    Mutant(EXPONENTIALS, "double(shift) * (w ? sum_lanes(weights) : double(n))", "double(shift) * double(n)"),
    Mutant("csrc/common/simd.h", "bits + 0x7fffu + ((bits >> 16) & 1u)", "bits + 0x8000u"),
    # frame: indices, strides, weights
    Mutant(FRAME, "data + row * row_bytes + column * element_bytes", "data + row * element_bytes + column * row_bytes"),
    Mutant(FRAME, "while (end < targets_ && index_[order[end]] == c) ++end;", ""),
    Mutant(FRAME, "if (rows.zero(row)) {", "if (false) {"),
    Mutant(FRAME, "write_element(out, dtype, c - begin, value);", "write_element(out, dtype, c, value);"),
    Mutant(FRAME, "if (arguments.classes <= kTinyRow) {", "if (false) {"),
    Mutant(FRONT, "share * class_weight", "class_weight"),
    Mutant(FRONT, "c != ignore_index && share != 0", "c != ignore_index"),
    Mutant(FRONT, "class_weight_sum / double(counted)", "class_weight_sum"),
    Mutant(FRONT, "c >= 0 && c < classes", "c >= 0 && c <= classes"),
    Mutant(FRONT, "int64_t(row) * stride", "0", 0),
    Mutant(FRONT, "safe_mean && sum == 0 ? 1 : sum", "sum"),
    Mutant(f"{CPU}/spherical_loss.cpp", "for (int64_t stretch = 0; stretch < per_row; ++stretch)", "for (int64_t stretch = 0; stretch < 1; ++stretch)"),
    Mutant(f"{CPU}/cross_entropy.cpp", "z_slope / divisor[1]", "z_slope / divisor[0]"),
    Mutant(f"{CPU}/cross_entropy.cpp", "losses.z_term[row] * (divisor[0] / divisor[1])", "losses.z_term[row]"),
]  # fmt: skip

CUDA = "csrc/spherical/cuda"
EMULATED = [
    Mutant(FORMULA, "(square_overflows ? Real(2) : u + u)", "(u + u)"),  # on the CPU only for float64 beyond 1e154
    Mutant(f"{CUDA}/spherical_loss.cu", "vector_squares += d * d;", "vector_squares += Real(1.001) * d * d;"),
    Mutant(f"{CUDA}/spherical_loss.cu", "b < elements ? Real(o[b]) - shift : Real(0)", "Real(o[b]) - shift"),
    Mutant(f"{CUDA}/spherical_loss.cu", "own.m2 + count * (delta * delta)", "own.m2"),
    Mutant(f"{CUDA}/spherical_loss.cu", "inverse_scale) * slope + shift;", "inverse_scale) * slope + Real(1.001) * shift;"),
    Mutant(f"{CUDA}/spherical_loss.cu", "const double pivot = finite(first_element) ? first_element : 0;", "const double pivot = first_element;"),
    Mutant(f"{CUDA}/row_reduce.cuh", "row * target.row_stride + position * target.column_stride", "row * target.column_stride + position * target.row_stride"),
    Mutant(f"{CUDA}/row_reduce.cuh", "row * rows.target_weight.row_stride + position", "row + position"),
    Mutant(f"{CUDA}/row_gradient.cuh", "+ row * g.gradient_row_stride + begin", "+ row * g.row_stride + begin"),
    Mutant(f"{CUDA}/row_gradient.cuh", "distance >= 0 && distance < columns ?", "distance >= 0 ?"),
    Mutant(f"{CUDA}/row_gradient.cuh", "sum += gradient_there;", "sum = gradient_there;"),
    Mutant(f"{CUDA}/cross_entropy.cu", "maximum = larger(maximum, highest);", "maximum = highest;"),
    Mutant(f"{CUDA}/cross_entropy.cu", "vector_sum += exponential<T>(o[a][b] - finite_shift);", "vector_sum += Real(1.001) * exponential<T>(o[a][b] - finite_shift);"),
    Mutant(f"{CUDA}/cross_entropy.cu", "own.sum * exp(own.shift - shift)", "own.sum"),
    Mutant(f"{CUDA}/cross_entropy.cu", "exponential<T>(o - shift) * slope - smooth;", "exponential<T>(o - shift) * slope;"),
    Mutant(f"{CUDA}/cross_entropy.cu", "* slope - weight * smooth;", "* slope - smooth;"),
]  # fmt: skip

PYTHON = [
    Mutant(FORMULAS, "rho.sum(1, keepdim=True) * scale / classes", "rho.sum(1, keepdim=True) * scale"),
    Mutant(REFERENCE, "shift = shift - slope * ((mean - center) * scale)", "pass"),
    Mutant(REFERENCE, "grad.scatter_add_(1, index,", "grad.scatter_(1, index,"),
    Mutant(REFERENCE, "share.sum(1, keepdim=True)", "share[:, :1]"),
    # the factored layer: terms of second order, the order of operations, what must not move
    Mutant(FACTORED, "T.sub_(MH, alpha=0.5 * rate)", "T.sub_(MH, alpha=rate)"),
    Mutant(FACTORED, "Bh @ (Z.T @ h)", "0 * (Bh @ (Z.T @ h))"),
    Mutant(FACTORED, " - (y / classes).unsqueeze(1) * (y @ h)", ""),
    Mutant(FACTORED, "g[counts].unsqueeze(1) * sums[place]", "g[counts].unsqueeze(1) * rows"),
    Mutant(FACTORED, "Z.sub(y.unsqueeze(1) * (wbar / classes))", "Z.sub(0)"),
    Mutant(FACTORED, "(h @ omega - mean) + shift", "(h @ omega) + shift"),
    Mutant(FACTORED, "if not shift_invariant:", "if True:"),
    Mutant(FACTORED, "rate * (changes.sums @ U_inv)", "keep * rate * (changes.sums @ U_inv)"),
    Mutant(FACTORED, "(C, keep * keep)", "(C, keep)"),
    Mutant(FACTORED, "U.sub_(U @ S, alpha=rate)", "U.copy_(U @ factor)"),
    Mutant(FACTORED, "keep * (block.to(U.dtype) @ factor - rate * changes.common)", "block.to(U.dtype) @ factor - rate * changes.common"),
    Mutant(FACTORED, "(values[outside] - 1)", "values[outside]"),
    Mutant(FACTORED, "values = torch.where(outside, torch.ones_like(values), values)", "pass"),
    Mutant(FACTORED, "row.shift + beta * mean", "row.shift"),
    Mutant(LINEAR_LOSS, " - weight.shape[0] * torch.outer(rest, rest)", ""),
    Mutant(LINEAR_LOSS, "h.T @ (shift - beta * mean)", "h.T @ shift"),
    Mutant(LINEAR_LOSS, "(begin * block.shape[0] / total)", "(block.shape[0] / total)"),
    Mutant(LINEAR_LOSS, "classes[first:last] - begin", "classes[first:last] * 0"),
    Mutant(FACTORED_LAYER, "if ctx.versions != _versions(state):", "if False:"),
    Mutant(FACTORED_LAYER, "if outcome == ops.SKIPPED:", "if False:"),
    Mutant(FACTORED_LAYER, "indices.gather(1, best.indices)", "best.indices"),
    Mutant(FACTORED_LAYER, "lr / (keep * self.grad_scale)", "lr / keep"),
    Mutant(FACTORED_LAYER, "lr / (keep * self.grad_scale)", "lr / self.grad_scale"),
    Mutant(FACTORED_LAYER, "condition <= _GOOD_CONDITION and 0.5 <= size <= 2", "condition <= _GOOD_CONDITION"),
    Mutant("pyops/spherical/reference.py", "classes.sum(1) / counts.sum(1).clamp(min=1)", "classes.sum(1)"),
    Mutant("pyops/spherical/spherical_loss.py", "if inplace_backward and args[0].is_leaf:", "if False:"),
    Mutant("pyops/spherical/spherical_loss.py", "if torch.is_grad_enabled():  # create_graph", "if False:  # create_graph"),
    Mutant("pyops/spherical/spherical_loss.py", "    if transform_level_active():", "    if False:"),
    Mutant("pyops/spherical/_options.py", "out_dtype = torch.float32", "out_dtype = None"),
]  # fmt: skip

GEMM, GEMM_KERNEL = "csrc/common/cpu/gemm.cpp", "csrc/common/cpu/gemm_kernel.cpp"
STEP, STEP_FRONT = f"{CPU}/factored_product.cpp", f"{CPU}/factored_linear.cpp"
ROWS_KERNEL = f"{CPU}/factored_linear_kernel.cpp"
FACTORED_CPP = [
    Mutant(GEMM, "options.accumulate || k0 > 0", "options.accumulate"),
    Mutant(GEMM, "options.depth_scale + k0", "options.depth_scale"),
    Mutant(GEMM, "if (options.lower && column > row + count - 1) continue;", "if (options.lower && column > row) continue;"),
    Mutant(GEMM, "std::min(tile_columns, n1 - first)", "std::min(tile_columns, columns - first)"),
    Mutant(GEMM, "std::swap_ranges(row, row + k, other);", ""),
    Mutant(GEMM, "std::swap_ranges(row + next, row + size, other + next);", ""),
    Mutant(GEMM, "pivots[i] += k;", ""),
    Mutant(GEMM, "kernel.solve_upper(factors + k * stride + k,", "kernel.solve_upper(factors + k * stride,"),
    Mutant(GEMM_KERNEL, "if (scale) square[i] *= factor;", ""),
    Mutant(GEMM_KERNEL, "first + i < count ?", "true ?"),
    Mutant(GEMM_KERNEL, "if (size > largest) {", "if (largest < 0) {"),
    Mutant(GEMM_KERNEL, "c[r * stride + j] = accumulate ? c[r * stride + j] + value : value;", "c[r * stride + j] = value;"),
    Mutant(ROWS_KERNEL, "out[i] = (out[i] + x[i] * factor) * keep;", "out[i] = out[i] + x[i] * factor;"),
    Mutant(ROWS_KERNEL, "add(squares, value * value);", ""),
    Mutant(ROWS_KERNEL, "sum += x[i] * Real(0);", ""),
    Mutant(STEP, "sums.shift + out[kBeta] * moments.mean", "sums.shift"),
    Mutant(STEP, "const double offset = kernel.dot(h, state.omega, d)", "const double offset = 0"),
    Mutant(STEP, "Real(sum) * state.omega[k]", "Real(0)"),
    Mutant(STEP, "Real(p[kFactoredShift])", "Real(0)"),
    Mutant(STEP, "(kernel_.dot(h, state_.omega, d_) - mean)", "kernel_.dot(h, state_.omega, d_)"),
    Mutant(STEP, "classes * shift + y", "classes * shift"),
    Mutant(STEP, "-y_[row] * share * yH_[k]", "Real(0)"),
    Mutant(STEP, "sum_of_rows(segment, H_);", "std::fill(sum_, sum_ + d_, Real(0));"),
    Mutant(STEP, "Real(-double(y_[row]) / double(state_.classes))", "Real(0)"),
    Mutant(STEP, "centred_row(row, Real(0.5), T_)", "centred_row(row, Real(1), T_)"),
    Mutant(STEP, "F[i * m_ + j] * beta_[j] + F[j * m_ + i] * beta_[i]", "F[i * m_ + j] * beta_[j] * 2"),
    Mutant(STEP, "add(rows_ + row * d_, -rate_ / 2, T_ + row * d_);", ""),
    Mutant(STEP, "*= -rate_ * beta_[j]", "*= -rate_ * beta_[i]"),
    Mutant(STEP, "kernel_.combine(CS, Real(0.5), L,", "kernel_.combine(CS, Real(1), L,"),
    Mutant(STEP, "H(), A_, {.alpha = -rate_ / 2, .accumulate = true});", "H(), A_, {.alpha = -rate_, .accumulate = true});"),
    Mutant(STEP, "if (!(pivots.smallest > kSmallestPivotRatio * std::max(pivots.largest, 1.0)))", "if (false)"),
    Mutant(STEP, "pivots.largest == pivots.largest)", "true)"),
    Mutant(STEP, "* (keep_ * keep_);", "* keep_;"),
    Mutant(STEP, "1 / keep_, state_.U_inv", "keep_, state_.U_inv"),
    Mutant(STEP, "shift_invariant ? Real(0) : -rate_", "-rate_"),
    Mutant(STEP, "entries[i].c != entries[i - 1].c", "true"),
    Mutant(STEP, "squares < 0 ? 0 : squares", "squares"),
    Mutant(STEP_FRONT, "if (targets.ignored(row)) {", "if (false) {"),
    Mutant(STEP_FRONT, "features[row * d + own] = Real(bias_scale);", "features[row * d + own] = Real(1);"),
    Mutant(STEP_FRONT, "counts ? upstream[size_t(row)] / divisor : 0", "upstream[size_t(row)] / divisor"),
    Mutant(STEP_FRONT, "written->give_back();", "(void)written;"),
]  # fmt: skip

INTEGERS = "csrc/ternary/cpu/integer_product_kernel.cpp"
FLOATS = "csrc/ternary/cpu/float_product_kernel.cpp"
PRODUCT = "csrc/ternary/cpu/ternary_product.cpp"
REPACK = "csrc/ternary/cpu/repack_kernel.cpp"
WEIGHTS = "csrc/ternary/cpu/quantize_weight"
ACTIVATIONS = "csrc/ternary/cpu/quantize_activation_kernel.cpp"

TERNARY = [
    # quantizers: a tie, a clip, what is not finite, the bracket of the median
    Mutant(ACTIVATIONS, "magnitude >= kInfinity", "magnitude > kInfinity"),
    Mutant(ACTIVATIONS, "scaled < 127.0f ? scaled : broadcast(127.0f)", "scaled"),
    Mutant(ACTIVATIONS, "absmax < eps ? eps : absmax", "absmax"),
    Mutant(ACTIVATIONS, "12582912.0f", "12582913.0f"),
    Mutant(ACTIVATIONS, "return {largest / qmax, sum};", "return {1.0f / scale, sum};"),
    Mutant(ACTIVATIONS, "const Integers all = sums[0] + sums[1];", "const Integers all = sums[0];"),
    Mutant(f"{WEIGHTS}_kernel.cpp", "scaled > 0.5f", "scaled >= 0.5f", 0),
    Mutant(f"{WEIGHTS}_kernel.cpp", "_CMP_LT_OQ", "_CMP_LE_OQ"),
    Mutant(f"{WEIGHTS}_kernel.cpp", "if (count > rank) {", "if (count >= rank) {"),
    Mutant(f"{WEIGHTS}_kernel.cpp", "found += values[k] <= bound;", "found += values[k] < bound;"),
    Mutant(f"{WEIGHTS}_kernel.cpp", "size_t(n - k + 3) / 4", "size_t(n - k) / 4"),
    Mutant(f"{WEIGHTS}.cpp", "(n - 1) / 2", "n / 2"),
    Mutant(f"{WEIGHTS}.cpp", "rank - below", "rank"),
    Mutant(f"{WEIGHTS}.cpp", "if (rank < below) {", "if (false) {"),
    Mutant(f"{WEIGHTS}.cpp", "options.add_eps ? gamma + options.eps", "options.add_eps ? gamma"),
    Mutant(f"{WEIGHTS}.cpp", "if (rank >= below + inside) {", "if (false) {"),
    Mutant(f"{WEIGHTS}.cpp", "gammas[n] = kNaN;", ""),
    Mutant(f"{WEIGHTS}.cpp", "if (!finite) {", "if (false) {"),
    Mutant(f"{WEIGHTS}.cpp", "total / double(n)", "total / double(n + 1)"),
    # products: a field, a factor, a width of 16 bits, a tail
    Mutant(INTEGERS, "constexpr int64_t kSteps16 = 64;", "constexpr int64_t kSteps16 = 256;"),
    Mutant(INTEGERS, "_mm512_maskz_srai_epi32(0xffff, sums[3], 6)", "_mm512_maskz_srai_epi32(0xffff, sums[3], 5)"),
    Mutant(INTEGERS, "constexpr int64_t kBlockChunks = 4096;", "constexpr int64_t kBlockChunks = int64_t(1) << 30;"),
    Mutant(INTEGERS, "v / 27 % 3 << 6", "v / 27 % 3 << 5"),
    Mutant(INTEGERS, "lanes[r] / 81", "lanes[r] / 80"),
    Mutant(INTEGERS, "tile<kTokens, 1, kFromLines>({first, first}, count, panel, acc);", ""),
    Mutant(INTEGERS, "(load(gamma + r) * step)", "load(gamma + r) * step"),
    Mutant(INTEGERS, "return bias ? y + load(bias + r) : y;", "return y;", 0),
    Mutant(INTEGERS, "if (c < end) chunk(c, 0);", "", 0),
    Mutant(INTEGERS, "sums[t][v] = load_sums(acc + t * kUnitRows + v * kVectorRows);", "sums[t][v] = Codes{};"),
    Mutant(INTEGERS, "kFives ? kBlockChunks / 4 : kBlockChunks", "kBlockChunks"),
    Mutant(INTEGERS, "found = _mm512_max_epu8(found, line);", "found = line;"),
    Mutant(INTEGERS, "line = _mm512_and_si512(line, kept);", ""),
    Mutant(INTEGERS, "sum_of_lanes(fifth[t][r]) / 81", "sum_of_lanes(fifth[t][r])"),
    Mutant(INTEGERS, "_mm512_add_epi8(one, two)", "one"),
    Mutant(INTEGERS, "prefetch_weights(rows + r * row_bytes + b);\n        add_line(r,", "add_line(0,"),
    Mutant(PRODUCT, "begin + (r < rows ? r : rows - 1)", "begin"),
    Mutant(PRODUCT, "std::memset(padded.get() + t * stride + arguments.in_features, 0,", "std::memset(padded.get() + t * stride + arguments.in_features, 1,"),
    Mutant(PRODUCT, "std::min(tile, tokens % count)", "0"),
    Mutant(PRODUCT, "if (call.bad) {", "if (false) {"),
    Mutant(PRODUCT, "tiles_.begin(tile) * std::min(block_, steps_ - step)", "tiles_.begin(tile) * block_"),
    Mutant(PRODUCT, "+ (begin + d) / kTernaryGroup", ""),
    Mutant(PRODUCT, "float* panels = b.get() + (keep ? d * kColumns : 0);", "float* panels = b.get();"),
    Mutant(FLOATS, "sums[r][1] += high * number;", "sums[r][1] += low * number;"),
    Mutant(FLOATS, "gamma[d * gamma_stride]", "gamma[0]"),
    Mutant(FLOATS, "return bias != nullptr ? v + load(bias + j) : v;", "return v;"),
    # formats: a swap, a padding, a byte that is none
    Mutant(REPACK, "0x0000f0f0u", "0x0000f000u"),
    Mutant(REPACK, "(words[r][last] & kept) | (kPadding & ~kept)", "words[r][last]"),
    Mutant(REPACK, "v < 243 ?", "v < 256 ?"),
    Mutant(REPACK, "high[half] = f[6] >> 4 | f[7] << 6;", "high[half] = f[6] >> 4;"),
    Mutant(REPACK, "kLane & kSize ? kWords + kLane - kSize : kLane", "kLane"),
    Mutant(REPACK, "bad |= threes(block[i]);", ""),
    Mutant(REPACK, "81 * c[4]", "80 * c[4]"),
    Mutant("csrc/ternary/ternary_format.h", "row / 8 + 2 * (column % 32 / 16)", "row / 8 * 2 + column % 32 / 16"),
    Mutant("csrc/ternary/ternary_arguments.cpp", "qmax == 127 || qmax == 128", "qmax > 0"),
]  # fmt: skip

TERNARY_PYTHON = [
    Mutant("pyops/ternary/quantize_weight.py", "weight._version, ", ""),
    Mutant("pyops/ternary/quantize_weight.py", "known.places is None or torch.equal(known.places, known.values)", "True"),
    Mutant("pyops/ternary/bitlinear.py", "rows.sum() if gamma.dim() == 0 else rows", "rows.sum()"),
    Mutant("pyops/ternary/bitlinear.py", "grad.sum(0) if wants_bias else None", "grad.mean(0) if wants_bias else None"),
    Mutant("pyops/ternary/bitlinear.py", "if lambda_ != 1:", "if False:"),
    Mutant("pyops/ternary/bitlinear.py", "torch.where(gamma.isnan(), gamma, live)", "gamma"),
    Mutant("pyops/ternary/linear.py", "if dtype is not None and x.is_floating_point():", "if False:"),
    Mutant("pyops/ternary/reference.py", "scaled.abs() > 0.5", "scaled.abs() >= 0.5"),
]  # fmt: skip


def triton_mutants() -> list[Mutant]:
    """Every accumulation and mask of the Triton kernels, each dropped or scaled once."""
    mutants = []
    for name in ("_common", "spherical_loss", "cross_entropy"):
        path = f"triton_kernels/spherical/{name}.py"
        for line in (ROOT / path).read_text().splitlines():
            text = line.strip()
            if "tl.sum(" in text and "=" in text:
                mutants.append(Mutant(path, text, text.replace("tl.sum(", "1.001 * tl.sum(", 1)))
            elif text.startswith("tl.store(") and text.endswith("mask=mask)"):
                mutants.append(Mutant(path, text, text.replace(", mask=mask)", ")")))
    return list(dict.fromkeys(mutants))


def all_mutants() -> dict[str, list[Mutant]]:
    return {
        "cpp": CPP,
        "factored": FACTORED_CPP,
        "emulated": EMULATED,
        "python": PYTHON,
        "triton": triton_mutants(),
        "ternary": TERNARY,
        "ternary-python": TERNARY_PYTHON,
    }


def mutated(text: str, mutant: Mutant) -> str:
    """The file's text with the mutant in it; raises ValueError when its place is gone."""
    parts = text.split(mutant.old)
    if len(parts) < mutant.which + 2:
        raise ValueError(f"mutant out of date: {mutant.file}: {mutant.old!r}")
    head, tail = mutant.old.join(parts[: mutant.which + 1]), mutant.old.join(parts[mutant.which + 1 :])
    return head + mutant.new + tail


def apply(tree: Path, mutant: Mutant) -> str:
    """Applies it and returns the original text."""
    path = tree / mutant.file
    text = path.read_text()
    path.write_text(mutated(text, mutant))
    return text


def rebuild(tree: Path, group: str) -> bool:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = os.environ | {"PYOPS_CUDA": "OFF", "PYOPS_EMULATION": "ON" if group == "emulated" else "OFF"}
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True).returncode == 0


def caught_by(tree: Path, group: str, timeout: int = 900) -> str:
    """Name of the check that noticed, or an empty string."""
    environment = os.environ | {"PYTHONPATH": str(tree), "PYOPS_CUDA_EMU": "check" if group == "emulated" else "0"}
    pytest = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow"]
    checks = [] if group in ("emulated", "triton") else [["-m", "pyops", "selftest", "--quick"]]
    for arguments in [*checks, *([*pytest, *tests] for tests in TESTS[group])]:
        name = arguments[2] if arguments[2] == "selftest" else next(a for a in arguments if a.startswith("tests/"))
        command = [sys.executable, *arguments]
        try:
            result = subprocess.run(command, cwd=tree, env=environment, capture_output=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            return f"{name} (hang)"
        if result.returncode:
            return name
    return ""


def prepare(folder: Path, groups: list[str]) -> Path:
    tree = folder / "tree"
    skipped = shutil.ignore_patterns(".venv*", ".triton-*", "build", ".git", "*.so", "__pycache__", "dist")
    shutil.copytree(ROOT, tree, ignore=skipped)
    # The installed package maps these folders in; a plain tree needs links.
    (tree / "pyops/triton_kernels").symlink_to(tree / "triton_kernels")
    (tree / "pyops/_bench").symlink_to(tree / "bench")
    for group in groups:
        if not rebuild(tree, group):
            raise SystemExit("the unmutated tree does not build")
        print(f"unmutated tree: {group}", flush=True)
        found = caught_by(tree, group)
        if found:
            raise SystemExit(f"the unmutated tree does not pass {found}")
    return tree


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=tuple(TESTS), help="one group of mutants")
    parser.add_argument("--first", type=int, default=0, help="skip this many mutants of each group")
    arguments = parser.parse_args()
    groups = all_mutants()
    if arguments.only:
        groups = {arguments.only: groups[arguments.only]}
    survivors, total = [], 0
    with tempfile.TemporaryDirectory() as name:
        tree = prepare(Path(name), list(groups))
        for group, mutants in groups.items():
            for mutant in mutants[arguments.first :]:
                start = time.perf_counter()
                original = apply(tree, mutant)
                built = group not in COMPILED or rebuild(tree, group)
                found = caught_by(tree, group) if built else "does not build"
                (tree / mutant.file).write_text(original)
                total += built
                if built and not found:
                    survivors.append(mutant)
                seconds = time.perf_counter() - start
                print(
                    f"{found or 'SURVIVED':12s} {seconds:5.0f} s  {mutant.file}: {mutant.old[:60]}",
                    flush=True,
                )
    caught = total - len(survivors)
    print(f"{caught} of {total} mutants caught")
    return 0 if total and caught >= 0.95 * total else 1


if __name__ == "__main__":
    sys.exit(main())
