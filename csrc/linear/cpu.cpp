// Linear layers on the CPU: products with a weight that is packed into panels, ahead or in the call, in float32
// arithmetic or, where the CPU has the instruction, by dot products of pairs of bfloat16.
#include "common/activation.h"
#include "common/blocks.h"

namespace bert_fast {

// The weight of a block of columns: panels that were packed ahead, or the rows, which each thread packs for itself.
struct LinearWeight {
  const void* panels;       // null without
  const void* ahead;        // the panels of the block that this thread probably computes next
  const void* const* rows;  // of float32, or of bfloat16; null with panels
  int64_t terms;            // numbers of a row
  bool bf16;                // the rows
};

struct LinearLayout {
  TileLayout tiles;
  bool pairs;       // panels of pairs of bfloat16 that are adjacent in a row of the weight, else of float32
  int64_t factors;  // pairs, or numbers, of a row
};

}  // namespace bert_fast

#define BF_KERNELS "linear/cpu_kernels.h"
#define BF_KERNELS_BF16_DOT
#include "common/foreach_isa.h"

namespace bert_fast {
namespace {

// With more rows of x the blocks of a column would pack its weight too often, at 3 % of the time of 1,024 rows.
constexpr int64_t kRowsPackedAhead = 2 * kBlockRows;

constexpr int64_t kFactorBytes = 4;  // a float32, or two bfloat16

LinearLayout layout_of(int64_t terms, bool bf16) {
  return bf16 ? BF_DISPATCH_BF16_DOT(linear_layout)(terms, true) : BF_DISPATCH(linear_layout)(terms, false);
}

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
    terms = depth;
  }
  int64_t count() const { return static_cast<int64_t>(rows.size()); }
  LinearWeight from(int64_t row) const { return {nullptr, nullptr, rows.data() + row, terms, bf16}; }
  std::vector<Tensor> held;
  std::vector<const void*> rows;
  int64_t terms = 0;
  bool bf16 = true;
};

// Without dot products of bfloat16 for x of float32, which has no use for them.
template <class T, int ACTIVATION>
auto block_of() {
  if constexpr (std::is_same_v<T, bfloat16>) {
    return BF_DISPATCH_BF16_DOT(linear_block<T, ACTIVATION>);
  } else {
    return BF_DISPATCH(linear_block<T, ACTIVATION>);
  }
}

// weight_of(block) is the LinearWeight of a block.
template <class T, int ACTIVATION, class WeightOf>
void multiply(const Tensor& x, const WeightOf& weight_of, bool packed, const float* bias, const Tensor& out) {
  const int64_t rows = out.size(0), cols = out.size(1), x_stride = x.stride(0);
  const auto block = block_of<T, ACTIVATION>();
  const Blocks blocks(rows, cols, layout_of(x.size(1), std::is_same_v<T, bfloat16>).tiles);
  const int64_t floats = BF_DISPATCH(linear_scratch_floats)(blocks.rows, packed);
  blocks.run([&] {
    return [&, scratch = aligned_floats(floats)](const Block& b) {
      block(data<T>(x) + b.row * x_stride, x_stride, weight_of(b), bias ? bias + b.col : nullptr,
            mutable_data<T>(out) + b.row * cols + b.col, cols, b.rows, b.cols, scratch.get());
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

// `bf16`: for x of bfloat16.
Tensor pack_rows(const WeightRows& rows, bool bf16) {
  const LinearLayout layout = layout_of(rows.terms, bf16);
  const int64_t panel = layout.tiles.panel, panels = parts(rows.count(), panel);
  const Tensor packed = layout.pairs ? empty({panels, layout.factors, panel, 2}, ScalarType::BFloat16)
                                     : empty({panels, layout.factors, panel}, ScalarType::Float);
  const auto pack = bf16 ? BF_DISPATCH_BF16_DOT(linear_pack_panel<bfloat16>) : BF_DISPATCH(linear_pack_panel<float>);
  char* to = mutable_data<char>(packed);
  parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      pack(rows.from(i * panel), std::min(panel, rows.count() - i * panel), 0, layout.factors,
           to + i * panel * layout.factors * kFactorBytes);
    }
  });
  return packed;
}

// weight (N, K) -> the panels that linear_tiles reads for x of float32, or of bfloat16 if `bf16`, zero-padded: float32
// (ceil(N / panel), K, panel), or pairs of bfloat16 (ceil(N / panel), ceil(K / 2), panel, 2).
Tensor linear_pack(const Tensor& weight, bool bf16) {
  STD_TORCH_CHECK(weight.dim() == 2, "linear_pack: expected weight (N, K)");
  return pack_rows(WeightRows({weight}, "linear_pack", weight.size(1)), bf16);
}

// act(x weight^T + bias) -> (T, columns) in the dtype of x, rounded once. `packed` is linear_pack's result for weight
// (columns, K) and the dtype of x.
Tensor linear_tiles(const Tensor& x, const Tensor& packed, int64_t columns, const std::optional<Tensor>& bias,
                    int64_t activation) {
  STD_TORCH_CHECK(x.dim() == 2, "linear_tiles: expected x (T, K)");
  STD_TORCH_CHECK(columns >= 0, "linear_tiles: columns is ", columns, "; expected at least 0");
  const int64_t terms = x.size(1);
  const LinearLayout layout = layout_of(terms, x.scalar_type() == ScalarType::BFloat16);
  const int64_t panel = layout.tiles.panel, panels = parts(columns, panel), factors = layout.factors;
  check_dtype(packed, "packed", layout.pairs ? ScalarType::BFloat16 : ScalarType::Float);
  check_shape(packed, "packed",
              layout.pairs ? std::vector{panels, factors, panel, int64_t{2}} : std::vector{panels, factors, panel});
  const Tensor contiguous = as_contiguous(packed);
  const char* first = data<char>(contiguous);
  const auto weight_of = [&](const Block& b) -> LinearWeight {
    const int64_t bytes = factors * kFactorBytes;
    return {first + b.col * bytes, first + b.next_col * bytes, nullptr, terms, false};
  };
  return product(x, weight_of, true, columns, bias, activation);
}

// The same of weights (N1, K), (N2, K) ... that are concatenated and not packed ahead: the same bits.
Tensor linear_unpacked(const Tensor& x, const std::vector<Tensor>& weights, const std::optional<Tensor>& bias,
                       int64_t activation) {
  STD_TORCH_CHECK(x.dim() == 2, "linear_unpacked: expected x (T, K)");
  const WeightRows rows(weights, "linear_unpacked", x.size(1));
  if (x.size(0) > kRowsPackedAhead) {
    const bool bf16 = x.scalar_type() == ScalarType::BFloat16;
    return linear_tiles(x, pack_rows(rows, bf16), rows.count(), bias, activation);
  }
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
