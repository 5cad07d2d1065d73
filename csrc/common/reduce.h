// Sums over rows that don't depend on the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/tensor.h"

namespace bert_fast {

// Parts of the rows, whose size depends on the number of rows alone. Each part is summed separately; the partial sums
// are added in order.
struct RowParts {
  explicit RowParts(int64_t total) : rows(total), size(std::max<int64_t>(16, (total + 63) / 64)) {
    count = (rows + size - 1) / size;
  }
  int64_t begin(int64_t part) const { return part * size; }
  int64_t length(int64_t part) const { return std::min(size, rows - part * size); }
  int64_t rows, size, count;
};

// The sums of columns [first, first + cols) of partial (count, stride) float32 -> (cols,) float32.
inline Tensor sum_parts(const Tensor& partial, int64_t count, int64_t cols, int64_t stride, int64_t first) {
  Tensor total = zeros({cols}, ScalarType::Float);
  const float* from = data<float>(partial);
  float* to = mutable_data<float>(total);
  parallel_for(0, cols, 256, [&](int64_t begin, int64_t end) {
    for (int64_t part = 0; part < count; ++part) {
      for (int64_t col = begin; col < end; ++col) to[col] += from[part * stride + first + col];
    }
  });
  return total;
}

// partial (count, cols) float32 -> (cols,) float32.
inline Tensor sum_parts(const Tensor& partial, int64_t count, int64_t cols) {
  return sum_parts(partial, count, cols, cols, 0);
}

}  // namespace bert_fast
