// Everything that kernel files may use from outside, included before any target pragma (see foreach_isa.h).
#pragma once

#include <algorithm>
#include <array>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/philox.h"

#define BF_INLINE inline __attribute__((always_inline))

namespace bert_fast {

// Storage only: the kernels compute in float.
struct bfloat16 {
  uint16_t bits;
};

}  // namespace bert_fast
