// Linear layers on the CPU: products in float32 arithmetic with a weight that is packed into panels once.
#include <memory>

#include "common/activation.h"
#include "common/blocks.h"

#define BF_KERNELS "linear/cpu_kernels.h"
#include "common/foreach_isa.h"

namespace bert_fast {
namespace {

template <class T, int ACTIVATION>
void multiply(const Tensor& x, const Tensor& packed, const float* bias, const Tensor& out) {
  const int64_t rows = out.size(0), cols = out.size(1), depth = x.size(1), x_stride = x.stride(0);
  const auto block = BF_DISPATCH(linear_block<T, ACTIVATION>);
  const Blocks blocks(rows, cols, BF_DISPATCH(linear_layout)());
  const int64_t floats = BF_DISPATCH(linear_scratch_floats)(blocks.rows);
  blocks.run([&] {
    return [&, scratch = std::unique_ptr<float[]>(new float[floats])](const Block& b) {
      const float *panels = data<float>(packed) + b.col * depth, *ahead = data<float>(packed) + b.next_col * depth;
      block(data<T>(x) + b.row * x_stride, x_stride, panels, ahead, bias ? bias + b.col : nullptr,
            mutable_data<T>(out) + b.row * cols + b.col, cols, b.rows, depth, b.cols, scratch.get());
    };
  });
}

// weight (N, K) -> the float32 panels that linear_tiles reads, (ceil(N / panel), K, panel), zero-padded.
Tensor linear_pack(const Tensor& weight) {
  STD_TORCH_CHECK(weight.dim() == 2, "linear_pack: expected weight (N, K)");
  const Tensor wide = as_float(weight);
  const int64_t rows = weight.size(0), cols = weight.size(1), panel = BF_DISPATCH(linear_layout)().panel;
  const Tensor packed = empty({parts(rows, panel), cols, panel}, ScalarType::Float);
  const auto pack = BF_DISPATCH(linear_pack_panel);
  parallel_for(0, packed.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      pack(data<float>(wide) + i * panel * cols, std::min(panel, rows - i * panel), cols,
           mutable_data<float>(packed) + i * panel * cols);
    }
  });
  return packed;
}

// act(x weight^T + bias) -> (T, columns) in the dtype of x, rounded once. `packed` is linear_pack's result for weight
// (columns, K).
Tensor linear_tiles(const Tensor& x, const Tensor& packed, int64_t columns, const std::optional<Tensor>& bias,
                    int64_t activation) {
  STD_TORCH_CHECK(x.dim() == 2, "linear_tiles: expected x (T, K)");
  STD_TORCH_CHECK(packed.dim() == 3, "linear_tiles: expected packed of linear_pack");
  const int64_t panel = BF_DISPATCH(linear_layout)().panel;
  check_dtype(packed, "packed", ScalarType::Float);
  check_size(packed, "packed", 0, parts(columns, panel));
  check_size(packed, "packed", 1, x.size(1));
  check_size(packed, "packed", 2, panel);
  if (bias) check_size(*bias, "bias", 0, columns);
  const Tensor in = x.stride(1) == 1 ? x : torch::stable::contiguous(x), panels = as_contiguous(packed);
  const Tensor shift = bias ? as_float(*bias) : empty({0}, ScalarType::Float);
  const float* shift_data = bias ? data<float>(shift) : nullptr;
  const Tensor out = empty({x.size(0), columns}, x.scalar_type());
  dispatch_float(x.scalar_type(), "linear", [&](auto element) {
    dispatch_activation(activation, "linear", [&](auto constant) {
      multiply<decltype(element), decltype(constant)::value>(in, panels, shift_data, out);
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bert_fast, CPU, m) {
  m.impl("linear_pack", TORCH_BOX(&linear_pack));
  m.impl("linear_tiles", TORCH_BOX(&linear_tiles));
}

}  // namespace bert_fast
