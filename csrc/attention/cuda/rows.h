// The prologue and the epilogue of 64 owned rows in the 16-bit kernels: four warps share them, 16 each.
// `Layout::offset(r, c)` is the position of chunk c (8 numbers) of row r in a tile.
#pragma once

#include "attention/cuda/scores.h"

namespace bert_fast {

constexpr int kRows = attention_block_rows(ScalarType::Half, kMaxDim);
constexpr int kWarpRows = 16;
constexpr int kBlockWarps = kRows / kWarpRows;

// The threads that share rows, with their named barrier: all of a block, or one of its warpgroups.
struct Team {
  int thread, threads, barrier;
  __device__ __forceinline__ void sync() const { named_barrier(barrier, threads); }
};

// Replaces the queries by sign (q + bias), rounded.
template <class T, int D, class Layout>
__device__ __forceinline__ void prepare_queries(T* q, const OwnedRows& owned, const AttentionBatch& batch, float sign,
                                                const Team& team) {
  constexpr int kChunks = D / 8;
  const int chunk = team.thread % kChunks, columns = batch.dim - 8 * chunk;
  float bias_q[8] = {};
  if (batch.bias != nullptr) {
    load_pack<8, false>(batch.bias + owned.head * batch.dim + 8 * chunk, columns, bias_q);
  }
  for (int row = team.thread / kChunks; row < kRows; row += team.threads / kChunks) {
    T* at = q + Layout::offset(row, chunk);
    float numbers[8];
    load_pack<8, true>(at, 8, numbers);
#pragma unroll
    for (int i = 0; i < 8; ++i) numbers[i] = (numbers[i] + bias_q[i]) * sign;
    store_pack<8, true>(at, 8, numbers);
  }
}

// Adds the bias to the owned queries and computes four statistics of each, to `vectors` (4, 64) and to `statistics`,
// whose rows are `stride` apart:
//   top, log2_sum  the arguments of `probability`;
//   shift    what turns a dP of the values without bias into (dP - delta) / multiplier when added to it;
//   dropped  what replaces it where dropout drops, -delta / multiplier.
// For rows past the end they make P and dP 0; `statistics` receives those rows if FULL.
template <class T, int D, class Layout, bool FULL>
__device__ __forceinline__ void prepare_rows(T* q, const T* dout, float* vectors, float* statistics, int64_t stride,
                                             const OwnedRows& owned, const AttentionBatch& batch,
                                             const AttentionBackward<T>& tensors, const Team& team) {
  constexpr int kChunks = D / 8;
  const int chunk = team.thread % kChunks, columns = batch.dim - 8 * chunk, part = batch.heads * batch.dim;
  const bool biased = batch.bias != nullptr;
  float bias_q[8] = {}, bias_v[8] = {};
  if (biased) {
    const float* bias = batch.bias + owned.head * batch.dim + 8 * chunk;
    load_pack<8, false>(bias, columns, bias_q);
    load_pack<8, false>(bias + 2 * part, columns, bias_v);
  }
  for (int row = team.thread / kChunks; row < kRows; row += team.threads / kChunks) {
    const bool inside = owned.row + row < owned.length;
    const int64_t token = owned.first + owned.row + row,
                  at = (token * batch.heads + owned.head) * batch.dim + 8 * chunk;
    float numbers[8], grad[8], result[8], delta = 0.0f, of_v = 0.0f;
    load_pack<8, true>(dout + Layout::offset(row, chunk), 8, grad);
    load_some<8>(tensors.out + (inside ? at : 0), inside ? columns : 0, batch.aligned, result);
#pragma unroll
    for (int i = 0; i < 8; ++i) delta += grad[i] * result[i];
    if (biased) {
      load_pack<8, true>(q + Layout::offset(row, chunk), 8, numbers);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        numbers[i] += bias_q[i];
        of_v += grad[i] * bias_v[i];
      }
      store_pack<8, true>(q + Layout::offset(row, chunk), 8, numbers);
      if (inside && columns > 0) store_some<8>(tensors.biased_q + at, columns, batch.aligned, numbers);
    }
#pragma unroll
    for (int mask = kChunks / 2; mask > 0; mask /= 2) {
      delta += __shfl_xor_sync(kAllLanes, delta, mask);
      of_v += __shfl_xor_sync(kAllLanes, of_v, mask);
    }
    if (chunk == 0) {
      const float* stats = tensors.stats + owned.head * batch.total + (inside ? token : 0);
      const float dropped = -delta / batch.dropout.scale;
      const float row_statistics[kStatistics] = {top_score(inside ? *stats : kAboveScores, batch.scale),
                                                 inside ? stats[batch.heads * batch.total] : INFINITY,
                                                 inside ? of_v + dropped : 0.0f, inside ? dropped : 0.0f};
#pragma unroll
      for (int i = 0; i < kStatistics; ++i) {
        vectors[i * kRows + row] = row_statistics[i];
        if (inside || FULL) statistics[i * stride + row] = row_statistics[i];
      }
    }
  }
}

