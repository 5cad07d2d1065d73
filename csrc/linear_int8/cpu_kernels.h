// Rows to 8 bits and back, each a row at a time, which stays in L1. Compiled once for each instruction set by
// foreach_isa.h.

#include "common/gelu_kernels.h"

namespace bert_fast {
namespace BF_ISA {

typedef uint8_t vbyte __attribute__((vector_size(BF_VECTOR_BYTES / 4)));

// kWidth values of a row that include its last ones and no others than its own.
template <class T>
BF_INLINE vfloat last_of(const T* x, int64_t cols) {
  if (cols >= kWidth) return load(x + cols - kWidth);
  T buffer[kWidth];
  for (int i = 0; i < kWidth; ++i) buffer[i] = x[i % cols];
  return load(buffer);
}

// One row to u = round((x - low) / scale); the row's own bounds where `range` is null, else low and high. What is not
// finite makes the scale, and so the whole row of the result, NaN.
template <class T>
inline void quantize_row(const T* x, const float* range, uint8_t* u, float* scale, float* low, int64_t cols) {
  float least = 0.0f, most = 0.0f, wrong = 0.0f;
  if (range != nullptr) {
    least = range[0];
    most = range[1];
    vfloat bad = set1(0.0f);
    for_columns(cols, [&](int64_t col, int n) {
      const vfloat v = load_n(x + col, n);
      bad += v - v;
    });
    wrong = reduce_add(bad);
  } else {
    vfloat lows = set1(FLT_MAX), highs = set1(-FLT_MAX), bad = set1(0.0f);
    for (int64_t col = 0; col < cols; col += kWidth) {
      // The last vector of a row that has no whole one there begins earlier.
      const vfloat v = col + kWidth <= cols ? load(x + col) : last_of(x, cols);
      lows = vmin(v, lows);
      highs = vmax(v, highs);
      bad += v - v;
    }
    least = -reduce_max(-lows);
    most = reduce_max(highs);
    wrong = reduce_add(bad);
  }
  const float step = (most - least) * (1.0f / 255.0f);
  const float inverse = step > 0.0f ? 1.0f / step : 0.0f;
  *scale = step + wrong;
  *low = least;
  const vfloat shifter = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer, to even
  for_columns(cols, [&](int64_t col, int n) {
    const vfloat scaled = (load_n(x + col, n) - least) * inverse;
    const vfloat inside = vmin(vmax(scaled, set1(0.0f)), set1(255.0f));
    const vbyte bytes = __builtin_convertvector(bit_cast<vuint>(inside + shifter) & 0xffu, vbyte);
    std::memcpy(u + col, &bytes, n);
  });
}

template <class T>
inline void quantize_rows(const T* x, const float* range, uint8_t* u, float* scale, float* low, int64_t rows,
                          int64_t cols) {
  for (int64_t row = 0; row < rows; ++row) {
    quantize_row(x + row * cols, range, u + row * cols, scale + row, low + row, cols);
  }
}

template <class T, int ACTIVATION>
inline void finish_row(const float* product, float scale, float low, const Int8Columns& columns, T* out, int64_t cols) {
  for_columns(cols, [&](int64_t col, int n) {
    vfloat v = scale * load_n(product + col, n) + low * load_n(columns.sums + col, n);
    v *= load_n(columns.scale + col, n);
    if (columns.bias != nullptr) v += load_n(columns.bias + col, n);
    store_n(out + col, activate<ACTIVATION>(v), n);
  });
}

template <class T, int ACTIVATION>
inline void finish_rows(const float* product, const float* scale, const float* low, const Int8Columns& columns, T* out,
                        int64_t rows, int64_t cols) {
  for (int64_t row = 0; row < rows; ++row) {
    finish_row<T, ACTIVATION>(product + row * cols, scale[row], low[row], columns, out + row * cols, cols);
  }
}

// `buffer` has op for a row.
template <int ACTIVATION>
inline void finish_quantize_rows(const float* product, const float* scale, const float* low, const Int8Columns& columns,
                                 const float* range, float* buffer, uint8_t* u, float* next_scale, float* next_low,
                                 int64_t rows, int64_t cols) {
  for (int64_t row = 0; row < rows; ++row) {
    finish_row<float, ACTIVATION>(product + row * cols, scale[row], low[row], columns, buffer, cols);
    quantize_row(buffer, range, u + row * cols, next_scale + row, next_low + row, cols);
  }
}

}  // namespace BF_ISA
}  // namespace bert_fast
