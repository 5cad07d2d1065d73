// Softmax cross entropy over rows of logits (C, V), with its gradient written over them.
#pragma once

#include "common/tensor.h"

namespace bert_fast {

std::tuple<Tensor, Tensor> masked_lm_loss_rows_cpu(const Tensor& logits, const Tensor& labels, const Tensor& bias,
                                                   const Tensor& dbias, double scale, double label_smoothing,
                                                   double z_loss, bool grad);

}  // namespace bert_fast
