// The scales of INT8 products.
//
// A row x is scale u + low with u from 0 to 255, and a weight row w is weight_scale times INT8 values v. So x w^T =
// weight_scale (scale (u . v) + low sum(v)), where u . v is the integer product, as float32: a library's, or computed
// by linear_int8_tiles.
#pragma once

#include <optional>

#include "common/tensor.h"

namespace bert_fast {

// What the epilogue reads for each column of a product; `bias` may be null.
struct Int8Columns {
  const float* scale;
  const float* sums;
  const float* bias;
};

// The scales and the bias of a product (rows, cols), checked, contiguous and in float32.
struct Int8Scales {
  Int8Scales(int64_t rows, int64_t cols, const Tensor& scale, const Tensor& low, const Tensor& weight_scale,
             const Tensor& weight_sums, const std::optional<Tensor>& bias)
      : scale(as_float(scale)),
        low(as_float(low)),
        weight_scale(as_float(weight_scale)),
        weight_sums(as_float(weight_sums)),
        bias(bias ? as_float(*bias) : empty({0}, ScalarType::Float)),
        with_bias(bias.has_value()) {
    check_shape(scale, "scale", {rows});
    check_shape(low, "low", {rows});
    check_shape(weight_scale, "weight_scale", {cols});
    check_shape(weight_sums, "weight_sums", {cols});
    if (bias) check_shape(*bias, "bias", {cols});
  }
  Int8Columns columns() const {
    return {data<float>(weight_scale), data<float>(weight_sums), with_bias ? data<float>(bias) : nullptr};
  }
  Tensor scale, low, weight_scale, weight_sums, bias;
  bool with_bias;
};

}  // namespace bert_fast
