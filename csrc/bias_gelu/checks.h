// Argument checks shared by the CPU and CUDA kernels of bias_gelu.
#pragma once

#include "common/tensor.h"

namespace bert_fast::bias_gelu {

inline void check_inputs(const Tensor& x, const Tensor& bias) {
  STD_TORCH_CHECK(x.dim() == 2, "bias_gelu: expected x (T, F)");
  check_shape(bias, "bias", {x.size(1)});
}

inline void check_inputs(const Tensor& dout, const Tensor& x, const Tensor& bias) {
  check_inputs(x, bias);
  check_shape(dout, "dout", {x.size(0), x.size(1)});
  check_dtype(dout, "dout", x.scalar_type());
}

}  // namespace bert_fast::bias_gelu
