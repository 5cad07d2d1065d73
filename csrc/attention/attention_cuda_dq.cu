// dq of attention in 16 bits: a block owns 64 queries of a head and walks over the keys, from which it computes P
// again.
//
// It also leaves what the kernel of dk and dv needs of each query: q + bias, and three vectors (`prepare_rows`).
#include "attention/attention_cuda_mma.h"

namespace bert_fast {
namespace {

// Of a multiprocessor: where the compiler is left to choose, it gives 36 to 52 bytes of spills on sm_100 for a third.
template <int D>
constexpr int kDqBlocks = D == 32 || D == 128 ? 3 : 1;

template <int D>
constexpr int dq_bytes() {
  return (2 * kRows + 2 * TilePlan<D>::kStages * TilePlan<D>::kStep) * D * 2 + 3 * kRows * 4;
}

// Of each owned query, to `vectors` (3, 64) and to `statistics`: lse2, the logarithm to base 2 of the sum of exp(Z)
// without the bias of the keys; what is added to a dP of the keys and values as they lie in memory to make
// (dP - delta) / multiplier; and that for a dropped dP, -delta / multiplier. Queries get their bias.
template <class T, int D>
__device__ __forceinline__ void prepare_rows(T* q, const T* dout, float* vectors, const OwnedRows& own,
                                             const AttentionBatch& batch, const AttentionBackward<T>& tensors) {
  constexpr int kChunks = D / 8;
  const int chunk = threadIdx.x % kChunks, columns = batch.dim - 8 * chunk, part = batch.heads * batch.dim;
  const bool biased = batch.bias != nullptr;
  float bias_q[8] = {}, bias_k[8] = {}, bias_v[8] = {};
  if (biased) {
    const float* bias = batch.bias + own.head * batch.dim + 8 * chunk;
    load_pack<8, false>(bias, columns, bias_q);
    load_pack<8, false>(bias + part, columns, bias_k);
    load_pack<8, false>(bias + 2 * part, columns, bias_v);
  }
  for (int row = threadIdx.x / kChunks; row < kRows; row += blockDim.x / kChunks) {
    const bool inside = own.row + row < own.length;
    const int64_t token = own.first + own.row + row, at = (token * batch.heads + own.head) * batch.dim + 8 * chunk;
    float numbers[8], grad[8], result[8], delta = 0.0f, of_k = 0.0f, of_v = 0.0f;
    load_pack<8, true>(dout + place<D>(row, chunk), 8, grad);
    load_some<8>(tensors.out + (inside ? at : 0), inside ? columns : 0, batch.aligned, result);
#pragma unroll
    for (int i = 0; i < 8; ++i) delta += grad[i] * result[i];
    if (biased) {
      load_pack<8, true>(q + place<D>(row, chunk), 8, numbers);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        numbers[i] = static_cast<float>(static_cast<T>(numbers[i] + bias_q[i]));
        of_k += numbers[i] * bias_k[i];
        of_v += grad[i] * bias_v[i];
      }
      store_pack<8, true>(q + place<D>(row, chunk), 8, numbers);
      if (inside && columns > 0) store_some<8>(tensors.biased_q + at, columns, batch.aligned, numbers);
    }
#pragma unroll
    for (int mask = kChunks / 2; mask > 0; mask /= 2) {
      delta += __shfl_xor_sync(kAllLanes, delta, mask);
      of_k += __shfl_xor_sync(kAllLanes, of_k, mask);
      of_v += __shfl_xor_sync(kAllLanes, of_v, mask);
    }
    if (chunk == 0) {
      float* own_vectors = tensors.statistics + own.head * 3 * batch.total + token;
      const float lse = inside ? tensors.lse[own.head * batch.total + token] : INFINITY;  // outside: P = 0
      const float dropped = -delta / batch.dropout.scale;
      const float found[3] = {(lse - of_k * batch.scale) * kLog2E, of_v + dropped, dropped};
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        vectors[i * kRows + row] = found[i];
        if (inside) own_vectors[i * batch.total] = found[i];
      }
    }
  }
}

