// GeLU and its derivative on vectors, exact (erf) or in the tanh approximation. Included by kernel files, which
// foreach_isa.h compiles once for each instruction set.

namespace bert_fast {
namespace BF_ISA {

constexpr float kSqrtHalf = 0.70710678118654752f;
constexpr float kInvSqrt2Pi = 0.39894228040143268f;
constexpr float kSqrt2OverPi = 0.79788456080286536f;
constexpr float kCubic = 0.044715f;

// The tanh approximation is u s with s = (1 + tanh w) / 2 = 1 / (1 + e^-2w), whose tails don't suffer cancellation.
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

// ACTIVATION is an Activation of common/activation.h.
template <int ACTIVATION>
BF_INLINE vfloat activate(vfloat u) {
  return ACTIVATION == kNone ? u : gelu<ACTIVATION == kGeluTanh>(u);
}

}  // namespace BF_ISA
}  // namespace bert_fast
