// dk and dv of attention in 16 bits: a block owns 64 keys of a head and walks over the queries.
//
// Scores are transposed, a row a key, so that P and dZ go from registers into the products for dv and dk. With D above
// 128 the accumulators of a row take two warps, half of the columns each; both compute its scores.
#include "attention/attention_cuda_mma.h"

namespace bert_fast {
namespace {

template <int D>
struct KeyPlan : TilePlan<D> {
  static constexpr int kSplit = D > 128 ? 2 : 1;
  static constexpr int kThreads = kBlockWarps * kSplit * kWarp;
  static constexpr int kColumns = D / kSplit;  // of a warp
  static constexpr int kBytes = (2 * kRows + 2 * TilePlan<D>::kStages * TilePlan<D>::kStep) * D * 2 +
                                TilePlan<D>::kStages * 3 * TilePlan<D>::kStep * 4;
};

template <class T, int D, bool DROPOUT>
__global__ void __launch_bounds__(KeyPlan<D>::kThreads)
    attention_dkv(AttentionBatch batch, AttentionBackward<T> tensors) {
  using Plan = KeyPlan<D>;
  constexpr int kStep = Plan::kStep, kColumns = Plan::kColumns;
  const int width = batch.heads * batch.dim;
  const OwnedRows own(batch, kRows);
  float* partial = tensors.partial;
  if (partial != nullptr) partial += ((own.sequence * batch.blocks + own.block) * 3 + 1) * width + own.head * batch.dim;
  if (own.row >= own.length) {
    if (partial != nullptr) {
      for (int d = threadIdx.x; d < batch.dim; d += blockDim.x) partial[d] = partial[width + d] = 0.0f;
    }
    return;
  }
  T* k = dynamic_shared<T>();
  T* v = k + kRows * D;
  T* stages = v + kRows * D;
  float* vectors = reinterpret_cast<float*>(stages + 2 * Plan::kStages * kStep * D);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int warp_row = warp % kBlockWarps, first_chunk = warp / kBlockWarps * (kColumns / 8);
  const bool biased = batch.bias != nullptr;
  const T* base = tensors.qkv + own.first * batch.stride_t + own.head * batch.stride_n;
  const int64_t packed = (own.first * batch.heads + own.head) * batch.dim;
  const T* query = biased ? tensors.biased_q + packed : base;
  const int64_t query_stride = biased ? width : batch.stride_t;
  const float* statistics = tensors.statistics + own.head * 3 * batch.total + own.first;
  const auto load_step = [&](int step) {
    const int stage = step % Plan::kStages, first = step * kStep;
    T* q = stages + stage * 2 * kStep * D;
    load_tile<D>(q, query + first * query_stride, query_stride, kStep, own.length - first, batch);
    load_tile<D>(q + kStep * D, tensors.dout + packed + int64_t{first} * width, width, kStep, own.length - first,
                 batch);
    for (int i = threadIdx.x; i < 3 * kStep; i += blockDim.x) {
      const bool valid = first + i % kStep < own.length;
      const float* from = statistics + i / kStep * batch.total + first + i % kStep;
      copy_async_4(vectors + stage * 3 * kStep + i, valid ? from : statistics, valid);
    }
    commit_copies();
  };
  const T* own_key = base + own.row * batch.stride_t + batch.stride_part;
  load_tile<D>(k, own_key, batch.stride_t, kRows, own.length - own.row, batch);
  load_tile<D>(v, own_key + batch.stride_part, batch.stride_t, kRows, own.length - own.row, batch);
  load_step(0);
  wait_for_copies<0>();
  __syncthreads();

  const LeftRows<T, D, Plan::kKeep> keys(k, warp_row * kWarpRows), values(v, warp_row * kWarpRows);
  float dk[kColumns / 8][4] = {}, dv[kColumns / 8][4] = {};
  const DropoutState drop = load_dropout(batch.dropout);
  const float scale2 = batch.scale * kLog2E;
  const int steps = (own.length + kStep - 1) / kStep;
  for (int step = 0; step < steps; ++step) {
    if (step > 0) {
      wait_for_copies<0>();
      __syncthreads();
    }
    if (Plan::kStages == 2 && step + 1 < steps) load_step(step + 1);
    const T* q = stages + step % Plan::kStages * 2 * kStep * D;
    const T* dout = q + kStep * D;
    const float* lse2 = vectors + step % Plan::kStages * 3 * kStep + 2 * t;
    // Queries behind the end are zeros, like all that is known of them: their P is 1, and is multiplied by zeros.
    float p[kStep / 8][4], dp[kStep / 8][4];
    multiply_transposed<T, D, kStep>(keys, q, p);
#pragma unroll
    for (int j = 0; j < kStep / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) p[j][i] = exp2_fast(p[j][i] * scale2 - lse2[8 * j + i % 2]);
    }
    const float *shift = lse2 + kStep, *dropped = shift + kStep;
    if constexpr (DROPOUT) {
      const int64_t first_query = own.first + step * kStep;
      const KeptQueries<kStep> mask(drop, own.head, first_query, own.row + warp_row * kWarpRows);
#pragma unroll
      for (int j = 0; j < kStep / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) dp[j][i] = mask.keeps(j, i) ? p[j][i] : 0.0f;
      }
      accumulate<T, D, kStep, kColumns>(dp, dout, first_chunk, dv);
      multiply_transposed<T, D, kStep>(values, dout, dp);
#pragma unroll
      for (int j = 0; j < kStep / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          p[j][i] *= mask.keeps(j, i) ? dp[j][i] + shift[8 * j + i % 2] : dropped[8 * j + i % 2];
        }
      }
    } else {
      accumulate<T, D, kStep, kColumns>(p, dout, first_chunk, dv);
      multiply_transposed<T, D, kStep>(values, dout, dp);
#pragma unroll
      for (int j = 0; j < kStep / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) p[j][i] *= dp[j][i] + shift[8 * j + i % 2];
      }
    }
    accumulate<T, D, kStep, kColumns>(p, q, first_chunk, dk);
    if (Plan::kStages == 1 && step + 1 < steps) {
      __syncthreads();
      load_step(step + 1);
    }
  }

