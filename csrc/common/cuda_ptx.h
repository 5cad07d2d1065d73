// The CUDA runtime and the PTX instructions that the kernels use. tests/emulator/cuda_instructions.h has the same
// functions for a CPU; common/cuda.h includes one of the two. Layouts of operands are those of the PTX ISA, with
// lane = 4 g + t.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>

#include "common/tensor.h"

#define BERT_FAST_CUDA_KEY CUDA  // the dispatch key that the kernels are registered for

// Kernels for Hopper have a body only where this is defined; elsewhere they are never launched.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define BERT_FAST_ON_HOPPER
#endif

namespace bert_fast {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// Raise unless `error` is success. It is cleared first: torch's next check would report it as an error of its own.
inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  STD_TORCH_CHECK(false, what, ": ", cudaGetErrorString(error));
}

// Launch `kernel` on the device and the current stream of `x`, with `shared` bytes of dynamic shared memory.
template <class... P>
inline void launch_kernel(void (*kernel)(P...), dim3 grid, unsigned threads, size_t shared, const Tensor& x,
                          P... arguments) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  if (shared > (48u << 10)) {
    check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shared)),
               "shared memory of a kernel");
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...), "launch of a kernel");
}

inline int device_attribute(const Tensor& x, cudaDeviceAttr attribute) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, attribute, x.get_device_index()), "attribute of a device");
  return value;
}

// The compute capability of the device of `x` times ten, e.g. 90.
inline int capability_of(const Tensor& x) {
  return 10 * device_attribute(x, cudaDevAttrComputeCapabilityMajor) +
         device_attribute(x, cudaDevAttrComputeCapabilityMinor);
}

inline int multiprocessors_of(const Tensor& x) {
  return device_attribute(x, cudaDevAttrMultiProcessorCount);
}

// The block's dynamic shared memory, aligned to 128 bytes.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char bert_fast_shared[];
  return reinterpret_cast<T*>(bert_fast_shared);
}

// The offset of an address in the shared memory window.
__device__ __forceinline__ uint32_t shared_offset(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The lower of two numbers, NaN where one of them is.
__device__ __forceinline__ float min_or_nan(float a, float b) {
  float lower;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(lower) : "f"(a), "f"(b));
  return lower;
}

// Approximate 2^x; subnormal results become 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// __syncthreads for `threads` threads of the block; `id` is 1 to 15, 0 is the barrier of __syncthreads itself.
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Arrives at a named barrier without waiting; `threads` counts those that arrive and those that wait.
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Tensor cores and asynchronous copies of sm_80 and later.

// Two numbers rounded to T in one register, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  uint32_t packed;
  if constexpr (std::is_same<T, BFloat16>::value) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

// c (16, 8) float32 += a (16, 16) b (16, 8) of T. A lane holds
//   a: rows g, g + 8, g, g + 8 of columns 2t, 2t + 1 (the first two) and 2t + 8, 2t + 9;
//   b: rows 2t, 2t + 1 and 2t + 8, 2t + 9 of column g;
//   c: columns 2t, 2t + 1 of row g, then of row g + 8.
template <class T>
__device__ __forceinline__ void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same<T, BFloat16>::value) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Four matrices of 8 by 8 16-bit numbers from shared memory: lane 8 i + r passes the address of row r of matrix i, 16
// bytes; register i receives columns 2t, 2t + 1 of row g of matrix i, if TRANSPOSED rows 2t, 2t + 1 of column g.
template <bool TRANSPOSED>
__device__ __forceinline__ void ldmatrix_x4(const void* row, uint32_t (&to)[4]) {
  if constexpr (TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_offset(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_offset(row))
                 : "memory");
  }
}

// 16 (4) bytes from global to shared memory, both addresses aligned to that size. Unless `valid`, zeros, without a
// read.
__device__ __forceinline__ void cp_async_16(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_offset(to)), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void cp_async_4(void* to, const void* from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_offset(to)), "l"(from), "r"(valid ? 4 : 0)
               : "memory");
}

// Closes the group of this thread's copies since the last call.
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until all of this thread's groups but the last GROUPS have arrived; other threads see them after a barrier.
template <int GROUPS>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

// TMA, mbarriers and wgmma of Hopper (sm_90a).

using TensorMap = CUtensorMap;

