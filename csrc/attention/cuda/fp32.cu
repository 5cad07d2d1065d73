// Attention in float32, without tensor cores, which would round it to fewer bits: products by FMA of tiles in shared
// memory. A block is 16 by 16 threads; thread (y, x) holds rows y, y + 16, ... and columns x, x + 16, ... of a tile.
//
// Unlike in the 16-bit kernels, biases are added to the tiles, and the dq kernel passes over the keys twice, first to
// sum P and P dP as exactly as it computes them: the rounding of log2_sum makes P sum to 1 + eps log2_sum, and dout *
// out is not the delta of such a P (kernels/attention/README.md, "Precision").
#include <cmath>

#include "attention/cuda/common.h"

namespace bert_fast {
namespace {

constexpr int kSide = 16;
constexpr int kThreads = kSide * kSide;
constexpr unsigned kAllLanes = 0xffffffffu;

template <int D>
struct FloatPlan {
  static constexpr int kRows = attention_block_rows(ScalarType::Float, D);  // of every tile
  static constexpr int kPitch = D + 4;                                      // puts adjacent rows in different banks
  static constexpr int kScorePitch = kRows + 1;
  static constexpr int kPerThread = kRows / kSide, kColumns = D / kSide;
  static constexpr int kTile = kRows * kPitch, kScores = kRows * kScorePitch, kMask = kRows * (kRows / 16);
  static constexpr int kForwardBytes = 4 * (3 * kTile + kScores + kMask);
  static constexpr int kBackwardBytes = 4 * (4 * kTile + kScores + kMask + 3 * kRows);
};

template <int D>
using Scores = float[FloatPlan<D>::kPerThread][FloatPlan<D>::kPerThread];
template <int D>
using Rows = float[FloatPlan<D>::kPerThread][FloatPlan<D>::kColumns];

__device__ __forceinline__ int thread_y() {
  return threadIdx.x / kSide;
}

__device__ __forceinline__ int thread_x() {
  return threadIdx.x % kSide;
}

// The sum and the maximum over the 16 threads of a row.
__device__ __forceinline__ float row_sum(float x) {
#pragma unroll
  for (int mask = kSide / 2; mask > 0; mask /= 2) x += __shfl_xor_sync(kAllLanes, x, mask);
  return x;
}

__device__ __forceinline__ float row_max(float x) {
#pragma unroll
  for (int mask = kSide / 2; mask > 0; mask /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, mask));
  return x;
}

// P before it is divided by its sum; see `probability`, whose exp2 is not as exact.
__device__ __forceinline__ float exponential(float score, float scale2, float top) {
  return exp2f(min_or_nan((score - top) * scale2, 0.0f));
}

// tile = factor (from + bias), rows `stride` apart, with zeros after the first `valid` rows and after column dim.
template <int D>
__device__ __forceinline__ void load_rows(float* tile, const float* from, int64_t stride, int valid, const float* bias,
                                          float factor, const AttentionBatch& batch) {
  constexpr int kChunks = D / 4;
  for (int i = threadIdx.x; i < FloatPlan<D>::kRows * kChunks; i += kThreads) {
    const int row = i / kChunks, column = i % kChunks * 4, columns = row < valid ? batch.dim - column : 0;
    float numbers[4], shift[4] = {};
    load_some<4>(columns > 0 ? from + row * stride + column : from, columns, batch.aligned, numbers);
    if (bias != nullptr) load_pack<4, false>(bias + (columns > 0 ? column : 0), columns, shift);
#pragma unroll
    for (int j = 0; j < 4; ++j) numbers[j] = (numbers[j] + shift[j]) * factor;
    store_pack<4, true>(tile + row * FloatPlan<D>::kPitch + column, 4, numbers);
  }
}

// s = a b^T of two tiles, as a sum of sums of 16 products, whose rounding errors are smaller than one long sum's.
template <int D>
__device__ __forceinline__ void multiply_transposed(const float* a, const float* b, Scores<D>& s) {
  using Plan = FloatPlan<D>;
#pragma unroll
  for (int i = 0; i < Plan::kPerThread; ++i) {
#pragma unroll
    for (int j = 0; j < Plan::kPerThread; ++j) s[i][j] = 0.0f;
  }
  a += thread_y() * Plan::kPitch;
  b += thread_x() * Plan::kPitch;
#pragma unroll 1
  for (int first = 0; first < D; first += 16) {
    Scores<D> part = {};
#pragma unroll
    for (int d = first; d < first + 16; d += 4) {
      float left[Plan::kPerThread][4], right[Plan::kPerThread][4];
#pragma unroll
      for (int i = 0; i < Plan::kPerThread; ++i) {
        load_pack<4, true>(a + i * kSide * Plan::kPitch + d, 4, left[i]);
        load_pack<4, true>(b + i * kSide * Plan::kPitch + d, 4, right[i]);
      }
#pragma unroll
      for (int i = 0; i < Plan::kPerThread; ++i) {
#pragma unroll
        for (int j = 0; j < Plan::kPerThread; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) part[i][j] = fmaf(left[i][e], right[j][e], part[i][j]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < Plan::kPerThread; ++i) {
#pragma unroll
      for (int j = 0; j < Plan::kPerThread; ++j) s[i][j] += part[i][j];
    }
  }
}

// Scores to shared memory, between two barriers.
template <int D>
__device__ __forceinline__ void store_scores(float* scores, const Scores<D>& s) {
  using Plan = FloatPlan<D>;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < Plan::kPerThread; ++i) {
#pragma unroll
    for (int j = 0; j < Plan::kPerThread; ++j) {
      scores[(thread_y() + kSide * i) * Plan::kScorePitch + thread_x() + kSide * j] = s[i][j];
    }
  }
  __syncthreads();
}

// c += scores (rows, rows) tile (rows, D).
template <int D>
__device__ __forceinline__ void accumulate(const float* scores, const float* tile, Rows<D>& c) {
  using Plan = FloatPlan<D>;
#pragma unroll 4
  for (int k = 0; k < Plan::kRows; ++k) {
    float left[Plan::kPerThread];
#pragma unroll
    for (int i = 0; i < Plan::kPerThread; ++i) left[i] = scores[(thread_y() + kSide * i) * Plan::kScorePitch + k];
#pragma unroll
    for (int j = 0; j < Plan::kColumns; ++j) {
      const float right = tile[k * Plan::kPitch + thread_x() + kSide * j];
#pragma unroll
      for (int i = 0; i < Plan::kPerThread; ++i) c[i][j] = fmaf(left[i], right, c[i][j]);
    }
  }
}

// The dropout decisions of a tile of queries and keys, 16 keys per number.
template <int D>
__device__ __forceinline__ void draw_mask(uint32_t* mask, const DropoutState& drop, const OwnedRows& owned, int query,
                                          int key) {
  if (drop.threshold == 0) return;
  constexpr int kGroups = FloatPlan<D>::kRows / 16;
  for (int i = threadIdx.x; i < FloatPlan<D>::kMask; i += kThreads) {
    mask[i] = kept_bits(drop, owned.head, owned.first + query + i / kGroups, key / 16 + i % kGroups);
  }
}

// The dropout multiplier, 0 or the scale.
template <int D>
__device__ __forceinline__ float multiplier(const uint32_t* mask, const DropoutState& drop, int query, int key) {
  if (drop.threshold == 0) return 1.0f;
  return mask[query * (FloatPlan<D>::kRows / 16) + key / 16] >> kept_bit(key % 16) & 1u ? drop.scale : 0.0f;
}

// Stores a thread's accumulator to global memory, and its column sums over the block to `partial` unless it is null.
template <int D>
__device__ __forceinline__ void store_rows(const Rows<D>& c, float* to, int64_t stride, int valid, float* sums,
                                           float* partial, const AttentionBatch& batch) {
  using Plan = FloatPlan<D>;
  __syncthreads();
#pragma unroll
  for (int j = 0; j < Plan::kColumns; ++j) {
    const int column = thread_x() + kSide * j;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < Plan::kPerThread; ++i) {
      const int row = thread_y() + kSide * i;
      if (row >= valid || column >= batch.dim) continue;
      to[row * stride + column] = c[i][j];
      sum += c[i][j];
    }
    if (partial != nullptr) sums[thread_y() * D + column] = sum;
  }
  if (partial == nullptr) return;
  __syncthreads();
  for (int d = threadIdx.x; d < batch.dim; d += kThreads) {
    float sum = 0.0f;
    for (int y = 0; y < kSide; ++y) sum += sums[y * D + d];
    partial[d] = sum;
  }
}

// The tensors at the block's head and first token.
struct Head {
  __device__ __forceinline__ Head(const AttentionBatch& batch, const OwnedRows& owned, const float* qkv)
      : base(qkv + owned.first * batch.stride_t + owned.head * batch.stride_n),
        bias_q(batch.bias == nullptr ? nullptr : batch.bias + owned.head * batch.dim),
        bias_k(batch.bias == nullptr ? nullptr : bias_q + batch.heads * batch.dim),
        bias_v(batch.bias == nullptr ? nullptr : bias_k + batch.heads * batch.dim) {}
  const float *base, *bias_q, *bias_k, *bias_v;
};

template <int D>
__global__ void __launch_bounds__(kThreads, 1)
    attention_forward_float(AttentionBatch batch, AttentionForward<float> tensors, float sign) {
  using Plan = FloatPlan<D>;
  zero_tail(batch, tensors.out, int64_t{batch.heads} * batch.dim, tensors.stats);
  const OwnedRows owned(batch, Plan::kRows);
  if (owned.row >= owned.length) return;
  float *q = dynamic_shared<float>(), *k = q + Plan::kTile, *v = k + Plan::kTile, *scores = v + Plan::kTile;
  uint32_t* mask = reinterpret_cast<uint32_t*>(scores + Plan::kScores);
  const Head head(batch, owned, tensors.qkv);
  const DropoutState drop = load_dropout(batch.dropout);
  const int64_t stride = batch.stride_t;
  load_rows<D>(q, head.base + owned.row * stride, stride, owned.length - owned.row, head.bias_q, sign, batch);
  float m[Plan::kPerThread], total[Plan::kPerThread] = {};
  Rows<D> acc = {};
#pragma unroll
  for (int i = 0; i < Plan::kPerThread; ++i) m[i] = -INFINITY;
  const float scale2 = batch.scale * kLog2E;
  for (int key = 0; key < owned.length; key += Plan::kRows) {
    const float* from = head.base + key * stride + batch.stride_part;
    const int remaining = owned.length - key;
    __syncthreads();
    load_rows<D>(k, from, stride, remaining, head.bias_k, 1.0f, batch);
    load_rows<D>(v, from + batch.stride_part, stride, remaining, head.bias_v, 1.0f, batch);
    draw_mask<D>(mask, drop, owned, owned.row, key);
    __syncthreads();
    Scores<D> s;
    multiply_transposed<D>(q, k, s);
#pragma unroll
    for (int i = 0; i < Plan::kPerThread; ++i) {
      float top = m[i], sum = 0.0f;
#pragma unroll
      for (int j = 0; j < Plan::kPerThread; ++j) {
        if (thread_x() + kSide * j >= remaining) s[i][j] = -INFINITY;
        top = fmaxf(top, s[i][j]);
      }
      top = row_max(top);
      const float decay = exp2f((m[i] - top) * scale2);
      m[i] = top;
#pragma unroll
      for (int j = 0; j < Plan::kPerThread; ++j) {
        const float p = exp2f((s[i][j] - top) * scale2);
        sum += p;
        s[i][j] = p * multiplier<D>(mask, drop, thread_y() + kSide * i, thread_x() + kSide * j);
      }
      total[i] = total[i] * decay + sum;
#pragma unroll
      for (int j = 0; j < Plan::kColumns; ++j) acc[i][j] *= decay;
    }
    store_scores<D>(scores, s);
    accumulate<D>(scores, v, acc);
  }
#pragma unroll
  for (int i = 0; i < Plan::kPerThread; ++i) {
    const float sum = row_sum(total[i]);
    const int row = owned.row + thread_y() + kSide * i;
#pragma unroll
    for (int j = 0; j < Plan::kColumns; ++j) acc[i][j] /= sum;
    if (thread_x() == 0 && row < owned.length) {
      float* stats = tensors.stats + owned.head * batch.total + owned.first + row;
      stats[0] = m[i];
      stats[batch.heads * batch.total] = log2f(sum);
    }
  }
  const int64_t width = int64_t{batch.heads} * batch.dim;
  store_rows<D>(acc, tensors.out + (owned.first + owned.row) * width + owned.head * batch.dim, width,
                owned.length - owned.row, nullptr, nullptr, batch);
}

// `statistics` (3, T) of a head: top; delta; the factor that makes P sum to 1.
template <int D>
__global__ void __launch_bounds__(kThreads, 1)
    attention_dq_float(AttentionBatch batch, AttentionBackward<float> tensors) {
  using Plan = FloatPlan<D>;
  const int width = batch.heads * batch.dim;
  zero_tail(batch, tensors.dqkv, int64_t{3} * width, nullptr);
  const OwnedRows owned(batch, Plan::kRows);
  float* partial = tensors.partial;
  if (partial != nullptr) partial += (owned.sequence * batch.blocks + owned.block) * 3 * width + owned.head * batch.dim;
  if (owned.row >= owned.length) {
    if (partial != nullptr) {
      for (int d = threadIdx.x; d < batch.dim; d += kThreads) partial[d] = 0.0f;
    }
    return;
  }
  float *q = dynamic_shared<float>(), *dout = q + Plan::kTile, *k = dout + Plan::kTile, *v = k + Plan::kTile;
  float* scores = v + Plan::kTile;
  uint32_t* mask = reinterpret_cast<uint32_t*>(scores + Plan::kScores);
  const Head head(batch, owned, tensors.qkv);
  const DropoutState drop = load_dropout(batch.dropout);
  const int64_t stride = batch.stride_t, token = owned.first + owned.row;
  const int valid = owned.length - owned.row;
  load_rows<D>(q, head.base + owned.row * stride, stride, valid, head.bias_q, 1.0f, batch);
  load_rows<D>(dout, tensors.dout + token * width + owned.head * batch.dim, width, valid, nullptr, 1.0f, batch);
  float top[Plan::kPerThread], total[Plan::kPerThread] = {}, delta[Plan::kPerThread] = {};
  const float* stats = tensors.stats + owned.head * batch.total + token;
#pragma unroll
  for (int i = 0; i < Plan::kPerThread; ++i) {
    const int row = thread_y() + kSide * i;
    top[i] = row < valid ? top_score(stats[row], batch.scale) : 0.0f;
  }
  const float scale2 = batch.scale * kLog2E;
  // Unnormalized P, and dP.
  const auto compute_tile = [&](int key, Scores<D>& p, Scores<D>& dp) {
    const float* from = head.base + key * stride + batch.stride_part;
    const int remaining = owned.length - key;
    __syncthreads();
    load_rows<D>(k, from, stride, remaining, head.bias_k, 1.0f, batch);
    load_rows<D>(v, from + batch.stride_part, stride, remaining, head.bias_v, 1.0f, batch);
    draw_mask<D>(mask, drop, owned, owned.row, key);
    __syncthreads();
    multiply_transposed<D>(q, k, p);
    multiply_transposed<D>(dout, v, dp);
#pragma unroll
    for (int i = 0; i < Plan::kPerThread; ++i) {
#pragma unroll
      for (int j = 0; j < Plan::kPerThread; ++j) {
        const int column = thread_x() + kSide * j;
        p[i][j] = column < remaining ? exponential(p[i][j], scale2, top[i]) : 0.0f;
        dp[i][j] *= multiplier<D>(mask, drop, thread_y() + kSide * i, column);
      }
    }
  };
  Scores<D> p, dp;
  for (int key = 0; key < owned.length; key += Plan::kRows) {
    compute_tile(key, p, dp);
#pragma unroll
    for (int i = 0; i < Plan::kPerThread; ++i) {
#pragma unroll
      for (int j = 0; j < Plan::kPerThread; ++j) {
        total[i] += p[i][j];
        delta[i] = fmaf(p[i][j], dp[i][j], delta[i]);
      }
    }
  }
  float inverse_sum[Plan::kPerThread];
#pragma unroll
  for (int i = 0; i < Plan::kPerThread; ++i) {
    const int row = thread_y() + kSide * i;
    const float sum = row_sum(total[i]);
    inverse_sum[i] = row < valid ? 1.0f / sum : 0.0f;
    delta[i] = row_sum(delta[i]) * inverse_sum[i];
    if (thread_x() == 0 && row < valid) {
      float* to = tensors.statistics + owned.head * 3 * batch.total + token + row;
      to[0] = top[i];
      to[batch.total] = delta[i];
      to[2 * batch.total] = inverse_sum[i];
    }
  }
  Rows<D> acc = {};
  for (int key = 0; key < owned.length; key += Plan::kRows) {
    compute_tile(key, p, dp);
#pragma unroll
    for (int i = 0; i < Plan::kPerThread; ++i) {
#pragma unroll
      for (int j = 0; j < Plan::kPerThread; ++j) p[i][j] *= inverse_sum[i] * (dp[i][j] - delta[i]);
    }
    store_scores<D>(scores, p);
    accumulate<D>(scores, k, acc);
  }
#pragma unroll
  for (int i = 0; i < Plan::kPerThread; ++i) {
#pragma unroll
    for (int j = 0; j < Plan::kColumns; ++j) acc[i][j] *= batch.scale;
  }
  float* to = tensors.dqkv + (token * 3 * batch.heads + owned.head) * batch.dim;
  store_rows<D>(acc, to, int64_t{3} * width, valid, q, partial, batch);
}

template <int D>
__global__ void __launch_bounds__(kThreads, 1)
    attention_dkv_float(AttentionBatch batch, AttentionBackward<float> tensors) {
  using Plan = FloatPlan<D>;
  const int width = batch.heads * batch.dim;
  const OwnedRows owned(batch, Plan::kRows);
  float* partial = tensors.partial;
  if (partial != nullptr)
    partial += ((owned.sequence * batch.blocks + owned.block) * 3 + 1) * width + owned.head * batch.dim;
  if (owned.row >= owned.length) {
    if (partial != nullptr) {
      for (int d = threadIdx.x; d < batch.dim; d += kThreads) partial[d] = partial[width + d] = 0.0f;
    }
    return;
  }
  float *k = dynamic_shared<float>(), *v = k + Plan::kTile, *q = v + Plan::kTile, *dout = q + Plan::kTile;
  float *scores = dout + Plan::kTile,
        *vectors = scores + Plan::kScores;  // `vectors`: the statistics of a tile of queries
  uint32_t* mask = reinterpret_cast<uint32_t*>(vectors + 3 * Plan::kRows);
  const Head head(batch, owned, tensors.qkv);
  const DropoutState drop = load_dropout(batch.dropout);
  const int64_t stride = batch.stride_t;
  const int valid = owned.length - owned.row;
  const float* owned_key = head.base + owned.row * stride + batch.stride_part;
  load_rows<D>(k, owned_key, stride, valid, head.bias_k, 1.0f, batch);
  load_rows<D>(v, owned_key + batch.stride_part, stride, valid, head.bias_v, 1.0f, batch);
  Rows<D> dk = {}, dv = {};
  const float scale2 = batch.scale * kLog2E;
  for (int query = 0; query < owned.length; query += Plan::kRows) {
    const int remaining = owned.length - query;
    const int64_t token = owned.first + query;
    __syncthreads();
    load_rows<D>(q, head.base + query * stride, stride, remaining, head.bias_q, 1.0f, batch);
    load_rows<D>(dout, tensors.dout + token * width + owned.head * batch.dim, width, remaining, nullptr, 1.0f, batch);
    draw_mask<D>(mask, drop, owned, query, owned.row);
    for (int i = threadIdx.x; i < 3 * Plan::kRows; i += kThreads) {
      const int which = i / Plan::kRows, row = i % Plan::kRows;
      const float* from = tensors.statistics + (int64_t{owned.head} * 3 + which) * batch.total + token + row;
      vectors[i] = row < remaining ? *from : 0.0f;  // past the end: P is multiplied by 0
    }
    __syncthreads();
    Scores<D> p, dp;
    multiply_transposed<D>(k, q, p);
    multiply_transposed<D>(v, dout, dp);
#pragma unroll
    for (int j = 0; j < Plan::kPerThread; ++j) {
      const int column = thread_x() + kSide * j;
      const float top = vectors[column], delta = vectors[Plan::kRows + column];
      const float inverse_sum = vectors[2 * Plan::kRows + column];
#pragma unroll
      for (int i = 0; i < Plan::kPerThread; ++i) {
        const float kept = multiplier<D>(mask, drop, column, thread_y() + kSide * i);
        const float probability = exponential(p[i][j], scale2, top) * inverse_sum;
        p[i][j] = probability * kept;
        dp[i][j] = probability * (dp[i][j] * kept - delta);
      }
    }
    store_scores<D>(scores, p);
    accumulate<D>(scores, dout, dv);
    store_scores<D>(scores, dp);
    accumulate<D>(scores, q, dk);
  }
#pragma unroll
  for (int i = 0; i < Plan::kPerThread; ++i) {
#pragma unroll
    for (int j = 0; j < Plan::kColumns; ++j) dk[i][j] *= batch.scale;
  }
  float* to = tensors.dqkv + ((owned.first + owned.row) * 3 * batch.heads + owned.head) * batch.dim + width;
  const int64_t row_stride = int64_t{3} * width;
  store_rows<D>(dk, to, row_stride, valid, q, partial, batch);
  store_rows<D>(dv, to + width, row_stride, valid, q, partial == nullptr ? nullptr : partial + width, batch);
}

}  // namespace

