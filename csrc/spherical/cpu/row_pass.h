// What the CPU fronts of the family share: targets read once and checked before any kernel runs, rows cut into
// stretches, the reduction over rows, and the frame of a streaming backward.
#pragma once

#include <algorithm>
#include <vector>

#include "../loss_arguments.h"
#include "../tiny_row.h"

namespace pyops {

struct RowTargets {
  // Per target, rows x targets: class index (-1: does not count), target weight, target weight times class
  // weight.
  std::vector<int64_t> index;
  std::vector<double> own, omega;
  int64_t targets;
  double weight_sum;    // what 'mean' divides by: per row the mean class weight over its targets that count
  double counted_rows;  // rows with at least one target that counts

  bool ignored(int64_t row) const;
};

// Raises IndexError for the first target outside [0, classes) that is not ignore_index. A target does not
// count when it is ignore_index or its target weight is 0.
RowTargets read_targets(const LossArguments& arguments, const Tensor& target, const OptionalTensor& target_weight,
                        const OptionalTensor& weight, int64_t ignore_index);

// For a backward: class indices where the saved target gradient is not 0, -1 elsewhere.
std::vector<int64_t> read_target_indices(const LossArguments& arguments, const Tensor& target, const Tensor& statistics,
                                         int64_t columns);

// The class weights in the accumulation type, contiguous; empty without a weight.
std::vector<double> read_class_weights(const OptionalTensor& weight);

// Sum or mean of per-row losses in row order, or the rows themselves; `divisor` applies to the mean.
Tensor reduce_rows(const Tensor& logits, const std::vector<double>& rows, int64_t reduction, double divisor,
                   const std::optional<ScalarType>& out_dtype);

// What 'mean' divides by, with the safe form of an empty batch.
double mean_divisor(int64_t reduction, double sum, bool safe_mean);

// grad_loss as doubles, one per row (a scalar is repeated).
std::vector<double> read_row_gradients(const LossArguments& arguments, const Tensor& grad_loss);

// Work on a row is cut into stretches of this many elements, whatever the number of threads: partial results
// are merged in stretch order, so results do not depend on how many threads shared a row.
constexpr int64_t kStretch = 32768;
inline int64_t stretches(int64_t classes) { return (classes + kStretch - 1) / kStretch; }

// Runs f(row, stretch, begin, size) over all stretches of all rows in parallel.
template <class Function>
void for_each_stretch(const LossArguments& arguments, const Function& f) {
  const int64_t per_row = stretches(arguments.classes);
  if (per_row == 0) return;
  const int64_t longest = arguments.classes < kStretch ? arguments.classes : kStretch;
  const int64_t grain = (kStretch + longest - 1) / longest;  // a task below about 10 us costs more than it saves
  torch::stable::parallel_for(0, arguments.rows * per_row, grain, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t row = unit / per_row, stretch = unit % per_row, first = stretch * kStretch;
      const int64_t size = arguments.classes - first < kStretch ? arguments.classes - first : kStretch;
      f(row, stretch, first, size);
    }
  });
}

// Whether stores should bypass the caches: the output is far larger than they are and its pages are there.
bool use_nontemporal(const LossArguments& arguments, const LargeOutput& output);

// Dense rows of a matrix by plain numbers: the tensor's own accessors are calls into torch, too slow per row.
struct RowsView {
  char* data;
  int64_t row_bytes, element_bytes;

  RowsView(const Tensor& rows, DType dtype)
      : data(static_cast<char*>(rows.data_ptr())),
        row_bytes(rows.numel() ? rows.stride(0) * pyops::element_bytes(dtype) : 0),
        element_bytes(pyops::element_bytes(dtype)) {}
  char* at(int64_t row, int64_t column) const { return data + row * row_bytes + column * element_bytes; }
};

// The classes of one row that have targets, each with the positions of its targets, and their finished values.
class TargetValues {
 public:
  TargetValues(const int64_t* index, int64_t targets) : index_(index), targets_(targets) {
    if (targets > kFew) more_.resize(size_t(targets));
    int64_t* order = order_data();
    for (int64_t j = 0; j < targets; ++j) order[j] = j;
    std::sort(order, order + targets, [index](int64_t left, int64_t right) {
      return index[left] != index[right] ? index[left] < index[right] : left < right;
    });
  }

  // value(c, first, last) for every class c in [begin, begin + size), with the positions of its targets.
  template <class Value>
  void for_each_class(int64_t begin, int64_t size, const Value& value) {
    int64_t* order = order_data();
    for (int64_t i = 0; i < targets_;) {
      const int64_t c = index_[order[i]];
      int64_t end = i + 1;
      while (end < targets_ && index_[order[end]] == c) ++end;
      if (c >= begin && c < begin + size) values_.push_back({c, value(c, order + i, order + end)});
      i = end;
    }
  }

  void write(char* out, DType dtype, int64_t begin) const {
    for (const auto& [c, value] : values_) write_element(out, dtype, c - begin, value);
  }

 private:
  static constexpr int64_t kFew = 8;
  int64_t* order_data() { return targets_ > kFew ? more_.data() : few_; }

  const int64_t* index_;
  int64_t targets_, few_[kFew];
  std::vector<int64_t> more_;
  std::vector<std::pair<int64_t, double>> values_;
};

// Writes the gradient of the logits to `out`, which may be the logits. `Rows` knows the formula of one loss:
//   bool zero(row)                       the row is ignored: its gradient is 0 whatever its logits hold
//   Gradient scaled(row, upstream)       row numbers times upstream gradient over normaliser
//   double value(gradient, o, k)         gradient of class k with logit o, without target gradients
//   double target(row, j, upstream)      target gradient j, scaled
//   void run(x, out, begin, size, gradient, nontemporal)   value() over a stretch
// Targets are computed whole before the pass, which may overwrite the logits, and written after it: the sum over
// duplicate targets and the streaming part is rounded once.
template <class Rows>
void run_backward(const LossArguments& arguments, const Rows& rows, const std::vector<int64_t>& indices,
                  const std::vector<double>& upstream, const Tensor& logits, Tensor& out, bool nontemporal) {
  const int64_t targets = arguments.targets;
  const RowsView from(logits, arguments.dtype), to(out, arguments.dtype);
  for_each_stretch(arguments, [&](int64_t row, int64_t, int64_t begin, int64_t size) {
    const char* x = from.at(row, begin);
    char* result = to.at(row, begin);
    if (rows.zero(row)) {
      memset(result, 0, size_t(size * to.element_bytes));
      return;
    }
    const auto gradient = rows.scaled(row, upstream[size_t(row)]);
    TargetValues values(indices.data() + row * targets, targets);
    values.for_each_class(begin, size, [&](int64_t c, const int64_t* first, const int64_t* last) {
      double value = rows.value(gradient, read_element(x, arguments.dtype, c - begin), c);
      for (; first != last; ++first) value += rows.target(row, *first, upstream[size_t(row)]);
      return value;
    });
    if (arguments.classes <= kTinyRow) {
      for (int64_t k = 0; k < size; ++k) {
        write_element(result, arguments.dtype, k, rows.value(gradient, read_element(x, arguments.dtype, k), k));
      }
    } else {
      rows.run(x, result, begin, size, gradient, nontemporal);
    }
    values.write(result, arguments.dtype, begin);
  });
}

}  // namespace pyops
