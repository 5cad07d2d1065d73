// The dropout mask of kernels/_common/philox.py: what a kernel needs to know of it, and the checked way to get that.
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
  int32_t threshold = 0;  // of 256; 0 drops nothing
  float scale = 1.0f;
};

// Bytes that dropout_bytes may write for a row of `cols`: whole vectors of groups of 16, for the widest vectors.
inline int64_t dropout_bytes_size(int64_t cols) {
  return (cols + 255) / 256 * 256;
}

// What a thread needs to work on one row: its values in float32 and its random bytes.
struct RowScratch {
  explicit RowScratch(int64_t cols) : row(cols), bytes(dropout_bytes_size(cols)) {}
  std::vector<float> row;
  std::vector<uint8_t> bytes;
};

// rng_state is int64 (2,) = (seed, offset) and has to be there where dropout_p > 0.
inline Dropout make_dropout(double dropout_p, const std::optional<Tensor>& rng_state) {
  Dropout drop;
  if (dropout_p == 0.0) return drop;
  STD_TORCH_CHECK(dropout_p > 0.0 && dropout_p < 1.0, "dropout_p is ", dropout_p, "; expected 0 <= dropout_p < 1");
  drop.threshold = static_cast<int32_t>(dropout_p * 256 + 0.5);
  STD_TORCH_CHECK(drop.threshold >= 1 && drop.threshold <= 255, "dropout_p is ", dropout_p,
                  "; expected 0 or a probability from 1/512 to 511/512");
  STD_TORCH_CHECK(rng_state.has_value(), "dropout_p > 0 needs rng_state");
  STD_TORCH_CHECK(rng_state->scalar_type() == ScalarType::Long && rng_state->dim() == 1 && rng_state->size(0) == 2,
                  "rng_state: expected int64 (2,)");
  const Tensor state = as_contiguous(*rng_state);
  const uint64_t seed = static_cast<uint64_t>(data<int64_t>(state)[0]);
  drop.key = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  drop.offset = static_cast<uint32_t>(data<int64_t>(state)[1]);
  drop.scale = 256.0f / static_cast<float>(256 - drop.threshold);
  return drop;
}

}  // namespace bert_fast