template <>
void attention_forward_cuda(const AttentionBatch& batch, const AttentionForward<float>& tensors, const Tensor& on) {
  float sign;
  const AttentionBatch positive = with_positive_scale(batch, &sign);
  dispatch_dim(batch.dim, [&](auto dim) {
    constexpr int kDim = decltype(dim)::value;
    launch(attention_forward_float<kDim>, grid_of(batch), kThreads, FloatPlan<kDim>::kForwardBytes, on, positive,
           tensors, sign);
  });
}

template <>
void attention_dq_cuda(const AttentionBatch& batch, const AttentionBackward<float>& tensors, const Tensor& on) {
  dispatch_dim(batch.dim, [&](auto dim) {
    constexpr int kDim = decltype(dim)::value;
    launch(attention_dq_float<kDim>, grid_of(batch), kThreads, FloatPlan<kDim>::kBackwardBytes, on, batch, tensors);
  });
}

template <>
void attention_dkv_cuda(const AttentionBatch& batch, const AttentionBackward<float>& tensors, const Tensor& on) {
  dispatch_dim(batch.dim, [&](auto dim) {
    constexpr int kDim = decltype(dim)::value;
    launch(attention_dkv_float<kDim>, grid_of(batch), kThreads, FloatPlan<kDim>::kBackwardBytes, on, batch, tensors);
  });
}

}  // namespace bert_fast
