// Compile one file of kernels once for each instruction set, each time in a namespace of its own.
//
// A room's `<op>_cpu.cpp` defines BF_KERNELS as its kernel file and includes this one. The kernels are then there as
// bert_fast::generic::f, bert_fast::avx2::f and bert_fast::avx512::f, and BF_DISPATCH(f) is the one that suits this
// CPU. The kernel file includes nothing but files of its own kind (common/*_kernels.h): whatever else it needs is
// included before, outside the target pragmas, so that no inline function of the standard library is ever compiled for
// a newer CPU than the one that runs it.
//
// No include guard: a translation unit includes this once.

#include "common/cpu_features.h"
#include "common/simd_prelude.h"

#define BF_ISA generic
#define BF_VECTOR_BYTES 16
#include "common/simd.h"
#include BF_KERNELS
#undef BF_ISA
#undef BF_VECTOR_BYTES

#if defined(__x86_64__)

#define BF_ISA avx2
#define BF_VECTOR_BYTES 32
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#include "common/simd.h"
#include BF_KERNELS
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef BF_ISA
#undef BF_VECTOR_BYTES

#define BF_ISA avx512
#define BF_VECTOR_BYTES 64
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#endif
#include "common/simd.h"
#include BF_KERNELS
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef BF_ISA
#undef BF_VECTOR_BYTES

#define BF_DISPATCH(...)                                                                  \
  (::bert_fast::cpu_isa() == ::bert_fast::Isa::kAvx512 ? ::bert_fast::avx512::__VA_ARGS__ \
   : ::bert_fast::cpu_isa() == ::bert_fast::Isa::kAvx2 ? ::bert_fast::avx2::__VA_ARGS__   \
                                                       : ::bert_fast::generic::__VA_ARGS__)
#else
#define BF_DISPATCH(...) (::bert_fast::generic::__VA_ARGS__)
#endif
