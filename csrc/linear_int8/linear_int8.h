// An integer product, and what stands before and behind it: rows to 8 bits, and the product's rows back.
//
// A row x is scale u + low, u from 0 to 255. So x w^T = wscale (scale (u . w) + low sum(w)), of which (u . w) is the
// integer product, as float32: of another library, or of linear_int8_tiles.
#pragma once

#include <optional>

#include "common/tensor.h"

namespace bert_fast {

// x (T, K) float32 or bfloat16 -> u (T, K) uint8, scale (T,), low (T,). `range` (2,) float32: the lowest and the
// highest value that all rows share; absent: each row's own.
std::tuple<Tensor, Tensor, Tensor> linear_int8_quantize_cpu(const Tensor& x, const std::optional<Tensor>& range);

// product (T, N), scale and low (T,) -> act(...) (T, N), bfloat16 or float32. activation: 0 for none, 1 for GeLU with
// erf, 2 with tanh.
Tensor linear_int8_finish_cpu(const Tensor& product, const Tensor& scale, const Tensor& low, const Tensor& weight_scale,
                              const Tensor& weight_sums, const std::optional<Tensor>& bias, int64_t activation,
                              bool bf16);

// The same, quantized at once for the next product: a row of act(...) is never in memory.
std::tuple<Tensor, Tensor, Tensor> linear_int8_finish_quantize_cpu(const Tensor& product, const Tensor& scale,
                                                                   const Tensor& low, const Tensor& weight_scale,
                                                                   const Tensor& weight_sums,
                                                                   const std::optional<Tensor>& bias,
                                                                   int64_t activation,
                                                                   const std::optional<Tensor>& range);

// weight (N, K) int8, from -64 to 64, in the panels that linear_int8_tiles takes.
Tensor linear_int8_pack_cpu(const Tensor& values);

// The integer product of u (T, K) with a packed weight of `columns` rows, and what stands behind it, by our own tiles:
// act(...) (T, columns).
Tensor linear_int8_tiles_cpu(const Tensor& u, const Tensor& packed, int64_t columns, const Tensor& scale,
                             const Tensor& low, const Tensor& weight_scale, const Tensor& weight_sums,
                             const std::optional<Tensor>& bias, int64_t activation, bool bf16);

// The numbers that a row of a product is multiplied by; `bias` may be null.
struct Int8Columns {
  const float* scale;
  const float* sums;
  const float* bias;
};

// What stands behind a product (rows, cols), checked and contiguous.
struct Int8Scales {
  Int8Scales(int64_t rows, int64_t cols, const Tensor& scale, const Tensor& low, const Tensor& weight_scale,
             const Tensor& weight_sums, const std::optional<Tensor>& bias)
      : scale(as_float(scale)),
        low(as_float(low)),
        weight_scale(as_float(weight_scale)),
        weight_sums(as_float(weight_sums)),
        bias(bias ? as_float(*bias) : empty({0}, ScalarType::Float)),
        with_bias(bias.has_value()) {
    check_size(scale, "scale", 0, rows);
    check_size(low, "low", 0, rows);
    check_size(weight_scale, "weight_scale", 0, cols);
    check_size(weight_sums, "weight_sums", 0, cols);
    if (bias) check_size(*bias, "bias", 0, cols);
  }
  Int8Columns columns() const {
    return {data<float>(weight_scale), data<float>(weight_sums), with_bias ? data<float>(bias) : nullptr};
  }
  Tensor scale, low, weight_scale, weight_sums, bias;
  bool with_bias;
};

}  // namespace bert_fast
