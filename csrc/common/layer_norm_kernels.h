// What the ops with a LayerNorm share: the statistics of a row, its normalised values, and the gradient through them.
// Included by kernel files (see foreach_isa.h); no include guard on purpose, once a kernel file.

namespace bert_fast {
namespace BF_ISA {

// v with the lanes from n on set to zero.
BF_INLINE vfloat first_lanes(vfloat v, int n) {
  if (n == kWidth) return v;
  float lanes[kWidth];
  store(lanes, v);
  return load_first(lanes, n);
}

struct RowStatistics {
  float mean, rstd;
};

// Mean and 1 / sqrt(variance + eps) of row[0, cols), whose sum is given. Two passes: the second works on deviations
// from the first mean, so nothing large cancels, and its own mean deviation repairs what the first sum lost to
// rounding.
BF_INLINE RowStatistics row_statistics(const float* row, float sum, int64_t cols, float eps) {
  const float count = static_cast<float>(cols);
  const float first_mean = sum / count;
  vfloat deviations = set1(0.0f), squares = set1(0.0f);
  for_columns(cols, [&](int64_t col, int n) {
    const vfloat d = first_lanes(load_n(row + col, n) - first_mean, n);
    deviations += d;
    squares += d * d;
  });
  const float shift = reduce_add(deviations) / count;
  const float variance = reduce_add(squares) / count - shift * shift;
  return {first_mean + shift, 1.0f / std::sqrt((variance < 0.0f ? 0.0f : variance) + eps)};
}

// The gradient of a row's normalised values xhat with respect to the row itself is
// rstd * (g - mean(g) - xhat * mean(g * xhat)) for g = dout * weight: these are the two means.
struct RowMeans {
  float grad, grad_xhat;
};

BF_INLINE vfloat layer_norm_grad(vfloat g, vfloat xhat, RowMeans means, float rstd) {
  return (g - means.grad - xhat * means.grad_xhat) * rstd;
}

}  // namespace BF_ISA
}  // namespace bert_fast
