// Forward pass of attention for Hopper: a team owns 64 queries and walks over the keys with an online softmax.
//
// The scores of the next keys are made while the values of these are summed. Biases enter as in attention_cuda_fwd.cu.
#include "attention/cuda/hopper.h"

namespace bert_fast {
namespace {

// 128 keys at a time. The next piece's queries come while these are multiplied, where there is op.
template <class T, int D>
using ForwardMemory = HopperMemory<T, D, 128, D == 64 ? 5 : 3, D == 64 ? 2 : 1, 1, kRows, 0>;

template <class T, int D, bool DROPOUT>
struct ForwardTeam {
  using Memory = ForwardMemory<T, D>;
  static constexpr int kStep = Memory::kStep;

  // Scores of the keys of `step` to exponentials, which are dropped and, later, rounded.
  __device__ __forceinline__ void soften(const OwnedRows& own, int step, float (&s)[kStep / 8][4], float (&decay)[2]) {
    fill_behind<kStep>(s, own.length - step * kStep, -INFINITY);
    softmax.template step<kStep>(s, batch.scale * kLog2E, decay);
    if constexpr (DROPOUT) {
      const int warp = threadIdx.x % kWarpgroup / kWarp;
      softmax.template drop<kStep>(s, drop, own.head, own.first + own.row + warp * kWarpRows, step * kStep);
    }
  }

  // One pass: 64 queries, all keys.
  __device__ __forceinline__ void run(const OwnedRows& own, const T* q, int steps, bool last_pass,
                                      const Taker<Memory>& taker, float (&acc)[D / 8][4]) {
    float s[kStep / 8][4], decay[2];
    uint32_t p[kStep / 16][4];
    const T* k = taker.wait(0, 0);
    fence_products(s);
    start_scores<T, D, kStep>(s, q, k);
    commit_products();
    wait_for_products<0>(s);
    taker.release(0, 0, last_pass);
    soften(own, 0, s, decay);
    round_scores<T, kStep>(s, p);
    for (int step = 0; step + 1 < steps; ++step) {
      k = taker.wait(0, step + 1);
      fence_products(s);
      start_scores<T, D, kStep>(s, q, k);
      commit_products();
      const T* v = taker.wait(1, step);
      fence_products(acc, p);
      start_sums<T, D, kStep>(acc, p, v);
      commit_products();
      wait_for_products<1>(s);
      taker.release(0, step + 1, last_pass);
      soften(own, step + 1, s, decay);
      wait_for_products<0>(acc);
      taker.release(1, step, last_pass);
      multiply_rows_by<D>(acc, decay);
      round_scores<T, kStep>(s, p);
    }
    const T* v = taker.wait(1, steps - 1);
    fence_products(acc, p);
    start_sums<T, D, kStep>(acc, p, v);
    commit_products();
    wait_for_products<0>(acc);
    taker.release(1, steps - 1, last_pass);
  }

  const AttentionBatch& batch;
  const DropoutState drop;
  OnlineSoftmax softmax = {};
};

template <class T, int D, bool DROPOUT>
__global__ void __launch_bounds__(kHopperThreads, 1)
    hopper_forward(const __grid_constant__ TensorMap qkv, AttentionBatch batch, AttentionForward<T> tensors,
                   HopperWork work, float sign) {
#ifdef BERT_FAST_ON_HOPPER
  using Memory = ForwardMemory<T, D>;
  using Layout = TiledRows<kRows>;
  const Memory memory;
  zero_tail(batch, tensors.out, int64_t{batch.heads} * batch.dim, tensors.lse);
  memory.init_barriers();
  const int group = warpgroup();
  if (group == kTeams) {
    set_registers<kMovingRegisters, false>();
    Mover<T, Memory>{memory}.run(batch, work, {{&qkv, 0}}, {{&qkv, 1}, {&qkv, 2}}, nullptr);
  } else {
    set_registers<kTeamRegisters, true>();
    const Team team = {static_cast<int>(threadIdx.x) % kWarpgroup, kWarpgroup, 1 + group};
    const int warp_row = team.thread / kWarp * kWarpRows, row = warp_row + team.thread % kWarp / 4;
    const DropoutState drop = load_dropout(batch.dropout);
    float* shift = memory.extra(group);
    Taker<Memory> taker = {memory};
    const auto pass = [&](const OwnedRows& own, int steps, bool last_pass) {
      T* q = memory.own(group, taker.own_slot(), 0);
      taker.wait_own(group);
      if (batch.bias != nullptr || sign != 1.0f) {
        prepare_queries<T, D, Layout>(q, shift, own, batch, sign, team);
        fence_async_proxy();
        team.sync();
      }
      float acc[D / 8][4] = {};
      ForwardTeam<T, D, DROPOUT> walk = {batch, drop};
      walk.run(own, q, steps, last_pass, taker, acc);
      const int valid = own.length - own.row;
      const int64_t token = own.first + own.row, stride = int64_t{batch.heads} * batch.dim;
      float* lse = tensors.lse + own.head * batch.total + token;
      walk.softmax.template finish<D, DROPOUT>(acc, batch, own.head, shift, row, valid, lse);
      team.sync();  // all warps are done with the queries, in whose place the result is put in order
      T* to = tensors.out + token * stride + own.head * batch.dim;
      store_rows<T, D, Layout>(q, warp_row, 0, acc, to, stride, valid, batch);
      taker.release_own(group);
    };
    for_each_pass(batch, work, group, taker, pass, [](const OwnedRows&) {});
  }
#endif
}

}  // namespace

template <class T>
void attention_forward_hopper(const AttentionBatch& given, const AttentionForward<T>& tensors, const Tensor& on) {
  float sign;
  const AttentionBatch batch = with_positive_scale(given, &sign);
  dispatch_hopper_dim(batch.dim, [&](auto dim) {
    constexpr int kDim = decltype(dim)::value;
    using Memory = ForwardMemory<T, kDim>;
    const HopperWork work = plan_work<Memory>(batch);
    const auto kernel = batch.dropout.threshold ? hopper_forward<T, kDim, true> : hopper_forward<T, kDim, false>;
    launch(kernel, grid_of(work, on), kHopperThreads, Memory::kBytes, on, map_qkv(tensors.qkv, batch), batch, tensors,
           work, sign);
  });
}

template void attention_forward_hopper(const AttentionBatch&, const AttentionForward<BFloat16>&, const Tensor&);
template void attention_forward_hopper(const AttentionBatch&, const AttentionForward<Half>&, const Tensor&);

}  // namespace bert_fast
