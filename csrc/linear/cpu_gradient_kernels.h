// A block of the gradients of linear: dx = dout W and dW = dout^T x. Both multiply rows of a second factor that are
// adjacent in memory, so nothing is transposed ahead. Compiled once for each instruction set by foreach_isa.h.

#include "common/tile_kernels.h"

namespace bert_fast {
namespace BF_ISA {

// The block's part of b, (kGradientDepth, kGradientColumns), and its sums stay in L2; the group of rows of a that is
// multiplied by it, whole cache lines of a transposed factor, in L1.
constexpr int64_t kGradientDepth = 256;
constexpr int64_t kGradientColumns = 256;
constexpr int64_t kGroupRows = 4 * kRows;
constexpr int64_t kAheadRows = 8;  // that are prefetched: their stride is too large for the hardware prefetcher
static_assert(kGradientColumns % kPanel == 0 && kGroupRows % kWidth == 0, "full panels and vectors");

inline TileLayout gradient_layout() {
  return {kPanel, kRows, kGradientColumns};
}

// The scratch memory of a block of `rows` rows, in 32-bit words.
inline int64_t gradient_scratch_floats(int64_t rows) {
  return (kGroupRows + kGradientColumns) * kGradientDepth + round_up(rows, kRows) * kGradientColumns;
}

// The factor of one number, or of two that are adjacent in the summed dimension; `odd` without a second.
BF_INLINE vfloat factor_of(vfloat first, vfloat, const float*) {
  return first;
}

BF_INLINE vuint factor_of(vfloat first, vfloat second, const uint32_t*) {
  return bfloat16_bits(first) | bfloat16_bits(second) << 16;
}

// Rows `row` and, of pairs, `row` + 1 of x as factors along the rows; the second is zero from `rows` on.
template <class F, class T>
BF_INLINE auto factors_of_rows(const T* x, int64_t stride, int64_t row, int64_t rows, int64_t col, int n) {
  const vfloat first = load_n(x + row * stride + col, n);
  vfloat second{};
  if (kPerFactor<F> == 2 && row + 1 < rows) second = load_n(x + (row + 1) * stride + col, n);
  if constexpr (kPerFactor<F> == 2 && std::is_same_v<T, bfloat16>) {  // both are bfloat16 in the high halves
    return bit_cast<vuint>(first) >> 16 | bit_cast<vuint>(second);
  } else {
    return factor_of(first, second, static_cast<const F*>(nullptr));
  }
}

// to = `depth` factors of `cols` columns of the rows of b, in panels (depth, kPanel), zero-padded.
template <class F, class T>
inline void pack_second(const T* b, int64_t stride, int64_t rows, int64_t depth, int64_t cols, F* to) {
  if (cols % kPanel != 0) std::memset(to + cols / kPanel * kPanel * depth, 0, depth * kPanel * sizeof(F));
  for (int64_t k = 0; k < depth; ++k) {
    if (k + kAheadRows < depth) prefetch(b + (k + kAheadRows) * kPerFactor<F> * stride, cols * sizeof(T));
    for_columns(cols, [&](int64_t col, int n) {
      store(to + (col / kPanel * depth + k) * kPanel + col % kPanel,
            factors_of_rows<F>(b, stride, k * kPerFactor<F>, rows, col, n));
    });
  }
}

// to (depth, kGroupRows) = the same of `count` columns of the rows of a.
template <class F, class T>
inline void pack_transposed_first(const T* a, int64_t stride, int64_t rows, int64_t depth, int64_t count, F* to) {
  for (int64_t k = 0; k < depth; ++k) {
    if (k + kAheadRows < depth) prefetch(a + (k + kAheadRows) * kPerFactor<F> * stride, count * sizeof(T));
    for (int64_t col = 0; col < kGroupRows; col += kWidth) {
      const int n = static_cast<int>(std::min<int64_t>(kWidth, count - col));
      if (n <= 0) {
        std::memset(to + k * kGroupRows + col, 0, kWidth * sizeof(F));
      } else {
        store(to + k * kGroupRows + col, factors_of_rows<F>(a, stride, k * kPerFactor<F>, rows, col, n));
      }
    }
  }
}

template <class F>
BF_INLINE bool is_aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % sizeof(F) == 0;
}

// to (count rounded up to kStep, kGradientDepth) = `terms` numbers of `count` rows of a, as factors along the row.
template <class F, class T>
inline void pack_first(const T* a, int64_t stride, int64_t terms, int64_t count, F* to) {
  using Number = std::conditional_t<kPerFactor<F> == 1, float, bfloat16>;
  const int64_t padded = round_up(count, kStep);
  for (int64_t row = 0; row < padded; ++row) {
    F* factors = to + row * kGradientDepth;
    if (row >= count || terms % kPerFactor<F> != 0) std::memset(factors, 0, depth_of<F>(terms) * sizeof(F));
    if (row >= count) continue;
    auto* numbers = reinterpret_cast<Number*>(factors);
    if constexpr (std::is_same_v<T, Number>) {
      std::memcpy(numbers, a + row * stride, terms * sizeof(T));
    } else {
      for_columns(terms, [&](int64_t col, int n) { store_n(numbers + col, load_n(a + row * stride + col, n), n); });
    }
  }
}

// out (rows, cols) = a b, or += if `accumulate`: a is (rows, terms), stored as (terms, rows) if TRANSPOSED, and b
// (terms, cols). Long sums are sums of short ones, in the order of the terms.
template <bool TRANSPOSED, class A, class B, class O>
inline void gradient_block(const A* a, int64_t a_stride, const B* b, int64_t b_stride, O* out, int64_t out_stride,
                           int64_t rows, int64_t cols, int64_t terms, bool accumulate, float* scratch) {
  using F = Factor<A>;
  F* first = reinterpret_cast<F*>(scratch);
  F* second = first + kGroupRows * kGradientDepth;
  float* sums = scratch + (kGroupRows + kGradientColumns) * kGradientDepth;
  const int64_t step = kGradientDepth * kPerFactor<F>, panels = round_up(cols, kPanel) / kPanel;
  for (int64_t start = 0; start == 0 || start < terms; start += step) {
    const int64_t part = std::min(step, terms - start), depth = depth_of<F>(part);
    pack_second(b + start * b_stride, b_stride, part, depth, cols, second);
    for (int64_t row = 0; row < rows; row += kGroupRows) {
      const int64_t count = std::min(kGroupRows, rows - row), padded = round_up(count, kStep);
      const F* group = first;
      int64_t lda = TRANSPOSED ? kGroupRows : kGradientDepth;
      if constexpr (!TRANSPOSED && sizeof(A) * kPerFactor<F> == sizeof(F)) {
        const A* rows_of_group = a + row * a_stride + start;
        if (count % kStep == 0 && (part | a_stride) % kPerFactor<F> == 0 && is_aligned<F>(rows_of_group)) {
          group = reinterpret_cast<const F*>(rows_of_group);
          lda = a_stride / kPerFactor<F>;
        }
      }
      if (group == first) {
        if constexpr (TRANSPOSED) {
          pack_transposed_first(a + start * a_stride + row, a_stride, part, depth, count, first);
        } else {
          pack_first(a + row * a_stride + start, a_stride, part, count, first);
        }
      }
      for (int64_t at = 0; at < padded; at += kRows) {  // a tile of rows stays in L1 for all panels
        const F* tile_rows = group + at * (TRANSPOSED ? 1 : lda);
        const int64_t tile_count = std::min<int64_t>(kRows, padded - at);
        for (int64_t panel = 0; panel < panels; ++panel) {
          float* c = sums + (row + at) * kGradientColumns + panel * kPanel;
          const F* from = second + panel * depth * kPanel;
          if (start == 0) {
            tiles<TRANSPOSED, false>(tile_rows, lda, from, kPanel, c, kGradientColumns, tile_count, depth);
          } else {
            tiles<TRANSPOSED, true>(tile_rows, lda, from, kPanel, c, kGradientColumns, tile_count, depth);
          }
        }
      }
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    for_columns(cols, [&](int64_t col, int n) {
      const vfloat sum = load(sums + row * kGradientColumns + col);
      O* to = out + row * out_stride + col;
      store_n(to, accumulate ? load_n(to, n) + sum : sum, n);
    });
  }
}

}  // namespace BF_ISA
}  // namespace bert_fast
