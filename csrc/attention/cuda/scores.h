// Softmax, dropout and their gradients on scores in registers, for the 16-bit kernels. A warp holds 16 rows of scores
// in the layout of mma_16x8x16: lane 4 g + t has columns 8 j + 2 t and the next of row g (s[j][0], s[j][1]) and of row
// g + 8 (s[j][2], s[j][3]).
#pragma once

#include <cmath>

#include "attention/cuda/common.h"
#include "common/cuda.h"

namespace bert_fast {

constexpr unsigned kAllLanes = 0xffffffffu;

// The sum and the maximum over the four lanes that share a row of an accumulator.
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

// Which of a warp's scores, 16 queries by STEP keys, dropout keeps; first_key is a multiple of 16. A call of the
// generator decides 16 keys of a query, so the four lanes of a row divide the calls and exchange the bits.
template <int STEP>
struct KeptKeys {
  __device__ __forceinline__ KeptKeys(const DropoutState& drop, int head, uint32_t first_query, int first_key) {
    constexpr int kGroups = STEP / 16;
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    uint32_t bits = 0;
#pragma unroll
    for (int call = 0; call < kGroups / 2; ++call) {
      const int index = t + 4 * call;
      const uint32_t query = first_query + g + index / kGroups * 8;
      bits |= kept_bits(drop, head, query, first_key / 16 + index % kGroups) << (8 * call);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = __shfl_sync(kAllLanes, bits, 4 * g + i) >> kept_bit(2 * t);
  }

  // Element i of accumulator j.
  __device__ __forceinline__ bool keeps(int j, int i) const {
    const int index = i / 2 * (STEP / 16) + j / 2;
    return words[index % 4] >> (index / 4 * 8 + j % 2 * 4 + i % 2) & 1u;
  }

  uint32_t words[4];
};

// The keys of one mask of STEP keys.
template <int STEP>
constexpr int kMaskedKeys = STEP < 64 ? STEP : 64;

// The same for transposed scores: 16 keys by STEP queries.
template <int STEP>
struct KeptQueries {
  __device__ __forceinline__ KeptQueries(const DropoutState& drop, int head, uint32_t first_query, int first_key) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    uint32_t bits = 0;
#pragma unroll
    for (int call = 0; call < STEP / 32; ++call) {
      bits |= kept_bits(drop, head, first_query + lane + 32 * call, first_key / 16) << (8 * call);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) words[j][i] = __shfl_sync(kAllLanes, bits, 8 * j + 2 * t + i) >> kept_bit(g);
    }
  }

  __device__ __forceinline__ bool keeps(int j, int i) const {
    return words[j % 4][i % 2] >> (j / 4 * 8 + i / 2 * 4) & 1u;
  }

  uint32_t words[4][2];
};

// The mask without dropout.
struct KeepsAll {
  template <class... X>
  __device__ __forceinline__ explicit KeepsAll(const X&...) {}
  __device__ __forceinline__ bool keeps(int, int) const { return true; }
};

// P, rounded to T, as left operands of products; 0 where `mask` drops it. What it drops changes sign in s: P is not
// negative, so the sign is the mask from here on, without registers of its own.
template <class T, int STEP, class Mask>
__device__ __forceinline__ void round_kept(float (&s)[STEP / 8][4], const Mask& mask, uint32_t (&p)[STEP / 16][4]) {
#pragma unroll
  for (int k = 0; k < STEP / 16; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int j = 2 * k + i / 2, first = i % 2 * 2;
      float kept[2];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        float& x = s[j][first + n];
        const bool keeps = mask.keeps(j, first + n);
        kept[n] = keeps ? x : 0.0f;
        x = keeps ? x : -x;
      }
      p[k][i] = pack_pair<T>(kept[0], kept[1]);
    }
  }
}

template <class T, int STEP>
__device__ __forceinline__ void round_scores(float (&s)[STEP / 8][4], uint32_t (&p)[STEP / 16][4]) {
  round_kept<T, STEP>(s, KeepsAll(), p);
}

// Sets columns from `valid` on, which are past the end, to `value`.
template <int STEP>
__device__ __forceinline__ void mask_columns(float (&s)[STEP / 8][4], int valid, float value) {
  if (valid >= STEP) return;
  const int first = threadIdx.x % 4 * 2;
#pragma unroll
  for (int j = 0; j < STEP / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s[j][i] = 8 * j + first + i % 2 < valid ? s[j][i] : value;
  }
}

template <int COLS>
__device__ __forceinline__ void scale_rows(float (&c)[COLS / 8][4], const float (&factor)[2]) {
#pragma unroll
  for (int j = 0; j < COLS / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) c[j][i] *= factor[i / 2];
  }
}

