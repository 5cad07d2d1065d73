// The dropout mask of kernels/_common/philox.py: its checked parameters.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

#include "common/tensor.h"

namespace bert_fast {

struct Dropout {
  std::array<uint32_t, 2> key = {0, 0};
  uint32_t offset = 0;
  int32_t threshold = 0;  // in 256ths; 0 drops nothing
  float scale = 1.0f;
};

// The bytes that dropout_bytes may write for a row of `cols`: a multiple of 16 groups of 16, for the widest vectors.
inline int64_t dropout_bytes_size(int64_t cols) {
  return (cols + 255) / 256 * 256;
}

// A thread's scratch memory for one row: its values in float32 and its random bytes.
struct RowScratch {
  explicit RowScratch(int64_t cols) : row(cols), bytes(dropout_bytes_size(cols)) {}
  std::vector<float> row;
  std::vector<uint8_t> bytes;
};

// `dropout_p` in 256ths: an element whose random byte is below it is dropped. Checks dropout_p and, unless that is 0,
// rng_state, int64 (2,) = (seed, offset).
inline int32_t dropout_threshold(double dropout_p, const std::optional<Tensor>& rng_state) {
  if (dropout_p == 0.0) return 0;
  STD_TORCH_CHECK(dropout_p > 0.0 && dropout_p < 1.0, "dropout_p is ", dropout_p, "; expected 0 <= dropout_p < 1");
  const auto threshold = static_cast<int32_t>(dropout_p * 256 + 0.5);
  STD_TORCH_CHECK(threshold >= 1 && threshold <= 255, "dropout_p is ", dropout_p,
                  "; expected 0 or a probability from 1/512 to 511/512");
  STD_TORCH_CHECK(rng_state.has_value(), "dropout_p > 0 needs rng_state");
  STD_TORCH_CHECK(rng_state->scalar_type() == ScalarType::Long && rng_state->dim() == 1 && rng_state->size(0) == 2,
                  "rng_state: expected int64 (2,)");
  return threshold;
}

inline float dropout_scale(int32_t threshold) {
  return 256.0f / static_cast<float>(256 - threshold);
}

inline Dropout make_dropout(double dropout_p, const std::optional<Tensor>& rng_state) {
  Dropout drop;
  drop.threshold = dropout_threshold(dropout_p, rng_state);
  if (drop.threshold == 0) return drop;
  const Tensor state = as_contiguous(*rng_state);
  const uint64_t seed = static_cast<uint64_t>(data<int64_t>(state)[0]);
  drop.key = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  drop.offset = static_cast<uint32_t>(data<int64_t>(state)[1]);
  drop.scale = dropout_scale(drop.threshold);
  return drop;
}

}  // namespace bert_fast
