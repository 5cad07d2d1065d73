// A row of logits (V,) is read from memory once, for its largest value, and kept in cache as float for the two passes
// that follow: the exponentials with their sum, and the gradient written over the logits. Each exponential is computed
// once. Compiled once for each instruction set by foreach_isa.h.

namespace bert_fast {
namespace BF_ISA {

constexpr int64_t kBlock = 1024;  // columns added up in float before they go into a double

// Returns the loss of one row. exps (V,) is scratch. With GRAD, x becomes (softmax(x + bias) - onehot(label)) * scale.
template <class T, bool GRAD>
inline double softmax_row(T* x, const float* bias, float* exps, int64_t label, float scale, int64_t cols, bool* hit) {
  vfloat highest = set1(-INFINITY);
  for_columns(cols, [&](int64_t col, int n) {
    const vfloat logit = load_n(x + col, n) + load_n(bias + col, n);
    store_n(exps + col, logit, n);
    if (n == kWidth) highest = vmax(logit, highest);
  });
  float top = reduce_max(highest);
  for (int64_t col = cols - cols % kWidth; col < cols; ++col) top = exps[col] > top ? exps[col] : top;

  // Of equal largest logits the first counts as the prediction.
  const float wanted = exps[label];
  *hit = wanted == top;
  for (int64_t col = 0; *hit && col < label; ++col) *hit = exps[col] != top;

  double sum = 0.0;
  for (int64_t start = 0; start < cols; start += kBlock) {
    vfloat lanes = set1(0.0f);
    float tail = 0.0f;
    float* block = exps + start;
    for_columns(std::min(kBlock, cols - start), [&](int64_t col, int n) {
      const vfloat value = vexp(load_n(block + col, n) - top);
      store_n(block + col, value, n);
      if (n == kWidth) {
        lanes += value;
      } else {
        for (int i = 0; i < n; ++i) tail += block[col + i];
      }
    });
    sum += static_cast<double>(reduce_add(lanes)) + tail;
  }

  if (GRAD) {
    const float factor = static_cast<float>(scale / sum);
    const vfloat at_label = set1((static_cast<float>(exps[label] / sum) - 1.0f) * scale);
    for_columns(cols, [&](int64_t col, int n) { store_n(x + col, load_n(exps + col, n) * factor, n); });
    store_n(x + label, at_label, 1);
  }
  return std::log(sum) - (static_cast<double>(wanted) - top);
}

// total (cols) += the sum over the rows of x, rows `stride` apart, in their order.
template <class T>
inline void add_rows(const T* x, float* total, int64_t rows, int64_t stride, int64_t cols) {
  for (int64_t row = 0; row < rows; ++row) {
    const T* from = x + row * stride;
    for_columns(cols,
                [&](int64_t col, int n) { store_n(total + col, load_n(total + col, n) + load_n(from + col, n), n); });
  }
}

}  // namespace BF_ISA
}  // namespace bert_fast
