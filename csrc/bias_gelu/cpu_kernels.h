// One pass over the rows: forward reads x and writes out; backward reads dout and x, writes dx and accumulates dbias.
// Compiled once for each instruction set by foreach_isa.h.

#include "common/gelu_kernels.h"

namespace bert_fast {
namespace BF_ISA {

template <class T, bool TANH>
inline void bias_gelu_rows(const T* x, const float* bias, T* out, int64_t rows, int64_t cols) {
  for (int64_t row = 0; row < rows; ++row) {
    const T* in = x + row * cols;
    T* to = out + row * cols;
    for_columns(cols, [&](int64_t col, int n) {
      store_n(to + col, gelu<TANH>(load_n(in + col, n) + load_n(bias + col, n)), n);
    });
  }
}

template <class T, bool TANH>
inline void bias_gelu_grad_rows(const T* dout, const T* x, const float* bias, T* dx, float* dbias, int64_t rows,
                                int64_t cols) {
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t start = row * cols;
    for_columns(cols, [&](int64_t col, int n) {
      const vfloat u = load_n(x + start + col, n) + load_n(bias + col, n);
      const vfloat grad = load_n(dout + start + col, n) * gelu_grad<TANH>(u);
      store_n(dx + start + col, grad, n);
      store_n(dbias + col, load_n(dbias + col, n) + grad, n);
    });
  }
}

}  // namespace BF_ISA
}  // namespace bert_fast
