// LayerNorm(residual + dropout(x + x_bias)) * weight + bias, x (T, E), on the CPU. The backward pass recomputes the sum
// and the dropout mask.
#include "add_layer_norm/checks.h"
#include "common/dropout.h"
#include "common/reduce.h"

namespace bert_fast {

template <class T>
struct AddLayerNormRows {
  const T *x, *residual;
  const float *x_bias, *weight, *bias;
  T* out;
  float *mean, *rstd;
  int64_t cols;
  float eps;
  Dropout drop;
};

template <class T>
struct AddLayerNormGradRows {
  const T *dout, *x, *residual;
  const float *x_bias, *weight, *mean, *rstd;
  T *dx, *dresidual;
  int64_t cols;
  Dropout drop;
};

}  // namespace bert_fast

#define BF_KERNELS "add_layer_norm/cpu_kernels.h"
#include "common/foreach_isa.h"

namespace bert_fast {
namespace {

constexpr int64_t kGrain = 8192;  // the fewest elements of a thread

// Adding zeros that stay in L1 costs less than a second instantiation of every kernel.
Tensor bias_or_zeros(const std::optional<Tensor>& x_bias, int64_t cols) {
  return x_bias ? as_float(*x_bias) : zeros({cols}, ScalarType::Float);
}

template <class T>
void forward(const AddLayerNormRows<T>& in, int64_t rows) {
  const auto rows_of =
      in.drop.threshold ? BF_DISPATCH(add_layer_norm_rows<T, true>) : BF_DISPATCH(add_layer_norm_rows<T, false>);
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, in.cols));
  parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    RowScratch scratch(in.cols);
    rows_of(in, begin, end, scratch.row.data(), scratch.bytes.data());
  });
}

// partial (parts, 3 E): dweight, dbias and dx_bias of each part of the rows.
template <class T>
void backward(const AddLayerNormGradRows<T>& in, const RowParts& parts, bool has_x_bias, float* partial) {
  const auto rows_of = in.drop.threshold ? BF_DISPATCH(add_layer_norm_grad_rows<T, true>)
                                         : BF_DISPATCH(add_layer_norm_grad_rows<T, false>);
  parallel_for(0, parts.count, 1, [&](int64_t begin, int64_t end) {
    RowScratch scratch(in.cols);
    for (int64_t part = begin; part < end; ++part) {
      float* sums = partial + part * 3 * in.cols;
      const int64_t first = parts.begin(part);
      rows_of(in, first, first + parts.length(part), sums, sums + in.cols, has_x_bias ? sums + 2 * in.cols : nullptr,
              scratch.row.data(), scratch.bytes.data());
    }
  });
}

// -> out (T, E), mean (T,), rstd (T,)
std::tuple<Tensor, Tensor, Tensor> add_layer_norm_fwd(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                                      const Tensor& bias, const std::optional<Tensor>& x_bias,
                                                      double dropout_p, double eps,
                                                      const std::optional<Tensor>& rng_state) {
  add_layer_norm::check_inputs(x, residual, weight, x_bias);
  const int64_t rows = x.size(0), cols = x.size(1);
  check_shape(bias, "bias", {cols});
  const Dropout drop = make_dropout(dropout_p, rng_state);
  const Tensor x_in = as_contiguous(x), residual_in = as_contiguous(residual);
  const Tensor x_bias_in = bias_or_zeros(x_bias, cols), weight_in = as_float(weight), bias_in = as_float(bias);
  const Tensor out = empty({rows, cols}, x.scalar_type());
  const Tensor mean = empty({rows}, ScalarType::Float), rstd = empty({rows}, ScalarType::Float);
  dispatch_float(x.scalar_type(), "add_layer_norm", [&](auto element) {
    using T = decltype(element);
    forward<T>({data<T>(x_in), data<T>(residual_in), data<float>(x_bias_in), data<float>(weight_in),
                data<float>(bias_in), mutable_data<T>(out), mutable_data<float>(mean), mutable_data<float>(rstd), cols,
                static_cast<float>(eps), drop},
               rows);
  });
  return {out, mean, rstd};
}

// -> dx, dresidual, dweight, dbias, dx_bias (empty without x_bias)
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> add_layer_norm_bwd(const Tensor& dout, const Tensor& x,
                                                                      const Tensor& residual, const Tensor& weight,
                                                                      const std::optional<Tensor>& x_bias,
                                                                      const Tensor& mean, const Tensor& rstd,
                                                                      double dropout_p,
                                                                      const std::optional<Tensor>& rng_state) {
  add_layer_norm::check_inputs(x, residual, weight, x_bias);
  const int64_t rows = x.size(0), cols = x.size(1);
  add_layer_norm::check_saved(dout, x, mean, rstd);
  const Dropout drop = make_dropout(dropout_p, rng_state);
  const Tensor dout_in = as_contiguous(dout), x_in = as_contiguous(x), residual_in = as_contiguous(residual);
  const Tensor x_bias_in = bias_or_zeros(x_bias, cols), weight_in = as_float(weight);
  const Tensor mean_in = as_float(mean), rstd_in = as_float(rstd);
  const Tensor dx = empty({rows, cols}, x.scalar_type()), dresidual = empty({rows, cols}, x.scalar_type());
  const RowParts parts(rows);
  const Tensor partial = zeros({parts.count, 3 * cols}, ScalarType::Float);
  dispatch_float(x.scalar_type(), "add_layer_norm", [&](auto element) {
    using T = decltype(element);
    backward<T>(
        {data<T>(dout_in), data<T>(x_in), data<T>(residual_in), data<float>(x_bias_in), data<float>(weight_in),
         data<float>(mean_in), data<float>(rstd_in), mutable_data<T>(dx), mutable_data<T>(dresidual), cols, drop},
        parts, x_bias.has_value(), mutable_data<float>(partial));
  });
  const auto sum = [&](int64_t index) { return sum_parts(partial, parts.count, cols, 3 * cols, index * cols); };
  return {dx, dresidual, sum(0), sum(1), x_bias ? sum(2) : empty({0}, ScalarType::Float)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bert_fast, CPU, m) {
  m.impl("add_layer_norm_fwd", TORCH_BOX(&add_layer_norm_fwd));
  m.impl("add_layer_norm_bwd", TORCH_BOX(&add_layer_norm_bwd));
}

}  // namespace bert_fast
