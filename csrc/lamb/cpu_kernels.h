// LAMB of a chunk of a tensor, in float32. Compiled once for each instruction set by foreach_isa.h.

namespace bert_fast {
namespace BF_ISA {

BF_INLINE vfloat vsqrt(vfloat x) {
  vfloat root{};
  for (int lane = 0; lane < kWidth; ++lane) root[lane] = std::sqrt(x[lane]);
  return root;
}

// The update of w, before the trust ratio.
BF_INLINE vfloat lamb_update(vfloat w, vfloat m, vfloat v, const LambNumbers& numbers) {
  return m / numbers.correction / (vsqrt(v / numbers.correction_sq) + numbers.eps) + w * numbers.weight_decay;
}

// The sum of the squares of x.
template <class T>
inline float lamb_squares(const T* x, int64_t count) {
  vfloat sum{};
  for_columns(count, [&](int64_t at, int n) {
    const vfloat value = load_n(x + at, n);
    sum += value * value;
  });
  return reduce_add(sum);
}

// Moves both moments; the sums of the squares of w and of its update.
template <class W, class G, class M>
inline LambSquares lamb_moments(const W* w, const G* g, M* m, M* v, int64_t count, const LambNumbers& numbers) {
  vfloat weight{}, update{};
  for_columns(count, [&](int64_t at, int n) {
    const vfloat grad = load_n(g + at, n) * numbers.grad_scale, old = load_n(m + at, n);
    store_n(m + at, old + (grad - old) * numbers.one_minus_beta1, n);
    store_n(v + at, load_n(v + at, n) * numbers.beta2 + grad * grad * numbers.one_minus_beta2, n);
    // As the second pass reads them: rounded to the moments' dtype.
    const vfloat u = lamb_update(load_n(w + at, n), load_n(m + at, n), load_n(v + at, n), numbers);
    // Past the end everything is 0, but u is 0 / 0 with an eps of 0.
    const vfloat x = load_n(w + at, n);
    weight += x * x;
    if (n == kWidth) {
      update += u * u;
    } else {
      for (int lane = 0; lane < n; ++lane) update[lane] += u[lane] * u[lane];
    }
  });
  return {reduce_add(weight), reduce_add(update)};
}

// w -= rate update.
template <class W, class M>
inline void lamb_weights(W* w, const M* m, const M* v, int64_t count, float rate, const LambNumbers& numbers) {
  for_columns(count, [&](int64_t at, int n) {
    const vfloat x = load_n(w + at, n);
    store_n(w + at, x - lamb_update(x, load_n(m + at, n), load_n(v + at, n), numbers) * rate, n);
  });
}

}  // namespace BF_ISA
}  // namespace bert_fast
