// The gradients of linear layers on the CPU: dx = dout W and dW = dout^T x, of float32, or of bfloat16 by dot products
// of pairs where the CPU has the instruction, in float32 elsewhere.
#include "common/blocks.h"

#define BF_KERNELS "linear/cpu_gradient_kernels.h"
#define BF_KERNELS_BF16_DOT
#include "common/foreach_isa.h"

namespace bert_fast {
namespace {

// Without dot products of bfloat16 for factors of float32, which have no use for them.
template <bool TRANSPOSED, class A, class B, class O>
auto block_of() {
  if constexpr (std::is_same_v<A, bfloat16>) {
    return BF_DISPATCH_BF16_DOT(gradient_block<TRANSPOSED, A, B, O>);
  } else {
    return BF_DISPATCH(gradient_block<TRANSPOSED, A, B, O>);
  }
}

// out (rows, cols) = a b, or += if `accumulate`; a is (rows, terms) or, TRANSPOSED, (terms, rows). All are contiguous.
template <bool TRANSPOSED, class A, class B, class O>
void multiply(const Tensor& a, const Tensor& b, const Tensor& out, bool accumulate) {
  const int64_t rows = out.size(0), cols = out.size(1), terms = b.size(0), a_stride = TRANSPOSED ? rows : terms;
  const auto block = block_of<TRANSPOSED, A, B, O>();
  const Blocks blocks(rows, cols, BF_DISPATCH(gradient_layout)());
  const int64_t floats = BF_DISPATCH(gradient_scratch_floats)(blocks.rows);
  const A* first = data<A>(a);
  const B* second = data<B>(b);
  O* to = mutable_data<O>(out);
  blocks.run([&] {
    return [&, scratch = aligned_floats(floats)](const Block& at) {
      block(first + at.row * (TRANSPOSED ? 1 : a_stride), a_stride, second + at.col, cols, to + at.row * cols + at.col,
            cols, at.rows, at.cols, terms, accumulate, scratch.get());
    };
  });
}

// dout (T, N), weight (N, K) -> dx (T, K) in the dtype of dout, rounded once. The weight has that dtype or float32.
Tensor linear_dx(const Tensor& dout, const Tensor& weight) {
  STD_TORCH_CHECK(dout.dim() == 2 && weight.dim() == 2, "linear_dx: expected dout (T, N) and weight (N, K)");
  check_shape(weight, "weight", {dout.size(1), weight.size(1)});
  const bool wide = weight.scalar_type() == ScalarType::Float;
  if (!wide) check_dtype(weight, "weight", dout.scalar_type());
  const Tensor a = as_contiguous(dout), b = as_contiguous(weight);
  const Tensor dx = empty({dout.size(0), weight.size(1)}, dout.scalar_type());
  dispatch_float(dout.scalar_type(), "linear_dx", [&](auto element) {
    using T = decltype(element);
    wide ? multiply<false, T, float, T>(a, b, dx, false) : multiply<false, T, T, T>(a, b, dx, false);
  });
  return dx;
}

// dweight (N, K) = dout^T x for dout (T, N) and x (T, K), or += if `accumulate`. It is float32 or has their dtype, and
// each element is rounded once.
void linear_dweight(const Tensor& dout, const Tensor& x, const Tensor& dweight, bool accumulate) {
  STD_TORCH_CHECK(dout.dim() == 2 && x.dim() == 2, "linear_dweight: expected dout (T, N) and x (T, K)");
  check_shape(x, "x", {dout.size(0), x.size(1)});
  check_dtype(x, "x", dout.scalar_type());
  check_shape(dweight, "dweight", {dout.size(1), x.size(1)});
  STD_TORCH_CHECK(dweight.is_contiguous(), "linear_dweight: dweight isn't contiguous");
  const bool wide = dweight.scalar_type() == ScalarType::Float;
  if (!wide) check_dtype(dweight, "dweight", dout.scalar_type());
  const Tensor a = as_contiguous(dout), b = as_contiguous(x);
  dispatch_float(dout.scalar_type(), "linear_dweight", [&](auto element) {
    using T = decltype(element);
    wide ? multiply<true, T, T, float>(a, b, dweight, accumulate) : multiply<true, T, T, T>(a, b, dweight, accumulate);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bert_fast, CPU, m) {
  m.impl("linear_dx", TORCH_BOX(&linear_dx));
  m.impl("linear_dweight", TORCH_BOX(&linear_dweight));
}

}  // namespace bert_fast
