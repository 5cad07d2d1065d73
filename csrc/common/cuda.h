// What the CUDA sources include: torch's stable ABI, launching, and the small parts that kernels share.
//
// With BERT_FAST_EMULATOR the same sources are compiled by the C++ compiler and run on CPU tensors (csrc/emulator).
#pragma once

#ifdef BERT_FAST_EMULATOR
#include "emulator/cuda.h"
#else
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "common/tensor.h"

namespace bert_fast {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int kWarp = 32;

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

template <class T>
struct Same {
  using type = T;
};

// Run `kernel` on the device and the current stream of `x`, with `shared` bytes of dynamic shared memory.
template <class... P>
inline void launch(void (*kernel)(P...), dim3 grid, unsigned threads, size_t shared, const Tensor& x,
                   typename Same<P>::type... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
#ifdef BERT_FAST_EMULATOR
  emulator::run(grid, threads, shared, [&] { kernel(arguments...); });
#else
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  if (shared > (48u << 10)) {
    const cudaError_t set = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                 cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    STD_TORCH_CHECK(set == cudaSuccess, "shared memory of a kernel: ", cudaGetErrorString(set));
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t launched = cudaLaunchKernelEx(&config, kernel, arguments...);
  STD_TORCH_CHECK(launched == cudaSuccess, "launch of a kernel: ", cudaGetErrorString(launched));
#endif
}

// Compute capability of the device of `x` times ten, e.g. 90, and how many multiprocessors it has.
inline int capability_of(const Tensor& x) {
#ifdef BERT_FAST_EMULATOR
  return emulator::capability();
#else
  int major = 0, minor = 0;
  const int device = x.get_device_index();
  const cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  const cudaError_t other = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  STD_TORCH_CHECK(error == cudaSuccess && other == cudaSuccess, "the device's capability: ", cudaGetErrorString(error));
  return 10 * major + minor;
#endif
}

inline int multiprocessors_of(const Tensor& x) {
#ifdef BERT_FAST_EMULATOR
  return emulator::kMultiprocessors;
#else
  int count = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, x.get_device_index());
  STD_TORCH_CHECK(error == cudaSuccess, "the device's multiprocessors: ", cudaGetErrorString(error));
  return count;
#endif
}

inline Tensor empty_like_rows(const Tensor& x, std::vector<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_empty(x, shape, dtype);
}

// Run `body` with the element type of `dtype`.
template <class Body>
inline void dispatch_cuda(ScalarType dtype, const char* name, const Body& body) {
  switch (dtype) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::BFloat16:
      return body(BFloat16{});
    case ScalarType::Half:
      return body(Half{});
    default:
      STD_TORCH_CHECK(false, name, ": the CUDA kernels take float32, bfloat16 and float16");
  }
}

// The block's dynamic shared memory, aligned to 128 bytes.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
#ifdef BERT_FAST_EMULATOR
  return static_cast<T*>(emulator::shared_memory());
#else
  extern __shared__ __align__(128) unsigned char bert_fast_shared[];
  return reinterpret_cast<T*>(bert_fast_shared);
#endif
}

// N neighbouring elements, moved at once: 16 bytes where the kernel chose N so.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T element[N];
};

// WHOLE: the pack is all there and aligned to its size. Else only its first `count` elements are, anywhere; the others
// read as 0 and are not written.
template <int N, bool WHOLE, class T>
__device__ __forceinline__ void load_pack(const T* from, int64_t count, float (&to)[N]) {
  if (WHOLE) {
    const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(from);
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = static_cast<float>(pack.element[i]);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = i < count ? static_cast<float>(from[i]) : 0.0f;
  }
}

template <int N, bool WHOLE, class T>
__device__ __forceinline__ void store_pack(T* to, int64_t count, const float (&from)[N]) {
  if (WHOLE) {
    Pack<T, N> pack;
#pragma unroll
    for (int i = 0; i < N; ++i) pack.element[i] = static_cast<T>(from[i]);
    *reinterpret_cast<Pack<T, N>*>(to) = pack;
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < count) to[i] = static_cast<T>(from[i]);
    }
  }
}

// Sum over the warp, in every lane: a butterfly, so always in the same order.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
  return x;
}

}  // namespace bert_fast
