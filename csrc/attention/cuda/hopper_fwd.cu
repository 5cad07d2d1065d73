// The forward pass of attention for Hopper: a consumer owns 64 queries and loops over the keys with an online softmax.
//
// Software pipelining: the product for the next keys' scores runs while these keys' values are summed. The consumers
// take turns, so that the softmax of one overlaps the products of the other. Biases enter as in fwd.cu.
#include "attention/cuda/hopper.h"

namespace bert_fast {
namespace {

// 128 keys per step. With D of 64 a second slot holds the queries of the next work tile, loaded ahead.
template <class T, int D>
using ForwardMemory = HopperMemory<T, D, 128, D == 64 ? 5 : 3, D == 64 ? 2 : 1, 1, 0, 0>;

// The turns in which the two consumers issue their products (FlashAttention-3's ping-pong). A consumer waits at a named
// barrier of its own, where the other arrives after each of its turns and, for the first turn of consumer 0, at the
// start.
struct Turns {
  static constexpr int kFirstBarrier = 1 + kConsumers;  // after those of the teams
  static constexpr int kThreads = kConsumers * kWarpgroup;

  __device__ __forceinline__ void begin() const {
    if (group == 1) pass();
  }
  __device__ __forceinline__ void wait() const { named_barrier(kFirstBarrier + group, kThreads); }
  __device__ __forceinline__ void pass() const { named_barrier_arrive(kFirstBarrier + 1 - group, kThreads); }
  // Nobody arrives at a barrier that is not waited for.
  __device__ __forceinline__ void end() const {
    if (group == 0) wait();
  }

  // Whether both consumers own rows in the pass of `owned`, and so have the same number of turns.
  __device__ __forceinline__ bool shared(const OwnedRows& owned) const {
    return owned.row + (kConsumers - 1 - group) * kRows < owned.length;
  }

  int group;
};

template <class T, int D, bool DROPOUT>
struct ForwardLoop {
  using Memory = ForwardMemory<T, D>;
  static constexpr int kStep = Memory::kStep;

  // Replaces the scores of the keys of `step` by exponentials after dropout.
  __device__ __forceinline__ void exponentiate(const OwnedRows& owned, int step, float (&s)[kStep / 8][4],
                                               float (&decay)[2]) {
    mask_columns<kStep>(s, owned.length - step * kStep, -INFINITY);
    softmax.template step<kStep>(s, batch.scale * kLog2E, decay);
    if constexpr (DROPOUT) {
      const int warp = threadIdx.x % kWarpgroup / kWarp;
      softmax.template drop<kStep>(s, drop, owned.head, owned.first + owned.row + warp * kWarpRows, step * kStep);
    }
  }

