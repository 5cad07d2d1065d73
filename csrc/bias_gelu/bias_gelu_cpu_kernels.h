// One pass over the rows: reads x, writes out (forward); reads dout and x, writes dx and adds up dbias (backward).
// Compiled once for each instruction set by foreach_isa.h.

namespace bert_fast {
namespace BF_ISA {

constexpr float kSqrtHalf = 0.70710678118654752f;
constexpr float kInvSqrt2Pi = 0.39894228040143268f;
constexpr float kSqrt2OverPi = 0.79788456080286536f;
constexpr float kCubic = 0.044715f;

// The tanh approximation as u s with s = (1 + tanh w) / 2 = 1 / (1 + e^-2w), whose tails don't cancel.
struct TanhGate {
  vfloat s, rest;  // rest = 1 - s
};

BF_INLINE TanhGate tanh_gate(vfloat u) {
  const vfloat e = vexp((-2.0f * kSqrt2OverPi) * (u + kCubic * u * u * u));
  const vfloat s = 1.0f / (1.0f + e);
  return {s, e * s};
}

template <bool TANH>
BF_INLINE vfloat gelu(vfloat u) {
  if (TANH) return u * tanh_gate(u).s;
  return 0.5f * u * (1.0f + verf(u * kSqrtHalf));
}

template <bool TANH>
BF_INLINE vfloat gelu_grad(vfloat u) {
  if (TANH) {
    const TanhGate gate = tanh_gate(u);
    return gate.s + u * gate.s * gate.rest * ((2.0f * kSqrt2OverPi) * (1.0f + 3.0f * kCubic * u * u));
  }
  return 0.5f * (1.0f + verf(u * kSqrtHalf)) + u * (kInvSqrt2Pi * vexp(-0.5f * u * u));
}

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
