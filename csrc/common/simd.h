// Vectors of float for one instruction set, BF_VECTOR_BYTES wide, in namespace bert_fast::BF_ISA (see foreach_isa.h).
// They are compiler vector extensions, so that the same kernels serve SSE2, AVX2, AVX-512 and NEON; intrinsics, under
// BF_INTRINSICS, only where the compiler doesn't select the instruction by itself. No include guard on purpose.

namespace bert_fast {
namespace BF_ISA {

constexpr int kWidth = BF_VECTOR_BYTES / 4;

typedef float vfloat __attribute__((vector_size(BF_VECTOR_BYTES)));
typedef int32_t vint __attribute__((vector_size(BF_VECTOR_BYTES)));
typedef uint32_t vuint __attribute__((vector_size(BF_VECTOR_BYTES)));
typedef uint16_t vhalf __attribute__((vector_size(BF_VECTOR_BYTES / 2)));

BF_INLINE vfloat set1(float x) {
  return x - vfloat{};  // compiles to a broadcast: x - 0 is x, whereas x + 0 turns -0 into 0
}

template <class To, class From>
BF_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

BF_INLINE vfloat load(const float* p) {
  vfloat v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

BF_INLINE vfloat load(const bfloat16* p) {
  vhalf half;
  std::memcpy(&half, p, sizeof(half));
  return bit_cast<vfloat>(__builtin_convertvector(half, vuint) << 16);
}

BF_INLINE vuint load(const uint32_t* p) {
  vuint v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

BF_INLINE void store(float* p, vfloat v) {
  std::memcpy(p, &v, sizeof(v));
}

BF_INLINE void store(uint32_t* p, vuint v) {
  std::memcpy(p, &v, sizeof(v));
}

// v rounded to bfloat16, to nearest even, as bits in the low halves; a NaN stays a NaN.
BF_INLINE vuint bfloat16_bits(vfloat v) {
  const vuint bits = bit_cast<vuint>(v);
  const vuint rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const vuint quiet = (bits >> 16) | 0x40u;
  return v == v ? rounded : quiet;
}

BF_INLINE void store(bfloat16* p, vfloat v) {
  const vhalf half = __builtin_convertvector(bfloat16_bits(v), vhalf);
  std::memcpy(p, &half, sizeof(half));
}

// The first n < kWidth elements of a vector; the others read as zero and are not written.
template <class T>
BF_INLINE vfloat load_first(const T* p, int n) {
  T buffer[kWidth] = {};
  std::memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}

template <class T>
BF_INLINE void store_first(T* p, vfloat v, int n) {
  T buffer[kWidth];
  store(buffer, v);
  std::memcpy(p, buffer, n * sizeof(T));
}

template <class T>
BF_INLINE vfloat load_n(const T* p, int n) {
  return n == kWidth ? load(p) : load_first(p, n);
}

template <class T>
BF_INLINE void store_n(T* p, vfloat v, int n) {
  if (n == kWidth) {
    store(p, v);
  } else {
    store_first(p, v, n);
  }
}

// Calls body(column, n) for each vector of a row of `cols`; n is kWidth except for a last partial vector.
template <class Body>
BF_INLINE void for_columns(int64_t cols, const Body& body) {
  int64_t col = 0;
  for (; col + kWidth <= cols; col += kWidth) body(col, kWidth);
  if (col < cols) body(col, static_cast<int>(cols - col));
}

// As x86's instructions: the result is b if either is a NaN, so a NaN in `a` is lost.
BF_INLINE vfloat vmax(vfloat a, vfloat b) {
  return a > b ? a : b;
}
BF_INLINE vfloat vmin(vfloat a, vfloat b) {  // GCC selects the instruction for vmax alone
#if BF_INTRINSICS && BF_VECTOR_BYTES == 64
  return (vfloat)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b);
#elif BF_INTRINSICS && BF_VECTOR_BYTES == 32
  return (vfloat)_mm256_min_ps((__m256)a, (__m256)b);
#elif BF_INTRINSICS
  return (vfloat)_mm_min_ps((__m128)a, (__m128)b);
#else
  return a < b ? a : b;
#endif
}

// Reduces v by op(low half, high half) to 4 elements, then in pairs: the order depends on the width alone.
template <class V, class Op>
BF_INLINE float reduce_halves(V v, const Op& op) {
  if constexpr (sizeof(V) > 16) {
    typedef float Half __attribute__((vector_size(sizeof(V) / 2)));
    Half halves[2];
    std::memcpy(halves, &v, sizeof(v));
    return reduce_halves(op(halves[0], halves[1]), op);
  } else {
    return op(op(v[0], v[2]), op(v[1], v[3]));
  }
}

BF_INLINE float reduce_add(vfloat v) {
  return reduce_halves(v, [](auto a, auto b) { return a + b; });
}

BF_INLINE float reduce_max(vfloat v) {
  return reduce_halves(v, [](auto a, auto b) { return a > b ? a : b; });
}

// e^x to about 1 ulp on [-87.3, 88.3]; 0 below -87.7, e^88.3 above; NaN for NaN. Range reduction to [-ln2/2, ln2/2]
// with ln 2 in two parts, then the degree-6 polynomial of Cephes' expf.
BF_INLINE vfloat vexp(vfloat x) {
  const vfloat clamped = vmin(set1(88.3f), vmax(set1(-88.02f), x));
  // Adding 1.5 * 2^23 rounds to the nearest integer n, in the low bits of the sum; adding 127 more makes those the
  // exponent bits of 2^n, or of 0 for the lowest n.
  const vfloat shifter = set1(12582912.0f + 127.0f);
  const vfloat shifted = clamped * 1.44269504088896341f + shifter;
  const vfloat n = shifted - shifter;
  const vfloat r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
  vfloat p = set1(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return p * bit_cast<vfloat>(bit_cast<vuint>(shifted) << 23);
}

// erf(x) to a few ulp; NaN for NaN. The rational minimax approximation on [-4, 4] of Eigen and XLA, of degree 13
// over 8.
BF_INLINE vfloat verf(vfloat x) {
  const vfloat c = vmin(vmax(x, set1(-4.0f)), set1(4.0f));
  const vfloat s = c * c;
  vfloat p = set1(-2.72614225801306e-10f);
  p = p * s + 2.77068142495902e-08f;
  p = p * s + -2.10102402082508e-06f;
  p = p * s + -5.69250639462346e-05f;
  p = p * s + -7.34990630326855e-04f;
  p = p * s + -2.95459980854025e-03f;
  p = p * s + -1.60960333262415e-02f;
  vfloat q = set1(-1.45660718464996e-05f);
  q = q * s + -2.13374055278905e-04f;
  q = q * s + -1.68282697438203e-03f;
  q = q * s + -7.37332916720468e-03f;
  q = q * s + -1.42647390514189e-02f;
  return x != x ? x : c * p / q;
}

// Flushes subnormal numbers to zero.
BF_INLINE vfloat flush_subnormal(vfloat v) {
  const vuint bits = bit_cast<vuint>(v);
  return bit_cast<vfloat>((bits & 0x7f800000u) != 0 ? bits : bits & 0x80000000u);
}

// sum + a.high b.high + a.low b.low in each lane, for pairs of bfloat16. Without the instruction, the same arithmetic:
// two consecutive fused multiply-adds (the product of two bfloat16 is exact in float, so rounding it changes nothing),
// with subnormal inputs and outputs flushed to zero.
BF_INLINE vfloat add_bf16_dot(vfloat sum, vuint a, vuint b) {
#if BF_BF16_DOT && BF_INTRINSICS
  return (vfloat)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
  const vfloat a_high = flush_subnormal(bit_cast<vfloat>(a & 0xffff0000u));
  const vfloat b_high = flush_subnormal(bit_cast<vfloat>(b & 0xffff0000u));
  const vfloat a_low = flush_subnormal(bit_cast<vfloat>(a << 16)), b_low = flush_subnormal(bit_cast<vfloat>(b << 16));
  return flush_subnormal(flush_subnormal(flush_subnormal(sum) + a_high * b_high) + a_low * b_low);
#endif
}

// v rounded to bfloat16 as factors of add_bf16_dot, which reads subnormal numbers as zero: so does the instruction that
// rounds them, in place of the nine of bfloat16_bits.
BF_INLINE void store_factors(bfloat16* p, vfloat v) {
#if BF_BF16_DOT && BF_INTRINSICS
  const __m256bh half = _mm512_cvtneps_pbh((__m512)v);
  std::memcpy(p, &half, sizeof(half));
#else
  store(p, flush_subnormal(v));
#endif
}

BF_INLINE void store_factors(float* p, vfloat v) {
  store(p, v);
}

// Pairs of such factors: `low` and `high` in the low and high halves of each lane.
BF_INLINE vuint pair_factors(vfloat low, vfloat high) {
#if BF_BF16_DOT && BF_INTRINSICS
  typedef uint16_t vhalves __attribute__((vector_size(BF_VECTOR_BYTES)));
  const vhalves halves = (vhalves)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  return (vuint)__builtin_shufflevector(halves, halves, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24,
                                        9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#else
  return bfloat16_bits(flush_subnormal(low)) | bfloat16_bits(flush_subnormal(high)) << 16;
#endif
}

// sum + a.0 b.0 + ... + a.3 b.3 in each lane, for four bytes, unsigned in a and signed in b. Without BF_INT8_DOT, exact
// if a.0 b.0 + a.1 b.1 and a.2 b.2 + a.3 b.3 fit in 16 bits, as with b from -64 to 64.
BF_INLINE vint add_int8_dot(vint sum, vuint a, vuint b) {
#if BF_INT8_DOT && BF_INTRINSICS
  return (vint)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif BF_INTRINSICS && BF_VECTOR_BYTES == 64
  const __m512i pairs = _mm512_maddubs_epi16((__m512i)a, (__m512i)b);
  return sum + (vint)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif BF_INTRINSICS && BF_VECTOR_BYTES == 32
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)a, (__m256i)b);
  return sum + (vint)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
  for (int shift = 0; shift < 32; shift += 8) {
    sum += (vint)(a >> shift & 0xffu) * ((vint)(b << (24 - shift)) >> 24);
  }
  return sum;
#endif
}

// Prefetches `bytes` bytes from p on.
BF_INLINE void prefetch(const void* p, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(p) + at);
}

// Interleaves the low halves of a and b, or the high ones.
#if BF_VECTOR_BYTES == 64
#define BF_LOW_HALVES 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define BF_HIGH_HALVES 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif BF_VECTOR_BYTES == 32
#define BF_LOW_HALVES 0, 8, 1, 9, 2, 10, 3, 11
#define BF_HIGH_HALVES 4, 12, 5, 13, 6, 14, 7, 15
#else
#define BF_LOW_HALVES 0, 4, 1, 5
#define BF_HIGH_HALVES 2, 6, 3, 7
#endif
#if defined(__clang__)
#define BF_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define BF_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, vuint{__VA_ARGS__})
#endif
BF_INLINE vuint interleave_low(vuint a, vuint b) {
  return BF_SHUFFLE(a, b, BF_LOW_HALVES);
}
BF_INLINE vuint interleave_high(vuint a, vuint b) {
  return BF_SHUFFLE(a, b, BF_HIGH_HALVES);
}
#undef BF_SHUFFLE
#undef BF_LOW_HALVES
#undef BF_HIGH_HALVES

// Writes rows [0, count) of the transpose of a block of kWidth x kWidth 32-bit numbers, count > 0. row_of(i) is row i
// of the block, a vuint.
template <class T, class RowOf>
BF_INLINE void transpose_rows(const RowOf& row_of, T* to, int64_t to_stride, int64_t count) {
  static_assert(sizeof(T) == 4, "32 bits");
  vuint rows[kWidth];
#pragma GCC unroll 16
  for (int row = 0; row < kWidth; ++row) rows[row] = row_of(row);
#pragma GCC unroll 4
  for (int width = 1; width < kWidth; width *= 2) {
    vuint next[kWidth];
#pragma GCC unroll 8
    for (int row = 0; row < kWidth / 2; ++row) {
      next[2 * row] = interleave_low(rows[row], rows[row + kWidth / 2]);
      next[2 * row + 1] = interleave_high(rows[row], rows[row + kWidth / 2]);
    }
#pragma GCC unroll 16
    for (int row = 0; row < kWidth; ++row) rows[row] = next[row];
  }
#pragma GCC unroll 16
  for (int row = 0; row < kWidth; ++row) {
    if (row < count) std::memcpy(to + row * to_stride, &rows[row], sizeof(vuint));
  }
}

// The same of a block in memory.
template <class T>
BF_INLINE void transpose(const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t count) {
  const auto row_of = [&](int row) {
    vuint v;
    std::memcpy(&v, from + row * from_stride, sizeof(v));
    return v;
  };
  transpose_rows(row_of, to, to_stride, count);
}

}  // namespace BF_ISA
}  // namespace bert_fast
