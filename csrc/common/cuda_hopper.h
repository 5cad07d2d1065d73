// Tiles of 16-bit numbers in shared memory as Hopper (sm_90a) reads and writes them, for TMA and wgmma.
//
// A tile is rows of 64 numbers, 128 bytes, in the 128-byte swizzle: the 16-byte chunk c of row r is stored at position
// c ^ r % 8. A wider matrix is several tiles of 64 columns, one after the other in memory. Tiles are aligned to 1024
// bytes.
#pragma once

#include "common/cuda.h"

namespace bert_fast {

constexpr int kWarpgroup = 4 * kWarp;
constexpr int kTileColumns = 64;
constexpr int kBoxRows = 64;  // of the tensor that one tma_load_box copies
constexpr int kTileAlignment = 1024;

template <class T>
inline TensorMap make_tensor_map(const T* x, const int64_t (&sizes)[4], const int64_t (&strides)[3]) {
  TensorMap map;
  const int error = encode_tensor_map(&map, x, sizes, strides);
  STD_TORCH_CHECK(error == 0, "cuTensorMapEncodeTiled refuses a tensor: error ", error);
  return map;
}

// The index of this thread's warpgroup; the shuffle tells the compiler that it is uniform in a warp.
__device__ __forceinline__ int warpgroup() {
  return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
}

// The block's dynamic shared memory from the first multiple of 1024 bytes on, so up to 1023 bytes are unused.
template <class T>
__device__ __forceinline__ T* tile_memory() {
  unsigned char* memory = dynamic_shared<unsigned char>();
  return reinterpret_cast<T*>(memory + (kTileAlignment - shared_offset(memory) % kTileAlignment) % kTileAlignment);
}

// The descriptor of a wgmma operand that begins at `tile`. `next_columns` is the distance in bytes between tiles of
// adjacent columns, which matters where the rows run across the summed dimension. It is opaque: else the compiler
// computes the descriptors of all products of a loop ahead and keeps them in registers.
__device__ __forceinline__ uint64_t make_descriptor(const void* tile, int next_columns) {
  constexpr uint64_t kEightRows = 1024 >> 4, kSwizzle128 = 1;
  uint64_t descriptor = (shared_offset(tile) & 0x3ffff) >> 4 | static_cast<uint64_t>(next_columns >> 4) << 16 |
                        kEightRows << 32 | kSwizzle128 << 62;
  make_opaque(descriptor);
  return descriptor;
}

// The descriptor of the operand that begins `numbers` 16-bit numbers later.
__device__ __forceinline__ uint64_t advance_descriptor(uint64_t descriptor, int numbers) {
  return descriptor + numbers * 2 / 16;
}

}  // namespace bert_fast
