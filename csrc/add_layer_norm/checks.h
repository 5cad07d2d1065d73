// Argument checks shared by the CPU and CUDA kernels of add_layer_norm.
#pragma once

#include <optional>

#include "common/tensor.h"

namespace bert_fast::add_layer_norm {

inline void check_inputs(const Tensor& x, const Tensor& residual, const Tensor& weight,
                         const std::optional<Tensor>& x_bias) {
  STD_TORCH_CHECK(x.dim() == 2 && residual.dim() == 2 && weight.dim() == 1,
                  "add_layer_norm: expected x (T, E), residual (T, E) and weight (E,)");
  check_size(residual, "residual", 0, x.size(0));
  check_size(residual, "residual", 1, x.size(1));
  check_dtype(residual, "residual", x.scalar_type());
  check_size(weight, "weight", 0, x.size(1));
  if (x_bias) check_size(*x_bias, "x_bias", 0, x.size(1));
}

// Checks the additional arguments of the backward pass.
inline void check_saved(const Tensor& dout, const Tensor& x, const Tensor& mean, const Tensor& rstd) {
  check_size(dout, "dout", 0, x.size(0));
  check_size(dout, "dout", 1, x.size(1));
  check_dtype(dout, "dout", x.scalar_type());
  check_size(mean, "mean", 0, x.size(0));
  check_size(rstd, "rstd", 0, x.size(0));
}

}  // namespace bert_fast::add_layer_norm
