// Argument checks shared by the CPU and CUDA kernels of attention.
#pragma once

#include <optional>

#include "common/tensor.h"

namespace bert_fast::attention {

inline void check_inputs(const Tensor& qkv, const std::optional<Tensor>& bias, const Tensor& cu_seqlens) {
  STD_TORCH_CHECK(qkv.dim() == 4 && qkv.size(1) == 3, "attention: expected qkv (T, 3, N, D)");
  if (bias) check_shape(*bias, "bias", {3, qkv.size(2), qkv.size(3)});
  check_dtype(cu_seqlens, "cu_seqlens", ScalarType::Int);
  STD_TORCH_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1, "attention: expected cu_seqlens (B+1,)");
}

inline void check_like_out(const Tensor& x, const char* name, const Tensor& qkv) {
  check_shape(x, name, {qkv.size(0), qkv.size(2), qkv.size(3)});
  check_dtype(x, name, qkv.scalar_type());
}

// Checks the additional arguments of the backward pass.
inline void check_saved(const Tensor& dout, const Tensor& out, const Tensor& stats, const Tensor& qkv) {
  check_like_out(dout, "dout", qkv);
  check_like_out(out, "out", qkv);
  check_dtype(stats, "stats", ScalarType::Float);
  check_shape(stats, "stats", {2, qkv.size(2), qkv.size(0)});
}

}  // namespace bert_fast::attention
