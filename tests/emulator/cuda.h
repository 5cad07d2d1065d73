// The part of CUDA C++ that the kernels use, on a CPU, for tests: each thread of a block is a fiber.
//
// A kernel compiled with this header computes what it would on a GPU, slowly and under stricter rules: dynamic shared
// memory is initialized to NaN; threads run in random order between barriers, so that a missing barrier changes the
// result; cp.async copies complete only at their wait; and it is an error if lanes of a warp call different collectives
// or if some threads never reach a barrier. Registers, memory order and speed are not emulated. `__shared__` is
// undefined on purpose: kernels use dynamic_shared().
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
constexpr int kPayload = 64;  // the most bytes that a lane passes to a collective

struct Index {
  dim3 thread, block, block_size, grid;
};

// The compute capability of the emulated device, BERT_FAST_EMULATED_CAPABILITY or 80, and its number of
// multiprocessors: so few that persistent kernels loop.
int capability();
constexpr int kMultiprocessors = 3;

// The index of the running thread.
const Index& index();

// Runs `body` once for each thread of each block, one block after the other. Throws std::runtime_error on a deadlock.
void run(dim3 grid, unsigned threads, size_t shared_bytes, const std::function<void()>& body);

void* shared_memory();

// __syncthreads and named barriers: waits for `count` threads of the block, or for all that still run if it is 0.
void barrier(int id, int count);

// Counts this thread among the `count` that a named barrier waits for, and goes on. A second arrival before the others'
// is an error, and so is a barrier that is incomplete when the block ends.
void barrier_arrive(int id, int count);

// A collective of the warp: passes `size` bytes and returns those of all 32 lanes, kPayload bytes apart. `kind` names
// the operation, which has to be the same in all lanes.
const unsigned char* exchange(const char* kind, const void* value, size_t size);

void cp_async(void* to, const void* from, size_t bytes);
void cp_async_commit();
void cp_async_wait(int groups_left);

template <class T>
T lane_value(const unsigned char* lanes, int lane) {
  T value;
  std::memcpy(&value, lanes + lane * kPayload, sizeof(T));
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
