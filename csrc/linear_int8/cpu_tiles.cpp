// INT8 linear layers by register tiles of our own, with the epilogue fused, on the CPU.
#include "common/activation.h"
#include "common/blocks.h"
#include "linear_int8/scales.h"

#define BF_KERNELS "linear_int8/cpu_tiles_kernels.h"
#define BF_KERNELS_INT8_DOT
#include "common/foreach_isa.h"

namespace bert_fast {
namespace {

struct ByteRows {
  const uint8_t* u;
  const float *scale, *low;
};

template <class T, int ACTIVATION>
void multiply(const ByteRows& x, const int8_t* packed, const Int8Columns& columns, const Tensor& out, int64_t depth) {
  const int64_t cols = out.size(1), padded = parts(depth, 4) * 4;
  const auto block = BF_DISPATCH_INT8_DOT(linear_int8_block<T, ACTIVATION>);
  const int64_t floats = parts(BF_DISPATCH_INT8_DOT(byte_scratch_bytes)(depth), sizeof(float));
  Blocks(out.size(0), cols, BF_DISPATCH_INT8_DOT(byte_layout)()).run([&] {
    return [&, scratch = aligned_floats(floats)](const Block& b) {
      const float* bias = columns.bias == nullptr ? nullptr : columns.bias + b.col;
      block(x.u + b.row * depth, packed + b.col * padded, x.scale + b.row, x.low + b.row,
            {columns.scale + b.col, columns.sums + b.col, bias}, mutable_data<T>(out) + b.row * cols + b.col, cols,
            b.rows, depth, b.cols, scratch.get());
    };
  });
}

// weight (N, K) int8, from -64 to 64 unless the kernels have BF_INT8_DOT -> the panels that linear_int8_tiles reads.
Tensor linear_int8_pack(const Tensor& values) {
  STD_TORCH_CHECK(values.dim() == 2, "linear_int8_pack: expected values (N, K)");
  check_dtype(values, "values", ScalarType::Char);
  const Tensor in = as_contiguous(values);
  const int64_t rows = in.size(0), depth = in.size(1), panel = BF_DISPATCH_INT8_DOT(byte_layout)().panel;
  const Tensor packed = empty({parts(rows, panel), parts(depth, 4), panel, 4}, ScalarType::Char);
  const auto pack = BF_DISPATCH_INT8_DOT(pack_byte_panel);
  parallel_for(0, packed.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      pack(data<int8_t>(in) + i * panel * depth, std::min(panel, rows - i * panel), depth,
           mutable_data<int8_t>(packed) + i * panel * parts(depth, 4) * 4);
    }
  });
  return packed;
}

// act(...) (T, columns) of u (T, K) uint8 and a packed weight of `columns` rows.
Tensor linear_int8_tiles(const Tensor& u, const Tensor& packed, int64_t columns, const Tensor& scale, const Tensor& low,
                         const Tensor& weight_scale, const Tensor& weight_sums, const std::optional<Tensor>& bias,
                         int64_t activation, bool bf16) {
  STD_TORCH_CHECK(u.dim() == 2, "linear_int8_tiles: expected u (T, K)");
  const int64_t rows = u.size(0), depth = u.size(1), panel = BF_DISPATCH_INT8_DOT(byte_layout)().panel;
  check_dtype(u, "u", ScalarType::Byte);
  check_dtype(packed, "packed", ScalarType::Char);
  STD_TORCH_CHECK(columns >= 0, "linear_int8_tiles: columns is ", columns, "; expected at least 0");
  check_shape(packed, "packed", {parts(columns, panel), parts(depth, 4), panel, 4});
  const Int8Scales scales(rows, columns, scale, low, weight_scale, weight_sums, bias);
  const Tensor in = as_contiguous(u), panels = as_contiguous(packed);
  const ScalarType dtype = bf16 ? ScalarType::BFloat16 : ScalarType::Float;
  const Tensor out = empty({rows, columns}, dtype);
  const ByteRows x{data<uint8_t>(in), data<float>(scales.scale), data<float>(scales.low)};
  dispatch_float(dtype, "linear_int8", [&](auto element) {
    dispatch_activation(activation, "linear_int8", [&](auto constant) {
      multiply<decltype(element), decltype(constant)::value>(x, data<int8_t>(panels), scales.columns(), out, depth);
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bert_fast, CPU, m) {
  m.impl("linear_int8_pack", TORCH_BOX(&linear_int8_pack));
  m.impl("linear_int8_tiles", TORCH_BOX(&linear_int8_tiles));
}

}  // namespace bert_fast
