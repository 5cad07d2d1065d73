// One pass over the rows in memory: forward reads x and residual and writes out; backward reads dout, x and residual
// and writes dx and dresidual. The current row stays in `scratch` (float32, in L1) between the passes over it. Compiled
// once for each instruction set by foreach_isa.h.

#include "common/dropout_kernels.h"
#include "common/layer_norm_kernels.h"

namespace bert_fast {
namespace BF_ISA {

template <class T, bool DROPOUT>
inline void add_layer_norm_rows(const AddLayerNormRows<T>& in, int64_t begin, int64_t end, float* scratch,
                                uint8_t* bytes) {
  const int64_t cols = in.cols;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = in.x + row * cols;
    const T* residual = in.residual + row * cols;
    if (DROPOUT) dropout_bytes(in.drop, 0, static_cast<uint32_t>(row), cols, bytes);
    vfloat sum = set1(0.0f);
    for_columns(cols, [&](int64_t col, int n) {
      vfloat branch = load_n(x + col, n) + load_n(in.x_bias + col, n);
      if (DROPOUT) branch *= dropout_multiplier(in.drop, bytes + col);
      const vfloat s = load_n(residual + col, n) + branch;
      store_n(scratch + col, s, n);
      sum += s;
    });
    const RowStatistics statistics = row_statistics(scratch, reduce_add(sum), cols, in.eps);
    T* out = in.out + row * cols;
    for_columns(cols, [&](int64_t col, int n) {
      const vfloat xhat = (load_n(scratch + col, n) - statistics.mean) * statistics.rstd;
      store_n(out + col, xhat * load_n(in.weight + col, n) + load_n(in.bias + col, n), n);
    });
    in.mean[row] = statistics.mean;
    in.rstd[row] = statistics.rstd;
  }
}

// Accumulates into dweight, dbias and, unless it is null, dx_bias, each of `cols` elements.
template <class T, bool DROPOUT>
inline void add_layer_norm_grad_rows(const AddLayerNormGradRows<T>& in, int64_t begin, int64_t end, float* dweight,
                                     float* dbias, float* dx_bias, float* scratch, uint8_t* bytes) {
  const int64_t cols = in.cols;
  for (int64_t row = begin; row < end; ++row) {
    const T* dout = in.dout + row * cols;
    const T* x = in.x + row * cols;
    const T* residual = in.residual + row * cols;
    const float mean = in.mean[row], rstd = in.rstd[row];
    if (DROPOUT) dropout_bytes(in.drop, 0, static_cast<uint32_t>(row), cols, bytes);
    vfloat sum = set1(0.0f), sum_xhat = set1(0.0f);
    for_columns(cols, [&](int64_t col, int n) {
      vfloat branch = load_n(x + col, n) + load_n(in.x_bias + col, n);
      if (DROPOUT) branch *= dropout_multiplier(in.drop, bytes + col);
      const vfloat xhat = (load_n(residual + col, n) + branch - mean) * rstd;
      const vfloat grad = load_n(dout + col, n);
      const vfloat g = grad * load_n(in.weight + col, n);
      store_n(scratch + col, xhat, n);
      sum += g;
      sum_xhat += g * xhat;
      store_n(dweight + col, load_n(dweight + col, n) + grad * xhat, n);
      store_n(dbias + col, load_n(dbias + col, n) + grad, n);
    });
    const float count = static_cast<float>(cols);
    const RowMeans means = {reduce_add(sum) / count, reduce_add(sum_xhat) / count};
    T* dx = in.dx + row * cols;
    T* dresidual = in.dresidual + row * cols;
    for_columns(cols, [&](int64_t col, int n) {
      const vfloat g = load_n(dout + col, n) * load_n(in.weight + col, n);
      vfloat ds = layer_norm_grad(g, load_n(scratch + col, n), means, rstd);
      store_n(dresidual + col, ds, n);
      if (DROPOUT) ds *= dropout_multiplier(in.drop, bytes + col);
      store_n(dx + col, ds, n);
      if (dx_bias) store_n(dx_bias + col, load_n(dx_bias + col, n) + ds, n);
    });
  }
}

}  // namespace BF_ISA
}  // namespace bert_fast
