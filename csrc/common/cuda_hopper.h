// What kernels use of Hopper (sm_90a) beyond cuda_mma.h: bulk copies by the copy engine, the barriers in shared memory
// that they complete on, and products of a warpgroup, four warps, with operands in shared memory.
//
// A tile is rows of 64 numbers of 16 bits, 128 bytes, whose 16-byte chunks are swizzled: chunk c of row r lies at place
// c ^ r % 8. A wider matrix is several tiles side by side, one behind the other in memory. Tiles begin at multiples of
// 1024 bytes. Copy engine and matrix unit both know this form as the 128-byte swizzle.
//
// In the emulator copies and products take their time, and see shared memory through a proxy of their own: what is not
// waited for or not fenced is not there.
#pragma once

#include "common/cuda_mma.h"

#ifdef BERT_FAST_EMULATOR
#include "emulator/hopper.h"
#else
#include <cuda.h>
#endif

// Kernels have a body only where this is defined; elsewhere they are never launched.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(BERT_FAST_EMULATOR)
#define BERT_FAST_ON_HOPPER
#endif

namespace bert_fast {

constexpr int kWarpgroup = 4 * kWarp;
constexpr int kTileColumns = 64;
constexpr int kBoxRows = 64;  // that one bulk copy of a tensor moves
constexpr int kTileAlignment = 1024;

#ifdef BERT_FAST_EMULATOR
using TensorMap = emulator::TensorMap;
#else
using TensorMap = CUtensorMap;
#endif

// Describes x (T, P, N, D) of 16 bits to the copy engine, in boxes of 64 tokens by 64 numbers of one part and head.
// Strides in numbers, those of D are dense; all a multiple of 8, as is the address of 16 bytes.
template <class T>
inline TensorMap map_tensor(const T* x, const int64_t (&sizes)[4], const int64_t (&strides)[3]) {
#ifdef BERT_FAST_EMULATOR
  TensorMap map = {x, {sizes[0], sizes[1], sizes[2], sizes[3]}, {strides[0] * 2, strides[1] * 2, strides[2] * 2}};
#else
  static const auto encode = [] {
    void* found = nullptr;  // of the driver, by name: so nothing is linked against it
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    STD_TORCH_CHECK(error == cudaSuccess && result == cudaDriverEntryPointSuccess,
                    "the CUDA driver has no cuTensorMapEncodeTiled; Hopper's kernels need driver 525 or later");
    return reinterpret_cast<CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                         const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                         CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill)>(found);
  }();
  TensorMap map;
  cuuint64_t dims[4], bytes[3];
  const cuuint32_t box[4] = {kTileColumns, 1, 1, kBoxRows}, steps[4] = {1, 1, 1, 1};
  for (int i = 0; i < 4; ++i) dims[i] = static_cast<cuuint64_t>(sizes[3 - i]);
  for (int i = 0; i < 3; ++i) bytes[i] = static_cast<cuuint64_t>(strides[2 - i]) * sizeof(T);
  const auto type =
      std::is_same<T, BFloat16>::value ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult error =
      encode(&map, type, 4, const_cast<T*>(x), dims, bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(error == CUDA_SUCCESS, "cuTensorMapEncodeTiled refuses a tensor: error ", static_cast<int>(error));
#endif
  return map;
}

// A barrier in shared memory whose phase ends when all of its `count` arrivals and all announced bytes have come.
using Mbarrier = uint64_t;

__device__ __forceinline__ void init_barrier(Mbarrier* barrier, int count) {
#ifdef BERT_FAST_EMULATOR
  emulator::init_mbarrier(barrier, count);
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
#endif
}

// Shows initialised barriers to the copy engine; other threads need a __syncthreads besides.
__device__ __forceinline__ void fence_barriers() {
#ifndef BERT_FAST_EMULATOR
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ __forceinline__ void arrive(Mbarrier* barrier) {
#ifdef BERT_FAST_EMULATOR
  emulator::arrive(barrier, 0);
#else
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#endif
}

// Arrive, and announce `bytes` that copies will bring.
__device__ __forceinline__ void arrive_expecting(Mbarrier* barrier, int bytes) {
#ifdef BERT_FAST_EMULATOR
  emulator::arrive(barrier, bytes);
#else
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#endif
}

// Until the phase of this parity has ended; of a new barrier the phase before its first, of parity 1, has.
__device__ __forceinline__ void wait_barrier(Mbarrier* barrier, int parity) {
#ifdef BERT_FAST_EMULATOR
  emulator::wait_mbarrier(barrier, parity);
#else
  uint32_t ended;
  do {
    asm volatile(
        "{\n.reg .pred ended;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
        "selp.u32 %0, 1, 0, ended;\n}"
        : "=r"(ended)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!ended);
#endif
}

// One box, 8 KB, of the tensor to shared memory; outside of it there are zeros. For one thread to call.
__device__ __forceinline__ void load_box(void* to, const TensorMap& map, int column, int head, int part, int token,
                                         Mbarrier* barrier) {
#ifdef BERT_FAST_EMULATOR
  emulator::load_box(to, map, column, head, part, token, barrier);
#else
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(column), "r"(head), "r"(part), "r"(token)
      : "memory");
#endif
}

// `bytes` as they lie, addresses and number a multiple of 16. For one thread to call.
__device__ __forceinline__ void load_bytes(void* to, const void* from, int bytes, Mbarrier* barrier) {
#ifdef BERT_FAST_EMULATOR
  emulator::load_bytes(to, from, bytes, barrier);
#else
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
#endif
}

// Shows this thread's own reads and writes of shared memory to copy engine and matrix unit; a barrier has to follow.
__device__ __forceinline__ void fence_async_proxy() {
#ifdef BERT_FAST_EMULATOR
  emulator::fence_async_proxy();
#else
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// The number of this thread's warpgroup; the shuffle tells the compiler that a warp agrees on it.
__device__ __forceinline__ int warpgroup() {
  return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
}

// Registers of a thread of this warpgroup from here on.
template <int COUNT, bool MORE>
__device__ __forceinline__ void set_registers() {
  static_assert(COUNT % 8 == 0 && COUNT >= 24 && COUNT <= 256, "what setmaxnreg takes");
#ifndef BERT_FAST_EMULATOR
  if constexpr (MORE) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
  }
#endif
}

// The offset of an address in the block's shared memory.
__device__ __forceinline__ uint32_t shared_place(const void* pointer) {
#ifdef BERT_FAST_EMULATOR
  return emulator::shared_offset(pointer);
#else
  return shared_address(pointer);
#endif
}

// The block's dynamic shared memory, from a multiple of 1024 bytes on: up to so many are lost.
template <class T>
__device__ __forceinline__ T* tile_memory() {
  unsigned char* memory = dynamic_shared<unsigned char>();
  return reinterpret_cast<T*>(memory + (kTileAlignment - shared_place(memory) % kTileAlignment) % kTileAlignment);
}

// Describes an operand from `tile` on. `next_columns` is the distance in bytes between tiles side by side, which counts
// where the columns are what the product doesn't sum over. Not to be kept in registers from one loop to the next, which
// the compiler likes to do for each of the products of a loop.
__device__ __forceinline__ uint64_t describe(const void* tile, int next_columns) {
  constexpr uint64_t kEightRows = 1024 >> 4, kSwizzle128 = 1;
  uint64_t description = (shared_place(tile) & 0x3ffff) >> 4 | static_cast<uint64_t>(next_columns >> 4) << 16 |
                         kEightRows << 32 | kSwizzle128 << 62;
#ifndef BERT_FAST_EMULATOR
  asm volatile("" : "+l"(description));
#endif
  return description;
}

// What is described, `numbers` of 16 bits further on.
__device__ __forceinline__ uint64_t advance(uint64_t description, int numbers) {
  return description + numbers * 2 / 16;
}

// What products add to or read may not be moved or reordered by the compiler across their beginning and their end.
template <class X, int ROWS>
__device__ __forceinline__ void pin(X (&x)[ROWS][4]) {
#ifndef BERT_FAST_EMULATOR
#pragma unroll
  for (int j = 0; j < ROWS; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (std::is_same<X, float>::value) {
        asm volatile("" : "+f"(x[j][i])::"memory");
      } else {
        asm volatile("" : "+r"(x[j][i])::"memory");
      }
    }
  }
#endif
}

// Before products that use these registers and that others have written since.
template <class... X>
__device__ __forceinline__ void fence_products(X&... registers) {
  (pin(registers), ...);
#ifdef BERT_FAST_EMULATOR
  emulator::fence_products();
#else
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// Closes the group of the products since the last call.
__device__ __forceinline__ void commit_products() {
#ifdef BERT_FAST_EMULATOR
  emulator::commit_products();
#else
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Until all of this warp's groups but the last GROUPS are done; `registers` are theirs.
template <int GROUPS, class... X>
__device__ __forceinline__ void wait_for_products(X&... registers) {
#ifdef BERT_FAST_EMULATOR
  emulator::wait_for_products(GROUPS);
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS) : "memory");
#endif
  (pin(registers), ...);
}

#ifndef BERT_FAST_EMULATOR
#define BERT_FAST_SUM_64                                                                                  \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define BERT_FAST_SUM_128                                                                                 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "  \
  "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "  \
  "%62, %63}"
#define BERT_FAST_PART(j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
#define BERT_FAST_PARTS_64                                                                                          \
  BERT_FAST_PART(0), BERT_FAST_PART(1), BERT_FAST_PART(2), BERT_FAST_PART(3), BERT_FAST_PART(4), BERT_FAST_PART(5), \
      BERT_FAST_PART(6), BERT_FAST_PART(7)
#define BERT_FAST_PARTS_128                                                                         \
  BERT_FAST_PARTS_64, BERT_FAST_PART(8), BERT_FAST_PART(9), BERT_FAST_PART(10), BERT_FAST_PART(11), \
      BERT_FAST_PART(12), BERT_FAST_PART(13), BERT_FAST_PART(14), BERT_FAST_PART(15)
// The product instruction of N columns; LEFT, RIGHT, ADD and TRANSPOSED are the operands' numbers.
#define BERT_FAST_PRODUCT(N, TYPE, LEFT, RIGHT, ADD, TRANSPOSED, ...)                                \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ADD                                               \
               ", 0;\n"                                                                              \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " " BERT_FAST_SUM_##N \
               ", " LEFT ", " RIGHT ", p, 1, 1, " TRANSPOSED ";\n}"                                  \
               : BERT_FAST_PARTS_##N                                                                 \
               : __VA_ARGS__)
