// Argument checks shared by the CPU and CUDA kernels of add_layer_norm.
#pragma once

#include <optional>

#include "common/tensor.h"

namespace bert_fast::add_layer_norm {

inline void check_inputs(const Tensor& x, const Tensor& residual, const Tensor& weight,
                         const std::optional<Tensor>& x_bias) {
  STD_TORCH_CHECK(x.dim() == 2, "add_layer_norm: expected x (T, E)");
  check_shape(residual, "residual", {x.size(0), x.size(1)});
  check_dtype(residual, "residual", x.scalar_type());
  check_shape(weight, "weight", {x.size(1)});
  if (x_bias) check_shape(*x_bias, "x_bias", {x.size(1)});
}

// Checks the additional arguments of the backward pass.
inline void check_saved(const Tensor& dout, const Tensor& x, const Tensor& mean, const Tensor& rstd) {
  check_shape(dout, "dout", {x.size(0), x.size(1)});
  check_dtype(dout, "dout", x.scalar_type());
  check_shape(mean, "mean", {x.size(0)});
  check_shape(rstd, "rstd", {x.size(0)});
}

}  // namespace bert_fast::add_layer_norm
