// Packing and the products of packed operands, for both passes. Included by cpu_kernels.h, once for each instruction
// set; no include guard on purpose.

#include "common/tile_kernels.h"

namespace bert_fast {
namespace BF_ISA {

// The depth of a product over keys: the rows of a tile and a panel stay in L1, and a long sum is a sum of short sums,
// with a smaller rounding error.
constexpr int64_t kDepth = 128;
constexpr int64_t kAhead = 6;  // rows that are prefetched: their stride is too large for the hardware prefetcher

// A vector of factors from rows that are adjacent in the summed dimension.
BF_INLINE vfloat join(const vfloat (&rows)[1]) {
  return rows[0];
}

BF_INLINE vuint join(const vfloat (&rows)[2]) {
  return pair_factors(rows[0], rows[1]);
}

// c (rows, panels x kPanel) = a b, with b in contiguous panels (depth, kPanel). `rows` is a multiple of kStep.
template <class F>
inline void product(const F* a, int64_t lda, const F* b, float* c, int64_t ldc, int64_t rows, int64_t panels,
                    int64_t depth) {
  for (int64_t start = 0; start < depth; start += kDepth) {
    const int64_t part = std::min(kDepth, depth - start);
    for (int64_t panel = 0; panel < panels; ++panel) {
      const F* from = b + (panel * depth + start) * kPanel;
      float* to = c + panel * kPanel;
      if (start == 0) {
        tiles<false, false>(a, lda, from, kPanel, to, ldc, rows, part);
      } else {
        tiles<false, true>(a + start, lda, from, kPanel, to, ldc, rows, part);
      }
    }
  }
}

// c (rows, cols) += a^T b for row-major a (depth, rows) and b (depth, cols). `rows` is a multiple of kStep, `cols` of
// kPanel.
template <class F>
inline void add_transposed_product(const F* a, int64_t lda, const F* b, float* c, int64_t cols, int64_t rows,
                                   int64_t depth) {
  for (int64_t col = 0; col < cols; col += kPanel) {
    tiles<true, true>(a, lda, b + col, cols, c + col, cols, rows, depth);
  }
}

// Rows of a head, the bias that is added to each, and the number of rows that follow them (for prefetching).
template <class T>
struct HeadRows {
  const T* first;
  int64_t stride;
  const float* bias;
  int64_t count, dim, more;

  BF_INLINE vfloat read(int64_t row, int64_t col, int n) const {
    const vfloat x = load_n(first + row * stride + col, n);
    return bias ? x + load_n(bias + col, n) : x;
  }

  BF_INLINE void prefetch_row(int64_t row) const {
    if (row < count + more) prefetch(first + row * stride, dim * sizeof(T));
  }

  HeadRows part(int64_t row, int64_t rows) const {
    return {first + row * stride, stride, bias, rows, dim, count - row - rows + more};
  }
};

// to (count, cols) = the rows times `scale`, which is 1, -1 or 0, as factors along the row, zero-padded to `cols` and
// to a multiple of kStep rows.
template <class F, class T>
inline void pack_rows(const HeadRows<T>& rows, float scale, F* to, int64_t cols) {
  std::memset(to + rows.count * cols, 0, (round_up(rows.count, kStep) - rows.count) * cols * sizeof(F));
  if (cols * kPerFactor<F> != rows.dim) std::memset(to, 0, rows.count * cols * sizeof(F));
  for (int64_t row = 0; row < rows.count; ++row) {
    rows.prefetch_row(row + kAhead);
    auto* numbers = reinterpret_cast<std::conditional_t<kPerFactor<F> == 1, float, bfloat16>*>(to + row * cols);
    for_columns(rows.dim, [&](int64_t col, int n) { store_factors(numbers + col, rows.read(row, col, n) * scale); });
  }
}

// to = the rows in zero-padded panels (depth_of(count), kPanel), as factors along the columns.
template <class F, class T>
inline void pack_panels(const HeadRows<T>& rows, F* to) {
  constexpr int kTogether = kPerFactor<F>;
  const int64_t cols = round_up(rows.dim, kPanel), depth = depth_of<F>(rows.count);
  if (cols != rows.dim) std::memset(to, 0, depth * cols * sizeof(F));
  for (int64_t index = 0; index < depth; ++index) {
    for (int i = 0; i < kTogether; ++i) rows.prefetch_row((index + kAhead) * kTogether + i);
    for_columns(rows.dim, [&](int64_t col, int n) {
      vfloat x[kTogether] = {};
      for (int i = 0; i < kTogether; ++i) {
        const int64_t row = index * kTogether + i;
        if (row < rows.count) x[i] = rows.read(row, col, n);
      }
      store(to + (col / kPanel * depth + index) * kPanel + col % kPanel, join(x));
    });
  }
}

// to = the transposed rows in zero-padded panels (depth_of(dim), kPanel), as factors along the rows. `rows_of_panel` is
// scratch memory of kPanel rows of `dim` rounded up to full panels.
template <class F, class T>
inline void pack_transposed(const HeadRows<T>& rows, F* to, F* rows_of_panel) {
  const int64_t cols = round_up(rows.dim, kPanel), depth = depth_of<F>(rows.dim);
  for (int64_t start = 0; start < rows.count; start += kPanel) {
    const int64_t count = std::min<int64_t>(kPanel, rows.count - start);
    if (count < kPanel) std::memset(rows_of_panel, 0, kPanel * cols * sizeof(F));
    pack_rows(rows.part(start, count), 1.0f, rows_of_panel, cols);
    for (int64_t col = 0; col < round_up(depth, kWidth); col += kWidth) {
      for (int64_t row = 0; row < kPanel; row += kWidth) {
        transpose(rows_of_panel + row * cols + col, cols, to + col * kPanel + row, kPanel, depth - col);
      }
    }
    to += depth * kPanel;
  }
}

}  // namespace BF_ISA
}  // namespace bert_fast
