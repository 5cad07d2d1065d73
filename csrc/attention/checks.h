// Argument checks shared by the CPU and CUDA kernels of attention.
#pragma once

#include <optional>

#include "common/tensor.h"

namespace bert_fast::attention {

inline void check_inputs(const Tensor& qkv, const std::optional<Tensor>& bias, const Tensor& cu_seqlens) {
  STD_TORCH_CHECK(qkv.dim() == 4 && qkv.size(1) == 3, "attention: expected qkv (T, 3, N, D)");
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 3, "attention: expected bias (3, N, D)");
    for (int64_t i = 0; i < 3; ++i) check_size(*bias, "bias", i, qkv.size(i + 1));
  }
  check_dtype(cu_seqlens, "cu_seqlens", ScalarType::Int);
  STD_TORCH_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1, "attention: expected cu_seqlens (B+1,)");
}

inline void check_like_out(const Tensor& x, const char* name, const Tensor& qkv) {
  STD_TORCH_CHECK(x.dim() == 3, name, ": expected (T, N, D)");
  check_size(x, name, 0, qkv.size(0));
  check_size(x, name, 1, qkv.size(2));
  check_size(x, name, 2, qkv.size(3));
  check_dtype(x, name, qkv.scalar_type());
}

// Checks the additional arguments of the backward pass.
inline void check_saved(const Tensor& dout, const Tensor& out, const Tensor& lse, const Tensor& qkv) {
  check_like_out(dout, "dout", qkv);
  check_like_out(out, "out", qkv);
  check_dtype(lse, "lse", ScalarType::Float);
  STD_TORCH_CHECK(lse.dim() == 2, "lse: expected (N, T)");
  check_size(lse, "lse", 0, qkv.size(2));
  check_size(lse, "lse", 1, qkv.size(0));
}

}  // namespace bert_fast::attention
