// The dropout mask of kernels/_common/philox.py in CUDA kernels: the same bits.
//
// One call of the generator decides 16 adjacent columns of a row, a byte each. The state stays on the device: no
// synchronization with the host, and a captured CUDA graph draws new masks after the state has been overwritten.
#pragma once

#include <optional>

#include "common/cuda.h"
#include "common/dropout.h"

namespace bert_fast {

// A kernel's argument; state is int64 (2,) = (seed, offset) on the device, or null without dropout.
struct DropoutArguments {
  const int64_t* state = nullptr;
  int threshold = 0;  // in 256ths; 0 drops nothing
  float scale = 1.0f;
};

inline DropoutArguments dropout_arguments(double dropout_p, const std::optional<Tensor>& rng_state) {
  DropoutArguments drop;
  drop.threshold = dropout_threshold(dropout_p, rng_state);
  if (drop.threshold == 0) return drop;
  STD_TORCH_CHECK(rng_state->is_contiguous(), "rng_state: expected contiguous int64 (2,)");
  drop.state = data<int64_t>(*rng_state);
  drop.scale = dropout_scale(drop.threshold);
  return drop;
}

struct DropoutState {
  uint32_t key[2], offset;
  uint32_t threshold;
  float scale;
};

__device__ __forceinline__ DropoutState load_dropout(const DropoutArguments& arguments) {
  DropoutState drop = {{0, 0}, 0, static_cast<uint32_t>(arguments.threshold), arguments.scale};
  if (arguments.threshold) {
    const uint64_t seed = static_cast<uint64_t>(arguments.state[0]);
    drop.key[0] = static_cast<uint32_t>(seed);
    drop.key[1] = static_cast<uint32_t>(seed >> 32);
    drop.offset = static_cast<uint32_t>(arguments.state[1]);
  }
  return drop;
}

// The 16 random bytes of columns [16 group, 16 group + 16): byte c is words[c / 4] >> 8 (c % 4).
__device__ __forceinline__ void dropout_words(const DropoutState& drop, uint32_t plane, uint32_t row, uint32_t group,
                                              uint32_t (&words)[4]) {
  uint32_t c0 = group, c1 = row, c2 = plane, c3 = drop.offset, k0 = drop.key[0], k1 = drop.key[1];
#pragma unroll
  for (int round = 0; round < 7; ++round) {
    const uint32_t high0 = __umulhi(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u;
    const uint32_t high2 = __umulhi(c2, 0xCD9E8D57u), low2 = c2 * 0xCD9E8D57u;
    c0 = high2 ^ c1 ^ k0;
    c1 = low2;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

__device__ __forceinline__ bool dropout_keeps(const DropoutState& drop, const uint32_t (&words)[4], uint32_t col) {
  // Selects instead of an index keep `words` in registers.
  const uint32_t low = col & 4 ? words[1] : words[0], high = col & 4 ? words[3] : words[2];
  return (((col & 8 ? high : low) >> (8 * (col & 3))) & 255u) >= drop.threshold;
}

// The multipliers, 0 or scale, of N columns from `col` on, a multiple of N; N divides 16.
template <int N>
__device__ __forceinline__ void dropout_multipliers(const DropoutState& drop, uint32_t plane, uint32_t row,
                                                    uint32_t col, float (&multiplier)[N]) {
  uint32_t words[4];
  dropout_words(drop, plane, row, col / 16, words);
#pragma unroll
  for (int i = 0; i < N; ++i) multiplier[i] = dropout_keeps(drop, words, col + i) ? drop.scale : 0.0f;
}

}  // namespace bert_fast
