// Tiles in shared memory and their products, for the kernels of 16 bits: a warp owns 16 rows, a block 64.
//
// A tile is (rows, D) numbers, D padded with zeros; its 16-byte chunks are swizzled within a row so that the eight rows
// that an ldmatrix takes lie in different banks.
#pragma once

#include "attention/cuda/rows.h"

namespace bert_fast {

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

// Where chunk `chunk` (8 numbers) of a row of a tile begins.
template <int D>
struct SwizzledRows {
  static __device__ __forceinline__ int place(int row, int chunk) {
    const int swizzle = D >= 64 ? row % 8 : row / 2 % 4;
    return row * D + (chunk ^ swizzle) * 8;
  }
};

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
      copy_async_16(tile + SwizzledRows<D>::place(row, chunk), source, columns > 0);
    } else {
      float numbers[8];
      load_pack<8, false>(source, columns, numbers);
      store_pack<8, true>(tile + SwizzledRows<D>::place(row, chunk), 8, numbers);
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
    load_matrix_x4<false>(tile + SwizzledRows<D>::place(row + lane % 16, 2 * step + lane / 16), a);
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
      load_matrix_x4<false>(right + SwizzledRows<D>::place(16 * j + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2),
                            b);
      mma_16x8x16<T>(c[2 * j], a, b[0], b[1]);
      mma_16x8x16<T>(c[2 * j + 1], a, b[2], b[3]);
    }
  }
}

// c (16, COLS) += p right[:, first_chunk...], `right` a tile of STEP rows, p (16, STEP) rounded to T where kept, else
// 0.
template <class T, int D, int STEP, int COLS, class Mask>
__device__ __forceinline__ void accumulate(const float (&p)[STEP / 8][4], const Mask& mask, const T* right,
                                           int first_chunk, float (&c)[COLS / 8][4]) {
  const int lane = threadIdx.x % kWarp;
  uint32_t a[STEP / 16][4];
  round_kept<T, STEP>(p, mask, a);
#pragma unroll
  for (int step = 0; step < STEP / 16; ++step) {
#pragma unroll
    for (int j = 0; j < COLS / 16; ++j) {
      uint32_t b[4];
      load_matrix_x4<true>(right + SwizzledRows<D>::place(16 * step + lane % 16, first_chunk + 2 * j + lane / 16), b);
      mma_16x8x16<T>(c[2 * j], a[step], b[0], b[1]);
      mma_16x8x16<T>(c[2 * j + 1], a[step], b[2], b[3]);
    }
  }
}

}  // namespace bert_fast