#define BERT_FAST_PRODUCT_SHARED(N, TYPE, A, B, C) \
  BERT_FAST_PRODUCT(N, TYPE, A, B, C, "0, 0", "l"(left), "l"(right), "r"(static_cast<int>(add)))
#define BERT_FAST_PRODUCT_REGISTERS(N, TYPE, A, B, C) \
  BERT_FAST_PRODUCT(N, TYPE, A, B, C, "1", "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(right), "r"(1))

#endif

// c (64, N) float32 = left (64, 16) right (N, 16)^T of T, or += where `add`; both are described, rows of columns that
// are summed over. Warp w of the group has rows 16 w to 16 w + 15 of c, laid out as by mma_16x8x16.
template <class T, int N>
__device__ __forceinline__ void start_product(float (&c)[N / 8][4], uint64_t left, uint64_t right, bool add) {
#ifdef BERT_FAST_EMULATOR
  emulator::start_product(&c[0][0], N, nullptr, left, right, false, add, &half_of<T>);
#else
  constexpr bool kBrain = std::is_same<T, BFloat16>::value;
  if constexpr (N == 64 && kBrain) BERT_FAST_PRODUCT_SHARED(64, "bf16", "%32", "%33", "%34");
  if constexpr (N == 64 && !kBrain) BERT_FAST_PRODUCT_SHARED(64, "f16", "%32", "%33", "%34");
  if constexpr (N == 128 && kBrain) BERT_FAST_PRODUCT_SHARED(128, "bf16", "%64", "%65", "%66");
  if constexpr (N == 128 && !kBrain) BERT_FAST_PRODUCT_SHARED(128, "f16", "%64", "%65", "%66");
#endif
}

// c (64, N) += a (64, 16) right (16, N), a in registers as mma_16x8x16 takes it, right described with next_columns.
template <class T, int N>
__device__ __forceinline__ void start_product(float (&c)[N / 8][4], const uint32_t (&a)[4], uint64_t right) {
#ifdef BERT_FAST_EMULATOR
  emulator::start_product(&c[0][0], N, a, 0, right, true, true, &half_of<T>);
#else
  constexpr bool kBrain = std::is_same<T, BFloat16>::value;
  if constexpr (N == 64 && kBrain) BERT_FAST_PRODUCT_REGISTERS(64, "bf16", "{%32, %33, %34, %35}", "%36", "%37");
  if constexpr (N == 64 && !kBrain) BERT_FAST_PRODUCT_REGISTERS(64, "f16", "{%32, %33, %34, %35}", "%36", "%37");
  if constexpr (N == 128 && kBrain) BERT_FAST_PRODUCT_REGISTERS(128, "bf16", "{%64, %65, %66, %67}", "%68", "%69");
  if constexpr (N == 128 && !kBrain) BERT_FAST_PRODUCT_REGISTERS(128, "f16", "{%64, %65, %66, %67}", "%68", "%69");
#endif
}

}  // namespace bert_fast
