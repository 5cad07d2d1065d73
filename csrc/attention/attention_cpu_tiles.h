// The parts of which both passes are made: packing to float, and the register-tiled product. Included by
// attention_cpu_kernels.h, once for each instruction set; no include guard on purpose.

namespace bert_fast {
namespace BF_ISA {

constexpr int kRows = 6;            // 6 x 2 accumulators, 2 vectors of b and a broadcast: 15 of AVX2's 16 registers
constexpr int kPanel = 2 * kWidth;  // columns of a tile
// Depth of a product over keys: 6 rows and a panel stay in the L1 cache, and a long sum is one of short sums, which
// keeps more of its digits.
constexpr int64_t kDepth = 128;

BF_INLINE int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// c (kRows, kPanel) = a b, or += a b: a (kRows, depth), stored (depth, kRows) if TRANSPOSED; b (depth, kPanel).
template <bool TRANSPOSED, bool ACCUMULATE>
inline void tile(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t depth) {
  vfloat sum[kRows][2] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const vfloat b0 = load(b + k * ldb), b1 = load(b + k * ldb + kWidth);
    for (int row = 0; row < kRows; ++row) {
      const float x = TRANSPOSED ? a[k * lda + row] : a[row * lda + k];
      sum[row][0] += b0 * x;
      sum[row][1] += b1 * x;
    }
  }
  for (int row = 0; row < kRows; ++row) {
    float* to = c + row * ldc;
    store(to, ACCUMULATE ? load(to) + sum[row][0] : sum[row][0]);
    store(to + kWidth, ACCUMULATE ? load(to + kWidth) + sum[row][1] : sum[row][1]);
  }
}

// c (rows, panels x kPanel) = a b with b in panels, each (depth, kPanel) in one piece. `rows` counts whole tiles.
inline void product(const float* a, int64_t lda, const float* b, float* c, int64_t ldc, int64_t rows, int64_t panels,
                    int64_t depth) {
  for (int64_t start = 0; start < depth; start += kDepth) {
    const int64_t part = std::min(kDepth, depth - start);
    for (int64_t panel = 0; panel < panels; ++panel) {
      const float* from = b + (panel * depth + start) * kPanel;
      for (int64_t row = 0; row < rows; row += kRows) {
        float* to = c + row * ldc + panel * kPanel;
        if (start == 0) {
          tile<false, false>(a + row * lda, lda, from, kPanel, to, ldc, part);
        } else {
          tile<false, true>(a + row * lda + start, lda, from, kPanel, to, ldc, part);
        }
      }
    }
  }
}

// c (rows, cols) += a^T b: a (depth, rows), b (depth, cols), all row-major. `rows` counts whole tiles, `cols` whole
// panels.
inline void add_transposed_product(const float* a, int64_t lda, const float* b, float* c, int64_t cols, int64_t rows,
                                   int64_t depth) {
  for (int64_t row = 0; row < rows; row += kRows) {
    for (int64_t col = 0; col < cols; col += kPanel) {
      tile<true, true>(a + row, lda, b + col, cols, c + row * cols + col, cols, depth);
    }
  }
}

// to (rows, cols) = (from + bias) * scale, with zeros from `dim` to `cols` and in rows up to the next whole tile.
template <class T>
inline void pack_rows(const T* from, int64_t stride, const float* bias, float scale, int64_t rows, int64_t dim,
                      float* to, int64_t cols) {
  std::memset(to + rows * cols, 0, (round_up(rows, kRows) - rows) * cols * sizeof(float));
  if (cols != dim) std::memset(to, 0, rows * cols * sizeof(float));
  for (int64_t row = 0; row < rows; ++row) {
    for_columns(dim, [&](int64_t col, int n) {
      const vfloat x = load_n(from + row * stride + col, n);
      store(to + row * cols + col, (bias ? x + load_n(bias + col, n) : x) * scale);
    });
  }
}

// to: panels of (rows, kPanel), the columns of from + bias, with zeros behind the last.
template <class T>
inline void pack_panels(const T* from, int64_t stride, const float* bias, int64_t rows, int64_t dim, float* to) {
  const int64_t cols = round_up(dim, kPanel);
  if (cols != dim) std::memset(to, 0, rows * cols * sizeof(float));
  for (int64_t row = 0; row < rows; ++row) {
    for_columns(dim, [&](int64_t col, int n) {
      const vfloat x = load_n(from + row * stride + col, n);
      store(to + (col / kPanel * rows + row) * kPanel + col % kPanel, bias ? x + load_n(bias + col, n) : x);
    });
  }
}

// to: panels of (dim, kPanel), the columns of (from + bias)^T, that is rows of `from`, with zeros behind the last.
// `rows_of_panel` has room for kPanel rows of `dim` rounded up to whole panels.
template <class T>
inline void pack_transposed(const T* from, int64_t stride, const float* bias, int64_t rows, int64_t dim, float* to,
                            float* rows_of_panel) {
  const int64_t cols = round_up(dim, kPanel);
  for (int64_t start = 0; start < rows; start += kPanel) {
    const int64_t count = std::min<int64_t>(kPanel, rows - start);
    if (count < kPanel) std::memset(rows_of_panel, 0, kPanel * cols * sizeof(float));
    pack_rows(from + start * stride, stride, bias, 1.0f, count, dim, rows_of_panel, cols);
    for (int64_t col = 0; col < dim; ++col) {
      for (int row = 0; row < kPanel; ++row) to[col * kPanel + row] = rows_of_panel[row * cols + col];
    }
    to += dim * kPanel;
  }
}

}  // namespace BF_ISA
}  // namespace bert_fast
