// A block of the output: rows of x by panels of a packed weight. Compiled once for each instruction set by
// foreach_isa.h.

#include "common/gelu_kernels.h"
#include "common/tile_kernels.h"

namespace bert_fast {
namespace BF_ISA {

// The depth of a pass over a block: the rows of x of a tile stay in L1, the panels of a block in L2.
constexpr int64_t kPassDepth = 768;
constexpr int64_t kSumDepth = 384;  // a long sum is a sum of short sums, with a smaller rounding error
constexpr int64_t kBlockColumns = 64;
static_assert(kBlockColumns % kPanel == 0, "full panels");

inline TileLayout linear_layout() {
  return {kPanel, kRows, kBlockColumns};
}

// to (depth, kPanel) = the transpose of terms [start, start + depth) of `count` <= kPanel rows, zero-padded.
template <class W>
inline void pack_rows(const void* const* rows, int64_t count, int64_t start, int64_t depth, float* to) {
  const auto row = [&](int64_t i) { return static_cast<const W*>(rows[i]) + start; };
  for (int64_t first = 0; first < kPanel; first += kWidth) {
    for_columns(depth, [&](int64_t k, int n) {
      float* block = to + k * kPanel + first;
      if (n == kWidth && first + kWidth <= count) {
        transpose_rows([&](int i) { return bit_cast<vuint>(load(row(first + i) + k)); }, block, kPanel, kWidth);
      } else {
        transpose_rows(
            [&](int i) { return first + i < count ? bit_cast<vuint>(load_n(row(first + i) + k, n)) : vuint{}; }, block,
            kPanel, n);
      }
    });
  }
}

inline void linear_pack_panel(const LinearWeight& weight, int64_t count, int64_t start, int64_t depth, float* to) {
  (weight.bf16 ? pack_rows<bfloat16> : pack_rows<float>)(weight.rows, count, start, depth, to);
}

// The panels of a pass; `depth` is the number of terms of one, `next` those to prefetch, or null.
struct PassPanels {
  const float* first;
  int64_t depth;
  const float* next;
};

// Terms [start, start + part) of a block's `cols` columns, as panels; `scratch` is for those that are not packed ahead.
inline PassPanels pass_panels(const LinearWeight& weight, int64_t start, int64_t part, int64_t depth, int64_t cols,
                              float* scratch) {
  if (weight.panels != nullptr) {
    const float* next = start + part < depth ? weight.panels + (start + part) * kPanel : weight.ahead;
    return {weight.panels + start * kPanel, depth, next};
  }
  for (int64_t col = 0; col < cols; col += kPanel) {
    const LinearWeight rows{nullptr, nullptr, weight.rows + col, weight.bf16};
    linear_pack_panel(rows, std::min<int64_t>(kPanel, cols - col), start, part, scratch + col * part);
  }
  return {scratch, part, nullptr};
}

// Up to kRows rows of x as register tiles read them: in place, or, if they are bfloat16 or too few for a tile, as a
// zero-padded float32 copy.
template <class T>
struct TileRows {
  TileRows(const T* x, int64_t x_stride, int64_t rows, int64_t depth, float* copy) : first(copy), stride(kPassDepth) {
    const int64_t tile_rows = rows > kStep ? kRows : kStep;
    if constexpr (std::is_same_v<T, float>) {
      if (rows == tile_rows) {
        first = x;
        stride = x_stride;
        return;
      }
    }
    for (int64_t row = 0; row < rows; ++row) {
      for_columns(depth, [&](int64_t col, int n) {
        store_n(copy + row * stride + col, load_n(x + row * x_stride + col, n), n);
      });
    }
    for (int64_t row = rows; row < tile_rows; ++row) std::memset(copy + row * stride, 0, depth * sizeof(float));
  }
  const float* first;
  int64_t stride;
};

// The size of linear_block's scratch: the copied rows of a tile, the panels of a pass if they are not packed ahead, and
// the sums of a block.
inline int64_t linear_scratch_floats(int64_t rows, bool packed) {
  return (kRows + (packed ? 0 : kBlockColumns)) * kPassDepth + round_up(rows, kRows) * kBlockColumns;
}

// c (rows, kPanel) = a (rows, depth) times a panel, or += if `accumulate`. Prefetches the cache lines from `ahead` on
// unless it is null.
inline void linear_panel(const float* a, int64_t lda, const float* panel, float* c, int64_t rows, int64_t depth,
                         bool accumulate, const float* ahead) {
  if (ahead == nullptr) {
    const auto multiply = accumulate ? tiles<false, true, false, float> : tiles<false, false, false, float>;
    multiply(a, lda, panel, kPanel, c, kBlockColumns, rows, depth, nullptr);
  } else {
    const auto multiply = accumulate ? tiles<false, true, true, float> : tiles<false, false, true, float>;
    multiply(a, lda, panel, kPanel, c, kBlockColumns, rows, depth, ahead);
  }
}

// out (rows, cols) = act(x (rows, depth) weight^T + bias).
template <class T, int ACTIVATION>
inline void linear_block(const T* x, int64_t x_stride, const LinearWeight& weight, const float* bias, T* out,
                         int64_t out_stride, int64_t rows, int64_t depth, int64_t cols, float* scratch) {
  float *copy = scratch, *packed = scratch + kRows * kPassDepth;
  float* sums = packed + (weight.panels == nullptr ? kBlockColumns * kPassDepth : 0);
  for (int64_t start = 0; start == 0 || start < depth; start += kPassDepth) {
    const int64_t part = std::min(kPassDepth, depth - start);
    const PassPanels panels = pass_panels(weight, start, part, depth, cols, packed);
    for (int64_t row = 0; row < rows; row += kRows) {
      const int64_t count = std::min<int64_t>(kRows, rows - row), padded = round_up(count, kStep);
      const TileRows<T> a(x + row * x_stride + start, x_stride, count, part, copy);
      float* c = sums + row * kBlockColumns;
      const bool prefetches = panels.next != nullptr && row < 4 * kRows;
      for (int64_t col = 0; col < cols; col += kPanel) {
        const float* b = panels.first + col * panels.depth;
        for (int64_t k = 0; k == 0 || k < part; k += kSumDepth) {
          const int64_t terms = std::min(kSumDepth, part - k);
          // Each product of one of the first tiles of rows with a panel prefetches a quarter of a panel of the next
          // pass.
          const int64_t quarter = (row / kRows * cols + col) / kPanel;
          const int64_t line = quarter / 4 * kPanel * depth + (quarter % 4 * part + k) * kPanel / 4;
          linear_panel(a.first + k, a.stride, b + k * kPanel, c + col, padded, terms, start + k > 0,
                       prefetches ? panels.next + line : nullptr);
        }
      }
      if (start + part < depth) continue;
      for (int64_t i = 0; i < count; ++i) {
        for_columns(cols, [&](int64_t col, int n) {
          vfloat u = load(c + i * kBlockColumns + col);
          if (bias != nullptr) u += load_n(bias + col, n);
          store_n(out + (row + i) * out_stride + col, activate<ACTIVATION>(u), n);
        });
      }
    }
  }
}

}  // namespace BF_ISA
}  // namespace bert_fast
