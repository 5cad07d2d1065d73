// What all CUDA kernels of attention share: their arguments, and the rows that a block owns.
#pragma once

#include <limits>

#include "common/cuda.h"
#include "common/cuda_philox.h"

namespace bert_fast {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr int kMaxDim = 256;

// The packed batch; T tokens, B sequences, N heads, D numbers per head.
struct AttentionBatch {
  const int32_t* cu_seqlens;
  const float* bias;                        // (3, N, D), or null
  int64_t total, sequences;                 // T, B
  int64_t stride_t, stride_part, stride_n;  // of qkv; D is dense
  int heads, dim, max_seqlen;
  int blocks;    // of owned rows in the longest sequence
  bool aligned;  // every row of every tensor is a multiple of, and aligned to, 16 bytes
  float scale;
  DropoutArguments dropout;
};

template <class T>
struct AttentionForward {
  const T* qkv;
  T* out;        // (T, N, D)
  float* stats;  // (2, N, T): the highest score and the base-2 logarithm of the sum, kernels/attention/op.py
};

// What the dk and dv kernel reads of a query in 16 bits, in this order: see prepare_rows.
constexpr int kStatistics = 4;

// The dq kernel writes `statistics` for the dk and dv kernel, and, in 16 bits, `biased_q` (T, N, D) = q + bias.
template <class T>
struct AttentionBackward {
  const T *dout, *qkv, *out;
  const float* stats;
  T* dqkv;            // (T, 3, N, D)
  T* biased_q;        // null without a bias
  float* statistics;  // (N, 4, T), in float32 (N, 3, T); on Hopper (B, N, blocks, 4, 64)
  float* partial;     // (B blocks, 3, N, D): sums of dqkv over the rows of a block; null without a bias
};

// The block's rows: [row, row + rows of a block) of one sequence and head. Tokens first to first + length - 1 are
// within the packed batch whatever cu_seqlens holds.
struct OwnedRows {
  __device__ __forceinline__ OwnedRows(const AttentionBatch& batch, int rows)
      : OwnedRows(batch, rows, static_cast<int>(blockIdx.x), batch.blocks) {}

  // Work tile `index` of the batch; each head of each sequence has `blocks` of them.
  __device__ __forceinline__ OwnedRows(const AttentionBatch& batch, int rows, int index, int blocks) {
    block = index % blocks;
    head = index / blocks % batch.heads;
    sequence = index / blocks / batch.heads;
    const int64_t start = batch.cu_seqlens[sequence], end = batch.cu_seqlens[sequence + 1];
    first = start < 0 ? 0 : start > batch.total ? batch.total : start;
    int64_t tokens = (end < batch.total ? end : batch.total) - first;
    if (tokens > batch.max_seqlen) tokens = batch.max_seqlen;
    length = tokens > 0 ? static_cast<int>(tokens) : 0;
    row = block * rows;
  }

  int64_t sequence, first;
  int head, block, row, length;
};

// P, from a score as the forward pass computed it: the exponent is exactly -log2_sum at the highest of a row, `top`.
// For that the difference comes first: score * scale2 and top * scale2 alone have rounding errors that pass any bound
// of exp2 where scores are large. The limit of 0 holds where tensor cores add in another order and a score exceeds
// `top`.
__device__ __forceinline__ float probability(float score, float scale2, float top, float log2_sum) {
  return exp2_fast(min_or_nan((score - top) * scale2 - log2_sum, 0.0f));
}

// The score whose product with `scale` is the highest of a query, from its product with the scale's sign.
__device__ __forceinline__ float top_score(float highest, float scale) {
  return scale < 0.0f ? -highest : highest;
}

constexpr float kAboveScores = 3e38f;  // with it as `top` and a log2_sum of infinity P is 0

// Zeroes the rows of `x` (T, row) and `stats` (2, N, T; may be null) after the last sequence, divided among all
// threads: a packed batch of static shape ends in rows that belong to no sequence.
template <class T>
__device__ __forceinline__ void zero_tail(const AttentionBatch& batch, T* x, int64_t row, float* stats) {
  int64_t tail = batch.cu_seqlens[batch.sequences];
  tail = tail < 0 ? 0 : tail;
  if (tail >= batch.total) return;
  const int64_t thread = int64_t{blockIdx.x} * blockDim.x + threadIdx.x, threads = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = tail * row + thread; i < batch.total * row; i += threads) x[i] = static_cast<T>(0.0f);
  if (stats == nullptr) return;
  for (int n = 0; n < 2 * batch.heads; ++n) {
    for (int64_t t = tail + thread; t < batch.total; t += threads) stats[n * batch.total + t] = 0.0f;
  }
}

// load_pack with an alignment that is known only at run time; the first `valid` elements exist.
template <int N, class T>
__device__ __forceinline__ void load_some(const T* from, int valid, bool aligned, float (&to)[N]) {
  if (aligned && valid >= N) {
    load_pack<N, true>(from, N, to);
  } else {
    load_pack<N, false>(from, valid, to);
  }
}

