// dq of attention in 16 bits: a block owns 64 queries of a head and loops over the keys, recomputing P.
//
// It also writes what the dk and dv kernel needs of each query: q + bias, and four statistics (prepare_rows).
#include "attention/cuda/mma.h"

namespace bert_fast {
namespace {

// The fewest blocks of a multiprocessor. Left to choose, ptxas spills 36 to 52 bytes on sm_100 to fit a third block.
template <int D>
constexpr int kDqBlocks = D == 32 || D == 128 ? 3 : 1;

template <int D>
constexpr int dq_bytes() {
  return (2 * kRows + 2 * TilePlan<D>::kStages * TilePlan<D>::kStep) * D * 2 + kStatistics * kRows * 4;
}

template <class T, int D, bool DROPOUT>
__global__ void __launch_bounds__(kBlockWarps* kWarp, kDqBlocks<D>)
    attention_dq(AttentionBatch batch, AttentionBackward<T> tensors) {
  using Plan = TilePlan<D>;
  constexpr int kStep = Plan::kStep;
  const int width = batch.heads * batch.dim;
  zero_tail(batch, tensors.dqkv, int64_t{3} * width, nullptr);
  const OwnedRows owned(batch, kRows);
  float* partial = tensors.partial;
  if (partial != nullptr) partial += (owned.sequence * batch.blocks + owned.block) * 3 * width + owned.head * batch.dim;
  if (owned.row >= owned.length) {
    if (partial != nullptr) {
      for (int d = threadIdx.x; d < batch.dim; d += blockDim.x) partial[d] = 0.0f;
    }
    return;
  }
  const Team team = {static_cast<int>(threadIdx.x), kBlockWarps * kWarp, 0};
  T* q = dynamic_shared<T>();
  T* dout = q + kRows * D;
  T* stages = dout + kRows * D;
  float* vectors = reinterpret_cast<float*>(stages + 2 * Plan::kStages * kStep * D);
  const int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4;
  const T* base = tensors.qkv + owned.first * batch.stride_t + owned.head * batch.stride_n;
  const auto load_step = [&](int step) {
    T* k = stages + step % Plan::kStages * 2 * kStep * D;
    const int key = step * kStep;
    const T* from = base + key * batch.stride_t + batch.stride_part;
    load_tile<D>(k, from, batch.stride_t, kStep, owned.length - key, batch);
    load_tile<D>(k + kStep * D, from + batch.stride_part, batch.stride_t, kStep, owned.length - key, batch);
    cp_async_commit();
  };
  const int64_t token = owned.first + owned.row, packed = (token * batch.heads + owned.head) * batch.dim;
  load_tile<D>(q, base + owned.row * batch.stride_t, batch.stride_t, kRows, owned.length - owned.row, batch);
  load_tile<D>(dout, tensors.dout + packed, width, kRows, owned.length - owned.row, batch);
  load_step(0);
  cp_async_wait<0>();
  __syncthreads();
  prepare_rows<T, D, SwizzledRows<D>, false>(q, dout, vectors,
                                             tensors.statistics + owned.head * kStatistics * batch.total + token,
                                             batch.total, owned, batch, tensors, team);
  __syncthreads();

  const LeftRows<T, D, Plan::kLeftInRegisters> queries(q, warp * kWarpRows), grads(dout, warp * kWarpRows);
  const QueryRows rows(vectors, warp * kWarpRows + g, kRows);
  float acc[D / 8][4] = {};
  const DropoutState drop = load_dropout(batch.dropout);
  const float scale2 = batch.scale * kLog2E;
  const int steps = (owned.length + kStep - 1) / kStep;
  for (int step = 0; step < steps; ++step) {
    if (step > 0) {
      cp_async_wait<0>();
      __syncthreads();
    }
    if (Plan::kStages == 2 && step + 1 < steps) load_step(step + 1);
    const T* k = stages + step % Plan::kStages * 2 * kStep * D;
    float s[kStep / 8][4], dp[kStep / 8][4];
    multiply_transposed<T, D, kStep>(queries, k, s);
    multiply_transposed<T, D, kStep>(grads, k + kStep * D, dp);
    differentiate_queries<kStep, DROPOUT>(s, dp, rows, scale2, owned.length - step * kStep, drop, owned.head,
                                          token + warp * kWarpRows, step * kStep);
    accumulate<T, D, kStep, D>(s, KeepsAll(), k, 0, acc);
    if (Plan::kStages == 1 && step + 1 < steps) {
      __syncthreads();
      load_step(step + 1);
    }
  }

  const float factor = batch.scale * batch.dropout.scale;
  scale_valid_rows<D>(acc, factor, warp * kWarpRows + g, owned.length - owned.row);
  T* to = tensors.dqkv + (token * 3 * batch.heads + owned.head) * batch.dim;
  store_rows<T, D, SwizzledRows<D>>(q, warp * kWarpRows, 0, acc, to, int64_t{3} * width, owned.length - owned.row,
                                    batch);
  if (partial != nullptr) {
    store_column_sums<D, D>(reinterpret_cast<float*>(stages), warp, 0, acc, partial, batch.dim, team);
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
