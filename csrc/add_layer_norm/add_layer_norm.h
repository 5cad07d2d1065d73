// LayerNorm(residual + dropout(x + x_bias)) * weight + bias, x (T, E); the gradient computes sum and mask again.
#pragma once

#include "common/tensor.h"

namespace bert_fast {

// -> out, mean (T,), rstd (T,)
std::tuple<Tensor, Tensor, Tensor> add_layer_norm_fwd_cpu(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                                          const Tensor& bias, const std::optional<Tensor>& x_bias,
                                                          double dropout_p, double eps,
                                                          const std::optional<Tensor>& rng_state);

// -> dx, dresidual, dweight, dbias, dx_bias (empty without x_bias)
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> add_layer_norm_bwd_cpu(const Tensor& dout, const Tensor& x,
                                                                          const Tensor& residual, const Tensor& weight,
                                                                          const std::optional<Tensor>& x_bias,
                                                                          const Tensor& mean, const Tensor& rstd,
                                                                          double dropout_p,
                                                                          const std::optional<Tensor>& rng_state);

// -> out, mean (T,), rstd (T,)
std::tuple<Tensor, Tensor, Tensor> add_layer_norm_fwd_cuda(const Tensor& x, const Tensor& residual,
                                                           const Tensor& weight, const Tensor& bias,
                                                           const std::optional<Tensor>& x_bias, double dropout_p,
                                                           double eps, const std::optional<Tensor>& rng_state);

// -> dx, dresidual, dweight, dbias, dx_bias (empty without x_bias)
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> add_layer_norm_bwd_cuda(const Tensor& dout, const Tensor& x,
                                                                           const Tensor& residual, const Tensor& weight,
                                                                           const std::optional<Tensor>& x_bias,
                                                                           const Tensor& mean, const Tensor& rstd,
                                                                           double dropout_p,
                                                                           const std::optional<Tensor>& rng_state);

}  // namespace bert_fast