// Makes the tensor map of x (T, P, N, D) of 16-bit numbers, for boxes of 64 tokens by 64 numbers of one part and head
// in the 128-byte swizzle. Strides are in numbers, D is dense; all are multiples of 8, and the address is a multiple
// of 16. Returns 0, or the driver's error: that of a driver before 525, without the function, is CUDA_ERROR_NOT_FOUND.
template <class T>
inline int encode_tensor_map(TensorMap* map, const T* x, const int64_t (&sizes)[4], const int64_t (&strides)[3]) {
  static const auto encode = [] {
    void* function = nullptr;  // looked up by name, so that nothing is linked against the driver
    cudaDriverEntryPointQueryResult result;
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result),
               "cuTensorMapEncodeTiled");
    if (result != cudaDriverEntryPointSuccess) function = nullptr;
    return reinterpret_cast<CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                         const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                         CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill)>(
        function);
  }();
  if (encode == nullptr) return CUDA_ERROR_NOT_FOUND;
  cuuint64_t dims[4], bytes[3];
  const cuuint32_t box[4] = {64, 1, 1, 64}, steps[4] = {1, 1, 1, 1};
  for (int i = 0; i < 4; ++i) dims[i] = static_cast<cuuint64_t>(sizes[3 - i]);
  for (int i = 0; i < 3; ++i) bytes[i] = static_cast<cuuint64_t>(strides[2 - i]) * sizeof(T);
  const auto type =
      std::is_same<T, BFloat16>::value ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  return encode(map, type, 4, const_cast<T*>(x), dims, bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

// A barrier in shared memory whose phase completes after `count` arrivals and all expected bytes.
using Mbarrier = uint64_t;

__device__ __forceinline__ void mbarrier_init(Mbarrier* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_offset(barrier)), "r"(count) : "memory");
}

// Makes initialized barriers visible to the TMA unit; other threads need a __syncthreads in addition.
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(Mbarrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_offset(barrier)) : "memory");
}

// Arrives, and expects `bytes` more from copies.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(Mbarrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_offset(barrier)), "r"(bytes)
               : "memory");
}

// Waits for the phase of this parity to complete. A new barrier counts as past a phase of parity 1.
__device__ __forceinline__ void mbarrier_wait(Mbarrier* barrier, int parity) {
  uint32_t complete;
  do {
    asm volatile(
        "{\n.reg .pred complete;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
        "selp.u32 %0, 1, 0, complete;\n}"
        : "=r"(complete)
        : "r"(shared_offset(barrier)), "r"(parity)
        : "memory");
  } while (!complete);
}

// One box, 8 KB, of the tensor to shared memory, with zeros outside of the tensor. Called by one thread.
__device__ __forceinline__ void tma_load_box(void* to, const TensorMap& map, int column, int head, int part, int token,
                                             Mbarrier* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(shared_offset(to)),
      "l"(&map), "r"(shared_offset(barrier)), "r"(column), "r"(head), "r"(part), "r"(token)
      : "memory");
}

// `bytes` contiguous bytes; addresses and size are multiples of 16. Called by one thread.
__device__ __forceinline__ void bulk_load(void* to, const void* from, int bytes, Mbarrier* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_offset(to)),
               "l"(from), "r"(bytes), "r"(shared_offset(barrier))
               : "memory");
}

// Orders this thread's accesses to shared memory before those of TMA and wgmma; a barrier has to follow.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Sets the number of registers of each thread of this warpgroup.
template <int COUNT, bool INCREASE>
__device__ __forceinline__ void setmaxnreg() {
  static_assert(COUNT % 8 == 0 && COUNT >= 24 && COUNT <= 256, "the operands that setmaxnreg accepts");
  if constexpr (INCREASE) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
  }
}

// Hides a value's origin from the compiler, so that it is not computed ahead of a loop and kept in registers.
__device__ __forceinline__ void make_opaque(uint64_t& value) {
  asm volatile("" : "+l"(value));
}

// Keeps the compiler from moving accesses to the registers of a wgmma across its start and its wait.
template <class X, int ROWS>
__device__ __forceinline__ void pin(X (&x)[ROWS][4]) {
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
}

// Before a wgmma that uses these registers after other instructions have written them.
template <class... X>
__device__ __forceinline__ void wgmma_fence(X&... registers) {
  (pin(registers), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Closes the group of this warp's products since the last call.
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until all of this warp's groups but the last GROUPS are complete; `registers` are those that they use.
template <int GROUPS, class... X>
__device__ __forceinline__ void wgmma_wait(X&... registers) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS) : "memory");
  (pin(registers), ...);
}

