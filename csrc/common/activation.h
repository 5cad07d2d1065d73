// The activation of a linear layer as the operators encode it: 0 none, 1 GeLU with erf, 2 GeLU with tanh.
#pragma once

#include <type_traits>

#include "common/tensor.h"

namespace bert_fast {

// Run `body` with the activation as a constant.
template <class Body>
inline void dispatch_activation(int64_t activation, const char* name, const Body& body) {
  STD_TORCH_CHECK(activation >= 0 && activation <= 2, name, ": unknown activation ", activation);
  if (activation == 0) body(std::integral_constant<int, 0>{});
  if (activation == 1) body(std::integral_constant<int, 1>{});
  if (activation == 2) body(std::integral_constant<int, 2>{});
}

}  // namespace bert_fast