template <int N, class T>
__device__ __forceinline__ void store_some(T* to, int valid, bool aligned, const float (&from)[N]) {
  if (aligned && valid >= N) {
    store_pack<N, true>(to, N, from);
  } else {
    store_pack<N, false>(to, valid, from);
  }
}

// 16 dropout decisions as bits of one number: bit kept_bit(c) is set if column c is kept; bits 8 to 15 and 24 to 31
// are 0.
__device__ __forceinline__ uint32_t kept_bits(const DropoutState& drop, int head, uint32_t query, int group) {
  uint32_t words[4], bits = 0;
  dropout_words(drop, static_cast<uint32_t>(head), query, static_cast<uint32_t>(group), words);
  const uint32_t addend = (256 - drop.threshold) * 0x00010001u;  // carries out of bytes not below the threshold
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t even = (words[i] & 0x00ff00ffu) + addend, odd = (words[i] >> 8 & 0x00ff00ffu) + addend;
    bits |= ((even >> 8 & 0x00010001u) | (odd >> 7 & 0x00020002u)) << (2 * i);
  }
  return bits;
}

__device__ __forceinline__ int kept_bit(int column) {
  return column / 4 * 2 + column % 2 + column % 4 / 2 * 16;
}

// One block for each 64 (or fewer) rows of the longest sequence, each head and each sequence.
inline dim3 grid_of(const AttentionBatch& batch) {
  return dim3(static_cast<unsigned>(batch.sequences * batch.heads * batch.blocks));
}

// The running maximum requires a positive scale: its sign, or a 0, is multiplied into the queries.
inline AttentionBatch with_positive_scale(const AttentionBatch& batch, float* sign) {
  AttentionBatch positive = batch;
  *sign = batch.scale > 0.0f ? 1.0f : batch.scale < 0.0f ? -1.0f : 0.0f;
  positive.scale = batch.scale == 0.0f ? 1.0f : batch.scale * *sign;
  return positive;
}

// The launchers, for T = float, BFloat16 and Half; `on` is a tensor on the device.
template <class T>
void attention_forward_cuda(const AttentionBatch& batch, const AttentionForward<T>& tensors, const Tensor& on);
template <class T>
void attention_dq_cuda(const AttentionBatch& batch, const AttentionBackward<T>& tensors, const Tensor& on);
template <class T>
void attention_dkv_cuda(const AttentionBatch& batch, const AttentionBackward<T>& tensors, const Tensor& on);

// The same for Hopper (attention/cuda/hopper.h), for T = BFloat16 and Half, where takes_hopper_path is true.
template <class T>
void attention_forward_hopper(const AttentionBatch& batch, const AttentionForward<T>& tensors, const Tensor& on);
template <class T>
void attention_dq_hopper(const AttentionBatch& batch, const AttentionBackward<T>& tensors, const Tensor& on);
template <class T>
void attention_dkv_hopper(const AttentionBatch& batch, const AttentionBackward<T>& tensors, const Tensor& on);

// 0, or the driver's error for the tensor maps of qkv and of rows (T, N, D), where takes_hopper_path is true.
template <class T>
int tensor_map_error(const AttentionBatch& batch, const T* qkv);

// Whether the TMA and wgmma kernels apply: a build for sm_90a on a device of capability 9.0, a 16-bit dtype, D of 64 or
// 128, and the alignment and strides that TMA requires.
inline bool takes_hopper_path(const AttentionBatch& batch, ScalarType dtype, const Tensor& on) {
#ifdef BERT_FAST_HOPPER
  bool fits = dtype != ScalarType::Float && (batch.dim == 64 || batch.dim == 128) && batch.aligned &&
              batch.total <= std::numeric_limits<int>::max();
  for (const int64_t stride : {batch.stride_t, batch.stride_part, batch.stride_n}) {
    fits = fits && stride > 0 && stride < int64_t{1} << 39;
  }
  return fits && capability_of(on) == 90;
#else
  return false;
#endif
}

// Rows that a block owns: 64, fewer where float32 tiles would exceed shared memory.
constexpr int attention_block_rows(ScalarType dtype, int64_t dim) {
  return dtype != ScalarType::Float || dim <= 64 ? 64 : dim <= 128 ? 32 : 16;
}

// Run `body` with D rounded up to one of the instantiated sizes, as std::integral_constant.
template <class Body>
inline void dispatch_dim(int64_t dim, const Body& body) {
  if (dim <= 32) {
    body(std::integral_constant<int, 32>{});
  } else if (dim <= 64) {
    body(std::integral_constant<int, 64>{});
  } else if (dim <= 128) {
    body(std::integral_constant<int, 128>{});
  } else {
    body(std::integral_constant<int, 256>{});
  }
}

}  // namespace bert_fast
