// What Hopper adds, for kernels that use common/cuda_hopper.h: barriers in shared memory, the copy engine, products of
// a warpgroup.
//
// Stricter than a GPU, so that mistakes show: a bulk copy lands at once, some time later, or when no thread can go on
// without it; accumulators are NaN until a product is waited for, and operands that change before that are an error;
// copy engine and matrix unit see what threads wrote to shared memory after a fence.proxy.async alone.
#pragma once

#include "emulator/cuda.h"

namespace emulator {

// A tensor (T, P, N, D) of 16 bits, strides in bytes, moved in boxes of 64 by 64 with the 128-byte swizzle.
struct TensorMap {
  const void* base;
  int64_t sizes[4], strides[3];
};

uint32_t shared_offset(const void* pointer);

void init_mbarrier(void* barrier, int count);
void arrive(void* barrier, int expected_bytes);
void wait_mbarrier(void* barrier, int parity);

void load_box(void* to, const TensorMap& map, int column, int head, int part, int token, void* barrier);
void load_bytes(void* to, const void* from, int bytes, void* barrier);
void fence_async_proxy();

// c (64, n) = or += left right. `a`: the lane's four registers of the left operand, or null, where `left` describes it;
// TRANSPOSED: `right` is (16, n), not (n, 16). `number` reads half of a register.
void start_product(float* c, int n, const uint32_t* a, uint64_t left, uint64_t right, bool transposed, bool add,
                   float (*number)(uint32_t pair, int half));
void fence_products();
void commit_products();
void wait_for_products(int groups_left);

}  // namespace emulator
