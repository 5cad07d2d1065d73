// The activation of a linear layer as the operators encode it (kernels/_common/activation.py).
#pragma once

#include <type_traits>

#include "common/tensor.h"

namespace bert_fast {

enum Activation : int { kNone = 0, kGelu = 1, kGeluTanh = 2 };

// Run `body` with the activation as a constant.
template <class Body>
inline void dispatch_activation(int64_t activation, const char* name, const Body& body) {
  STD_TORCH_CHECK(activation >= kNone && activation <= kGeluTanh, name, ": unknown activation ", activation);
  if (activation == kNone) body(std::integral_constant<int, kNone>{});
  if (activation == kGelu) body(std::integral_constant<int, kGelu>{});
  if (activation == kGeluTanh) body(std::integral_constant<int, kGeluTanh>{});
}

}  // namespace bert_fast
