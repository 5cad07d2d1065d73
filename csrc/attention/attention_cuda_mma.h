// Tiles in shared memory and their products, for the kernels of 16 bits: a warp owns 16 rows, a block 64.
//
// A tile is (rows, D) numbers, D padded with zeros; its 16-byte chunks are swizzled within a row so that the eight rows
// that an ldmatrix takes lie in different banks.
#pragma once

#include <cmath>

#include "attention/attention_cuda.h"
#include "common/cuda_mma.h"

namespace bert_fast {

constexpr int kRows = attention_block_rows(ScalarType::Half, kMaxDim);  // that a block owns
constexpr int kWarpRows = 16;                                           // of them a warp's
constexpr int kBlockWarps = kRows / kWarpRows;                          // that share them
constexpr unsigned kAllLanes = 0xffffffffu;

// What follows from D: rows of the other side that are taken at a time, tiles of them that are in flight, and whether
// the owned operands stay in registers. Few models have heads of more than 128 numbers: one kernel for those, which
// without dropout draws a mask that keeps all, is worth the time of compiling two. 99 KB of shared memory, which sm_86,
// sm_89 and sm_120 have, suffice for all.
template <int D>
struct TilePlan {
  static constexpr int kStep = D <= 64 ? 64 : 32;
  static constexpr int kStages = D <= 128 ? 2 : 1;
  static constexpr bool kKeep = D <= 64;
  static constexpr bool kAlwaysDrops = D > 128;
};

__device__ __forceinline__ float exp2_fast(float x) {
#ifdef BERT_FAST_EMULATOR
  return std::exp2(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// Sum and largest over the four lanes that share a row of an accumulator.
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

// Where chunk `chunk` (8 numbers) of a row of a tile begins.
template <int D>
__device__ __forceinline__ int place(int row, int chunk) {
  const int swizzle = D >= 64 ? row % 8 : row / 2 % 4;
  return row * D + (chunk ^ swizzle) * 8;
}

// `rows` rows, `stride` apart, to a tile; zeros behind the first `valid` of them and behind dim. The caller commits.
template <int D, class T>
__device__ __forceinline__ void load_tile(T* tile, const T* from, int64_t stride, int rows, int valid,
                                          const AttentionBatch& batch) {
  constexpr int kChunks = D / 8;
  for (int i = threadIdx.x; i < rows * kChunks; i += blockDim.x) {
    const int row = i / kChunks, chunk = i % kChunks;
    const int columns = row < valid ? batch.dim - 8 * chunk : 0;
    const T* source = columns > 0 ? from + row * stride + 8 * chunk : from;
    if (batch.aligned) {
      copy_async_16(tile + place<D>(row, chunk), source, columns > 0);
    } else {
      float numbers[8];
      load_pack<8, false>(source, columns, numbers);
      store_pack<8, true>(tile + place<D>(row, chunk), 8, numbers);
    }
  }
}

// Rows [row, row + 16) of a tile as the left operand of products along D.
template <class T, int D, bool KEEP>
struct LeftRows {
  static constexpr int kUnroll = KEEP ? D / 16 : 2;

  __device__ __forceinline__ LeftRows(const T* tile, int row) : tile(tile), row(row) {
    if constexpr (KEEP) {
#pragma unroll
      for (int step = 0; step < D / 16; ++step) load(step, kept[step]);
    }
  }

  __device__ __forceinline__ void load(int step, uint32_t (&a)[4]) const {
    const int lane = threadIdx.x % kWarp;
    load_matrix_x4<false>(tile + place<D>(row + lane % 16, 2 * step + lane / 16), a);
  }

  __device__ __forceinline__ void get(int step, uint32_t (&a)[4]) const {
    if constexpr (KEEP) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = kept[step][i];
    } else {
      load(step, a);
    }
  }

  const T* tile;
  int row;
  uint32_t kept[KEEP ? D / 16 : 1][4];
};

// c (16, STEP) = left right^T, `right` a tile of STEP rows.
template <class T, int D, int STEP, class Left>
__device__ __forceinline__ void multiply_transposed(const Left& left, const T* right, float (&c)[STEP / 8][4]) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int j = 0; j < STEP / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) c[j][i] = 0.0f;
  }
#pragma unroll(Left::kUnroll)
  for (int step = 0; step < D / 16; ++step) {
    uint32_t a[4];
    left.get(step, a);
#pragma unroll
    for (int j = 0; j < STEP / 16; ++j) {
      uint32_t b[4];
      load_matrix_x4<false>(right + place<D>(16 * j + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2), b);
      mma_16x8x16<T>(c[2 * j], a, b[0], b[1]);
      mma_16x8x16<T>(c[2 * j + 1], a, b[2], b[3]);
    }
  }
}

