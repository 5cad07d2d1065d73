// Small kernels, right and wrong ones, for tests/kernels/test_cuda_emulator.py: `cases NAME` prints a result or fails.
#include <cstdio>
#include <stdexcept>
#include <string>

#include "emulator/cuda.h"

namespace {

float* shared() {
  return static_cast<float*>(emulator::shared_memory());
}

// Each thread writes its number and reads that of the thread after it.
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
  emulator::copy_async(shared() + 2 * threadIdx.x, in + threadIdx.x, sizeof(float));
  emulator::commit_copies();
  emulator::copy_async(shared() + 2 * threadIdx.x + 1, in + threadIdx.x + 1, sizeof(float));
  emulator::commit_copies();
  emulator::wait_for_copies(groups_left);
  out[threadIdx.x] = shared()[2 * threadIdx.x] + 100 * shared()[2 * threadIdx.x + 1];
}

void half_of_them_wait(float*) {
  if (threadIdx.x % 2) emulator::barrier(1, 64);
}

void lanes_disagree(float* out) {
  out[threadIdx.x] = threadIdx.x < 3 ? __shfl_sync(~0u, 1.0f, 0) : __shfl_xor_sync(~0u, 1.0f, 1);
}

void half_of_them_leave(float* out) {
  if (threadIdx.x >= 32) return;
  __syncthreads();
  out[threadIdx.x] = 1.0f;
}

}  // namespace

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
    if (name == "half_wait") run([&] { half_of_them_wait(out); });
    if (name == "disagree") run([&] { lanes_disagree(out); });
    if (name == "half_leave") run([&] { half_of_them_leave(out); });
  } catch (const std::runtime_error& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  for (float x : out) std::printf("%g ", x);
  return 0;
}
