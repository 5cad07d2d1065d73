// gelu(x + bias), x (T, F); the gradient recomputes GeLU instead of storing it.
#pragma once

#include "common/tensor.h"

namespace bert_fast {

Tensor bias_gelu_fwd_cpu(const Tensor& x, const Tensor& bias, bool tanh);
std::tuple<Tensor, Tensor> bias_gelu_bwd_cpu(const Tensor& dout, const Tensor& x, const Tensor& bias, bool tanh);

Tensor bias_gelu_fwd_cuda(const Tensor& x, const Tensor& bias, bool tanh);
std::tuple<Tensor, Tensor> bias_gelu_bwd_cuda(const Tensor& dout, const Tensor& x, const Tensor& bias, bool tanh);

}  // namespace bert_fast
