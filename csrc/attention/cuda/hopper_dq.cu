// dq of attention for Hopper: a consumer owns 64 queries and loops over the keys, recomputing P.
//
// It also writes the statistics of each query that the dk and dv kernel needs (prepare_rows), in blocks of 64 queries:
// (B, N, blocks, 4, 64).
#include "attention/cuda/hopper.h"

namespace bert_fast {
namespace {

constexpr int kStep = 64;

template <class T, int D>
using DqMemory =
    HopperMemory<T, D, kStep, D == 64 ? 9 : 4, D == 64 ? 2 : 1, 2, kStatistics * kRows + kBlockWarps * D, 0>;

// dq of 64 queries, summed over all keys, up to a factor.
template <class T, int D, bool DROPOUT>
__device__ __forceinline__ void sum_keys(float (&acc)[D / 8][4], const T* q, const T* dout, const float* vectors,
                                         const OwnedRows& owned, const AttentionBatch& batch, const DropoutState& drop,
                                         int steps, bool last_pass, const Consumer<DqMemory<T, D>>& consumer) {
  const int thread = threadIdx.x % kWarpgroup, warp_row = thread / kWarp * kWarpRows;
  const QueryRows rows(vectors, warp_row + thread % kWarp / 4, kRows);
  const float scale2 = batch.scale * kLog2E;
  float s[kStep / 8][4], dp[kStep / 8][4];
  uint32_t dz[kStep / 16][4];
  for (int step = 0; step < steps; ++step) {
    const T *k = consumer.wait(0, step), *v = consumer.wait(1, step);
    wgmma_fence(s, dp);
    start_scores<T, D, kStep>(s, q, k);
    start_scores<T, D, kStep>(dp, dout, v);
    wgmma_commit();
    wgmma_wait<1>(acc, dz);
    if (step > 0) consumer.release(0, step - 1, last_pass);
    wgmma_wait<0>(s, dp);
    consumer.release(1, step, last_pass);
    differentiate_queries<kStep, DROPOUT>(s, dp, rows, scale2, owned.length - step * kStep, drop, owned.head,
                                          owned.first + owned.row + warp_row, step * kStep);
    round_scores<T, kStep>(s, dz);
    wgmma_fence(acc, dz);
    start_sums<T, D, kStep>(acc, dz, k);
    wgmma_commit();
  }
  wgmma_wait<0>(acc);
  consumer.release(0, steps - 1, last_pass);
}

struct DqMaps {
  TensorMap qkv, dout;
};

template <class T, int D, bool DROPOUT>
__global__ void __launch_bounds__(kHopperThreads, 1)
    hopper_dq(const __grid_constant__ DqMaps maps, AttentionBatch batch, AttentionBackward<T> tensors,
              HopperWork work) {
#ifdef BERT_FAST_ON_HOPPER
  using Memory = DqMemory<T, D>;
  using Layout = TiledRows<kRows>;
  const Memory memory;
  const int width = batch.heads * batch.dim, group = warpgroup();
  zero_tail(batch, tensors.dqkv, int64_t{3} * width, nullptr);
  memory.init_barriers();
  if (group == kConsumers) {
    setmaxnreg<kProducerRegisters, false>();
    Producer<T, Memory>{memory}.run(batch, work, {{&maps.qkv, 0}, {&maps.dout, 0}}, {{&maps.qkv, 1}, {&maps.qkv, 2}},
                                    nullptr);
  } else {
    setmaxnreg<kConsumerRegisters, true>();
    const Team team = {static_cast<int>(threadIdx.x) % kWarpgroup, kWarpgroup, 1 + group};
    const int warp = team.thread / kWarp, warp_row = warp * kWarpRows, row = warp_row + team.thread % kWarp / 4;
    const DropoutState drop = load_dropout(batch.dropout);
    float *vectors = memory.extra(group), *sums = vectors + kStatistics * kRows;
    Consumer<Memory> consumer = {memory};
    const auto pass = [&](const OwnedRows& owned, int steps, bool last_pass) {
      T *q = memory.owned(group, consumer.owned_slot(), 0), *dout = memory.owned(group, consumer.owned_slot(), 1);
      consumer.wait_owned(group);
      prepare_rows<T, D, Layout, true>(q, dout, vectors, statistics_of(tensors.statistics, owned, batch), kRows, owned,
                                       batch, tensors, team);
      fence_async_proxy();
      team.sync();
      float acc[D / 8][4] = {};
      sum_keys<T, D, DROPOUT>(acc, q, dout, vectors, owned, batch, drop, steps, last_pass, consumer);
      const int valid = owned.length - owned.row;
      scale_valid_rows<D>(acc, batch.scale * batch.dropout.scale, row, valid);
      team.sync();  // all warps have read the queries, whose memory store_rows reuses
      T* to = tensors.dqkv + ((owned.first + owned.row) * 3 * batch.heads + owned.head) * batch.dim;
      store_rows<T, D, Layout>(q, warp_row, 0, acc, to, int64_t{3} * width, valid, batch);
      consumer.release_owned(group);
      float* partial = partial_of(tensors.partial, owned, batch, 0);
      if (partial != nullptr) store_column_sums<D, D>(sums, warp, 0, acc, partial, batch.dim, team);
    };
    for_each_pass(batch, work, group, consumer, pass, [&](const OwnedRows& owned) {
      float* partial = partial_of(tensors.partial, owned, batch, 0);
      if (partial != nullptr) zero_sums(partial, batch.dim, team);
    });
  }
#endif
}

}  // namespace

template <class T>
void attention_dq_hopper(const AttentionBatch& batch, const AttentionBackward<T>& tensors, const Tensor& on) {
  const DqMaps maps = {map_qkv(tensors.qkv, batch), map_rows(tensors.dout, batch)};
  dispatch_hopper_dim(batch.dim, [&](auto dim) {
    constexpr int kDim = decltype(dim)::value;
    const HopperWork work = plan_work<DqMemory<T, kDim>>(batch);
    const auto kernel = batch.dropout.threshold ? hopper_dq<T, kDim, true> : hopper_dq<T, kDim, false>;
    launch(kernel, grid_of(work, on), kHopperThreads, DqMemory<T, kDim>::kBytes, on, maps, batch, tensors, work);
  });
}

template void attention_dq_hopper(const AttentionBatch&, const AttentionBackward<BFloat16>&, const Tensor&);
template void attention_dq_hopper(const AttentionBatch&, const AttentionBackward<Half>&, const Tensor&);

}  // namespace bert_fast
