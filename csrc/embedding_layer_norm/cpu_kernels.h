// One pass over the tokens in each direction, with the current row in `scratch` (float32, in L1). Backward writes the
// gradient of each token's sum in float32; sum_rows then sums those of the tokens that use the same row of a table.
// Compiled once for each instruction set by foreach_isa.h.

#include "common/dropout_kernels.h"
#include "common/layer_norm_kernels.h"

namespace bert_fast {
namespace BF_ISA {

template <class T>
BF_INLINE vfloat embedded(const EmbeddingTables<T>& tables, int64_t token, int64_t col, int n) {
  const int64_t cols = tables.cols;
  return load_n(tables.word + tables.input_ids[token] * cols + col, n) +
         load_n(tables.position + tables.position_ids[token] * cols + col, n) +
         load_n(tables.token_type + tables.token_type_ids[token] * cols + col, n);
}

template <class T, class O>
inline void embedding_rows(const EmbeddingTables<T>& tables, const EmbeddingRows<O>& to, int64_t begin, int64_t end,
                           float* scratch, uint8_t* bytes) {
  const int64_t cols = tables.cols;
  for (int64_t token = begin; token < end; ++token) {
    vfloat sum = set1(0.0f);
    for_columns(cols, [&](int64_t col, int n) {
      const vfloat s = embedded(tables, token, col, n);
      store_n(scratch + col, s, n);
      sum += s;
    });
    const RowStatistics statistics = row_statistics(scratch, reduce_add(sum), cols, to.eps);
    if (to.drop.threshold) dropout_bytes(to.drop, 0, static_cast<uint32_t>(token), cols, bytes);
    O* out = to.out + token * cols;
    for_columns(cols, [&](int64_t col, int n) {
      const vfloat xhat = (load_n(scratch + col, n) - statistics.mean) * statistics.rstd;
      vfloat y = xhat * load_n(to.weight + col, n) + load_n(to.bias + col, n);
      if (to.drop.threshold) y *= dropout_multiplier(to.drop, bytes + col);
      store_n(out + col, y, n);
    });
    to.mean[token] = statistics.mean;
    to.rstd[token] = statistics.rstd;
  }
}

// Accumulates into dweight and dbias, each of `cols` elements; writes the gradient of the tokens' sums.
template <class T, class O>
inline void embedding_grad_rows(const EmbeddingTables<T>& tables, const EmbeddingGradRows<O>& in, int64_t begin,
                                int64_t end, float* dweight, float* dbias, float* scratch, uint8_t* bytes) {
  const int64_t cols = tables.cols;
  for (int64_t token = begin; token < end; ++token) {
    const O* dout = in.dout + token * cols;
    float* dsum = in.dsum + token * cols;
    const float mean = in.mean[token], rstd = in.rstd[token];
    if (in.drop.threshold) dropout_bytes(in.drop, 0, static_cast<uint32_t>(token), cols, bytes);
    vfloat sum = set1(0.0f), sum_xhat = set1(0.0f);
    for_columns(cols, [&](int64_t col, int n) {
      const vfloat xhat = (embedded(tables, token, col, n) - mean) * rstd;
      vfloat grad = load_n(dout + col, n);
      if (in.drop.threshold) grad *= dropout_multiplier(in.drop, bytes + col);
      const vfloat g = grad * load_n(in.weight + col, n);
      store_n(scratch + col, xhat, n);
      store_n(dsum + col, g, n);
      sum += g;
      sum_xhat += g * xhat;
      store_n(dweight + col, load_n(dweight + col, n) + grad * xhat, n);
      store_n(dbias + col, load_n(dbias + col, n) + grad, n);
    });
    const float count = static_cast<float>(cols);
    const RowMeans means = {reduce_add(sum) / count, reduce_add(sum_xhat) / count};
    for_columns(cols, [&](int64_t col, int n) {
      store_n(dsum + col, layer_norm_grad(load_n(dsum + col, n), load_n(scratch + col, n), means, rstd), n);
    });
  }
}

// to = the sum of the `count` rows of `from` at the indices `order`, added in that order.
template <class T>
inline void sum_rows(const float* from, const int64_t* order, int64_t count, int64_t cols, T* to, float* scratch) {
  std::memcpy(scratch, from + order[0] * cols, cols * sizeof(float));
  for (int64_t i = 1; i < count; ++i) {
    const float* row = from + order[i] * cols;
    for_columns(
        cols, [&](int64_t col, int n) { store_n(scratch + col, load_n(scratch + col, n) + load_n(row + col, n), n); });
  }
  for_columns(cols, [&](int64_t col, int n) { store_n(to + col, load_n(scratch + col, n), n); });
}

}  // namespace BF_ISA
}  // namespace bert_fast
