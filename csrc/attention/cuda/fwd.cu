// The forward pass of attention in 16 bits: a block owns 64 queries of a head and loops over the keys with an online
// softmax.
//
// Tiles of keys and values are copied to shared memory unchanged, the next one while one is multiplied; their biases
// enter through vectors (kernels/attention/README.md).
#include "attention/cuda/mma.h"

namespace bert_fast {
namespace {

template <int D>
constexpr int forward_bytes() {
  return (kRows + 2 * TilePlan<D>::kStages * TilePlan<D>::kStep) * D * 2;
}

template <class T, int D, bool DROPOUT>
__global__ void __launch_bounds__(kBlockWarps* kWarp, blocks_of_queries(D, DROPOUT))
    attention_forward(AttentionBatch batch, AttentionForward<T> tensors, float sign) {
  using Plan = TilePlan<D>;
  constexpr int kStep = Plan::kStep;
  zero_tail(batch, tensors.out, int64_t{batch.heads} * batch.dim, tensors.stats);
  const OwnedRows owned(batch, kRows);
  if (owned.row >= owned.length) return;
  const Team team = {static_cast<int>(threadIdx.x), kBlockWarps * kWarp, 0};
  T* q = dynamic_shared<T>();
  T* stages = q + kRows * D;
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
  load_tile<D>(q, base + owned.row * batch.stride_t, batch.stride_t, kRows, owned.length - owned.row, batch);
  load_step(0);
  if (batch.bias != nullptr || sign != 1.0f) {
    cp_async_wait<0>();
    __syncthreads();
    prepare_queries<T, D, SwizzledRows<D>>(q, owned, batch, sign, team);
  }

  const DropoutState drop = load_dropout(batch.dropout);
  OnlineSoftmax softmax;
  float acc[D / 8][4] = {};
  const float scale2 = batch.scale * kLog2E;
  const int steps = (owned.length + kStep - 1) / kStep;
  cp_async_wait<0>();
  __syncthreads();
  const LeftRows<T, D, Plan::kLeftInRegisters> queries(q, warp * kWarpRows);
  for (int step = 0; step < steps; ++step) {
    if (step > 0) {
      cp_async_wait<0>();
      __syncthreads();
    }
    if (Plan::kStages == 2 && step + 1 < steps) load_step(step + 1);
    const T* k = stages + step % Plan::kStages * 2 * kStep * D;
    float s[kStep / 8][4];
    multiply_transposed<T, D, kStep>(queries, k, s);
    mask_columns<kStep>(s, owned.length - step * kStep, -INFINITY);
    float decay[2];
    softmax.step<kStep>(s, scale2, decay);
    scale_rows<D>(acc, decay);
    if constexpr (DROPOUT) {
      softmax.drop<kStep>(s, drop, owned.head, owned.first + owned.row + warp * kWarpRows, step * kStep);
    }
    accumulate<T, D, kStep, D>(s, KeepsAll(), k + kStep * D, 0, acc);
    if (Plan::kStages == 1 && step + 1 < steps) {
      __syncthreads();
      load_step(step + 1);
    }
  }

  float* stats = tensors.stats + owned.head * batch.total + owned.first + owned.row;
  softmax.finish<D, DROPOUT>(acc, batch, owned.head, warp * kWarpRows + g, owned.length - owned.row, stats);
  const int64_t stride = int64_t{batch.heads} * batch.dim;
  T* to = tensors.out + (owned.first + owned.row) * stride + owned.head * batch.dim;
  store_rows<T, D, SwizzledRows<D>>(q, warp * kWarpRows, 0, acc, to, stride, owned.length - owned.row, batch);
}

}  // namespace

template <class T>
void attention_forward_cuda(const AttentionBatch& arguments, const AttentionForward<T>& tensors, const Tensor& on) {
  float sign;
  const AttentionBatch batch = with_positive_scale(arguments, &sign);
  dispatch_dim(batch.dim, [&](auto dim) {
    constexpr int kDim = decltype(dim)::value;
    const auto kernel = batch.dropout.threshold ? attention_forward<T, kDim, true>
                                                : attention_forward<T, kDim, TilePlan<kDim>::kAlwaysDrops>;
    launch(kernel, grid_of(batch), kBlockWarps * kWarp, forward_bytes<kDim>(), on, batch, tensors, sign);
  });
}

template void attention_forward_cuda(const AttentionBatch&, const AttentionForward<BFloat16>&, const Tensor&);
template void attention_forward_cuda(const AttentionBatch&, const AttentionForward<Half>&, const Tensor&);

}  // namespace bert_fast
