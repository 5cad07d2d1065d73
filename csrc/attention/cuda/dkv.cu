// dk and dv of attention in 16 bits: a block owns 64 keys of a head and loops over the queries.
//
// Scores are transposed, with a row per key, so that P and dZ stay in registers as operands of the products for dv and
// dk. With D above 128 two warps share the accumulators of a row, half of the columns each; both compute its scores.
#include "attention/cuda/mma.h"

namespace bert_fast {
namespace {

template <int D>
struct KeyPlan : TilePlan<D> {
  static constexpr int kSplit = D > 128 ? 2 : 1;
  static constexpr int kThreads = kBlockWarps * kSplit * kWarp;
  static constexpr int kColumns = D / kSplit;  // of a warp's accumulator
  static constexpr int kBytes = (2 * kRows + 2 * TilePlan<D>::kStages * TilePlan<D>::kStep) * D * 2 +
                                TilePlan<D>::kStages * kStatistics * TilePlan<D>::kStep * 4;
};

template <class T, int D, bool DROPOUT>
__global__ void __launch_bounds__(KeyPlan<D>::kThreads, blocks_of_keys(D, DROPOUT))
    attention_dkv(AttentionBatch batch, AttentionBackward<T> tensors) {
  using Plan = KeyPlan<D>;
  constexpr int kStep = Plan::kStep, kColumns = Plan::kColumns;
  const int width = batch.heads * batch.dim;
  const OwnedRows owned(batch, kRows);
  float* partial = tensors.partial;
  if (partial != nullptr)
    partial += ((owned.sequence * batch.blocks + owned.block) * 3 + 1) * width + owned.head * batch.dim;
  if (owned.row >= owned.length) {
    if (partial != nullptr) {
      for (int d = threadIdx.x; d < batch.dim; d += blockDim.x) partial[d] = partial[width + d] = 0.0f;
    }
    return;
  }
  T* k = dynamic_shared<T>();
  T* v = k + kRows * D;
  T* stages = v + kRows * D;
  float* vectors = reinterpret_cast<float*>(stages + 2 * Plan::kStages * kStep * D);
  const int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4;
  const int warp_row = warp % kBlockWarps, first_chunk = warp / kBlockWarps * (kColumns / 8);
  const bool biased = batch.bias != nullptr;
  const T* base = tensors.qkv + owned.first * batch.stride_t + owned.head * batch.stride_n;
  const int64_t packed = (owned.first * batch.heads + owned.head) * batch.dim;
  const T* query = biased ? tensors.biased_q + packed : base;
  const int64_t query_stride = biased ? width : batch.stride_t;
  const float* statistics = tensors.statistics + owned.head * kStatistics * batch.total + owned.first;
  const auto load_step = [&](int step) {
    const int stage = step % Plan::kStages, first = step * kStep;
    T* q = stages + stage * 2 * kStep * D;
    load_tile<D>(q, query + first * query_stride, query_stride, kStep, owned.length - first, batch);
    load_tile<D>(q + kStep * D, tensors.dout + packed + int64_t{first} * width, width, kStep, owned.length - first,
                 batch);
    for (int i = threadIdx.x; i < kStatistics * kStep; i += blockDim.x) {
      const bool valid = first + i % kStep < owned.length;
      const float* from = statistics + i / kStep * batch.total + first + i % kStep;
      cp_async_4(vectors + stage * kStatistics * kStep + i, valid ? from : statistics, valid);
    }
    cp_async_commit();
  };
  const T* owned_key = base + owned.row * batch.stride_t + batch.stride_part;
  load_tile<D>(k, owned_key, batch.stride_t, kRows, owned.length - owned.row, batch);
  load_tile<D>(v, owned_key + batch.stride_part, batch.stride_t, kRows, owned.length - owned.row, batch);
  load_step(0);
  cp_async_wait<0>();
  __syncthreads();

  const LeftRows<T, D, Plan::kLeftInRegisters> keys(k, warp_row * kWarpRows);
  // The mask needs the registers of one of the two.
  const LeftRows<T, D, Plan::kLeftInRegisters && !(DROPOUT && D == 64)> values(v, warp_row * kWarpRows);
  float dk[kColumns / 8][4] = {}, dv[kColumns / 8][4] = {};
  const DropoutState drop = load_dropout(batch.dropout);
  const float scale2 = batch.scale * kLog2E;
  const int steps = (owned.length + kStep - 1) / kStep;
  for (int step = 0; step < steps; ++step) {
    if (step > 0) {
      cp_async_wait<0>();
      __syncthreads();
    }
    if (Plan::kStages == 2 && step + 1 < steps) load_step(step + 1);
    const T* q = stages + step % Plan::kStages * 2 * kStep * D;
    const T* dout = q + kStep * D;
    const QueryColumns<kStep> queries(vectors + step % Plan::kStages * kStatistics * kStep);
    // Queries past the end are zeros, like their statistics: their P is 1, and is multiplied by zeros.
    float p[kStep / 8][4], dp[kStep / 8][4];
    multiply_transposed<T, D, kStep>(keys, q, p);
    queries.exponentials(p, scale2);
    const std::conditional_t<DROPOUT, KeptQueries<kStep>, KeepsAll> mask(
        drop, owned.head, static_cast<uint32_t>(owned.first) + step * kStep, owned.row + warp_row * kWarpRows);
    accumulate<T, D, kStep, kColumns>(p, mask, dout, first_chunk, dv);
    multiply_transposed<T, D, kStep>(values, dout, dp);
    queries.template differentiate<DROPOUT>(p, dp);
    accumulate<T, D, kStep, kColumns>(p, KeepsAll(), q, first_chunk, dk);
    if (Plan::kStages == 1 && step + 1 < steps) {
      __syncthreads();
      load_step(step + 1);
    }
  }

  const int row = warp_row * kWarpRows + g, valid = owned.length - owned.row;
  scale_valid_rows<kColumns>(dk, batch.scale * batch.dropout.scale, row, valid);
  scale_valid_rows<kColumns>(dv, batch.dropout.scale, row, valid);
  __syncthreads();
  T* to = tensors.dqkv + ((owned.first + owned.row) * 3 * batch.heads + owned.head) * batch.dim + width;
  const int64_t stride = int64_t{3} * width;
  store_rows<T, kColumns, SwizzledRows<D>>(k, warp_row * kWarpRows, first_chunk, dk, to, stride, valid, batch);
  store_rows<T, kColumns, SwizzledRows<D>>(v, warp_row * kWarpRows, first_chunk, dv, to + width, stride, valid, batch);
  if (partial != nullptr) {
    const Team team = {static_cast<int>(threadIdx.x), Plan::kThreads, 0};
    float* sums = reinterpret_cast<float*>(stages);
    store_column_sums<D, kColumns>(sums, warp_row, 8 * first_chunk, dk, partial, batch.dim, team);
    store_column_sums<D, kColumns>(sums, warp_row, 8 * first_chunk, dv, partial + width, batch.dim, team);
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
