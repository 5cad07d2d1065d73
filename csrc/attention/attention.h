// softmax(scale Q K^T) V of every sequence of a packed batch, with QKV bias and dropout; see
// kernels/attention/README.md.
#pragma once

#include "common/tensor.h"

namespace bert_fast {

// qkv (T, 3, N, D), any strides; bias (3, N, D) -> out (T, N, D), lse (N, T) float32.
std::tuple<Tensor, Tensor> attention_fwd_cpu(const Tensor& qkv, const std::optional<Tensor>& bias,
                                             const Tensor& cu_seqlens, int64_t max_seqlen, double softmax_scale,
                                             double dropout_p, const std::optional<Tensor>& rng_state);

// -> dqkv (T, 3, N, D), dbias (3, N, D) float32.
std::tuple<Tensor, Tensor> attention_bwd_cpu(const Tensor& dout, const Tensor& qkv, const std::optional<Tensor>& bias,
                                             const Tensor& out, const Tensor& lse, const Tensor& cu_seqlens,
                                             int64_t max_seqlen, double softmax_scale, double dropout_p,
                                             const std::optional<Tensor>& rng_state);

// On a GPU: nothing is checked that lies in device memory; rows behind the last sequence become 0.
std::tuple<Tensor, Tensor> attention_fwd_cuda(const Tensor& qkv, const std::optional<Tensor>& bias,
                                              const Tensor& cu_seqlens, int64_t max_seqlen, double softmax_scale,
                                              double dropout_p, const std::optional<Tensor>& rng_state);

std::tuple<Tensor, Tensor> attention_bwd_cuda(const Tensor& dout, const Tensor& qkv, const std::optional<Tensor>& bias,
                                              const Tensor& out, const Tensor& lse, const Tensor& cu_seqlens,
                                              int64_t max_seqlen, double softmax_scale, double dropout_p,
                                              const std::optional<Tensor>& rng_state);

}  // namespace bert_fast