// Online softmax: the running maximum of each row, the sum of the exponentials relative to it, and the sum of those
// that dropout keeps.
struct OnlineSoftmax {
  // Replaces scores by exponentials; `decay` is the factor by which all earlier sums have to be rescaled.
  template <int STEP>
  __device__ __forceinline__ void step(float (&s)[STEP / 8][4], float scale2, float (&decay)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = m[half], sum = 0.0f;
#pragma unroll
      for (int j = 0; j < STEP / 8; ++j) top = fmaxf(top, fmaxf(s[j][2 * half], s[j][2 * half + 1]));
      top = quad_max(top);
      decay[half] = exp2_fast((m[half] - top) * scale2);
      m[half] = top;
#pragma unroll
      for (int j = 0; j < STEP / 8; ++j) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          s[j][i] = exp2_fast((s[j][i] - top) * scale2);
          sum += s[j][i];
        }
      }
      sums[half] = sums[half] * decay[half] + sum;
      kept_sums[half] *= decay[half];
    }
  }

  // Dropout of the exponentials of 16 queries from first_query on and STEP keys from first_key on.
  template <int STEP>
  __device__ __forceinline__ void drop(float (&s)[STEP / 8][4], const DropoutState& state, int head,
                                       uint32_t first_query, int first_key) {
#pragma unroll
    for (int from = 0; from < STEP; from += kMaskedKeys<STEP>) {
      const KeptKeys<kMaskedKeys<STEP>> mask(state, head, first_query, first_key + from);
#pragma unroll
      for (int j = 0; j < kMaskedKeys<STEP> / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& x = s[from / 8 + j][i];
          x = mask.keeps(j, i) ? x : 0.0f;
          kept_sums[i / 2] += x;
        }
      }
    }
  }

  // Normalizes the sums over keys to rows of `out`, adds the bias of the values, and writes the `stats` of rows below
  // `valid`. `row` is the row of c[0][0].
  template <int D, bool DROPOUT>
  __device__ __forceinline__ void finish(float (&c)[D / 8][4], const AttentionBatch& batch, int head, int row,
                                         int valid, float* stats) {
    const int t = threadIdx.x % 4;
    float factor[2], weight[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = quad_sum(sums[half]);
      factor[half] = batch.dropout.scale / sum;
      weight[half] = DROPOUT ? quad_sum(kept_sums[half]) * factor[half] : 1.0f;
      if (t == 0 && row + 8 * half < valid) {
        stats[row + 8 * half] = m[half];
        stats[batch.heads * batch.total + row + 8 * half] = log2f(sum);
      }
    }
    scale_rows<D>(c, factor);
    if (batch.bias == nullptr) return;
    const float* bias_v = batch.bias + (2 * batch.heads + head) * batch.dim;
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int d = 8 * j + 2 * t + i;
        const float bias = d < batch.dim ? bias_v[d] : 0.0f;
        c[j][i] += weight[0] * bias;
        c[j][i + 2] += weight[1] * bias;
      }
    }
  }

  float m[2] = {-INFINITY, -INFINITY}, sums[2] = {}, kept_sums[2] = {};
};

// The statistics (prepare_rows) of the two queries whose rows a lane holds.
struct QueryRows {
  __device__ __forceinline__ QueryRows(const float* vectors, int row, int rows) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      top[half] = vectors[row + 8 * half];
      log2_sum[half] = vectors[rows + row + 8 * half];
      shift[half] = vectors[2 * rows + row + 8 * half];
      dropped[half] = vectors[3 * rows + row + 8 * half];
    }
  }

  float top[2], log2_sum[2], shift[2], dropped[2];
};

// From scores s and products dp, with a row per query, to dZ up to a factor, in s; 0 for keys from `valid` on.
template <int STEP, bool DROPOUT>
__device__ __forceinline__ void differentiate_queries(float (&s)[STEP / 8][4], const float (&dp)[STEP / 8][4],
                                                      const QueryRows& rows, float scale2, int valid,
                                                      const DropoutState& drop, int head, uint32_t first_query,
                                                      int first_key) {
#pragma unroll
  for (int j = 0; j < STEP / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s[j][i] = probability(s[j][i], scale2, rows.top[i / 2], rows.log2_sum[i / 2]);
  }
  mask_columns<STEP>(s, valid, 0.0f);
#pragma unroll
  for (int from = 0; from < STEP; from += kMaskedKeys<STEP>) {
    const std::conditional_t<DROPOUT, KeptKeys<kMaskedKeys<STEP>>, KeepsAll> mask(drop, head, first_query,
                                                                                  first_key + from);
#pragma unroll
    for (int j = 0; j < kMaskedKeys<STEP> / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float of_kept = dp[from / 8 + j][i] + rows.shift[i / 2];
        s[from / 8 + j][i] *= mask.keeps(j, i) ? of_kept : rows.dropped[i / 2];
      }
    }
  }
}

// The same for transposed scores, with a row per key. `vectors` (4, STEP) holds the statistics of the queries.
template <int STEP>
struct QueryColumns {
  __device__ __forceinline__ explicit QueryColumns(const float* vectors) : top(vectors + threadIdx.x % 4 * 2) {}

  // From scores to P.
  __device__ __forceinline__ void exponentials(float (&s)[STEP / 8][4], float scale2) const {
#pragma unroll
    for (int j = 0; j < STEP / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[j][i] = probability(s[j][i], scale2, top[8 * j + i % 2], top[STEP + 8 * j + i % 2]);
      }
    }
  }

  // From P and dp to dZ up to a factor, in p; with DROPOUT round_kept has negated the P that is dropped.
  template <bool DROPOUT>
  __device__ __forceinline__ void differentiate(float (&p)[STEP / 8][4], const float (&dp)[STEP / 8][4]) const {
    const float *shift = top + 2 * STEP, *dropped = shift + STEP;
#pragma unroll
    for (int j = 0; j < STEP / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool drops = DROPOUT && p[j][i] < 0.0f;
        const float factor = drops ? dropped[8 * j + i % 2] : dp[j][i] + shift[8 * j + i % 2];
        p[j][i] = (DROPOUT ? fabsf(p[j][i]) : p[j][i]) * factor;
      }
    }
  }

  const float* top;
};

}  // namespace bert_fast
