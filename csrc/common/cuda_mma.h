// What kernels use of the matrix unit of sm_80 and later: products of 16-bit fragments, their loads from shared memory,
// and asynchronous copies to it. Layouts as in the PTX ISA; lane = 4 g + t throughout.
//
// In the emulator a fragment is what the lanes hand over, element by element where the instruction wants it: a wrong
// layout gives wrong numbers there too.
#pragma once

#include <stdexcept>

#include "common/cuda.h"

namespace bert_fast {

#ifdef BERT_FAST_EMULATOR

// The number at place `half` (0 or 1) of a register that holds two.
template <class T>
inline float half_of(uint32_t pair, int half) {
  const uint16_t bits = static_cast<uint16_t>(pair >> (16 * half));
  T value;
  std::memcpy(&value, &bits, sizeof(value));
  return static_cast<float>(value);
}

inline void check_aligned(const char* kind, const void* address, uintptr_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes)
    throw std::runtime_error(std::string(kind) + ": address not aligned");
}

#else

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

#endif

// As __syncthreads, of `threads` threads of the block; `id` is 0 to 15, of which __syncthreads itself takes 0.
__device__ __forceinline__ void named_barrier(int id, int threads) {
#ifdef BERT_FAST_EMULATOR
  emulator::barrier(id, threads);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// Two numbers rounded to T in one register, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
#ifdef BERT_FAST_EMULATOR
  const T pair[2] = {static_cast<T>(low), static_cast<T>(high)};
  uint32_t packed;
  std::memcpy(&packed, pair, sizeof(packed));
  return packed;
#else
  uint32_t packed;
  if constexpr (std::is_same<T, BFloat16>::value) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
#endif
}

// c (16, 8) float32 += a (16, 16) b (16, 8) of T. A lane holds
//   a: rows g, g + 8, g, g + 8 of columns 2t, 2t + 1 (the first two) and 2t + 8, 2t + 9;
//   b: rows 2t, 2t + 1 and 2t + 8, 2t + 9 of column g;
//   c: columns 2t, 2t + 1 of row g, then of row g + 8.
template <class T>
__device__ __forceinline__ void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef BERT_FAST_EMULATOR
  struct Operands {
    uint32_t a[4], b[2];
  };
  const Operands mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
  const unsigned char* all = emulator::exchange("mma_16x8x16", &mine, sizeof(mine));
  const int g = emulator::lane() / 4, t = emulator::lane() % 4;
  float left[2][16], right[16][2];
  for (int k = 0; k < 16; ++k) {
    const int pair = k % 8 / 2;
    for (int i = 0; i < 2; ++i) {
      left[i][k] = half_of<T>(emulator::lane_value<Operands>(all, 4 * g + pair).a[k / 8 * 2 + i], k % 2);
      right[k][i] = half_of<T>(emulator::lane_value<Operands>(all, 4 * (2 * t + i) + pair).b[k / 8], k % 2);
    }
  }
  for (int i = 0; i < 4; ++i) {
    for (int k = 0; k < 16; ++k) c[i] += left[i / 2][k] * right[k][i % 2];
  }
#else
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
#endif
}

// Four matrices of 8 by 8 numbers of 16 bits from shared memory: lane 8 i + r gives the address of row r of matrix i,
// 16 bytes; register i gets columns 2t, 2t + 1 of row g of matrix i, TRANSPOSED rows 2t, 2t + 1 of column g.
template <bool TRANSPOSED>
__device__ __forceinline__ void load_matrix_x4(const void* row, uint32_t (&to)[4]) {
#ifdef BERT_FAST_EMULATOR
  check_aligned("load_matrix_x4", row, 16);
  const unsigned char* all =
      emulator::exchange(TRANSPOSED ? "load_matrix_x4 transposed" : "load_matrix_x4", &row, sizeof(row));
  const int g = emulator::lane() / 4, t = emulator::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (int half = 0; half < 2; ++half) {
      const int from = TRANSPOSED ? 2 * t + half : g, column = TRANSPOSED ? g : 2 * t + half;
      const auto* numbers = emulator::lane_value<const uint16_t*>(all, 8 * i + from);
      pair[half] = numbers[column];
    }
    std::memcpy(&to[i], pair, sizeof(to[i]));
  }
#else
  if constexpr (TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
  }
#endif
}

// 16 bytes (4 bytes) from global to shared memory, both aligned to that; zeros, and no read, where not `valid`.
__device__ __forceinline__ void copy_async_16(void* to, const void* from, bool valid) {
#ifdef BERT_FAST_EMULATOR
  check_aligned("copy_async_16", to, 16);
  if (valid) check_aligned("copy_async_16", from, 16);
  emulator::copy_async(to, valid ? from : nullptr, 16);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
#endif
}

__device__ __forceinline__ void copy_async_4(void* to, const void* from, bool valid) {
#ifdef BERT_FAST_EMULATOR
  emulator::copy_async(to, valid ? from : nullptr, 4);
#else
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 4 : 0)
               : "memory");
#endif
}

// Closes the group of this thread's copies since the last call.
__device__ __forceinline__ void commit_copies() {
#ifdef BERT_FAST_EMULATOR
  emulator::commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until all of this thread's groups but the last GROUPS have arrived; a barrier has to show them to other threads.
template <int GROUPS>
__device__ __forceinline__ void wait_for_copies() {
#ifdef BERT_FAST_EMULATOR
  emulator::wait_for_copies(GROUPS);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
#endif
}

}  // namespace bert_fast
