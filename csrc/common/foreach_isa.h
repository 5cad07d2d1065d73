// Compiles a file of kernels once for each instruction set, each time in a namespace of its own.
//
// csrc/<op>/cpu.cpp defines BF_KERNELS as its kernel file and includes this one. A kernel f then exists as
// bert_fast::generic::f, bert_fast::avx2::f and bert_fast::avx512::f, and BF_DISPATCH(f) is the one for this CPU. With
// BF_KERNELS_BF16_DOT there is also bert_fast::avx512bf16::f, which multiplies pairs of bfloat16, and
// BF_DISPATCH_BF16_DOT(f); with BF_KERNELS_INT8_DOT bert_fast::avx512vnni::f, which multiplies four bytes a lane, and
// BF_DISPATCH_INT8_DOT(f). The kernel file includes only files of its own kind (common/*_kernels.h): everything else is
// included before, outside the target pragmas, so that no inline function of the standard library is compiled for a
// newer CPU than the one that runs it.
//
// BERT_FAST_EMULATED_AVX512 compiles the AVX-512 kernels alone, with the same vectors and tiles, for the compiler's
// target, so that the tests run them on other CPUs (tests/emulator/build.py).
//
// No include guard: a translation unit includes this once.

#include <type_traits>

#include "common/cpu_features.h"
#include "common/simd_prelude.h"

#define BF_PRAGMA(...) _Pragma(#__VA_ARGS__)
#if defined(BERT_FAST_EMULATED_AVX512)
#define BF_PUSH_TARGET(features)
#define BF_POP_TARGET
#elif defined(__clang__)
#define BF_PUSH_TARGET(features) BF_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define BF_POP_TARGET BF_PRAGMA(clang attribute pop)
#else
#define BF_PUSH_TARGET(features) BF_PRAGMA(GCC push_options) BF_PRAGMA(GCC target(features))
#define BF_POP_TARGET BF_PRAGMA(GCC pop_options)
#endif

#if defined(__x86_64__) && !defined(BERT_FAST_EMULATED_AVX512)
#define BF_INTRINSICS 1
#else
#define BF_INTRINSICS 0
#endif

#if !defined(BERT_FAST_EMULATED_AVX512)
#define BF_ISA generic
#define BF_VECTOR_BYTES 16
#if defined(__x86_64__)
#define BF_REGISTERS 16
#else
#define BF_REGISTERS 32
#endif
#define BF_BF16_DOT 0
#define BF_INT8_DOT 0
#include "common/isa_pass.h"
#endif

#if BF_INTRINSICS
#define BF_ISA avx2
#define BF_VECTOR_BYTES 32
#define BF_REGISTERS 16
#define BF_BF16_DOT 0
#define BF_INT8_DOT 0
BF_PUSH_TARGET("avx2,fma")
#include "common/isa_pass.h"
BF_POP_TARGET
#endif

#if BF_INTRINSICS || defined(BERT_FAST_EMULATED_AVX512)
#define BF_ISA avx512
#define BF_VECTOR_BYTES 64
#define BF_REGISTERS 32
#define BF_BF16_DOT 0
#define BF_INT8_DOT 0
BF_PUSH_TARGET("avx512f,avx512bw,avx512dq,avx512vl,fma")
#include "common/isa_pass.h"
BF_POP_TARGET

#if defined(BF_KERNELS_BF16_DOT)
#define BF_ISA avx512bf16
#define BF_VECTOR_BYTES 64
#define BF_REGISTERS 32
#define BF_BF16_DOT 1
#define BF_INT8_DOT 0
BF_PUSH_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")
#include "common/isa_pass.h"
BF_POP_TARGET
#endif

#if defined(BF_KERNELS_INT8_DOT) && BF_INTRINSICS
#define BF_ISA avx512vnni
#define BF_VECTOR_BYTES 64
#define BF_REGISTERS 32
#define BF_BF16_DOT 0
#define BF_INT8_DOT 1
BF_PUSH_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")
#include "common/isa_pass.h"
BF_POP_TARGET
#endif

#define BF_DISPATCH_BF16_DOT(...)                                                                 \
  (::bert_fast::cpu_isa() == ::bert_fast::Isa::kAvx512Bf16 ? ::bert_fast::avx512bf16::__VA_ARGS__ \
                                                           : BF_DISPATCH(__VA_ARGS__))
#else
#define BF_DISPATCH_BF16_DOT(...) BF_DISPATCH(__VA_ARGS__)
#endif

#if defined(BERT_FAST_EMULATED_AVX512)
#define BF_DISPATCH(...) (::bert_fast::avx512::__VA_ARGS__)
#elif BF_INTRINSICS
#define BF_DISPATCH(...)                                                                  \
  (::bert_fast::cpu_isa() >= ::bert_fast::Isa::kAvx512 ? ::bert_fast::avx512::__VA_ARGS__ \
   : ::bert_fast::cpu_isa() == ::bert_fast::Isa::kAvx2 ? ::bert_fast::avx2::__VA_ARGS__   \
                                                       : ::bert_fast::generic::__VA_ARGS__)
#else
#define BF_DISPATCH(...) (::bert_fast::generic::__VA_ARGS__)
#endif

#if BF_INTRINSICS
#define BF_DISPATCH_INT8_DOT(...) \
  (::bert_fast::has_int8_dot() ? ::bert_fast::avx512vnni::__VA_ARGS__ : BF_DISPATCH(__VA_ARGS__))
#else
#define BF_DISPATCH_INT8_DOT(...) BF_DISPATCH(__VA_ARGS__)
#endif
