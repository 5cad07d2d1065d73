// The instruction set that the CPU kernels use: the best that this CPU supports, or a lower one by
// BERT_FAST_CPU_ISA=generic|avx2|avx512|avx512bf16.
#pragma once

#include <cstdlib>
#include <cstring>

namespace bert_fast {

enum class Isa { kGeneric = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

constexpr const char* kIsaNames[] = {"generic", "avx2", "avx512", "avx512bf16"};

// The best that both the CPU and the operating system support, from the compiler's runtime.
inline Isa best_isa() {
#if defined(BERT_FAST_EMULATED_AVX512)
  return Isa::kAvx512Bf16;
#elif defined(__x86_64__)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::kGeneric;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return Isa::kAvx2;
  }
  return __builtin_cpu_supports("avx512bf16") ? Isa::kAvx512Bf16 : Isa::kAvx512;
#else
  return Isa::kGeneric;
#endif
}

inline Isa detect_isa() {
  const Isa best = best_isa();
  if (const char* requested = std::getenv("BERT_FAST_CPU_ISA")) {
    for (int isa = 0; isa <= static_cast<int>(best); ++isa) {
      if (std::strcmp(requested, kIsaNames[isa]) == 0) return static_cast<Isa>(isa);
    }
  }
  return best;
}

inline Isa cpu_isa() {
  static const Isa isa = detect_isa();
  return isa;
}

// Whether the kernels add four products of bytes in INT32 (VNNI), which is exact for all of them. A lower instruction
// set by BERT_FAST_CPU_ISA does without, so that the code for older CPUs can be tested.
inline bool has_int8_dot() {
#if defined(__x86_64__) && !defined(BERT_FAST_EMULATED_AVX512)
  static const bool has = cpu_isa() >= Isa::kAvx512 && cpu_isa() == best_isa() && __builtin_cpu_supports("avx512vnni");
  return has;
#else
  return false;
#endif
}

inline const char* isa_name() {
  return kIsaNames[static_cast<int>(cpu_isa())];
}

}  // namespace bert_fast
