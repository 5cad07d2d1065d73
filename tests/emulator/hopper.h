// Hopper's instructions: mbarriers, TMA and wgmma.
//
// Stricter than a GPU, so that mistakes become visible: a bulk copy completes at once, some time later, or when no
// thread can continue without it; accumulators are NaN until the wait for their wgmma, and operands that change before
// it are an error; TMA and wgmma see what threads wrote to shared memory only after a fence.proxy.async.
#pragma once

#include "emulator/cuda.h"

namespace emulator {

// A tensor (T, P, N, D) of 16-bit numbers, strides in bytes, loaded in boxes of 64 by 64 in the 128-byte swizzle.
struct TensorMap {
  const void* base;
  int64_t sizes[4], strides[3];
};

uint32_t shared_offset(const void* pointer);

void mbarrier_init(void* barrier, int count);
void mbarrier_arrive(void* barrier, int expected_bytes);
void mbarrier_wait(void* barrier, int parity);

void tma_load_box(void* to, const TensorMap& map, int column, int head, int part, int token, void* barrier);
void bulk_load(void* to, const void* from, int bytes, void* barrier);
void fence_async_proxy();

// c (64, n) = or += left right. `a` holds the lane's four registers of the left operand, or is null if `left` is its
// descriptor; `right` is (16, n) if `transposed`, else (n, 16). `number` converts half of a register to float.
void wgmma(float* c, int n, const uint32_t* a, uint64_t left, uint64_t right, bool transposed, bool add,
           float (*number)(uint32_t pair, int half));
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int groups_left);

}  // namespace emulator
