// Compile one file of kernels once for each instruction set, each time in a namespace of its own.
//
// An op's `<op>_cpu.cpp` defines BF_KERNELS as its kernel file and includes this one. The kernels are then there as
// bert_fast::generic::f, bert_fast::avx2::f and bert_fast::avx512::f, and BF_DISPATCH(f) is the one that suits this
// CPU. Where BF_KERNELS_IN_PAIRS is defined too there is also bert_fast::avx512bf16::f, whose products multiply pairs
// of bfloat16, and BF_DISPATCH_PAIRS(f). The kernel file includes nothing but files of its own kind
// (common/*_kernels.h): whatever else it needs is included before, outside the target pragmas, so that no inline
// function of the standard library is ever compiled for a newer CPU than the one that runs it.
//
// BERT_FAST_EMULATED_AVX512 compiles the AVX-512 kernels alone, with vectors as wide and tiles as large, for whatever
// CPU the compiler is told: so the tests run them where there is no AVX-512 (tests/emulator/build.py).
//
// No include guard: a translation unit includes this once.

#include <type_traits>

#include "common/cpu_features.h"
#include "common/simd_prelude.h"

#if defined(BERT_FAST_EMULATED_AVX512)

#define BF_VECTOR_BYTES 64
#define BF_REGISTERS 32
#define BF_INTRINSICS 0
#define BF_ISA avx512
#define BF_PAIRS 0
#include "common/simd.h"
#include BF_KERNELS
#undef BF_ISA
#undef BF_PAIRS
#if defined(BF_KERNELS_IN_PAIRS)
#define BF_ISA avx512bf16
#define BF_PAIRS 1
#include "common/simd.h"
#include BF_KERNELS
#undef BF_ISA
#undef BF_PAIRS
#endif
#undef BF_VECTOR_BYTES
#undef BF_REGISTERS
#undef BF_INTRINSICS

#define BF_DISPATCH(...) (::bert_fast::avx512::__VA_ARGS__)

#else

#define BF_ISA generic
#define BF_VECTOR_BYTES 16
#define BF_PAIRS 0
#if defined(__x86_64__)
#define BF_REGISTERS 16
#define BF_INTRINSICS 1
#else
#define BF_REGISTERS 32
#define BF_INTRINSICS 0
#endif
#include "common/simd.h"
#include BF_KERNELS
#undef BF_ISA
#undef BF_VECTOR_BYTES
#undef BF_REGISTERS
#undef BF_INTRINSICS

#if defined(__x86_64__)
#define BF_INTRINSICS 1

#define BF_ISA avx2
#define BF_VECTOR_BYTES 32
#define BF_REGISTERS 16
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
#undef BF_REGISTERS

#define BF_VECTOR_BYTES 64
#define BF_REGISTERS 32
#define BF_ISA avx512
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
#undef BF_PAIRS

#if defined(BF_KERNELS_IN_PAIRS)
#define BF_ISA avx512bf16
#define BF_PAIRS 1
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")
#endif
#include "common/simd.h"
#include BF_KERNELS
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef BF_ISA
#undef BF_PAIRS
#endif
#undef BF_VECTOR_BYTES
#undef BF_REGISTERS
#undef BF_INTRINSICS

#define BF_DISPATCH(...)                                                                  \
  (::bert_fast::cpu_isa() >= ::bert_fast::Isa::kAvx512 ? ::bert_fast::avx512::__VA_ARGS__ \
   : ::bert_fast::cpu_isa() == ::bert_fast::Isa::kAvx2 ? ::bert_fast::avx2::__VA_ARGS__   \
                                                       : ::bert_fast::generic::__VA_ARGS__)
#else
#undef BF_PAIRS
#define BF_DISPATCH(...) (::bert_fast::generic::__VA_ARGS__)
#endif
#endif

#if defined(__x86_64__) || defined(BERT_FAST_EMULATED_AVX512)
#define BF_DISPATCH_PAIRS(...)                                                                    \
  (::bert_fast::cpu_isa() == ::bert_fast::Isa::kAvx512Bf16 ? ::bert_fast::avx512bf16::__VA_ARGS__ \
                                                           : BF_DISPATCH(__VA_ARGS__))
#else
#define BF_DISPATCH_PAIRS(...) BF_DISPATCH(__VA_ARGS__)
#endif
