// Register-tiled matrix products, for attention and linear. Included by kernel files, which foreach_isa.h compiles once
// for each instruction set.

namespace bert_fast {
namespace BF_ISA {

// A register tile needs kRows x 2 accumulators, 2 vectors of b and a broadcast: 15 of 16 registers, or 27 of 32. The
// last rows of a product use a tile of kStep rows if they fit.
constexpr int kRows = BF_REGISTERS >= 32 ? 12 : 6;
constexpr int kStep = kRows / 2;
constexpr int kPanel = 2 * kWidth;  // columns of a tile

BF_INLINE int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// A 32-bit factor of a product: a float or, with BF_BF16_DOT, two bfloat16 numbers that are adjacent in the summed
// dimension, the first in the low half.
#if BF_BF16_DOT
template <class T>
using Factor = std::conditional_t<std::is_same_v<T, bfloat16>, uint32_t, float>;
#else
template <class T>
using Factor = float;
#endif

template <class F>
constexpr int kPerFactor = std::is_same_v<F, float> ? 1 : 2;

// The number of factors that hold n numbers.
template <class F>
BF_INLINE int64_t depth_of(int64_t n) {
  return (n + kPerFactor<F> - 1) / kPerFactor<F>;
}

BF_INLINE vfloat multiply_add(vfloat sum, float a, vfloat b) {
  return sum + b * a;
}

BF_INLINE vfloat multiply_add(vfloat sum, uint32_t a, vuint b) {
  return add_bf16_dot(sum, vuint{} + a, b);
}

// A tile prefetches one cache line every kLineSteps steps: a core that prefetches many at once stalls on the first.
constexpr int kLineSteps = 64 / kPanel;
constexpr int64_t kLineFloats = 16;

// c (ROWS, kPanel) = a b, or += a b if ACCUMULATE: a is (ROWS, depth), stored as (depth, ROWS) if TRANSPOSED; b is
// (depth, kPanel). With AHEAD it also prefetches depth / kLineSteps cache lines from `ahead` on into L2.
template <int ROWS, bool TRANSPOSED, bool ACCUMULATE, bool AHEAD = false, class F>
inline void tile(const F* a, int64_t lda, const F* b, int64_t ldb, float* c, int64_t ldc, int64_t depth,
                 const F* ahead = nullptr) {
  vfloat sum[ROWS][2] = {};
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; ++k) {
    const auto b0 = load(b + k * ldb), b1 = load(b + k * ldb + kWidth);
    if (AHEAD && k % kLineSteps == 0) __builtin_prefetch(ahead + k / kLineSteps * kLineFloats, 0, 2);
#pragma GCC unroll 12
    for (int row = 0; row < ROWS; ++row) {
      F x;
      std::memcpy(&x, a + (TRANSPOSED ? k * lda + row : row * lda + k), sizeof(x));
      sum[row][0] = multiply_add(sum[row][0], x, b0);
      sum[row][1] = multiply_add(sum[row][1], x, b1);
    }
  }
#pragma GCC unroll 12
  for (int row = 0; row < ROWS; ++row) {
    float* to = c + row * ldc;
    store(to, ACCUMULATE ? load(to) + sum[row][0] : sum[row][0]);
    store(to + kWidth, ACCUMULATE ? load(to + kWidth) + sum[row][1] : sum[row][1]);
  }
}

// All rows of a panel of c; `rows` is a multiple of kStep.
template <bool TRANSPOSED, bool ACCUMULATE, bool AHEAD = false, class F>
BF_INLINE void tiles(const F* a, int64_t lda, const F* b, int64_t ldb, float* c, int64_t ldc, int64_t rows,
                     int64_t depth, const F* ahead = nullptr) {
  const int64_t next = TRANSPOSED ? 1 : lda;
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) {
    tile<kRows, TRANSPOSED, ACCUMULATE, AHEAD>(a + row * next, lda, b, ldb, c + row * ldc, ldc, depth, ahead);
  }
  if (row < rows) {
    tile<kStep, TRANSPOSED, ACCUMULATE, AHEAD>(a + row * next, lda, b, ldb, c + row * ldc, ldc, depth, ahead);
  }
}

// The heights of the tiles of a product's last rows: quarters of ROWS where they are whole, else halves.
template <int ROWS>
constexpr int kTail = ROWS % 4 == 0 ? ROWS / 4 : ROWS / 2;

// Calls body(constant) with the lowest tile that holds `count` <= ROWS rows.
template <int ROWS, int HEIGHT = kTail<ROWS>, class Body>
BF_INLINE void with_height(int64_t count, const Body& body) {
  if constexpr (HEIGHT >= ROWS) {
    body(std::integral_constant<int, ROWS>{});
  } else if (count <= HEIGHT) {
    body(std::integral_constant<int, HEIGHT>{});
  } else {
    with_height<ROWS, HEIGHT + kTail<ROWS>>(count, body);
  }
}

}  // namespace BF_ISA
}  // namespace bert_fast
