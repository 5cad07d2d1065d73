// The functions of csrc/common/cuda_ptx.h, where each is documented, on a CPU. Fragments are exchanged between lanes
// element by element as the instruction defines, so that a wrong layout gives wrong numbers here too.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "common/tensor.h"
#include "emulator/cuda.h"
#include "emulator/hopper.h"

#define BERT_FAST_CUDA_KEY CPU
#define BERT_FAST_ON_HOPPER

namespace bert_fast {

using emulator::TensorMap;
using torch::headeronly::BFloat16;
using torch::headeronly::Half;

template <class... P>
void launch_kernel(void (*kernel)(P...), dim3 grid, unsigned threads, size_t shared, const Tensor&, P... arguments) {
  emulator::run(grid, threads, shared, [&] { kernel(arguments...); });
}

inline int capability_of(const Tensor&) {
  return emulator::capability();
}

inline int multiprocessors_of(const Tensor&) {
  return emulator::kMultiprocessors;
}

template <class T>
T* dynamic_shared() {
  return static_cast<T*>(emulator::shared_memory());
}

inline uint32_t shared_offset(const void* pointer) {
  return emulator::shared_offset(pointer);
}

inline float min_or_nan(float a, float b) {
  return a != a || b != b ? a + b : a < b ? a : b;
}

inline float exp2_fast(float x) {
  return std::exp2(x);
}

inline void named_barrier(int id, int threads) {
  emulator::barrier(id, threads);
}

inline void named_barrier_arrive(int id, int threads) {
  emulator::barrier_arrive(id, threads);
}

template <class T>
uint32_t pack_pair(float low, float high) {
  const T pair[2] = {static_cast<T>(low), static_cast<T>(high)};
  uint32_t packed;
  std::memcpy(&packed, pair, sizeof(packed));
  return packed;
}

// The number in half 0 (low) or 1 (high) of a register that holds two.
template <class T>
float half_of(uint32_t pair, int half) {
  const uint16_t bits = static_cast<uint16_t>(pair >> (16 * half));
  T value;
  std::memcpy(&value, &bits, sizeof(value));
  return static_cast<float>(value);
}

inline void check_aligned(const char* kind, const void* address, uintptr_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes)
    throw std::runtime_error(std::string(kind) + ": address not aligned");
}

template <class T>
void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Operands {
    uint32_t a[4], b[2];
  };
  const Operands operands = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
  const unsigned char* lanes = emulator::exchange("mma_16x8x16", &operands, sizeof(operands));
  const int g = emulator::lane() / 4, t = emulator::lane() % 4;
  float left[2][16], right[16][2];
  for (int k = 0; k < 16; ++k) {
    const int pair = k % 8 / 2;
    for (int i = 0; i < 2; ++i) {
      left[i][k] = half_of<T>(emulator::lane_value<Operands>(lanes, 4 * g + pair).a[k / 8 * 2 + i], k % 2);
      right[k][i] = half_of<T>(emulator::lane_value<Operands>(lanes, 4 * (2 * t + i) + pair).b[k / 8], k % 2);
    }
  }
  for (int i = 0; i < 4; ++i) {
    for (int k = 0; k < 16; ++k) c[i] += left[i / 2][k] * right[k][i % 2];
  }
}

template <bool TRANSPOSED>
void ldmatrix_x4(const void* row, uint32_t (&to)[4]) {
  check_aligned("ldmatrix_x4", row, 16);
  const unsigned char* lanes =
      emulator::exchange(TRANSPOSED ? "ldmatrix_x4 transposed" : "ldmatrix_x4", &row, sizeof(row));
  const int g = emulator::lane() / 4, t = emulator::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (int half = 0; half < 2; ++half) {
      const int from = TRANSPOSED ? 2 * t + half : g, column = TRANSPOSED ? g : 2 * t + half;
      pair[half] = emulator::lane_value<const uint16_t*>(lanes, 8 * i + from)[column];
    }
    std::memcpy(&to[i], pair, sizeof(to[i]));
  }
}

inline void cp_async_16(void* to, const void* from, bool valid) {
  check_aligned("cp_async_16", to, 16);
  if (valid) check_aligned("cp_async_16", from, 16);
  emulator::cp_async(to, valid ? from : nullptr, 16);
}

inline void cp_async_4(void* to, const void* from, bool valid) {
  emulator::cp_async(to, valid ? from : nullptr, 4);
}

inline void cp_async_commit() {
  emulator::cp_async_commit();
}

template <int GROUPS>
void cp_async_wait() {
  emulator::cp_async_wait(GROUPS);
}

// BERT_FAST_EMULATED_TENSOR_MAP_ERROR is the error of a driver that refuses.
template <class T>
int encode_tensor_map(TensorMap* map, const T* x, const int64_t (&sizes)[4], const int64_t (&strides)[3]) {
  *map = {x, {sizes[0], sizes[1], sizes[2], sizes[3]}, {strides[0] * 2, strides[1] * 2, strides[2] * 2}};
  const char* error = std::getenv("BERT_FAST_EMULATED_TENSOR_MAP_ERROR");
  return error == nullptr ? 0 : std::atoi(error);
}

using Mbarrier = uint64_t;

inline void mbarrier_init(Mbarrier* barrier, int count) {
  emulator::mbarrier_init(barrier, count);
}

inline void mbarrier_init_fence() {}

inline void mbarrier_arrive(Mbarrier* barrier) {
  emulator::mbarrier_arrive(barrier, 0);
}

inline void mbarrier_arrive_expect_tx(Mbarrier* barrier, int bytes) {
  emulator::mbarrier_arrive(barrier, bytes);
}

inline void mbarrier_wait(Mbarrier* barrier, int parity) {
  emulator::mbarrier_wait(barrier, parity);
}

inline void tma_load_box(void* to, const TensorMap& map, int column, int head, int part, int token, Mbarrier* barrier) {
  emulator::tma_load_box(to, map, column, head, part, token, barrier);
}

inline void bulk_load(void* to, const void* from, int bytes, Mbarrier* barrier) {
  emulator::bulk_load(to, from, bytes, barrier);
}

inline void fence_async_proxy() {
  emulator::fence_async_proxy();
}

template <int COUNT, bool INCREASE>
void setmaxnreg() {
  static_assert(COUNT % 8 == 0 && COUNT >= 24 && COUNT <= 256, "the operands that setmaxnreg accepts");
}

inline void make_opaque(uint64_t&) {}

template <class... X>
void wgmma_fence(X&...) {
  emulator::wgmma_fence();
}

inline void wgmma_commit() {
  emulator::wgmma_commit();
}

template <int GROUPS, class... X>
void wgmma_wait(X&...) {
  emulator::wgmma_wait(GROUPS);
}

template <class T, int N>
void wgmma(float (&c)[N / 8][4], uint64_t left, uint64_t right, bool add) {
  emulator::wgmma(&c[0][0], N, nullptr, left, right, false, add, &half_of<T>);
}

template <class T, int N>
void wgmma(float (&c)[N / 8][4], const uint32_t (&a)[4], uint64_t right) {
  emulator::wgmma(&c[0][0], N, a, 0, right, true, true, &half_of<T>);
}

}  // namespace bert_fast