// c (16, COLS) += p right[:, first_chunk...], `right` a tile of STEP rows, p (16, STEP) rounded to T.
template <class T, int D, int STEP, int COLS>
__device__ __forceinline__ void accumulate(const float (&p)[STEP / 8][4], const T* right, int first_chunk,
                                           float (&c)[COLS / 8][4]) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int step = 0; step < STEP / 16; ++step) {
    const uint32_t a[4] = {pack_pair<T>(p[2 * step][0], p[2 * step][1]), pack_pair<T>(p[2 * step][2], p[2 * step][3]),
                           pack_pair<T>(p[2 * step + 1][0], p[2 * step + 1][1]),
                           pack_pair<T>(p[2 * step + 1][2], p[2 * step + 1][3])};
#pragma unroll
    for (int j = 0; j < COLS / 16; ++j) {
      uint32_t b[4];
      load_matrix_x4<true>(right + place<D>(16 * step + lane % 16, first_chunk + 2 * j + lane / 16), b);
      mma_16x8x16<T>(c[2 * j], a, b[0], b[1]);
      mma_16x8x16<T>(c[2 * j + 1], a, b[2], b[3]);
    }
  }
}

// Which of a warp's scores, 16 queries by STEP keys from a multiple of 16 on, dropout keeps. A call of the generator
// decides 16 keys of a query, so the four lanes of a row share the calls for it, and hand the bits around.
template <int STEP>
struct KeptKeys {
  __device__ __forceinline__ KeptKeys(const DropoutState& drop, int head, int64_t first_query, int first_key) {
    constexpr int kGroups = STEP / 16;
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    uint32_t mine = 0;
#pragma unroll
    for (int call = 0; call < kGroups / 2; ++call) {
      const int index = t + 4 * call;
      const int64_t query = first_query + g + index / kGroups * 8;
      mine |= kept_bits(drop, head, query, first_key / 16 + index % kGroups) << (8 * call);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = __shfl_sync(kAllLanes, mine, 4 * g + i) >> kept_place(2 * t);
  }

  // Element i of accumulator j.
  __device__ __forceinline__ bool keeps(int j, int i) const {
    const int index = i / 2 * (STEP / 16) + j / 2;
    return words[index % 4] >> (index / 4 * 8 + j % 2 * 4 + i % 2) & 1u;
  }

  uint32_t words[4];
};

// The same for scores that lie the other way: 16 keys, a whole group, by STEP queries.
template <int STEP>
struct KeptQueries {
  __device__ __forceinline__ KeptQueries(const DropoutState& drop, int head, int64_t first_query, int first_key) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    uint32_t mine = 0;
#pragma unroll
    for (int call = 0; call < STEP / 32; ++call) {
      mine |= kept_bits(drop, head, first_query + lane + 32 * call, first_key / 16) << (8 * call);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) words[j][i] = __shfl_sync(kAllLanes, mine, 8 * j + 2 * t + i) >> kept_place(g);
    }
  }

  __device__ __forceinline__ bool keeps(int j, int i) const {
    return words[j % 4][i % 2] >> (j / 4 * 8 + i / 2 * 4) & 1u;
  }

  uint32_t words[4][2];
};

// Rows [row, row + 16) of the warp's accumulator, rounded, to `to` in global memory; `tile` is where they are put in
// order, in rows that nobody else uses any more.
template <class T, int D, int COLS>
__device__ __forceinline__ void store_rows(T* tile, int row, int first_chunk, const float (&c)[COLS / 8][4], T* to,
                                           int64_t stride, int valid, const AttentionBatch& batch) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  __syncwarp();
#pragma unroll
  for (int j = 0; j < COLS / 8; ++j) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t pair = pack_pair<T>(c[j][2 * half], c[j][2 * half + 1]);
      *reinterpret_cast<uint32_t*>(tile + place<D>(row + g + 8 * half, first_chunk + j) + 2 * t) = pair;
    }
  }
  __syncwarp();
  constexpr int kChunks = COLS / 8;
  for (int i = lane; i < kWarpRows * kChunks; i += kWarp) {
    const int r = row + i / kChunks, chunk = first_chunk + i % kChunks;
    const int columns = r < valid ? batch.dim - 8 * chunk : 0;
    if (columns <= 0) continue;
    const auto pack = *reinterpret_cast<const Pack<T, 8>*>(tile + place<D>(r, chunk));
    T* at = to + r * stride + 8 * chunk;
    if (batch.aligned) {
      *reinterpret_cast<Pack<T, 8>*>(at) = pack;
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (j < columns) at[j] = pack.element[j];
      }
    }
  }
}

// Sums over the block's 64 rows of the warps' accumulators (16, COLS), the warps' in order: to `to` (dim,). `sums` is
// room for 4 D numbers. All threads of the block take part.
template <int D, int COLS>
__device__ __forceinline__ void store_column_sums(float* sums, int warp_row, int first_column,
                                                  const float (&c)[COLS / 8][4], float* to, int dim) {
  const int lane = threadIdx.x % kWarp;
  __syncthreads();
#pragma unroll
  for (int j = 0; j < COLS / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float sum = c[j][i] + c[j][i + 2];
#pragma unroll
      for (int mask = 4; mask < kWarp; mask *= 2) sum += __shfl_xor_sync(kAllLanes, sum, mask);
      if (lane < 4) sums[warp_row * D + first_column + 8 * j + 2 * lane + i] = sum;
    }
  }
  __syncthreads();
  for (int d = threadIdx.x; d < dim; d += blockDim.x) {
    float sum = sums[d];
    for (int w = 1; w < kBlockWarps; ++w) sum += sums[w * D + d];
    to[d] = sum;
  }
}

}  // namespace bert_fast
