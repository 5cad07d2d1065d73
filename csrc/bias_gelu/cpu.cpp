// gelu(x + bias), x (T, F), on the CPU. The backward pass recomputes GeLU's derivative from x and bias.
#include "bias_gelu/checks.h"
#include "common/activation.h"
#include "common/reduce.h"

#define BF_KERNELS "bias_gelu/cpu_kernels.h"
#include "common/foreach_isa.h"

namespace bert_fast {
namespace {

constexpr int64_t kGrain = 8192;  // the fewest elements of a thread

template <class T, bool TANH>
void forward(const Tensor& x, const Tensor& bias, const Tensor& out) {
  const int64_t cols = x.size(1);
  const auto rows_of = BF_DISPATCH(bias_gelu_rows<T, TANH>);
  parallel_for(
      0, x.size(0), std::max<int64_t>(1, kGrain / std::max<int64_t>(1, cols)), [&](int64_t begin, int64_t end) {
        rows_of(data<T>(x) + begin * cols, data<float>(bias), mutable_data<T>(out) + begin * cols, end - begin, cols);
      });
}

template <class T, bool TANH>
void backward(const Tensor& dout, const Tensor& x, const Tensor& bias, const Tensor& dx, const Tensor& partial) {
  const int64_t cols = x.size(1);
  const RowParts parts(x.size(0));
  const auto rows_of = BF_DISPATCH(bias_gelu_grad_rows<T, TANH>);
  parallel_for(0, parts.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t start = parts.begin(part) * cols;
      rows_of(data<T>(dout) + start, data<T>(x) + start, data<float>(bias), mutable_data<T>(dx) + start,
              mutable_data<float>(partial) + part * cols, parts.length(part), cols);
    }
  });
}

Tensor bias_gelu_fwd(const Tensor& x, const Tensor& bias, bool tanh) {
  bias_gelu::check_inputs(x, bias);
  const Tensor x_in = as_contiguous(x), bias_in = as_float(bias);
  const Tensor out = empty({x.size(0), x.size(1)}, x.scalar_type());
  dispatch_float(x.scalar_type(), "bias_gelu", [&](auto element) {
    using T = decltype(element);
    tanh ? forward<T, true>(x_in, bias_in, out) : forward<T, false>(x_in, bias_in, out);
  });
  return out;
}

std::tuple<Tensor, Tensor> bias_gelu_bwd(const Tensor& dout, const Tensor& x, const Tensor& bias, bool tanh) {
  bias_gelu::check_inputs(dout, x, bias);
  const Tensor dout_in = as_contiguous(dout), x_in = as_contiguous(x), bias_in = as_float(bias);
  const Tensor dx = empty({x.size(0), x.size(1)}, x.scalar_type());
  const RowParts parts(x.size(0));
  const Tensor partial = zeros({parts.count, x.size(1)}, ScalarType::Float);
  dispatch_float(x.scalar_type(), "bias_gelu", [&](auto element) {
    using T = decltype(element);
    tanh ? backward<T, true>(dout_in, x_in, bias_in, dx, partial)
         : backward<T, false>(dout_in, x_in, bias_in, dx, partial);
  });
  return {dx, sum_parts(partial, parts.count, x.size(1))};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bert_fast, CPU, m) {
  m.impl("bias_gelu_fwd", TORCH_BOX(&bias_gelu_fwd));
  m.impl("bias_gelu_bwd", TORCH_BOX(&bias_gelu_bwd));
}

}  // namespace bert_fast
