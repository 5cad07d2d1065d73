// Forward pass of attention in 16 bits: a block owns 64 queries of a head and walks over the keys with an online
// softmax.
//
// Tiles of keys and values go from memory to the matrix unit as they are, the next while one is multiplied; their
// biases enter through vectors (kernels/attention/README.md).
#include "attention/attention_cuda_mma.h"

namespace bert_fast {
namespace {

template <int D>
constexpr int forward_bytes() {
  return (kRows + 2 * TilePlan<D>::kStages * TilePlan<D>::kStep) * D * 2 + kRows * 4;
}

// Queries to sign (q + bias), rounded; `shift` gets their product with the bias of the keys.
template <class T, int D>
__device__ __forceinline__ void prepare_queries(T* q, float* shift, const OwnedRows& own, const AttentionBatch& batch,
                                                float sign) {
  constexpr int kChunks = D / 8;
  const int chunk = threadIdx.x % kChunks, columns = batch.dim - 8 * chunk, part = batch.heads * batch.dim;
  float bias_q[8] = {}, bias_k[8] = {};
  if (batch.bias != nullptr) {
    const float* bias = batch.bias + own.head * batch.dim + 8 * chunk;
    load_pack<8, false>(bias, columns, bias_q);
    load_pack<8, false>(bias + part, columns, bias_k);
  }
  for (int row = threadIdx.x / kChunks; row < kRows; row += blockDim.x / kChunks) {
    T* at = q + place<D>(row, chunk);
    float numbers[8], sum = 0.0f;
    load_pack<8, true>(at, 8, numbers);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      numbers[i] = static_cast<float>(static_cast<T>((numbers[i] + bias_q[i]) * sign));
      sum += numbers[i] * bias_k[i];
    }
    store_pack<8, true>(at, 8, numbers);
#pragma unroll
    for (int mask = kChunks / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(kAllLanes, sum, mask);
    if (chunk == 0) shift[row] = sum;
  }
}

template <class T, int D, bool DROPOUT>
__global__ void __launch_bounds__(kBlockWarps* kWarp)
    attention_forward(AttentionBatch batch, AttentionForward<T> tensors, float sign) {
  using Plan = TilePlan<D>;
  constexpr int kStep = Plan::kStep;
  zero_tail(batch, tensors.out, int64_t{batch.heads} * batch.dim, tensors.lse);
  const OwnedRows own(batch, kRows);
  if (own.row >= own.length) return;
  T* q = dynamic_shared<T>();
  T* stages = q + kRows * D;
  float* shift = reinterpret_cast<float*>(stages + 2 * Plan::kStages * kStep * D);
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
  load_tile<D>(q, base + own.row * batch.stride_t, batch.stride_t, kRows, own.length - own.row, batch);
  load_step(0);
  if (batch.bias != nullptr || sign != 1.0f) {
    wait_for_copies<0>();
    __syncthreads();
    prepare_queries<T, D>(q, shift, own, batch, sign);
  }

  const DropoutState drop = load_dropout(batch.dropout);
  float m[2] = {-INFINITY, -INFINITY}, total[2] = {}, kept[2] = {}, acc[D / 8][4] = {};
  const float scale2 = batch.scale * kLog2E;
  const int steps = (own.length + kStep - 1) / kStep;
  wait_for_copies<0>();
  __syncthreads();
  const LeftRows<T, D, Plan::kKeep> queries(q, warp * kWarpRows);
  for (int step = 0; step < steps; ++step) {
    if (step > 0) {
      wait_for_copies<0>();
      __syncthreads();
    }
    if (Plan::kStages == 2 && step + 1 < steps) load_step(step + 1);
    const T* k = stages + step % Plan::kStages * 2 * kStep * D;
    float s[kStep / 8][4];
    multiply_transposed<T, D, kStep>(queries, k, s);
    const int left = own.length - step * kStep;
    if (left < kStep) {
#pragma unroll
      for (int j = 0; j < kStep / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[j][i] = 8 * j + 2 * t + i % 2 < left ? s[j][i] : -INFINITY;
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = m[half], sum = 0.0f;
#pragma unroll
      for (int j = 0; j < kStep / 8; ++j) top = fmaxf(top, fmaxf(s[j][2 * half], s[j][2 * half + 1]));
      top = quad_max(top);
      const float decay = exp2_fast((m[half] - top) * scale2), shift2 = top * scale2;
      m[half] = top;
#pragma unroll
      for (int j = 0; j < kStep / 8; ++j) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          s[j][i] = exp2_fast(s[j][i] * scale2 - shift2);
          sum += s[j][i];
        }
      }
      total[half] = total[half] * decay + sum;
      kept[half] *= decay;
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
        acc[j][2 * half] *= decay;
        acc[j][2 * half + 1] *= decay;
      }
    }
    if constexpr (DROPOUT) {
      const KeptKeys<kStep> mask(drop, own.head, own.first + own.row + warp * kWarpRows, step * kStep);
#pragma unroll
      for (int j = 0; j < kStep / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          s[j][i] = mask.keeps(j, i) ? s[j][i] : 0.0f;
          kept[i / 2] += s[j][i];
        }
      }
    }
    accumulate<T, D, kStep, D>(s, k + kStep * D, 0, acc);
    if (Plan::kStages == 1 && step + 1 < steps) {
      __syncthreads();
      load_step(step + 1);
    }
  }

  const int rows = warp * kWarpRows + g;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = rows + 8 * half;
    const float sum = quad_sum(total[half]), factor = batch.dropout.scale / sum;
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      acc[j][2 * half] *= factor;
      acc[j][2 * half + 1] *= factor;
    }
    float lse = m[half] * batch.scale + logf(sum);
    if (batch.bias != nullptr) {
      const float weight = DROPOUT ? quad_sum(kept[half]) * factor : 1.0f;
      const float* bias_v = batch.bias + (2 * batch.heads + own.head) * batch.dim;
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int d = 8 * j + 2 * t + i;
          if (d < batch.dim) acc[j][2 * half + i] += weight * bias_v[d];
        }
      }
      lse += shift[row] * batch.scale;
    }
    if (t == 0 && own.row + row < own.length) {
      tensors.lse[own.head * batch.total + own.first + own.row + row] = lse;
    }
  }
  const int64_t stride = int64_t{batch.heads} * batch.dim;
  store_rows<T, D, D>(q, warp * kWarpRows, 0, acc, tensors.out + (own.first + own.row) * stride + own.head * batch.dim,
                      stride, own.length - own.row, batch);
}

}  // namespace

template <class T>
void attention_forward_cuda(const AttentionBatch& given, const AttentionForward<T>& tensors, const Tensor& on) {
  float sign;
  const AttentionBatch batch = with_positive_scale(given, &sign);
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
