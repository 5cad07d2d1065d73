// GeLU and its derivative on vectors, exact (erf) or in the tanh approximation. Included by kernel files, which
// foreach_isa.h compiles once for each instruction set.

namespace bert_fast {
namespace BF_ISA {

constexpr float kSqrtHalf = 0.70710678118654752f;
constexpr float kInvSqrt2Pi = 0.39894228040143268f;
constexpr float kSqrt2OverPi = 0.79788456080286536f;
constexpr float kCubic = 0.044715f;

// The tanh approximation is u s with s = (1 + tanh w) / 2 = 1 / (1 + e^-2w), whose tails don't suffer cancellation.
// Beyond kTanhEnd in magnitude s is 0 or 1 (to 1e-38), and set so: u times a tiny s would not be 0 for the largest u,
// nor would u^2 be finite. Clamped so, a NaN stays a NaN.
constexpr float kTanhEnd = 10.0f;

BF_INLINE vfloat clamp_tanh(vfloat u) {
  return vmin(set1(kTanhEnd), vmax(set1(-kTanhEnd), u));
}

struct TanhGate {
  vfloat s, rest;  // rest = 1 - s, or 0 if s is 0
};

BF_INLINE TanhGate tanh_gate(vfloat u) {
  const vfloat v = clamp_tanh(u);
  const vfloat e = vexp((-2.0f * kSqrt2OverPi) * (v + kCubic * v * v * v));
  const vfloat s = u < -kTanhEnd ? set1(0.0f) : 1.0f / (1.0f + e);
  return {s, u > kTanhEnd ? set1(0.0f) : e * s};
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
    const vfloat v = clamp_tanh(u);
    return gate.s + u * gate.s * gate.rest * ((2.0f * kSqrt2OverPi) * (1.0f + 3.0f * kCubic * v * v));
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