  // One pass: 64 queries, all keys.
  __device__ __forceinline__ void run(const OwnedRows& owned, const T* q, int steps, bool last_pass,
                                      const Consumer<Memory>& consumer, const Turns& turns, float (&acc)[D / 8][4]) {
    const bool take_turns = turns.shared(owned);
    float s[kStep / 8][4], decay[2];
    uint32_t p[kStep / 16][4];
    const T* k = consumer.wait(0, 0);
    wgmma_fence(s);
    start_scores<T, D, kStep>(s, q, k);
    wgmma_commit();
    wgmma_wait<0>(s);
    consumer.release(0, 0, last_pass);
    exponentiate(owned, 0, s, decay);
    round_scores<T, kStep>(s, p);
    for (int step = 0; step + 1 < steps; ++step) {
      k = consumer.wait(0, step + 1);
      if (take_turns) turns.wait();
      wgmma_fence(s);
      start_scores<T, D, kStep>(s, q, k);
      wgmma_commit();
      const T* v = consumer.wait(1, step);
      wgmma_fence(acc, p);
      start_sums<T, D, kStep>(acc, p, v);
      wgmma_commit();
      if (take_turns) turns.pass();
      wgmma_wait<1>(s);
      consumer.release(0, step + 1, last_pass);
      exponentiate(owned, step + 1, s, decay);
      wgmma_wait<0>(acc);
      consumer.release(1, step, last_pass);
      scale_rows<D>(acc, decay);
      round_scores<T, kStep>(s, p);
    }
    const T* v = consumer.wait(1, steps - 1);
    wgmma_fence(acc, p);
    start_sums<T, D, kStep>(acc, p, v);
    wgmma_commit();
    wgmma_wait<0>(acc);
    consumer.release(1, steps - 1, last_pass);
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
  zero_tail(batch, tensors.out, int64_t{batch.heads} * batch.dim, tensors.stats);
  memory.init_barriers();
  const int group = warpgroup();
  if (group == kConsumers) {
    setmaxnreg<kProducerRegisters, false>();
    Producer<T, Memory>{memory}.run(batch, work, {{&qkv, 0}}, {{&qkv, 1}, {&qkv, 2}}, nullptr);
  } else {
    setmaxnreg<kConsumerRegisters, true>();
    const Team team = {static_cast<int>(threadIdx.x) % kWarpgroup, kWarpgroup, 1 + group};
    const int warp_row = team.thread / kWarp * kWarpRows, row = warp_row + team.thread % kWarp / 4;
    const DropoutState drop = load_dropout(batch.dropout);
    Consumer<Memory> consumer = {memory};
    const Turns turns = {group};
    turns.begin();
    const auto pass = [&](const OwnedRows& owned, int steps, bool last_pass) {
      T* q = memory.owned(group, consumer.owned_slot(), 0);
      consumer.wait_owned(group);
      if (batch.bias != nullptr || sign != 1.0f) {
        prepare_queries<T, D, Layout>(q, owned, batch, sign, team);
        fence_async_proxy();
        team.sync();
      }
      float acc[D / 8][4] = {};
      ForwardLoop<T, D, DROPOUT> loop = {batch, drop};
      loop.run(owned, q, steps, last_pass, consumer, turns, acc);
      const int valid = owned.length - owned.row;
      const int64_t token = owned.first + owned.row, stride = int64_t{batch.heads} * batch.dim;
      float* stats = tensors.stats + owned.head * batch.total + token;
      loop.softmax.template finish<D, DROPOUT>(acc, batch, owned.head, row, valid, stats);
      team.sync();  // all warps have read the queries, whose memory store_rows reuses
      T* to = tensors.out + token * stride + owned.head * batch.dim;
      store_rows<T, D, Layout>(q, warp_row, 0, acc, to, stride, valid, batch);
      consumer.release_owned(group);
    };
    for_each_pass(batch, work, group, consumer, pass, [](const OwnedRows&) {});
    turns.end();
  }
#endif
}

}  // namespace

template <class T>
void attention_forward_hopper(const AttentionBatch& arguments, const AttentionForward<T>& tensors, const Tensor& on) {
  float sign;
  const AttentionBatch batch = with_positive_scale(arguments, &sign);
  dispatch_hopper_dim(batch.dim, [&](auto dim) {
    constexpr int kDim = decltype(dim)::value;
    using Memory = ForwardMemory<T, kDim>;
    const HopperWork work = plan_work<Memory>(batch);
    const auto kernel = batch.dropout.threshold ? hopper_forward<T, kDim, true> : hopper_forward<T, kDim, false>;
    launch(kernel, grid_of(work, on), kHopperThreads, Memory::kBytes, on, map_qkv(tensors.qkv, batch), batch, tensors,
           work, sign);
  });
}

// The maps of map_qkv and map_rows; the rows may be at any address that is as aligned as that of qkv.
template <class T>
int tensor_map_error(const AttentionBatch& batch, const T* qkv) {
  const int64_t width = int64_t{batch.heads} * batch.dim;
  TensorMap map;
  const int error = encode_tensor_map(&map, qkv, {batch.total, 3, batch.heads, batch.dim},
                                      {batch.stride_t, batch.stride_part, batch.stride_n});
  return error != 0 ? error
                    : encode_tensor_map(&map, qkv, {batch.total, 1, batch.heads, batch.dim}, {width, width, batch.dim});
}

template int tensor_map_error(const AttentionBatch&, const BFloat16*);
template int tensor_map_error(const AttentionBatch&, const Half*);
template void attention_forward_hopper(const AttentionBatch&, const AttentionForward<BFloat16>&, const Tensor&);
template void attention_forward_hopper(const AttentionBatch&, const AttentionForward<Half>&, const Tensor&);

}  // namespace bert_fast
