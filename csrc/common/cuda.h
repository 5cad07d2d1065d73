// Common header of the CUDA sources: launching a kernel, loads and stores of packs of elements, sums over a warp.
#pragma once

#ifdef BERT_FAST_EMULATOR  // the tests' build, by the C++ compiler for CPU tensors (tests/emulator)
#include "emulator/cuda_instructions.h"
#else
#include "common/cuda_ptx.h"
#endif

namespace bert_fast {

constexpr int kWarp = 32;

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// T, in a context from which template arguments are not deduced.
template <class T>
struct Same {
  using type = T;
};

// Run `kernel` on the device and the current stream of `x`, with `shared` bytes of dynamic shared memory.
template <class... P>
inline void launch(void (*kernel)(P...), dim3 grid, unsigned threads, size_t shared, const Tensor& x,
                   typename Same<P>::type... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  launch_kernel<P...>(kernel, grid, threads, shared, x, arguments...);
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

// N adjacent elements, loaded and stored at once.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T element[N];
};

// FULL: all N elements exist, and their address is aligned to the size of a pack. Otherwise only the first `count` of
// them exist, at any address: the others read as 0 and are not written.
template <int N, bool FULL, class T>
__device__ __forceinline__ void load_pack(const T* from, int64_t count, float (&to)[N]) {
  if (FULL) {
    const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(from);
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = static_cast<float>(pack.element[i]);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = i < count ? static_cast<float>(from[i]) : 0.0f;
  }
}

template <int N, bool FULL, class T>
__device__ __forceinline__ void store_pack(T* to, int64_t count, const float (&from)[N]) {
  if (FULL) {
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

// The sum over the warp, in every lane, by butterfly shuffles: always in the same order.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
  return x;
}

}  // namespace bert_fast
