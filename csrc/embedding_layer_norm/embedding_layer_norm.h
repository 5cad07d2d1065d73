// dropout(LayerNorm(word[id] + position[position id] + token_type[type id]) * weight + bias), ids (T,), tables (rows,
// E).
#pragma once

#include "common/tensor.h"

namespace bert_fast {

// -> out, mean (T,), rstd (T,)
std::tuple<Tensor, Tensor, Tensor> embedding_layer_norm_fwd_cpu(
    const Tensor& input_ids, const Tensor& token_type_ids, const Tensor& position_ids, const Tensor& word,
    const Tensor& token_type, const Tensor& position, const Tensor& weight, const Tensor& bias, double dropout_p,
    double eps, std::optional<int64_t> padding_idx, const std::optional<Tensor>& rng_state, ScalarType out_dtype);

// -> dword, dtoken_type, dposition in the tables' dtype, dweight, dbias
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> embedding_layer_norm_bwd_cpu(
    const Tensor& dout, const Tensor& input_ids, const Tensor& token_type_ids, const Tensor& position_ids,
    const Tensor& word, const Tensor& token_type, const Tensor& position, const Tensor& weight, const Tensor& mean,
    const Tensor& rstd, double dropout_p, std::optional<int64_t> padding_idx, const std::optional<Tensor>& rng_state);

}  // namespace bert_fast
