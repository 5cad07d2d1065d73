// LayerNorm's statistics of a row and the gradient through them. Included by kernel files, each of them once (see
// foreach_isa.h); no include guard on purpose.

namespace bert_fast {
namespace BF_ISA {

// v with lanes n and above set to zero.
BF_INLINE vfloat first_lanes(vfloat v, int n) {
  if (n == kWidth) return v;
  float lanes[kWidth];
  store(lanes, v);
  return load_first(lanes, n);
}

struct RowStatistics {
  float mean, rstd;
};

// The mean and 1 / sqrt(variance + eps) of row[0, cols), whose sum is passed. Two-pass variance: the second pass sums
// the deviations from the first mean, so nothing large cancels, and their mean corrects the rounding error of the
// first.
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

// The gradient of a row through its normalized values xhat is rstd * (g - mean(g) - xhat * mean(g * xhat)) for
// g = dout * weight: these are the two means.
struct RowMeans {
  float grad, grad_xhat;
};

BF_INLINE vfloat layer_norm_grad(vfloat g, vfloat xhat, RowMeans means, float rstd) {
  return (g - means.grad - xhat * means.grad_xhat) * rstd;
}

}  // namespace BF_ISA
}  // namespace bert_fast
