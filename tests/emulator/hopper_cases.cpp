// Correct and incorrect uses of wgmma and TMA, for tests/kernels/test_cuda_emulator.py; called by cases.cpp.
#include <string>

#include "common/cuda_hopper.h"

namespace {

using bert_fast::BFloat16;

// The mistake to make: a step to omit, or to do too early.
struct Mistakes {
  bool no_copy_wait = false, no_product_wait = false, no_product_fence = false, early_write = false;
  bool no_proxy_fence = false, fewer_bytes = false;
};

struct Numbers {
  BFloat16 left[64 * 64], right[64 * 64];
  Numbers() {
    for (int i = 0; i < 64 * 64; ++i) {
      left[i] = static_cast<float>(i * 7 % 23 - 11);
      right[i] = static_cast<float>(i * 5 % 19 - 9);
    }
  }
};

// left right^T of tiles that TMA loads, or left right with the left operand in REGISTERS. Before it the threads
// overwrite row 0 of the left tile.
template <bool REGISTERS>
void multiply(float* out, const Numbers& numbers, const Mistakes& mistakes) {
  auto* tiles = bert_fast::tile_memory<BFloat16>();
  auto* barrier = reinterpret_cast<bert_fast::Mbarrier*>(tiles + 2 * 64 * 64);
  if (threadIdx.x == 0) bert_fast::mbarrier_init(barrier, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    bert_fast::mbarrier_arrive_expect_tx(barrier, mistakes.fewer_bytes ? 8192 : 2 * 8192);
    for (int i = 0; i < 2; ++i) {
      const auto map = bert_fast::make_tensor_map(i ? numbers.right : numbers.left, {64, 1, 1, 64}, {64, 64, 64});
      bert_fast::tma_load_box(tiles + i * 64 * 64, map, 0, 0, 0, 0, barrier);
    }
  }
  if (!mistakes.no_copy_wait) bert_fast::mbarrier_wait(barrier, 0);
  if (threadIdx.x < 64) tiles[threadIdx.x] = mistakes.no_copy_wait ? tiles[threadIdx.x] : numbers.left[threadIdx.x] * 2;
  if (!mistakes.no_proxy_fence) bert_fast::fence_async_proxy();
  __syncthreads();
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  float c[8][4] = {};
  if (!mistakes.no_product_fence) bert_fast::wgmma_fence(c);
  for (int k = 0; k < 4; ++k) {
    if (REGISTERS) {
      uint32_t a[4];
      for (int i = 0; i < 4; ++i) {
        const BFloat16* at = numbers.left + (16 * warp + g + i % 2 * 8) * 64 + 16 * k + i / 2 * 8 + 2 * t;
        a[i] = bert_fast::pack_pair<BFloat16>(at[0], at[1]);
      }
      bert_fast::wgmma<BFloat16, 64>(c, a, bert_fast::make_descriptor(tiles + 64 * 64 + 16 * 64 * k, 0));
    } else {
      const uint64_t left = bert_fast::make_descriptor(tiles, 0),
                     right = bert_fast::make_descriptor(tiles + 64 * 64, 0);
      const auto at = [k](uint64_t descriptor) { return bert_fast::advance_descriptor(descriptor, 16 * k); };
      bert_fast::wgmma<BFloat16, 64>(c, at(left), at(right), k > 0);
    }
  }
  bert_fast::wgmma_commit();
  if (mistakes.early_write && threadIdx.x == 0) {
    tiles[64 * 64] = 100.0f;
    bert_fast::fence_async_proxy();
  }
  if (!mistakes.no_product_wait) bert_fast::wgmma_wait<0>(c);
  for (int j = 0; j < 8; ++j) {
    for (int i = 0; i < 4; ++i) out[(16 * warp + g + i / 2 * 8) * 64 + 8 * j + 2 * t + i % 2] = c[j][i];
  }
  bert_fast::wgmma_wait<0>(c);
}

// How many of the 64 by 64 numbers equal those of three loops bit for bit: they are small integers.
template <bool REGISTERS>
float count_correct(const Mistakes& mistakes) {
  const Numbers numbers;
  static float product[64 * 64];
  emulator::run(dim3(1), 128, 20 << 10, [&] { multiply<REGISTERS>(product, numbers, mistakes); });
  int correct = 0;
  for (int i = 0; i < 64; ++i) {
    for (int j = 0; j < 64; ++j) {
      float expected = 0.0f;
      for (int k = 0; k < 64; ++k) {
        const float factor = !REGISTERS && i == 0 ? 2.0f : 1.0f;  // of the row that the threads overwrite
        expected += factor * numbers.left[64 * i + k] * numbers.right[REGISTERS ? 64 * k + j : 64 * j + k];
      }
      correct += product[64 * i + j] == expected;
    }
  }
  return static_cast<float>(correct);
}

// A box that extends past the end of the tensor: only 8 of 16 tokens exist.
void outside(float* out, const Numbers& numbers) {
  auto* tile = bert_fast::tile_memory<BFloat16>();
  auto* barrier = reinterpret_cast<bert_fast::Mbarrier*>(tile + 64 * 64);
  if (threadIdx.x == 0) {
    bert_fast::mbarrier_init(barrier, 1);
    bert_fast::mbarrier_arrive_expect_tx(barrier, 8192);
    const auto map = bert_fast::make_tensor_map(numbers.left, {16, 1, 1, 64}, {64, 64, 64});
    bert_fast::tma_load_box(tile, map, 0, 0, 0, 8, barrier);
    bert_fast::mbarrier_wait(barrier, 0);
    for (int row = 0; row < 64; ++row) out[row] = tile[row * 64 + (1 ^ row % 8) * 8];  // column 8
  }
}

void not_initialised(float*) {
  bert_fast::mbarrier_arrive(reinterpret_cast<bert_fast::Mbarrier*>(bert_fast::tile_memory<float>()));
}

}  // namespace

// Runs the case of this name, if there is one.
void hopper_case(const std::string& name, float* out) {
  Mistakes mistakes;
  mistakes.no_copy_wait = name == "hopper_no_copy_wait";
  mistakes.no_product_wait = name == "hopper_no_product_wait";
  mistakes.no_product_fence = name == "hopper_no_product_fence";
  mistakes.early_write = name == "hopper_early_write";
  mistakes.no_proxy_fence = name == "hopper_no_proxy_fence";
  mistakes.fewer_bytes = name == "hopper_fewer_bytes";
  const Numbers numbers;
  if (name == "hopper_outside") {
    emulator::run(dim3(1), 32, 20 << 10, [&] { outside(out, numbers); });
  } else if (name == "hopper_not_initialised") {
    emulator::run(dim3(1), 32, 20 << 10, [&] { not_initialised(out); });
  } else if (name == "hopper_registers") {
    out[0] = count_correct<true>(mistakes);
  } else if (name.rfind("hopper", 0) == 0) {
    out[0] = count_correct<false>(mistakes);
  }
}
