// Tiles in shared memory and their products on tensor cores (sm_80 and later): a warp owns 16 rows, a block 64.
//
// A tile is (rows, D) numbers, D padded with zeros; its 16-byte chunks are swizzled within a row so that the eight rows
// of an ldmatrix are in different banks.
#pragma once

#include "attention/cuda/rows.h"

namespace bert_fast {

// What follows from D: the rows of the other operand per step, the pipeline stages, and whether the owned operands stay
// in registers. Few models have D above 128: those have one kernel instead of two to compile, which without dropout
// draws a mask that keeps everything. All fit the 99 KB of shared memory of sm_86, sm_89 and sm_120.
template <int D>
struct TilePlan {
  static constexpr int kStep = D <= 64 ? 64 : 32;
  static constexpr int kStages = D <= 128 ? 2 : 1;
  static constexpr bool kLeftInRegisters = D <= 64;
  static constexpr bool kAlwaysDrops = D > 128;
};

// The blocks of a multiprocessor for which the compiler must leave registers; 0 leaves the choice to it. On sm_100 it
// chooses one more than fit without spills in these kernels, forward and for dk and dv. On sm_90a that for dk and dv of
// D 32 with dropout takes 179 registers, two blocks: limited to three (168 registers) it spills 84 bytes.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int blocks_of_queries(int dim, bool dropout) {
  return dim == 32 && !dropout ? 4 : dim == 64 && dropout ? 3 : dim == 128 && dropout ? 2 : 0;
}
constexpr int blocks_of_keys(int dim, bool dropout) {
  return dim == 32 && !dropout ? 2 : 0;
}
#else
constexpr int blocks_of_queries(int, bool) {
  return 0;
}
constexpr int blocks_of_keys(int, bool) {
  return 0;
}
#endif

// The position of chunk `chunk` (8 numbers) of a row in a tile.
template <int D>
struct SwizzledRows {
  static __device__ __forceinline__ int offset(int row, int chunk) {
    const int swizzle = D >= 64 ? row % 8 : row / 2 % 4;
    return row * D + (chunk ^ swizzle) * 8;
  }
};

// Copies `rows` rows, `stride` apart, to a tile, with zeros after the first `valid` rows and after column dim. The
// caller commits.
template <int D, class T>
__device__ __forceinline__ void load_tile(T* tile, const T* from, int64_t stride, int rows, int valid,
                                          const AttentionBatch& batch) {
  constexpr int kChunks = D / 8;
  for (int i = threadIdx.x; i < rows * kChunks; i += blockDim.x) {
    const int row = i / kChunks, chunk = i % kChunks;
    const int columns = row < valid ? batch.dim - 8 * chunk : 0;
    const T* source = columns > 0 ? from + row * stride + 8 * chunk : from;
    if (batch.aligned) {
      cp_async_16(tile + SwizzledRows<D>::offset(row, chunk), source, columns > 0);
    } else {
      float numbers[8];
      load_pack<8, false>(source, columns, numbers);
      store_pack<8, true>(tile + SwizzledRows<D>::offset(row, chunk), 8, numbers);
    }
  }
}

// Rows [row, row + 16) of a tile as the left operand of products that sum over D.
template <class T, int D, bool IN_REGISTERS>
struct LeftRows {
  static constexpr int kUnroll = IN_REGISTERS ? D / 16 : 2;

  __device__ __forceinline__ LeftRows(const T* tile, int row) : tile(tile), row(row) {
    if constexpr (IN_REGISTERS) {
#pragma unroll
      for (int step = 0; step < D / 16; ++step) load(step, registers[step]);
    }
  }

  __device__ __forceinline__ void load(int step, uint32_t (&a)[4]) const {
    const int lane = threadIdx.x % kWarp;
    ldmatrix_x4<false>(tile + SwizzledRows<D>::offset(row + lane % 16, 2 * step + lane / 16), a);
  }

  __device__ __forceinline__ void get(int step, uint32_t (&a)[4]) const {
    if constexpr (IN_REGISTERS) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = registers[step][i];
    } else {
      load(step, a);
    }
  }

  const T* tile;
  int row;
  uint32_t registers[IN_REGISTERS ? D / 16 : 1][4];
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
      ldmatrix_x4<false>(right + SwizzledRows<D>::offset(16 * j + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2),
                         b);
      mma_16x8x16<T>(c[2 * j], a, b[0], b[1]);
      mma_16x8x16<T>(c[2 * j + 1], a, b[2], b[3]);
    }
  }
}

// c (16, COLS) += p right[:, 8 first_chunk:], `right` a tile of STEP rows; p (16, STEP) is rounded to T, and 0 where
// `mask` drops it; see round_kept for what becomes of p.
template <class T, int D, int STEP, int COLS, class Mask>
__device__ __forceinline__ void accumulate(float (&p)[STEP / 8][4], const Mask& mask, const T* right, int first_chunk,
                                           float (&c)[COLS / 8][4]) {
  const int lane = threadIdx.x % kWarp;
  uint32_t a[STEP / 16][4];
  round_kept<T, STEP>(p, mask, a);
#pragma unroll
  for (int step = 0; step < STEP / 16; ++step) {
#pragma unroll
    for (int j = 0; j < COLS / 16; ++j) {
      uint32_t b[4];
      ldmatrix_x4<true>(right + SwizzledRows<D>::offset(16 * step + lane % 16, first_chunk + 2 * j + lane / 16), b);
      mma_16x8x16<T>(c[2 * j], a[step], b[0], b[1]);
      mma_16x8x16<T>(c[2 * j + 1], a[step], b[2], b[3]);
    }
  }
}

}  // namespace bert_fast
