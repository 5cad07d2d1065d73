// A block of an integer product and its epilogue: rows of u by panels of a packed weight. Compiled once for each
// instruction set by foreach_isa.h.

#include "common/tile_kernels.h"
#include "linear_int8/cpu_kernels.h"

namespace bert_fast {
namespace BF_ISA {

// kByteRows x 2 accumulators, 2 vectors of b, a broadcast and, without BF_INT8_DOT, a product and ones: 29 of 32
// registers, or 15 of 16 with a vector of b at a time.
constexpr int kByteRows = BF_REGISTERS >= 32 ? 12 : 6;
constexpr int kBytePanel = 2 * kWidth;  // columns of a tile
constexpr int64_t kByteColumns = 64;    // of a block
static_assert(kByteColumns % kBytePanel == 0, "full panels");

inline TileLayout byte_layout() {
  return {kBytePanel, kByteRows, kByteColumns};
}

// to (steps, kBytePanel, 4): four adjacent terms of each column, zero-padded.
inline void pack_byte_panel(const int8_t* values, int64_t columns, int64_t depth, int8_t* to) {
  const int64_t steps = (depth + 3) / 4;
  for (int64_t step = 0; step < steps; ++step) {
    for (int64_t column = 0; column < kBytePanel; ++column) {
      for (int64_t k = 4 * step; k < 4 * step + 4; ++k) {
        *to++ = column < columns && k < depth ? values[column * depth + k] : int8_t{0};
      }
    }
  }
}

// c (ROWS, kBytePanel) = u (ROWS, 4 steps) times a panel, as float32.
template <int ROWS>
inline void byte_tile(const uint8_t* u, int64_t u_stride, const int8_t* panel, float* c, int64_t c_stride,
                      int64_t steps) {
  vint sum[ROWS][2] = {};
#pragma GCC unroll 2
  for (int64_t step = 0; step < steps; ++step) {
    vuint b0, b1;
    std::memcpy(&b0, panel + 2 * step * sizeof(vuint), sizeof(vuint));
    std::memcpy(&b1, panel + (2 * step + 1) * sizeof(vuint), sizeof(vuint));
#pragma GCC unroll 12
    for (int row = 0; row < ROWS; ++row) {
      uint32_t four;
      std::memcpy(&four, u + row * u_stride + 4 * step, sizeof(four));
      sum[row][0] = add_int8_dot(sum[row][0], vuint{} + four, b0);
      sum[row][1] = add_int8_dot(sum[row][1], vuint{} + four, b1);
    }
  }
#pragma GCC unroll 12
  for (int row = 0; row < ROWS; ++row) {
    store(c + row * c_stride, __builtin_convertvector(sum[row][0], vfloat));
    store(c + row * c_stride + kWidth, __builtin_convertvector(sum[row][1], vfloat));
  }
}

// The size of linear_int8_block's scratch: the sums of a tile, and a copy of its rows.
inline int64_t byte_scratch_bytes(int64_t depth) {
  return kByteRows * (kByteColumns * sizeof(float) + (depth + 3) / 4 * 4);
}

// out (rows, cols) = the epilogue of u (rows, depth) times the panels.
template <class T, int ACTIVATION>
inline void linear_int8_block(const uint8_t* u, const int8_t* panels, const float* scale, const float* low,
                              const Int8Columns& columns, T* out, int64_t out_stride, int64_t rows, int64_t depth,
                              int64_t cols, float* scratch) {
  float* sums = scratch;
  uint8_t* copy = reinterpret_cast<uint8_t*>(sums + kByteRows * kByteColumns);
  const int64_t steps = (depth + 3) / 4;
  for (int64_t row = 0; row < rows; row += kByteRows) {
    const int64_t count = std::min<int64_t>(kByteRows, rows - row);
    const uint8_t* from = u + row * depth;
    int64_t stride = depth;
    if (count % kTail<kByteRows> != 0 || depth % 4 != 0) {
      stride = 4 * steps;
      std::memset(copy, 0, kByteRows * stride);
      for (int64_t i = 0; i < count; ++i) std::memcpy(copy + i * stride, from + i * depth, depth);
      from = copy;
    }
    for (int64_t col = 0; col < cols; col += kBytePanel) {
      const int8_t* panel = panels + col * 4 * steps;
      with_height<kByteRows>(count, [&](auto height) {
        byte_tile<decltype(height)::value>(from, stride, panel, sums + col, kByteColumns, steps);
      });
    }
    for (int64_t i = 0; i < count; ++i) {
      epilogue_row<T, ACTIVATION>(sums + i * kByteColumns, scale[row + i], low[row + i], columns,
                                  out + (row + i) * out_stride, cols);
    }
  }
}

}  // namespace BF_ISA
}  // namespace bert_fast
