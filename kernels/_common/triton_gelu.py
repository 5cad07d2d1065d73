"""GeLU with the exact erf, and its derivative, in Triton: without branches, one exponential for both.

With a = |u|, the upper tail of the normal distribution is Q(a) = t P(t) exp(-a^2 / 2), t = 1 / (1 + C a), where P of
degree 7 was fitted to the relative error: 1.8e-7 for a up to 14.5, where exp(-a^2 / 2) is the smallest float32. So GeLU
is max(u, 0) - a Q(a) with an absolute error of 2.4e-7 in float32 (eager PyTorch's: 1.2e-6), and for negative u a
relative one, where 1 + erf cancels. tl.erf is some thirty instructions, with a branch.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tail(a):
    """Q(a) and exp(-a^2 / 2)."""
    t = 1.0 / (1.0 + 0.3111269772052765 * a)
    p = 0.035647228360176086 * t - 0.13912904262542725
    p = p * t + 0.14862486720085144
    p = p * t - 0.010363727807998657
    p = p * t + 0.10805947333574295
    p = p * t + 0.10860736668109894
    p = p * t + 0.12444401532411575
    p = p * t + 0.1241098940372467
    e = tl.exp2(-0.7213475204444817 * a * a)
    return p * t * e, e


@triton.jit
def gelu(u):
    """0.5 u (1 + erf(u / sqrt(2))); u is float32. NaN for NaN, infinity for infinity, 0 for -infinity."""
    a = tl.abs(u)
    q, _ = _tail(a)
    return tl.maximum(u, 0.0) - tl.minimum(a, 15.0) * q  # q is 0 from 15 on, and NaN for NaN


@triton.jit
def gelu_derivative(u):
    """Phi(u) + u phi(u); u is float32."""
    a = tl.abs(u)
    q, e = _tail(a)
    return tl.where(u >= 0.0, 1.0 - q, q) + tl.minimum(tl.maximum(u, -15.0), 15.0) * (0.3989422804014327 * e)
