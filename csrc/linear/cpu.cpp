// Linear layers on the CPU: products in float32 arithmetic with a weight that is packed into panels, ahead or in the
// call.
#include "common/activation.h"
#include "common/blocks.h"

namespace bert_fast {

// The weight of a block of columns: panels that were packed ahead, or the rows, which each thread packs for itself.
struct LinearWeight {
  const float* panels;      // null without
  const float* ahead;       // the panels of the block that this thread probably computes next
  const void* const* rows;  // of float32, or of bfloat16; null with panels
  bool bf16;
};

}  // namespace bert_fast

#define BF_KERNELS "linear/cpu_kernels.h"
#include "common/foreach_isa.h"

namespace bert_fast {
namespace {

// With more rows of x the blocks of a column would pack its weight too often, at 3 % of the time of 1,024 rows.
constexpr int64_t kRowsPackedAhead = 2 * kBlockRows;

// Pointers to the rows of weights (N1, K), (N2, K) ..., read in place where they are float32 or bfloat16 and the terms
// of a row are adjacent.
struct WeightRows {
  WeightRows(const std::vector<Tensor>& weights, const char* name, int64_t depth) {
    STD_TORCH_CHECK(!weights.empty(), name, ": expected at least one weight");
    for (const Tensor& weight : weights) {
      check_shape(weight, "weight", {weight.dim() == 2 ? weight.size(0) : 0, depth});
      bf16 = bf16 && weight.scalar_type() == ScalarType::BFloat16;
    }
    for (const Tensor& weight : weights) {
      const Tensor wide = bf16 || weight.scalar_type() == ScalarType::Float ? weight : as_float(weight);
      held.push_back(wide.stride(1) == 1 ? wide : as_contiguous(wide));
      const auto* first = data<char>(held.back());
      const int64_t bytes = held.back().stride(0) * static_cast<int64_t>(wide.element_size());
      for (int64_t row = 0; row < wide.size(0); ++row) rows.push_back(first + row * bytes);
    }
  }
  int64_t count() const { return static_cast<int64_t>(rows.size()); }
  LinearWeight from(int64_t row) const { return {nullptr, nullptr, rows.data() + row, bf16}; }
  std::vector<Tensor> held;
  std::vector<const void*> rows;
  bool bf16 = true;
};

// weight_of(block) is the LinearWeight of a block.
template <class T, int ACTIVATION, class WeightOf>
void multiply(const Tensor& x, const WeightOf& weight_of, bool packed, const float* bias, const Tensor& out) {
  const int64_t rows = out.size(0), cols = out.size(1), depth = x.size(1), x_stride = x.stride(0);
  const auto block = BF_DISPATCH(linear_block<T, ACTIVATION>);
  const Blocks blocks(rows, cols, BF_DISPATCH(linear_layout)());
  const int64_t floats = BF_DISPATCH(linear_scratch_floats)(blocks.rows, packed);
  blocks.run([&] {
    return [&, scratch = aligned_floats(floats)](const Block& b) {
      block(data<T>(x) + b.row * x_stride, x_stride, weight_of(b), bias ? bias + b.col : nullptr,
            mutable_data<T>(out) + b.row * cols + b.col, cols, b.rows, depth, b.cols, scratch.get());
    };
  });
}

template <class WeightOf>
Tensor product(const Tensor& x, const WeightOf& weight_of, bool packed, int64_t columns,
               const std::optional<Tensor>& bias, int64_t activation) {
  if (bias) check_shape(*bias, "bias", {columns});
  const Tensor in = x.stride(1) == 1 ? x : torch::stable::contiguous(x);
  const Tensor shift = bias ? as_float(*bias) : empty({0}, ScalarType::Float);
  const float* shift_data = bias ? data<float>(shift) : nullptr;
  const Tensor out = empty({x.size(0), columns}, x.scalar_type());
  dispatch_float(x.scalar_type(), "linear", [&](auto element) {
    dispatch_activation(activation, "linear", [&](auto constant) {
      multiply<decltype(element), decltype(constant)::value>(in, weight_of, packed, shift_data, out);
    });
  });
  return out;
}

Tensor pack_rows(const WeightRows& rows, int64_t cols) {
  const int64_t panel = BF_DISPATCH(linear_layout)().panel;
  const Tensor packed = empty({parts(rows.count(), panel), cols, panel}, ScalarType::Float);
  const auto pack = BF_DISPATCH(linear_pack_panel);
  parallel_for(0, packed.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      pack(rows.from(i * panel), std::min(panel, rows.count() - i * panel), 0, cols,
           mutable_data<float>(packed) + i * panel * cols);
    }
  });
  return packed;
}

// weight (N, K) -> the float32 panels that linear_tiles reads, (ceil(N / panel), K, panel), zero-padded.
Tensor linear_pack(const Tensor& weight) {
  STD_TORCH_CHECK(weight.dim() == 2, "linear_pack: expected weight (N, K)");
  return pack_rows(WeightRows({weight}, "linear_pack", weight.size(1)), weight.size(1));
}

// act(x weight^T + bias) -> (T, columns) in the dtype of x, rounded once. `packed` is linear_pack's result for weight
// (columns, K).
Tensor linear_tiles(const Tensor& x, const Tensor& packed, int64_t columns, const std::optional<Tensor>& bias,
                    int64_t activation) {
  STD_TORCH_CHECK(x.dim() == 2, "linear_tiles: expected x (T, K)");
  STD_TORCH_CHECK(columns >= 0, "linear_tiles: columns is ", columns, "; expected at least 0");
  const int64_t depth = x.size(1), panel = BF_DISPATCH(linear_layout)().panel;
  check_dtype(packed, "packed", ScalarType::Float);
  check_shape(packed, "packed", {parts(columns, panel), depth, panel});
  const Tensor panels = as_contiguous(packed);
  const float* first = data<float>(panels);
  const auto weight_of = [&](const Block& b) -> LinearWeight {
    return {first + b.col * depth, first + b.next_col * depth, nullptr, false};
  };
  return product(x, weight_of, true, columns, bias, activation);
}

// The same of weights (N1, K), (N2, K) ... that are concatenated and not packed ahead: the same bits.
Tensor linear_unpacked(const Tensor& x, const std::vector<Tensor>& weights, const std::optional<Tensor>& bias,
                       int64_t activation) {
  STD_TORCH_CHECK(x.dim() == 2, "linear_unpacked: expected x (T, K)");
  const WeightRows rows(weights, "linear_unpacked", x.size(1));
  if (x.size(0) > kRowsPackedAhead) return linear_tiles(x, pack_rows(rows, x.size(1)), rows.count(), bias, activation);
  const auto weight_of = [&](const Block& b) { return rows.from(b.col); };
  return product(x, weight_of, false, rows.count(), bias, activation);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bert_fast, CPU, m) {
  m.impl("linear_pack", TORCH_BOX(&linear_pack));
  m.impl("linear_tiles", TORCH_BOX(&linear_tiles));
  m.impl("linear_unpacked", TORCH_BOX(&linear_unpacked));
}

}  // namespace bert_fast
