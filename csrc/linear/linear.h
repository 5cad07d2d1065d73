// Linear layers in float32 arithmetic, of weights that are packed once.
#pragma once

#include <optional>

#include "common/tensor.h"

namespace bert_fast {

// weight (N, K) as the panels of float32 that linear_tiles reads: (N / columns of a panel, rounded up; K; those
// columns), with zeros behind the last row.
Tensor linear_pack_cpu(const Tensor& weight);

// act(x weight^T + bias), (T, N) in the dtype of x, rounded once. packed: what linear_pack made of weight (N, K), N is
// `columns`. activation: 0 for none, 1 for GeLU with erf, 2 with tanh.
Tensor linear_tiles_cpu(const Tensor& x, const Tensor& packed, int64_t columns, const std::optional<Tensor>& bias,
                        int64_t activation);

}  // namespace bert_fast
