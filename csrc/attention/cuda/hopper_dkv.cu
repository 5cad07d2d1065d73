// dk and dv of attention for Hopper: a consumer owns 64 keys and loops over the queries. Scores are transposed, with a
// row per key, so that P and dZ stay in registers as operands of the products for dv and dk.
#include "attention/cuda/hopper.h"

namespace bert_fast {
namespace {

constexpr int kStep = 64;
static_assert(kStep == kRows, "the statistics of queries are stored in blocks of kRows");

template <class T, int D>
using DkvMemory = HopperMemory<T, D, kStep, D == 64 ? 9 : 4, D == 64 ? 2 : 1, 2, kBlockWarps * D, kStatistics * kStep>;

// dk and dv of 64 keys, summed over all queries, up to factors. Where the registers suffice, the product for the next
// scores follows that for dk without a wait, and that for dP runs while P is computed.
template <class T, int D, bool DROPOUT>
__device__ __forceinline__ void sum_queries(float (&dk)[D / 8][4], float (&dv)[D / 8][4], const T* k, const T* v,
                                            const OwnedRows& owned, const AttentionBatch& batch,
                                            const DropoutState& drop, int steps, bool last_pass,
                                            const Consumer<DkvMemory<T, D>>& consumer) {
  constexpr bool kOverlap = D == 64;
  const int first_key = owned.row + threadIdx.x % kWarpgroup / kWarp * kWarpRows;
  const float scale2 = batch.scale * kLog2E;
  float p[kStep / 8][4], dp[kStep / 8][4];
  uint32_t left[kStep / 16][4];
  const auto start = [&](float (&scores)[kStep / 8][4], const T* owned_rows, const T* rows) {
    wgmma_fence(scores);
    start_scores<T, D, kStep>(scores, owned_rows, rows);
    wgmma_commit();
  };
  const T* q = nullptr;
  const auto start_step = [&](int step) {
    q = consumer.wait(0, step);
    start(p, k, q);
  };
  if constexpr (kOverlap) {
    start_step(0);
    wgmma_wait<0>(p);
  }
  for (int step = 0; step < steps; ++step) {
    if constexpr (!kOverlap) {
      start_step(step);
      wgmma_wait<0>(p);
    }
    const T* dout = consumer.wait(1, step);
    if constexpr (kOverlap) start(dp, v, dout);
    const QueryColumns<kStep> queries(consumer.memory.stage_extra(consumer.slot(step)));
    queries.exponentials(p, scale2);
    const std::conditional_t<DROPOUT, KeptQueries<kStep>, KeepsAll> mask(
        drop, owned.head, static_cast<uint32_t>(owned.first) + step * kStep, first_key);
    round_kept<T, kStep>(p, mask, left);
    wgmma_fence(dv, left);
    start_sums<T, D, kStep>(dv, left, dout);
    wgmma_commit();
    if constexpr (kOverlap) {
      wgmma_wait<1>(dp);
      queries.template differentiate<DROPOUT>(p, dp);
      wgmma_wait<0>(dv, left);
    } else {
      wgmma_wait<0>(dv, left);
      start(dp, v, dout);
      wgmma_wait<0>(dp);
      queries.template differentiate<DROPOUT>(p, dp);
    }
    consumer.release(1, step, last_pass);
    round_scores<T, kStep>(p, left);
    wgmma_fence(dk, left);
    start_sums<T, D, kStep>(dk, left, q);
    wgmma_commit();
    if constexpr (kOverlap) {
      if (step + 1 == steps) break;
      start_step(step + 1);
      wgmma_wait<0>(p, dk, left);
    } else {
      wgmma_wait<0>(dk, left);
    }
    consumer.release(0, step, last_pass);
  }
  if constexpr (kOverlap) {
    wgmma_wait<0>(dk);
    consumer.release(0, steps - 1, last_pass);
  }
}

// `queries` is q + bias if there is a bias, else part of qkv.
struct DkvMaps {
  TensorMap qkv, queries, dout;
};

template <class T, int D, bool DROPOUT>
__global__ void __launch_bounds__(kHopperThreads, 1)
    hopper_dkv(const __grid_constant__ DkvMaps maps, AttentionBatch batch, AttentionBackward<T> tensors,
               HopperWork work) {
#ifdef BERT_FAST_ON_HOPPER
  using Memory = DkvMemory<T, D>;
  using Layout = TiledRows<kRows>;
  const Memory memory;
  const int width = batch.heads * batch.dim, group = warpgroup();
  memory.init_barriers();
  if (group == kConsumers) {
    setmaxnreg<kProducerRegisters, false>();
    Producer<T, Memory>{memory}.run(batch, work, {{&maps.qkv, 1}, {&maps.qkv, 2}},
                                    {{&maps.queries, 0}, {&maps.dout, 0}}, tensors.statistics);
  } else {
    setmaxnreg<kConsumerRegisters, true>();
    const Team team = {static_cast<int>(threadIdx.x) % kWarpgroup, kWarpgroup, 1 + group};
    const int warp = team.thread / kWarp, warp_row = warp * kWarpRows, row = warp_row + team.thread % kWarp / 4;
    const DropoutState drop = load_dropout(batch.dropout);
    Consumer<Memory> consumer = {memory};
    const auto pass = [&](const OwnedRows& owned, int steps, bool last_pass) {
      T *k = memory.owned(group, consumer.owned_slot(), 0), *v = memory.owned(group, consumer.owned_slot(), 1);
      consumer.wait_owned(group);
      float dk[D / 8][4] = {}, dv[D / 8][4] = {};
      sum_queries<T, D, DROPOUT>(dk, dv, k, v, owned, batch, drop, steps, last_pass, consumer);
      const int valid = owned.length - owned.row;
      scale_valid_rows<D>(dk, batch.scale * batch.dropout.scale, row, valid);
      scale_valid_rows<D>(dv, batch.dropout.scale, row, valid);
      team.sync();  // all warps have read the keys and values, whose memory store_rows reuses
      T* to = tensors.dqkv + ((owned.first + owned.row) * 3 * batch.heads + owned.head) * batch.dim + width;
      const int64_t stride = int64_t{3} * width;
      store_rows<T, D, Layout>(k, warp_row, 0, dk, to, stride, valid, batch);
      store_rows<T, D, Layout>(v, warp_row, 0, dv, to + width, stride, valid, batch);
      consumer.release_owned(group);
      float* partial = partial_of(tensors.partial, owned, batch, 1);
      if (partial == nullptr) return;
      store_column_sums<D, D>(memory.extra(group), warp, 0, dk, partial, batch.dim, team);
      store_column_sums<D, D>(memory.extra(group), warp, 0, dv, partial + width, batch.dim, team);
    };
    for_each_pass(batch, work, group, consumer, pass, [&](const OwnedRows& owned) {
      float* partial = partial_of(tensors.partial, owned, batch, 1);
      if (partial == nullptr) return;
      zero_sums(partial, batch.dim, team);
      zero_sums(partial + width, batch.dim, team);
    });
  }
#endif
}

}  // namespace

template <class T>
void attention_dkv_hopper(const AttentionBatch& batch, const AttentionBackward<T>& tensors, const Tensor& on) {
  const TensorMap qkv = map_qkv(tensors.qkv, batch);
  const DkvMaps maps = {qkv, tensors.biased_q != nullptr ? map_rows<T>(tensors.biased_q, batch) : qkv,
                        map_rows(tensors.dout, batch)};
  dispatch_hopper_dim(batch.dim, [&](auto dim) {
    constexpr int kDim = decltype(dim)::value;
    const HopperWork work = plan_work<DkvMemory<T, kDim>>(batch);
    const auto kernel = batch.dropout.threshold ? hopper_dkv<T, kDim, true> : hopper_dkv<T, kDim, false>;
    launch(kernel, grid_of(work, on), kHopperThreads, DkvMemory<T, kDim>::kBytes, on, maps, batch, tensors, work);
  });
}

template void attention_dkv_hopper(const AttentionBatch&, const AttentionBackward<BFloat16>&, const Tensor&);
template void attention_dkv_hopper(const AttentionBatch&, const AttentionBackward<Half>&, const Tensor&);

}  // namespace bert_fast
