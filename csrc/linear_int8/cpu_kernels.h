// Quantization of rows to INT8 and the epilogue of an integer product, row by row, so that a row stays in L1. Compiled
// once for each instruction set by foreach_isa.h.

#include "common/gelu_kernels.h"

namespace bert_fast {
namespace BF_ISA {

typedef uint8_t vbyte __attribute__((vector_size(BF_VECTOR_BYTES / 4)));

// kWidth elements of a row, the last ones included, repeated if the row is shorter.
template <class T>
BF_INLINE vfloat last_of(const T* x, int64_t cols) {
  if (cols >= kWidth) return load(x + cols - kWidth);
  T buffer[kWidth];
  for (int i = 0; i < kWidth; ++i) buffer[i] = x[i % cols];
  return load(buffer);
}

// u = round((x - low) / scale) for one row, within `range`, or within the row's own bounds if that is null. A value
// that is not finite makes the scale, and so the row of the layer's output, NaN.
template <class T>
inline void quantize_row(const T* x, const float* range, uint8_t* u, float* scale, float* low, int64_t cols) {
  float low_bound = 0.0f, high_bound = 0.0f, nonfinite = 0.0f;
  if (range != nullptr) {
    low_bound = range[0];
    high_bound = range[1];
    vfloat bad = set1(0.0f);
    for_columns(cols, [&](int64_t col, int n) {
      const vfloat v = load_n(x + col, n);
      bad += v - v;
    });
    nonfinite = reduce_add(bad);
  } else {
    vfloat lows = set1(FLT_MAX), highs = set1(-FLT_MAX), bad = set1(0.0f);
    for (int64_t col = 0; col < cols; col += kWidth) {
      // The last vector overlaps the one before it if the row is not a multiple of vectors.
      const vfloat v = col + kWidth <= cols ? load(x + col) : last_of(x, cols);
      lows = vmin(v, lows);
      highs = vmax(v, highs);
      bad += v - v;
    }
    low_bound = -reduce_max(-lows);
    high_bound = reduce_max(highs);
    nonfinite = reduce_add(bad);
  }
  const float step = (high_bound - low_bound) * (1.0f / 255.0f);
  const float inverse = step > 0.0f ? 1.0f / step : 0.0f;
  *scale = step + nonfinite;
  *low = low_bound;
  const vfloat shifter = set1(12582912.0f);  // adding 1.5 * 2^23 rounds to the nearest integer, ties to even
  for_columns(cols, [&](int64_t col, int n) {
    const vfloat scaled = (load_n(x + col, n) - low_bound) * inverse;
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
inline void epilogue_row(const float* product, float scale, float low, const Int8Columns& columns, T* out,
                         int64_t cols) {
  for_columns(cols, [&](int64_t col, int n) {
    vfloat v = scale * load_n(product + col, n) + low * load_n(columns.sums + col, n);
    v *= load_n(columns.scale + col, n);
    if (columns.bias != nullptr) v += load_n(columns.bias + col, n);
    store_n(out + col, activate<ACTIVATION>(v), n);
  });
}

template <class T, int ACTIVATION>
inline void epilogue_rows(const float* product, const float* scale, const float* low, const Int8Columns& columns,
                          T* out, int64_t rows, int64_t cols) {
  for (int64_t row = 0; row < rows; ++row) {
    epilogue_row<T, ACTIVATION>(product + row * cols, scale[row], low[row], columns, out + row * cols, cols);
  }
}

// `buffer` holds a row.
template <int ACTIVATION>
inline void epilogue_quantize_rows(const float* product, const float* scale, const float* low,
                                   const Int8Columns& columns, const float* range, float* buffer, uint8_t* u,
                                   float* next_scale, float* next_low, int64_t rows, int64_t cols) {
  for (int64_t row = 0; row < rows; ++row) {
    epilogue_row<float, ACTIVATION>(product + row * cols, scale[row], low[row], columns, buffer, cols);
    quantize_row(buffer, range, u + row * cols, next_scale + row, next_low + row, cols);
  }
}

}  // namespace BF_ISA
}  // namespace bert_fast
