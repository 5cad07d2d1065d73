// Dropout on vectors: the random bytes of a row, and the multipliers of its columns. Included by kernel files (see
// foreach_isa.h), after common/dropout.h; no include guard on purpose.

namespace bert_fast {
namespace BF_ISA {

typedef uint64_t vlong __attribute__((vector_size(BF_VECTOR_BYTES)));
typedef uint8_t vbyte __attribute__((vector_size(BF_VECTOR_BYTES / 4)));

// The 64-bit products of the low halves of 64-bit lanes: one instruction on x86, which GCC doesn't select by itself.
BF_INLINE vlong multiply_low_halves(vlong a, vlong b) {
#if BF_INTRINSICS && BF_VECTOR_BYTES == 64
  return (vlong)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b);  // unmasked, GCC 12 warns about its own header
#elif BF_INTRINSICS && BF_VECTOR_BYTES == 32
  return (vlong)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif BF_INTRINSICS
  return (vlong)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

BF_INLINE void multiply_high_low(uint32_t constant, vuint x, vuint* high, vuint* low) {
  const vlong factor = vlong{} + uint64_t{constant};
  const vlong even = multiply_low_halves(bit_cast<vlong>(x), factor);
  const vlong odd = multiply_low_halves(bit_cast<vlong>(x) >> 32, factor);
  *high = bit_cast<vuint>((even >> 32) | (odd & 0xffffffff00000000u));
  *low = bit_cast<vuint>((even & 0xffffffffu) | (odd << 32));
}

// Writes the random bytes of columns [0, cols) of one row to `bytes`, which holds dropout_bytes_size(cols). A lane
// computes the 16 bytes of one group of columns.
BF_INLINE void dropout_bytes(const Dropout& drop, uint32_t plane, uint32_t row, int64_t cols, uint8_t* bytes) {
  vuint group;
  for (int i = 0; i < kWidth; ++i) group[i] = i;
  for (int64_t col = 0; col < cols; col += 16 * kWidth, group += kWidth) {
    vuint c0 = group, c1 = vuint{} + row, c2 = vuint{} + plane, c3 = vuint{} + drop.offset;
    uint32_t k0 = drop.key[0], k1 = drop.key[1];
    for (int round = 0; round < 7; ++round) {
      vuint high0, low0, high2, low2;
      multiply_high_low(0xD2511F53u, c0, &high0, &low0);
      multiply_high_low(0xCD9E8D57u, c2, &high2, &low2);
      c0 = high2 ^ c1 ^ k0;
      c1 = low2;
      c2 = high0 ^ c3 ^ k1;
      c3 = low0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    const vuint even[2] = {interleave_low(c0, c2), interleave_high(c0, c2)};
    const vuint odd[2] = {interleave_low(c1, c3), interleave_high(c1, c3)};
    const vuint words[4] = {interleave_low(even[0], odd[0]), interleave_high(even[0], odd[0]),
                            interleave_low(even[1], odd[1]), interleave_high(even[1], odd[1])};
    std::memcpy(bytes + col, words, sizeof(words));
  }
}

// kWidth bytes as integers, which GCC would convert one at a time.
BF_INLINE vint widen(const uint8_t* bytes) {
#if BF_INTRINSICS && BF_VECTOR_BYTES == 64
  return (vint)_mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
#elif BF_INTRINSICS && BF_VECTOR_BYTES == 32
  return (vint)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
#else
  vbyte narrow;
  std::memcpy(&narrow, bytes, sizeof(narrow));
  return __builtin_convertvector(narrow, vint);
#endif
}

// The multipliers of kWidth columns from their random bytes: 0 or drop.scale.
BF_INLINE vfloat dropout_multiplier(const Dropout& drop, const uint8_t* bytes) {
  return widen(bytes) >= drop.threshold ? set1(drop.scale) : set1(0.0f);
}

}  // namespace BF_ISA
}  // namespace bert_fast
