// Which of the compiled instruction sets this CPU runs. BERT_FAST_CPU_ISA=generic|avx2|avx512 lowers the choice.
#pragma once

#include <cstdlib>
#include <cstring>

namespace bert_fast {

enum class Isa { kGeneric = 0, kAvx2 = 1, kAvx512 = 2 };

inline Isa detect_isa() {
#if defined(__x86_64__)
  Isa best = Isa::kGeneric;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    best = Isa::kAvx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      best = Isa::kAvx512;
    }
  }
  if (const char* wanted = std::getenv("BERT_FAST_CPU_ISA")) {
    if (std::strcmp(wanted, "generic") == 0) return Isa::kGeneric;
    if (std::strcmp(wanted, "avx2") == 0 && best >= Isa::kAvx2) return Isa::kAvx2;
  }
  return best;
#else
  return Isa::kGeneric;
#endif
}

inline Isa cpu_isa() {
  static const Isa isa = detect_isa();
  return isa;
}

inline const char* isa_name() {
  switch (cpu_isa()) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "generic";
  }
}

}  // namespace bert_fast
