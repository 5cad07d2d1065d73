// What stands behind a float32 product whose result is bfloat16: act(product + bias), rounded once.
#pragma once

#include <optional>

#include "common/tensor.h"

namespace bert_fast {

// activation: 0 for none, 1 for GeLU with erf, 2 with tanh.
Tensor linear_finish_cpu(const Tensor& product, const std::optional<Tensor>& bias, int64_t activation);

}  // namespace bert_fast
