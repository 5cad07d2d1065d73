// A block of the output: rows of x by panels of a packed weight. Compiled once for each instruction set by
// foreach_isa.h.

#include "common/gelu_kernels.h"
#include "common/tile_kernels.h"

namespace bert_fast {
namespace BF_ISA {

// The depth of a pass over a block, in factors: the rows of x of a tile stay in L1, the panels of a block in L2.
constexpr int64_t kPassDepth = 768;
constexpr int64_t kSumDepth = 384;  // a long sum is a sum of short sums, with a smaller rounding error
constexpr int64_t kBlockColumns = 64;
static_assert(kBlockColumns % kPanel == 0, "full panels");

// `factors` is the number of those that hold n numbers.
inline LinearLayout linear_layout(int64_t n, bool bf16) {
  const bool pairs = bf16 && kPerFactor<Factor<bfloat16>> == 2;
  return {{kPanel, kRows, kBlockColumns}, pairs, pairs ? depth_of<uint32_t>(n) : n};
}

// n <= kWidth factors of a row, from number k on; those past the end of the row, which has `end` numbers, are zero.
template <class F, class W>
BF_INLINE vuint row_factors(const W* row, int64_t k, int64_t end, int n) {
  if constexpr (kPerFactor<F> == 1) {
    return bit_cast<vuint>(load_n(row + k, n));
  } else if constexpr (std::is_same_v<W, bfloat16>) {
    vuint pairs{};
    if (n == kWidth && k + 2 * kWidth <= end) {
      std::memcpy(&pairs, row + k, sizeof(pairs));
    } else {
      std::memcpy(&pairs, row + k, std::min<int64_t>(2 * n, end - k) * sizeof(bfloat16));
    }
    return pairs;
  } else {
    const auto half = [&](int64_t first) {
      const int64_t left = std::min<int64_t>(kWidth, end - first);
      const vfloat x = left <= 0 ? vfloat{} : load_n(row + first, static_cast<int>(left));
      return __builtin_convertvector(bfloat16_bits(x), vhalf);
    };
    const vhalf halves[2] = {half(k), half(k + kWidth)};
    return bit_cast<vuint>(halves);
  }
}

// to (depth, kPanel) = the transpose of factors [start, start + depth) of `count` <= kPanel rows of `terms` numbers,
// zero-padded.
template <class F, class W>
inline void pack_rows(const void* const* rows, int64_t terms, int64_t count, int64_t start, int64_t depth, F* to) {
  for (int64_t first = 0; first < kPanel; first += kWidth) {
    const auto row_of = [&](int64_t i, int64_t k, int n) {
      return row_factors<F>(static_cast<const W*>(rows[first + i]), (start + k) * kPerFactor<F>, terms, n);
    };
    for_columns(depth, [&](int64_t k, int n) {
      F* block = to + k * kPanel + first;
      if (n == kWidth && first + kWidth <= count) {
        transpose_rows([&](int i) { return row_of(i, k, kWidth); }, block, kPanel, kWidth);
      } else {
        transpose_rows([&](int i) { return first + i < count ? row_of(i, k, n) : vuint{}; }, block, kPanel, n);
      }
    });
  }
}

// Panels of the factors that x of type T is multiplied by.
template <class T>
inline void linear_pack_panel(const LinearWeight& weight, int64_t count, int64_t start, int64_t depth, void* to) {
  using F = Factor<T>;
  const auto pack = weight.bf16 ? pack_rows<F, bfloat16> : pack_rows<F, float>;
  pack(weight.rows, weight.terms, count, start, depth, static_cast<F*>(to));
}

// The panels of a pass; `depth` is the number of factors of one, `next` those to prefetch, or null.
template <class F>
struct PassPanels {
  const F* first;
  int64_t depth;
  const F* next;
};

// Factors [start, start + part) of a block's `cols` columns, as panels; `scratch` is for those that are not packed
// ahead.
template <class T, class F>
inline PassPanels<F> pass_panels(const LinearWeight& weight, int64_t start, int64_t part, int64_t depth, int64_t cols,
                                 F* scratch) {
  if (weight.panels != nullptr) {
    const auto *panels = static_cast<const F*>(weight.panels), *ahead = static_cast<const F*>(weight.ahead);
    return {panels + start * kPanel, depth, start + part < depth ? panels + (start + part) * kPanel : ahead};
  }
  for (int64_t col = 0; col < cols; col += kPanel) {
    const LinearWeight rows{nullptr, nullptr, weight.rows + col, weight.terms, weight.bf16};
    linear_pack_panel<T>(rows, std::min<int64_t>(kPanel, cols - col), start, part, scratch + col * part);
  }
  return {scratch, part, nullptr};
}

// Up to kRows rows of `terms` numbers of x as register tiles read them: in place, or, if they are converted, end within
// a factor or are too few for a tile, as a zero-padded copy.
template <class T, class F>
struct TileRows {
  TileRows(const T* x, int64_t x_stride, int64_t rows, int64_t terms, F* copy) : first(copy), stride(kPassDepth) {
    const int64_t tile_rows = round_up(rows, kTail<kRows>);
    if constexpr (kPerFactor<F> * sizeof(T) == sizeof(F)) {
      const bool aligned = reinterpret_cast<uintptr_t>(x) % sizeof(F) == 0;
      if (rows == tile_rows && aligned && x_stride % kPerFactor<F> == 0 && terms % kPerFactor<F> == 0) {
        first = reinterpret_cast<const F*>(x);
        stride = x_stride / kPerFactor<F>;
        return;
      }
    }
    const int64_t depth = depth_of<F>(terms);
    for (int64_t row = 0; row < rows; ++row) {
      for_columns(depth, [&](int64_t k, int n) {
        const vuint factors = row_factors<F>(x + row * x_stride, k * kPerFactor<F>, terms, n);
        std::memcpy(copy + row * stride + k, &factors, n * sizeof(F));
      });
    }
    for (int64_t row = rows; row < tile_rows; ++row) std::memset(copy + row * stride, 0, depth * sizeof(F));
  }
  const F* first;
  int64_t stride;
};

// The size of linear_block's scratch: the copied rows of a tile, the panels of a pass if they are not packed ahead, and
// the sums of a block.
inline int64_t linear_scratch_floats(int64_t rows, bool packed) {
  return (kRows + (packed ? 0 : kBlockColumns)) * kPassDepth + round_up(rows, kRows) * kBlockColumns;
}

// c (HEIGHT, kPanel) = a (HEIGHT, depth) times a panel, or += if `accumulate`. Prefetches the cache lines from `ahead`
// on unless it is null.
template <int HEIGHT, class F>
inline void linear_panel(const F* a, int64_t lda, const F* panel, float* c, int64_t depth, bool accumulate,
                         const F* ahead) {
  if (ahead == nullptr) {
    const auto multiply = accumulate ? tile<HEIGHT, false, true, false, F> : tile<HEIGHT, false, false, false, F>;
    multiply(a, lda, panel, kPanel, c, kBlockColumns, depth, nullptr);
  } else {
    const auto multiply = accumulate ? tile<HEIGHT, false, true, true, F> : tile<HEIGHT, false, false, true, F>;
    multiply(a, lda, panel, kPanel, c, kBlockColumns, depth, ahead);
  }
}

// out (rows, cols) = act(x (rows, weight.terms) weight^T + bias).
template <class T, int ACTIVATION>
inline void linear_block(const T* x, int64_t x_stride, const LinearWeight& weight, const float* bias, T* out,
                         int64_t out_stride, int64_t rows, int64_t cols, float* scratch) {
  using F = Factor<T>;
  const int64_t depth = depth_of<F>(weight.terms);
  F *copy = reinterpret_cast<F*>(scratch), *packed = copy + kRows * kPassDepth;
  float* sums = scratch + (kRows + (weight.panels == nullptr ? kBlockColumns : 0)) * kPassDepth;
  for (int64_t start = 0; start == 0 || start < depth; start += kPassDepth) {
    const int64_t part = std::min(kPassDepth, depth - start);
    const PassPanels<F> panels = pass_panels<T>(weight, start, part, depth, cols, packed);
    const int64_t first = start * kPerFactor<F>, terms = std::min(part * kPerFactor<F>, weight.terms - first);
    for (int64_t row = 0; row < rows; row += kRows) {
      const int64_t count = std::min<int64_t>(kRows, rows - row);
      const TileRows<T, F> a(x + row * x_stride + first, x_stride, count, terms, copy);
      float* c = sums + row * kBlockColumns;
      const bool prefetches = panels.next != nullptr && row < 4 * kRows;
      for (int64_t col = 0; col < cols; col += kPanel) {
        const F* b = panels.first + col * panels.depth;
        for (int64_t k = 0; k == 0 || k < part; k += kSumDepth) {
          const int64_t length = std::min(kSumDepth, part - k);
          // Each product of one of the first tiles of rows with a panel prefetches a quarter of a panel of the next
          // pass.
          const int64_t quarter = (row / kRows * cols + col) / kPanel;
          const int64_t line = quarter / 4 * kPanel * depth + (quarter % 4 * part + k) * kPanel / 4;
          const F* ahead = prefetches ? panels.next + line : nullptr;
          with_height<kRows>(count, [&](auto height) {
            linear_panel<decltype(height)::value>(a.first + k, a.stride, b + k * kPanel, c + col, length, start + k > 0,
                                                  ahead);
          });
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
