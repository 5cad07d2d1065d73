// Reads the bits of sum, a and b in hexadecimal, three a line, and writes those of add_dot_of_pairs(sum, a, b),
// emulated.
#include <cstdio>

#define BF_KERNELS "common/layer_norm_kernels.h"
#define BF_KERNELS_IN_PAIRS
#include "common/foreach_isa.h"

int main() {
  using namespace bert_fast::avx512bf16;
  unsigned sum, a, b;
  while (std::scanf("%x %x %x", &sum, &a, &b) == 3) {
    const vfloat found = add_dot_of_pairs(bit_cast<vfloat>(vuint{} + sum), vuint{} + a, vuint{} + b);
    for (int lane = 1; lane < kWidth; ++lane) {
      if (bit_cast<vuint>(found)[lane] != bit_cast<vuint>(found)[0]) return 1;
    }
    std::printf("%08x\n", bit_cast<vuint>(found)[0]);
  }
  return 0;
}
