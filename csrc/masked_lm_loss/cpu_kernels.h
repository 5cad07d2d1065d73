// A row of logits (V,) is read from memory once, for its maximum, and stays in cache as float for the two passes that
// follow: the exponentials with their sum, and the gradient, which overwrites the logits. Each exponential is computed
// once. Compiled once for each instruction set by foreach_isa.h.

namespace bert_fast {
namespace BF_ISA {

constexpr int64_t kBlock = 1024;  // columns summed in float before the sum is added to a double

// Returns the loss of one row. exps (V,) is scratch. With GRAD, x becomes the gradient of the loss times terms.scale:
// softmax(x + bias) (1 + 2 z lse) - (1 - s) onehot(label) - s / V.
template <class T, bool GRAD>
inline double softmax_row(T* x, const float* bias, float* exps, int64_t label, const Terms& terms, int64_t cols,
                          bool* hit) {
  vfloat highest = set1(-INFINITY);
  for_columns(cols, [&](int64_t col, int n) {
    const vfloat logit = load_n(x + col, n) + load_n(bias + col, n);
    store_n(exps + col, logit, n);
    if (n == kWidth) highest = vmax(logit, highest);
  });
  float top = reduce_max(highest);
  for (int64_t col = cols - cols % kWidth; col < cols; ++col) top = exps[col] > top ? exps[col] : top;

  // Of several equal maxima the first is the prediction.
  const float target = exps[label];
  *hit = target == top;
  for (int64_t col = 0; *hit && col < label; ++col) *hit = exps[col] != top;

  double sum = 0.0, below = 0.0;  // of the exponentials, and of the logits minus their maximum
  for (int64_t start = 0; start < cols; start += kBlock) {
    vfloat lanes = set1(0.0f), lanes_below = set1(0.0f);
    float tail = 0.0f, tail_below = 0.0f;
    float* block = exps + start;
    for_columns(std::min(kBlock, cols - start), [&](int64_t col, int n) {
      const vfloat logit = load_n(block + col, n) - top;
      const vfloat value = vexp(logit);
      if (n == kWidth) {
        lanes += value;
        lanes_below += logit;
      } else {
        for (int i = 0; i < n; ++i) tail_below += block[col + i] - top;
      }
      store_n(block + col, value, n);
      for (int i = 0; n < kWidth && i < n; ++i) tail += block[col + i];
    });
    sum += static_cast<double>(reduce_add(lanes)) + tail;
    below += static_cast<double>(reduce_add(lanes_below)) + tail_below;
  }

  const double lse = std::log(sum) + top, smoothing = terms.label_smoothing;
  if (GRAD) {
    const double weight = 1.0 + 2.0 * terms.z_loss * lse;
    const float factor = static_cast<float>(terms.scale * weight / sum);
    const vfloat everywhere = set1(static_cast<float>(-terms.scale * smoothing / cols));
    const double at_label = exps[label] / sum * weight - (1.0 - smoothing) - smoothing / cols;
    for_columns(cols, [&](int64_t col, int n) { store_n(x + col, load_n(exps + col, n) * factor + everywhere, n); });
    store_n(x + label, set1(static_cast<float>(at_label * terms.scale)), 1);
  }
  const double loss = std::log(sum) - (1.0 - smoothing) * (static_cast<double>(target) - top);
  // Without label smoothing the mean is not used at all: a logit of minus infinity would make 0 times it NaN.
  return loss + (smoothing > 0.0 ? -smoothing * (below / cols) : 0.0) + terms.z_loss * lse * lse;
}

// total (cols) += the sum over the rows of x, `stride` apart, in order.
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