#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool inside = own.row + warp_row * kWarpRows + g + i / 2 * 8 < own.length;
      dk[j][i] = inside ? dk[j][i] * (batch.scale * batch.dropout.scale) : 0.0f;
      dv[j][i] = inside ? dv[j][i] * batch.dropout.scale : 0.0f;
    }
  }
  __syncthreads();
  T* to = tensors.dqkv + ((own.first + own.row) * 3 * batch.heads + own.head) * batch.dim + width;
  const int64_t stride = int64_t{3} * width;
  const int valid = own.length - own.row;
  store_rows<T, D, kColumns>(k, warp_row * kWarpRows, first_chunk, dk, to, stride, valid, batch);
  store_rows<T, D, kColumns>(v, warp_row * kWarpRows, first_chunk, dv, to + width, stride, valid, batch);
  if (partial != nullptr) {
    float* sums = reinterpret_cast<float*>(stages);
    store_column_sums<D, kColumns>(sums, warp_row, 8 * first_chunk, dk, partial, batch.dim);
    store_column_sums<D, kColumns>(sums, warp_row, 8 * first_chunk, dv, partial + width, batch.dim);
  }
}

}  // namespace

template <class T>
void attention_dkv_cuda(const AttentionBatch& batch, const AttentionBackward<T>& tensors, const Tensor& on) {
  dispatch_dim(batch.dim, [&](auto dim) {
    constexpr int kDim = decltype(dim)::value;
    const auto kernel =
        batch.dropout.threshold ? attention_dkv<T, kDim, true> : attention_dkv<T, kDim, TilePlan<kDim>::kAlwaysDrops>;
    launch(kernel, grid_of(batch), KeyPlan<kDim>::kThreads, KeyPlan<kDim>::kBytes, on, batch, tensors);
  });
}

template void attention_dkv_cuda(const AttentionBatch&, const AttentionBackward<BFloat16>&, const Tensor&);
template void attention_dkv_cuda(const AttentionBatch&, const AttentionBackward<Half>&, const Tensor&);

}  // namespace bert_fast
