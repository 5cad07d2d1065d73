// CUDA C++ on a CPU, for tests: what the project's kernels use of the language, each thread of a block a fiber.
//
// A kernel compiled with this header computes what it would on a GPU, slowly, and is stricter than one: dynamic shared
// memory begins as NaN, threads between two barriers run in shuffled order (so a missing barrier shows), copies of
// cp.async land only when they are waited for, lanes of a warp that disagree on a collective and barriers that are
// never reached by all are errors. What it can't show: registers, memory order, speed. `__shared__` is left undefined
// on purpose: kernels take dynamic_shared().
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulator {

constexpr int kWarp = 32;
constexpr int kPayload = 64;  // bytes that a lane may hand over in one collective

struct Index {
  dim3 thread, block, block_size, grid;
};

// Compute capability of the emulated device, BERT_FAST_EMULATED_CAPABILITY (80 where it isn't set), and its
// multiprocessors: few, so that kernels that loop over work do.
int capability();
constexpr int kMultiprocessors = 3;

// Of the thread that runs.
const Index& index();

// Run `body` once for each thread of each block, one block after the other. std::runtime_error where threads wait for
// what can't come.
void run(dim3 grid, unsigned threads, size_t shared_bytes, const std::function<void()>& body);

void* shared_memory();

// __syncthreads and named barriers: wait until `count` threads of the block are here (0 for all that still run).
void barrier(int id, int count);

// A collective of the warp: hand over `size` bytes, get those of all 32 lanes, kPayload bytes apart. `kind` names the
// operation; all lanes have to do the same.
const unsigned char* exchange(const char* kind, const void* mine, size_t size);

void copy_async(void* to, const void* from, size_t bytes);
void commit_copies();
void wait_for_copies(int groups_left);

template <class T>
T lane_value(const unsigned char* all, int lane) {
  T value;
  std::memcpy(&value, all + lane * kPayload, sizeof(T));
  return value;
}

inline int lane() {
  return index().thread.x % kWarp;
}

}  // namespace emulator

#define threadIdx (::emulator::index().thread)
#define blockIdx (::emulator::index().block)
#define blockDim (::emulator::index().block_size)
#define gridDim (::emulator::index().grid)

inline void __syncthreads() {
  emulator::barrier(0, 0);
}

inline void __syncwarp() {
  emulator::exchange("__syncwarp", nullptr, 0);
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulator::lane_value<T>(emulator::exchange("__shfl_xor_sync", &value, sizeof(T)), emulator::lane() ^ mask);
}

template <class T>
T __shfl_sync(unsigned, T value, int from) {
  return emulator::lane_value<T>(emulator::exchange("__shfl_sync", &value, sizeof(T)), from % emulator::kWarp);
}

template <class T>
T __ldg(const T* address) {
  return *address;
}

inline uint32_t __umulhi(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>((uint64_t{a} * b) >> 32);
}

inline float __fdividef(float a, float b) {
  return a / b;
}

inline float rsqrtf(float x) {
  return 1.0f / std::sqrt(x);
}
