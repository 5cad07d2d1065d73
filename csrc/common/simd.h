// Vectors of float for one instruction set: BF_VECTOR_BYTES wide, in namespace bert_fast::BF_ISA (see foreach_isa.h).
// Compiler vector extensions, so that the same kernels serve SSE2, AVX2, AVX-512 and NEON; no include guard on purpose.

namespace bert_fast {
namespace BF_ISA {

constexpr int kWidth = BF_VECTOR_BYTES / 4;

typedef float vfloat __attribute__((vector_size(BF_VECTOR_BYTES)));
typedef int32_t vint __attribute__((vector_size(BF_VECTOR_BYTES)));
typedef uint32_t vuint __attribute__((vector_size(BF_VECTOR_BYTES)));
typedef uint16_t vhalf __attribute__((vector_size(BF_VECTOR_BYTES / 2)));

BF_INLINE vfloat set1(float x) {
  return x - vfloat{};  // a broadcast alone: x - 0 is x, where x + 0 would have to turn -0 into 0
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

BF_INLINE void store(float* p, vfloat v) {
  std::memcpy(p, &v, sizeof(v));
}

// Rounds to nearest even; a NaN stays a NaN.
BF_INLINE void store(bfloat16* p, vfloat v) {
  const vuint bits = bit_cast<vuint>(v);
  const vuint rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const vuint quiet = (bits >> 16) | 0x40u;
  const vhalf half = __builtin_convertvector(v == v ? rounded : quiet, vhalf);
  std::memcpy(p, &half, sizeof(half));
}

// The first n elements of a vector (n < kWidth); the others read as zero and are not written.
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

// Call body(column, n) for each vector of a row of `cols`: n is kWidth but for the last.
template <class Body>
BF_INLINE void for_columns(int64_t cols, const Body& body) {
  int64_t col = 0;
  for (; col + kWidth <= cols; col += kWidth) body(col, kWidth);
  if (col < cols) body(col, static_cast<int>(cols - col));
}

// A NaN in `a` is lost, one in `b` is kept.
BF_INLINE vfloat vmax(vfloat a, vfloat b) {
  return a > b ? a : b;
}
BF_INLINE vfloat vmin(vfloat a, vfloat b) {
  return a < b ? a : b;
}

// Pairwise, so that the order of additions is fixed by the width alone.
BF_INLINE float reduce_add(vfloat v) {
  float x[kWidth];
  store(x, v);
  for (int half = kWidth / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  }
  return x[0];
}

BF_INLINE float reduce_max(vfloat v) {
  float x[kWidth];
  store(x, v);
  for (int half = kWidth / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) x[i] = x[i] > x[i + half] ? x[i] : x[i + half];
  }
  return x[0];
}

// e^x to about 1 ulp on [-87.3, 88.3]; 0 below, e^88.3 above; a NaN stays. Range reduction to [-ln2/2, ln2/2] with ln 2
// in two parts, then the degree-6 polynomial of Cephes' expf.
BF_INLINE vfloat vexp(vfloat x) {
  const vfloat clamped = vmin(vmax(x, set1(-87.3f)), set1(88.3f));
  const vfloat shifter = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
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
  const vint exponent = (__builtin_convertvector(n, vint) + 127) << 23;
  const vfloat result = p * bit_cast<vfloat>(exponent);
  return x != x ? x : (x < set1(-87.3f) ? set1(0.0f) : result);
}

// erf(x) to a few ulp; a NaN stays: the rational minimax approximation on [-4, 4] that Eigen and XLA use (degree 13
// over 8).
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

}  // namespace BF_ISA
}  // namespace bert_fast