template <class T, int D, bool DROPOUT>
__global__ void __launch_bounds__(kBlockWarps* kWarp, kDqBlocks<D>)
    attention_dq(AttentionBatch batch, AttentionBackward<T> tensors) {
  using Plan = TilePlan<D>;
  constexpr int kStep = Plan::kStep;
  const int width = batch.heads * batch.dim;
  zero_tail(batch, tensors.dqkv, int64_t{3} * width, nullptr);
  const OwnedRows own(batch, kRows);
  float* partial = tensors.partial;
  if (partial != nullptr) partial += (own.sequence * batch.blocks + own.block) * 3 * width + own.head * batch.dim;
  if (own.row >= own.length) {
    if (partial != nullptr) {
      for (int d = threadIdx.x; d < batch.dim; d += blockDim.x) partial[d] = 0.0f;
    }
    return;
  }
  T* q = dynamic_shared<T>();
  T* dout = q + kRows * D;
  T* stages = dout + kRows * D;
  float* vectors = reinterpret_cast<float*>(stages + 2 * Plan::kStages * kStep * D);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const T* base = tensors.qkv + own.first * batch.stride_t + own.head * batch.stride_n;
  const auto load_step = [&](int step) {
    T* k = stages + step % Plan::kStages * 2 * kStep * D;
    const int key = step * kStep;
    const T* from = base + key * batch.stride_t + batch.stride_part;
    load_tile<D>(k, from, batch.stride_t, kStep, own.length - key, batch);
    load_tile<D>(k + kStep * D, from + batch.stride_part, batch.stride_t, kStep, own.length - key, batch);
    commit_copies();
  };
  const int64_t token = own.first + own.row, packed = (token * batch.heads + own.head) * batch.dim;
  load_tile<D>(q, base + own.row * batch.stride_t, batch.stride_t, kRows, own.length - own.row, batch);
  load_tile<D>(dout, tensors.dout + packed, width, kRows, own.length - own.row, batch);
  load_step(0);
  wait_for_copies<0>();
  __syncthreads();
  prepare_rows<T, D>(q, dout, vectors, own, batch, tensors);
  __syncthreads();

  const LeftRows<T, D, Plan::kKeep> queries(q, warp * kWarpRows), grads(dout, warp * kWarpRows);
  float lse2[2], shift[2], dropped[2], acc[D / 8][4] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float* own_vectors = vectors + warp * kWarpRows + g + 8 * half;
    lse2[half] = own_vectors[0];
    shift[half] = own_vectors[kRows];
    dropped[half] = own_vectors[2 * kRows];
  }
  const DropoutState drop = load_dropout(batch.dropout);
  const float scale2 = batch.scale * kLog2E;
  const int steps = (own.length + kStep - 1) / kStep;
  for (int step = 0; step < steps; ++step) {
    if (step > 0) {
      wait_for_copies<0>();
      __syncthreads();
    }
    if (Plan::kStages == 2 && step + 1 < steps) load_step(step + 1);
    const T* k = stages + step % Plan::kStages * 2 * kStep * D;
    float s[kStep / 8][4], dp[kStep / 8][4];
    multiply_transposed<T, D, kStep>(queries, k, s);
    multiply_transposed<T, D, kStep>(grads, k + kStep * D, dp);
    const int left = own.length - step * kStep;
#pragma unroll
    for (int j = 0; j < kStep / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float p = exp2_fast(s[j][i] * scale2 - lse2[i / 2]);
        s[j][i] = left >= kStep || 8 * j + 2 * t + i % 2 < left ? p : 0.0f;
      }
    }
    if constexpr (DROPOUT) {
      const KeptKeys<kStep> mask(drop, own.head, token + warp * kWarpRows, step * kStep);
#pragma unroll
      for (int j = 0; j < kStep / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[j][i] *= mask.keeps(j, i) ? dp[j][i] + shift[i / 2] : dropped[i / 2];
      }
    } else {
#pragma unroll
      for (int j = 0; j < kStep / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[j][i] *= dp[j][i] + shift[i / 2];
      }
    }
    accumulate<T, D, kStep, D>(s, k, 0, acc);
    if (Plan::kStages == 1 && step + 1 < steps) {
      __syncthreads();
      load_step(step + 1);
    }
  }

  const float factor = batch.scale * batch.dropout.scale;
#pragma unroll
  for (int j = 0; j < D / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[j][i] *= factor;
  }
  store_rows<T, D, D>(q, warp * kWarpRows, 0, acc, tensors.dqkv + (token * 3 * batch.heads + own.head) * batch.dim,
                      int64_t{3} * width, own.length - own.row, batch);
  // Rows behind the end hold zeros.
  if (partial != nullptr) {
    store_column_sums<D, D>(reinterpret_cast<float*>(stages), warp, 0, acc, partial, batch.dim);
  }
}

}  // namespace

template <class T>
void attention_dq_cuda(const AttentionBatch& batch, const AttentionBackward<T>& tensors, const Tensor& on) {
  dispatch_dim(batch.dim, [&](auto dim) {
    constexpr int kDim = decltype(dim)::value;
    const auto kernel =
        batch.dropout.threshold ? attention_dq<T, kDim, true> : attention_dq<T, kDim, TilePlan<kDim>::kAlwaysDrops>;
    launch(kernel, grid_of(batch), kBlockWarps * kWarp, dq_bytes<kDim>(), on, batch, tensors);
  });
}

template void attention_dq_cuda(const AttentionBatch&, const AttentionBackward<BFloat16>&, const Tensor&);
template void attention_dq_cuda(const AttentionBatch&, const AttentionBackward<Half>&, const Tensor&);

}  // namespace bert_fast
