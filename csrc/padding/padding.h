// Gather the real tokens of a padded batch, and scatter them back. Rows are moved as bytes, so every dtype is taken.
#pragma once

#include "common/tensor.h"

namespace bert_fast {

// mask (B, S) bool -> flat positions of the ones (T,) int64, cu_seqlens (B+1,) int32.
std::tuple<Tensor, Tensor> unpad_indices_cpu(const Tensor& mask);

// x (R, ...), indices (T,) rising -> (T, ...).
Tensor gather_rows_cpu(const Tensor& x, const Tensor& indices);

// x (T, ...), indices (T,) rising -> (rows, ...), zeros elsewhere.
Tensor scatter_rows_cpu(const Tensor& x, const Tensor& indices, int64_t rows);

}  // namespace bert_fast