#define BERT_FAST_ACCUMULATOR_64                                                                          \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define BERT_FAST_ACCUMULATOR_128                                                                         \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "  \
  "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "  \
  "%62, %63}"
#define BERT_FAST_REGISTERS(j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
#define BERT_FAST_REGISTERS_64                                                                    \
  BERT_FAST_REGISTERS(0), BERT_FAST_REGISTERS(1), BERT_FAST_REGISTERS(2), BERT_FAST_REGISTERS(3), \
      BERT_FAST_REGISTERS(4), BERT_FAST_REGISTERS(5), BERT_FAST_REGISTERS(6), BERT_FAST_REGISTERS(7)
#define BERT_FAST_REGISTERS_128                                                                           \
  BERT_FAST_REGISTERS_64, BERT_FAST_REGISTERS(8), BERT_FAST_REGISTERS(9), BERT_FAST_REGISTERS(10),        \
      BERT_FAST_REGISTERS(11), BERT_FAST_REGISTERS(12), BERT_FAST_REGISTERS(13), BERT_FAST_REGISTERS(14), \
      BERT_FAST_REGISTERS(15)
// wgmma with N columns; LEFT, RIGHT, ADD and TRANSPOSED are the numbers of the asm operands.
#define BERT_FAST_WGMMA(N, TYPE, LEFT, RIGHT, ADD, TRANSPOSED, ...)                                          \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ADD                                                       \
               ", 0;\n"                                                                                      \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " " BERT_FAST_ACCUMULATOR_##N \
               ", " LEFT ", " RIGHT ", p, 1, 1, " TRANSPOSED ";\n}"                                          \
               : BERT_FAST_REGISTERS_##N                                                                     \
               : __VA_ARGS__)
#define BERT_FAST_WGMMA_SHARED(N, TYPE, A, B, C) \
  BERT_FAST_WGMMA(N, TYPE, A, B, C, "0, 0", "l"(left), "l"(right), "r"(static_cast<int>(add)))
#define BERT_FAST_WGMMA_REGISTERS(N, TYPE, A, B, C) \
  BERT_FAST_WGMMA(N, TYPE, A, B, C, "1", "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(right), "r"(1))

// c (64, N) float32 = left (64, 16) right (N, 16)^T of T, or += if `add`. Both are descriptors of operands whose rows
// run along the summed dimension. Warp w of the group holds rows 16 w to 16 w + 15 of c, in the layout of mma_16x8x16.
template <class T, int N>
__device__ __forceinline__ void wgmma(float (&c)[N / 8][4], uint64_t left, uint64_t right, bool add) {
  constexpr bool kBFloat16 = std::is_same<T, BFloat16>::value;
  if constexpr (N == 64 && kBFloat16) BERT_FAST_WGMMA_SHARED(64, "bf16", "%32", "%33", "%34");
  if constexpr (N == 64 && !kBFloat16) BERT_FAST_WGMMA_SHARED(64, "f16", "%32", "%33", "%34");
  if constexpr (N == 128 && kBFloat16) BERT_FAST_WGMMA_SHARED(128, "bf16", "%64", "%65", "%66");
  if constexpr (N == 128 && !kBFloat16) BERT_FAST_WGMMA_SHARED(128, "f16", "%64", "%65", "%66");
}

// c (64, N) += a (64, 16) right (16, N): a in registers, in the layout of mma_16x8x16, right a descriptor with
// `next_columns`.
template <class T, int N>
__device__ __forceinline__ void wgmma(float (&c)[N / 8][4], const uint32_t (&a)[4], uint64_t right) {
  constexpr bool kBFloat16 = std::is_same<T, BFloat16>::value;
  if constexpr (N == 64 && kBFloat16) BERT_FAST_WGMMA_REGISTERS(64, "bf16", "{%32, %33, %34, %35}", "%36", "%37");
  if constexpr (N == 64 && !kBFloat16) BERT_FAST_WGMMA_REGISTERS(64, "f16", "{%32, %33, %34, %35}", "%36", "%37");
  if constexpr (N == 128 && kBFloat16) BERT_FAST_WGMMA_REGISTERS(128, "bf16", "{%64, %65, %66, %67}", "%68", "%69");
  if constexpr (N == 128 && !kBFloat16) BERT_FAST_WGMMA_REGISTERS(128, "f16", "{%64, %65, %66, %67}", "%68", "%69");
}

}  // namespace bert_fast
