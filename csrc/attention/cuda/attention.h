// What the CUDA kernels of attention share, whatever the dtype: their arguments, and which rows a block owns.
#pragma once

#include <limits>

#include "attention/attention.h"
#include "common/cuda.h"
#include "common/cuda_philox.h"

namespace bert_fast {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr int kMaxDim = 256;

// The packed batch; T tokens, B sequences, N heads, D numbers a head.
struct AttentionBatch {
  const int32_t* cu_seqlens;
  const float* bias;                        // (3, N, D), or null
  int64_t total, sequences;                 // T, B
  int64_t stride_t, stride_part, stride_n;  // of qkv; D is dense
  int heads, dim, max_seqlen;
  int blocks;    // of owned rows that the longest sequence has
  bool aligned;  // rows of every tensor can be moved 16 bytes at a time
  float scale;
  DropoutArguments dropout;
};

template <class T>
struct AttentionForward {
  const T* qkv;
  T* out;      // (T, N, D)
  float* lse;  // (N, T)
};

// `statistics` goes from the kernel of dq to that of dk and dv, in 16 bits also `biased_q` (T, N, D) = q + bias.
template <class T>
struct AttentionBackward {
  const T *dout, *qkv, *out;
  const float* lse;
  T* dqkv;            // (T, 3, N, D)
  T* biased_q;        // null without a bias
  float* statistics;  // (N, 3, T); on Hopper (B, N, blocks, 3, 64)
  float* partial;     // (B blocks, 3, N, D): sums of dqkv over the rows of a block; null without a bias
};

// The block's rows: [row, row + rows of a block) of one sequence and head. Whatever cu_seqlens holds, tokens first to
// first + length - 1 are within the pack.
struct OwnedRows {
  __device__ __forceinline__ OwnedRows(const AttentionBatch& batch, int rows)
      : OwnedRows(batch, rows, static_cast<int>(blockIdx.x), batch.blocks) {}

  // Piece `index` of the batch, where `blocks` pieces are those of a head of a sequence.
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

// Zero the rows of `x` (T, row) and `lse` (N, T; may be null) behind the last sequence, every thread a share: a pack of
// static shape ends in rows that belong to no sequence.
template <class T>
__device__ __forceinline__ void zero_tail(const AttentionBatch& batch, T* x, int64_t row, float* lse) {
  int64_t tail = batch.cu_seqlens[batch.sequences];
  tail = tail < 0 ? 0 : tail;
  if (tail >= batch.total) return;
  const int64_t thread = int64_t{blockIdx.x} * blockDim.x + threadIdx.x, threads = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = tail * row + thread; i < batch.total * row; i += threads) x[i] = static_cast<T>(0.0f);
  if (lse == nullptr) return;
  for (int n = 0; n < batch.heads; ++n) {
    for (int64_t t = tail + thread; t < batch.total; t += threads) lse[n * batch.total + t] = 0.0f;
  }
}

// As load_pack, where it is known at run time alone whether a row's packs are aligned; `valid` numbers are there.
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

// 16 decisions of dropout as bits of one number: that of column c is bit kept_place(c); bits 8 to 15 and 24 to 31 are
// 0.
__device__ __forceinline__ uint32_t kept_bits(const DropoutState& drop, int head, uint32_t query, int group) {
  uint32_t words[4], bits = 0;
  dropout_words(drop, static_cast<uint32_t>(head), query, static_cast<uint32_t>(group), words);
  const uint32_t addend = (256 - drop.threshold) * 0x00010001u;  // carries out of a byte that is large enough
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t even = (words[i] & 0x00ff00ffu) + addend, odd = (words[i] >> 8 & 0x00ff00ffu) + addend;
    bits |= ((even >> 8 & 0x00010001u) | (odd >> 7 & 0x00020002u)) << (2 * i);
  }
  return bits;
}

__device__ __forceinline__ int kept_place(int column) {
  return column / 4 * 2 + column % 2 + column % 4 / 2 * 16;
}

// One block for each 64 (or fewer) rows that the longest sequence may have, each head, each sequence.
inline dim3 grid_of(const AttentionBatch& batch) {
  return dim3(static_cast<unsigned>(batch.sequences * batch.heads * batch.blocks));
}

// The running maximum wants a scale above 0: its sign, or a 0, goes into the queries.
inline AttentionBatch with_positive_scale(const AttentionBatch& batch, float* sign) {
  AttentionBatch positive = batch;
  *sign = batch.scale > 0.0f ? 1.0f : batch.scale < 0.0f ? -1.0f : 0.0f;
  positive.scale = batch.scale == 0.0f ? 1.0f : batch.scale * *sign;
  return positive;
}

// The launchers, of T = float, BFloat16 and Half; `on` is a tensor on the device.
template <class T>
void attention_forward_cuda(const AttentionBatch& batch, const AttentionForward<T>& tensors, const Tensor& on);
template <class T>
void attention_dq_cuda(const AttentionBatch& batch, const AttentionBackward<T>& tensors, const Tensor& on);
template <class T>
void attention_dkv_cuda(const AttentionBatch& batch, const AttentionBackward<T>& tensors, const Tensor& on);

// The same on Hopper (csrc/attention/cuda/hopper.h), of T = BFloat16 and Half, for what
// `takes_hopper_path` takes.
template <class T>
void attention_forward_hopper(const AttentionBatch& batch, const AttentionForward<T>& tensors, const Tensor& on);
template <class T>
void attention_dq_hopper(const AttentionBatch& batch, const AttentionBackward<T>& tensors, const Tensor& on);
template <class T>
void attention_dkv_hopper(const AttentionBatch& batch, const AttentionBackward<T>& tensors, const Tensor& on);

// Whether wgmma and the copy engine compute this: on a device of capability 9.0 and in a build for sm_90a, 16 bits, D
// of 64 or 128, addresses and strides as the copy engine wants them.
inline bool takes_hopper_path(const AttentionBatch& batch, ScalarType dtype, const Tensor& on) {
#if defined(BERT_FAST_HOPPER) || defined(BERT_FAST_EMULATOR)
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

// Rows that a block owns: of 64, fewer where float32 needs the op.
constexpr int attention_block_rows(ScalarType dtype, int64_t dim) {
  return dtype != ScalarType::Float || dim <= 64 ? 64 : dim <= 128 ? 32 : 16;
}

// Run `body` with D padded to what the kernels are compiled for, as std::integral_constant.
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
