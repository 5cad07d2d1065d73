// Small kernels, correct and incorrect, for tests/kernels/test_cuda_emulator.py: `cases NAME` prints a result or fails.
#include <cstdio>
#include <stdexcept>
#include <string>

#include "common/cuda.h"

namespace {

float* shared() {
  return static_cast<float*>(emulator::shared_memory());
}

// Each thread writes its index and reads that of the next thread.
void neighbour(float* out, bool wait) {
  shared()[threadIdx.x] = threadIdx.x;
  if (wait) __syncthreads();
  out[threadIdx.x] = shared()[(threadIdx.x + 1) % blockDim.x];
}

void warp_sum(float* out) {
  float x = threadIdx.x;
  for (int mask = 16; mask; mask /= 2) x += __shfl_xor_sync(~0u, x, mask);
  out[threadIdx.x] = x;
}

void copied(float* out, const float* in, int groups_left) {
  emulator::cp_async(shared() + 2 * threadIdx.x, in + threadIdx.x, sizeof(float));
  emulator::cp_async_commit();
  emulator::cp_async(shared() + 2 * threadIdx.x + 1, in + threadIdx.x + 1, sizeof(float));
  emulator::cp_async_commit();
  emulator::cp_async_wait(groups_left);
  out[threadIdx.x] = shared()[2 * threadIdx.x] + 100 * shared()[2 * threadIdx.x + 1];
}

void half_of_the_threads_wait(float*) {
  if (threadIdx.x % 2) emulator::barrier(1, 64);
}

// The second warp waits for what the first one writes; that arrives, `times` times, and goes on.
void arrive_and_wait(float* out, int times) {
  if (threadIdx.x < 32) {
    shared()[threadIdx.x] = threadIdx.x;
    for (int i = 0; i < times; ++i) bert_fast::named_barrier_arrive(1, 64);
  } else {
    bert_fast::named_barrier(1, 64);
    out[threadIdx.x] = shared()[threadIdx.x - 32];
  }
}

void nobody_waits(float*) {
  if (threadIdx.x < 32) bert_fast::named_barrier_arrive(1, 64);
}

void counts_disagree(float*) {
  bert_fast::named_barrier(1, threadIdx.x < 32 ? 64 : 32);
}

void lanes_disagree(float* out) {
  out[threadIdx.x] = threadIdx.x < 3 ? __shfl_sync(~0u, 1.0f, 0) : __shfl_xor_sync(~0u, 1.0f, 1);
}

void half_of_the_threads_return(float* out) {
  if (threadIdx.x >= 32) return;
  __syncthreads();
  out[threadIdx.x] = 1.0f;
}

using bert_fast::BFloat16;

// left (16, 16) right (16, 16) by the fragments of one warp, with `right` row-major or TRANSPOSED in memory; the copies
// of the operands to shared memory are asynchronous.
template <bool TRANSPOSED>
void multiply(float* out, const BFloat16* left, const BFloat16* right) {
  auto* tiles = static_cast<BFloat16*>(emulator::shared_memory());
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  for (int i = 0; i < 2; ++i) {
    bert_fast::cp_async_16(tiles + 8 * (lane + 32 * i), (i ? right : left) + 8 * lane, true);
  }
  bert_fast::cp_async_commit();
  bert_fast::cp_async_wait<0>();
  __syncthreads();
  uint32_t a[4], b[4];
  bert_fast::ldmatrix_x4<false>(tiles + 16 * (lane % 16) + 8 * (lane / 16), a);
  // The first two registers hold columns 0 to 7 of the right operand, the others columns 8 to 15.
  const int row = TRANSPOSED ? lane % 8 + lane / 16 * 8 : lane % 16, chunk = TRANSPOSED ? lane / 8 % 2 : lane / 16;
  bert_fast::ldmatrix_x4<!TRANSPOSED>(tiles + 256 + 16 * row + 8 * chunk, b);
  for (int half = 0; half < 2; ++half) {
    float c[4] = {};
    bert_fast::mma_16x8x16<BFloat16>(c, a, b[2 * half], b[2 * half + 1]);
    for (int i = 0; i < 4; ++i) out[16 * (g + i / 2 * 8) + 8 * half + 2 * t + i % 2] = c[i];
  }
}

// 1 if the product of fragments equals that of three loops bit for bit: the numbers are small integers.
template <bool TRANSPOSED>
float multiplies() {
  alignas(16) BFloat16 left[256], right[256];
  float expected[256] = {}, product[256] = {};
  for (int i = 0; i < 256; ++i) {
    left[i] = static_cast<float>(i * 7 % 23 - 11);
    right[i] = static_cast<float>(i * 5 % 19 - 9);
  }
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) {
      for (int k = 0; k < 16; ++k)
        expected[16 * i + j] += left[16 * i + k] * right[TRANSPOSED ? 16 * j + k : 16 * k + j];
    }
  }
  emulator::run(dim3(1), 32, 1024, [&] { multiply<TRANSPOSED>(product, left, right); });
  return std::memcmp(expected, product, sizeof(product)) == 0;
}

// The second register of a left operand belongs to row g + 8, so lanes with t = 0 print 4 g.
void second_register(float* out) {
  uint32_t a[4] = {}, zero = 0;
  const int g = threadIdx.x % 32 / 4;
  a[1] = bert_fast::pack_pair<BFloat16>(static_cast<float>(g), 0.0f);
  float c[4] = {};
  bert_fast::mma_16x8x16<BFloat16>(c, a, g == 0 ? bert_fast::pack_pair<BFloat16>(1.0f, 0.0f) : zero, zero);
  out[threadIdx.x] = threadIdx.x % 4 == 0 ? c[2] - c[0] : 0.0f;
}

}  // namespace

void hopper_case(const std::string& name, float* out);

int main(int, char** arguments) {
  const std::string name = arguments[1];
  float out[64] = {}, in[65];
  for (int i = 0; i < 65; ++i) in[i] = i;
  const auto run = [&](auto body) { emulator::run(dim3(1), 64, 1024, body); };
  try {
    if (name == "neighbour") run([&] { neighbour(out, true); });
    if (name == "no_barrier") run([&] { neighbour(out, false); });
    if (name == "warp_sum") run([&] { warp_sum(out); });
    if (name == "copied") run([&] { copied(out, in, 0); });
    if (name == "waited_for_one") run([&] { copied(out, in, 1); });
    if (name == "half_wait") run([&] { half_of_the_threads_wait(out); });
    if (name == "arrive") run([&] { arrive_and_wait(out, 1); });
    if (name == "arrive_twice") run([&] { arrive_and_wait(out, 2); });
    if (name == "nobody_waits") run([&] { nobody_waits(out); });
    if (name == "counts_disagree") run([&] { counts_disagree(out); });
    if (name == "disagree") run([&] { lanes_disagree(out); });
    if (name == "multiply") out[0] = multiplies<false>(), out[1] = multiplies<true>();
    if (name == "second_register") run([&] { second_register(out); });
    hopper_case(name, out);
    if (name == "half_leave") run([&] { half_of_the_threads_return(out); });
  } catch (const std::runtime_error& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  for (float x : out) std::printf("%g ", x);
  return 0;
}
