// dk and dv of attention for Hopper: a team owns 64 keys and walks over the queries. Scores are transposed, a row a
// key, so that P and dZ go from registers into the products for dv and dk.
#include "attention/cuda/hopper.h"

namespace bert_fast {
namespace {

constexpr int kStep = 64;
static_assert(kStep == kRows, "what is known of the queries comes in blocks of kRows");

template <class T, int D>
using DkvMemory = HopperMemory<T, D, kStep, D == 64 ? 9 : 4, D == 64 ? 2 : 1, 2, kBlockWarps * D, 3 * kStep>;

// dk and dv of 64 keys from all queries, up to factors. dP is made while P is, where there are registers for both.
template <class T, int D, bool DROPOUT>
__device__ __forceinline__ void sum_queries(float (&dk)[D / 8][4], float (&dv)[D / 8][4], const T* k, const T* v,
                                            const OwnedRows& own, const AttentionBatch& batch, const DropoutState& drop,
                                            int steps, bool last_pass, const Taker<DkvMemory<T, D>>& taker) {
  constexpr bool kTogether = D == 64;
  const int first_key = own.row + threadIdx.x % kWarpgroup / kWarp * kWarpRows;
  const float scale2 = batch.scale * kLog2E;
  for (int step = 0; step < steps; ++step) {
    float p[kStep / 8][4], dp[kStep / 8][4];
    uint32_t left[kStep / 16][4];
    const T *q = taker.wait(0, step), *dout = taker.wait(1, step);
    const auto start_dp = [&] {
      fence_products(dp);
      start_scores<T, D, kStep>(dp, v, dout);
      commit_products();
    };
    fence_products(p);
    start_scores<T, D, kStep>(p, k, q);
    commit_products();
    if constexpr (kTogether) start_dp();
    wait_for_products<kTogether ? 1 : 0>(p);
    const QueryColumns<kStep> queries(taker.memory.stage_extra(taker.slot(step)));
    queries.exponentials(p, scale2);
    const std::conditional_t<DROPOUT, KeptQueries<kStep>, KeepsAll> mask(
        drop, own.head, static_cast<uint32_t>(own.first) + step * kStep, first_key);
    round_kept<T, kStep>(p, mask, left);
    fence_products(dv, left);
    start_sums<T, D, kStep>(dv, left, dout);
    commit_products();
    if constexpr (kTogether) {
      wait_for_products<1>(dp);
      queries.differentiate(p, dp, mask);
      wait_for_products<0>(dv, left);
    } else {
      wait_for_products<0>(dv, left);
      start_dp();
      wait_for_products<0>(dp);
      queries.differentiate(p, dp, mask);
    }
    taker.release(1, step, last_pass);
    round_scores<T, kStep>(p, left);
    fence_products(dk, left);
    start_sums<T, D, kStep>(dk, left, q);
    commit_products();
    wait_for_products<0>(dk);
    taker.release(0, step, last_pass);
  }
}

// Queries come from `queries`, q + bias where there is a bias.
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
  if (group == kTeams) {
    set_registers<kMovingRegisters, false>();
    Mover<T, Memory>{memory}.run(batch, work, {{&maps.qkv, 1}, {&maps.qkv, 2}}, {{&maps.queries, 0}, {&maps.dout, 0}},
                                 tensors.statistics);
  } else {
    set_registers<kTeamRegisters, true>();
    const Team team = {static_cast<int>(threadIdx.x) % kWarpgroup, kWarpgroup, 1 + group};
    const int warp = team.thread / kWarp, warp_row = warp * kWarpRows, row = warp_row + team.thread % kWarp / 4;
    const DropoutState drop = load_dropout(batch.dropout);
    Taker<Memory> taker = {memory};
    const auto pass = [&](const OwnedRows& own, int steps, bool last_pass) {
      T *k = memory.own(group, taker.own_slot(), 0), *v = memory.own(group, taker.own_slot(), 1);
      taker.wait_own(group);
      float dk[D / 8][4] = {}, dv[D / 8][4] = {};
      sum_queries<T, D, DROPOUT>(dk, dv, k, v, own, batch, drop, steps, last_pass, taker);
      const int valid = own.length - own.row;
      multiply_valid_rows<D>(dk, batch.scale * batch.dropout.scale, row, valid);
      multiply_valid_rows<D>(dv, batch.dropout.scale, row, valid);
      team.sync();  // all warps are done with the keys and values, in whose place the results are put in order
      T* to = tensors.dqkv + ((own.first + own.row) * 3 * batch.heads + own.head) * batch.dim + width;
      const int64_t stride = int64_t{3} * width;
      store_rows<T, D, Layout>(k, warp_row, 0, dk, to, stride, valid, batch);
      store_rows<T, D, Layout>(v, warp_row, 0, dv, to + width, stride, valid, batch);
      taker.release_own(group);
      float* partial = partial_of(tensors.partial, own, batch, 1);
      if (partial == nullptr) return;
      store_column_sums<D, D>(memory.extra(group), warp, 0, dk, partial, batch.dim, team);
      store_column_sums<D, D>(memory.extra(group), warp, 0, dv, partial + width, batch.dim, team);
    };
    for_each_pass(batch, work, group, taker, pass, [&](const OwnedRows& own) {
      float* partial = partial_of(tensors.partial, own, batch, 1);
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
