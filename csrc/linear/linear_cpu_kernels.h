// One pass over the rows of a product: reads float32, writes bfloat16. Compiled once for each instruction set by
// foreach_isa.h.

#include "common/gelu_kernels.h"

namespace bert_fast {
namespace BF_ISA {

template <int ACTIVATION>
inline void linear_finish_rows(const float* product, const float* bias, bfloat16* out, int64_t rows, int64_t cols) {
  for (int64_t row = 0; row < rows; ++row) {
    const float* in = product + row * cols;
    bfloat16* to = out + row * cols;
    for_columns(cols, [&](int64_t col, int n) {
      vfloat u = load_n(in + col, n);
      if (bias != nullptr) u += load_n(bias + col, n);
      store_n(to + col, activate<ACTIVATION>(u), n);
    });
  }
}

}  // namespace BF_ISA
}  // namespace bert_fast