// Stores the warp's accumulator, rounded, as rows [row, row + 16) of `to` in global memory, through the same rows of
// `tile`, which no other warp reads any more, so that the stores are coalesced.
template <class T, int COLS, class Layout>
__device__ __forceinline__ void store_rows(T* tile, int row, int first_chunk, const float (&c)[COLS / 8][4], T* to,
                                           int64_t stride, int valid, const AttentionBatch& batch) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  __syncwarp();
#pragma unroll
  for (int j = 0; j < COLS / 8; ++j) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t pair = pack_pair<T>(c[j][2 * half], c[j][2 * half + 1]);
      *reinterpret_cast<uint32_t*>(tile + Layout::offset(row + g + 8 * half, first_chunk + j) + 2 * t) = pair;
    }
  }
  __syncwarp();
  constexpr int kChunks = COLS / 8;
  for (int i = lane; i < kWarpRows * kChunks; i += kWarp) {
    const int r = row + i / kChunks, chunk = first_chunk + i % kChunks;
    const int columns = r < valid ? batch.dim - 8 * chunk : 0;
    if (columns <= 0) continue;
    const auto pack = *reinterpret_cast<const Pack<T, 8>*>(tile + Layout::offset(r, chunk));
    T* at = to + r * stride + 8 * chunk;
    if (batch.aligned) {
      *reinterpret_cast<Pack<T, 8>*>(at) = pack;
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (j < columns) at[j] = pack.element[j];
      }
    }
  }
}

// Multiplies the rows of `c` before the end by `factor` and zeroes the others; `row` is the row of c[0][0].
template <int COLS>
__device__ __forceinline__ void scale_valid_rows(float (&c)[COLS / 8][4], float factor, int row, int valid) {
#pragma unroll
  for (int j = 0; j < COLS / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) c[j][i] = row + i / 2 * 8 < valid ? c[j][i] * factor : 0.0f;
  }
}

// Sums the warps' accumulators (16, COLS) over the team's 64 rows to `to` (dim,), the warps in order. `sums` is scratch
// memory of 4 D numbers.
template <int D, int COLS>
__device__ __forceinline__ void store_column_sums(float* sums, int warp_row, int first_column,
                                                  const float (&c)[COLS / 8][4], float* to, int dim, const Team& team) {
  const int lane = threadIdx.x % kWarp;
  team.sync();
#pragma unroll
  for (int j = 0; j < COLS / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float sum = c[j][i] + c[j][i + 2];
#pragma unroll
      for (int mask = 4; mask < kWarp; mask *= 2) sum += __shfl_xor_sync(kAllLanes, sum, mask);
      if (lane < 4) sums[warp_row * D + first_column + 8 * j + 2 * lane + i] = sum;
    }
  }
  team.sync();
  for (int d = team.thread; d < dim; d += team.threads) {
    float sum = sums[d];
    for (int w = 1; w < kBlockWarps; ++w) sum += sums[w * D + d];
    to[d] = sum;
  }
}

}  // namespace bert_fast
