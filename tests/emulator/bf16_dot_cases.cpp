// Reads lines of the bits of sum, a and b in hexadecimal, and writes those of the emulated add_bf16_dot(sum, a, b).
#include <cstdio>

#define BF_KERNELS "common/layer_norm_kernels.h"
#define BF_KERNELS_BF16_DOT
#include "common/foreach_isa.h"

int main() {
  using namespace bert_fast::avx512bf16;
  unsigned sum, a, b;
  while (std::scanf("%x %x %x", &sum, &a, &b) == 3) {
    const vfloat dot = add_bf16_dot(bit_cast<vfloat>(vuint{} + sum), vuint{} + a, vuint{} + b);
    for (int lane = 1; lane < kWidth; ++lane) {
      if (bit_cast<vuint>(dot)[lane] != bit_cast<vuint>(dot)[0]) return 1;
    }
    std::printf("%08x\n", bit_cast<vuint>(dot)[0]);
  }
  return 0;
}
