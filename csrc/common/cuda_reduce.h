// Deterministic sums over rows in two steps: over each part of the rows, then over the parts, in a fixed order.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "common/cuda.h"

namespace bert_fast {

// Parts of the rows, whose number depends on `rows` alone: of at least 16 rows, and at most `most`. The default is
// enough for a large GPU together with a few blocks of columns.
struct DeviceParts {
  explicit DeviceParts(int64_t rows, int64_t most = 256)
      : size(std::max<int64_t>(16, ceil_div(rows, most))), count(ceil_div(rows, size)) {}
  int64_t size, count;
};

// The warps of a block: each sums every eighth part, then their eight sums are added in order.
constexpr int kSumGroups = 8;

// The most sums that one launch computes.
constexpr int kMostSums = 3;

// Where the sums of each range of columns go.
template <class T>
struct SumsOfParts {
  T* total[kMostSums];
};

// Block (x, y) sums columns [32 x, 32 x + 32) of range y, of `cols` columns. A template, since several translation
// units use it.
template <class T>
__global__ void __launch_bounds__(kWarp* kSumGroups)
    sum_parts_kernel(const T* partial, const __grid_constant__ SumsOfParts<T> to, int64_t parts, int64_t stride,
                     int64_t cols) {
  T* sums = dynamic_shared<T>();
  const int lane = threadIdx.x % kWarp, group = threadIdx.x / kWarp;
  const int64_t col = int64_t{blockIdx.x} * kWarp + lane;
  T sum = 0;
  if (col < cols) {
    const T* from = partial + blockIdx.y * cols + col;
#pragma unroll 8
    for (int64_t part = group; part < parts; part += kSumGroups) sum += from[part * stride];
  }
  sums[group * kWarp + lane] = sum;
  __syncthreads();
  if (group == 0 && col < cols) {
    for (int other = 1; other < kSumGroups; ++other) sum += sums[other * kWarp + lane];
    to.total[blockIdx.y][col] = sum;
  }
}

// The sums over the parts of the first `count` ranges of `cols` columns of partial (parts, stride) float32, each
// (cols,) float32, in one launch.
inline std::vector<Tensor> sum_parts_cuda(const Tensor& partial, int64_t cols, int count) {
  SumsOfParts<float> to = {};
  std::vector<Tensor> totals;
  for (int range = 0; range < count; ++range) {
    totals.push_back(empty_like_rows(partial, {cols}, ScalarType::Float));
    to.total[range] = mutable_data<float>(totals.back());
  }
  const dim3 grid(static_cast<unsigned>(ceil_div(cols, kWarp)), static_cast<unsigned>(count));
  launch(sum_parts_kernel<float>, grid, kWarp * kSumGroups, sizeof(float) * kWarp * kSumGroups, partial,
         data<float>(partial), to, partial.size(0), partial.size(1), cols);
  return totals;
}

// The adjacent columns that a thread loads at once: 16 bytes.
template <class T>
constexpr int kPack = 16 / sizeof(T);

// Run `body(element, full)` with the element type of `dtype` and, as std::bool_constant, whether all packs are FULL:
// rows are a multiple of 16 bytes, and every tensor's address is.
template <class Body>
inline void dispatch_pack(ScalarType dtype, const char* name, int64_t cols, std::initializer_list<Tensor> tensors,
                          const Body& body) {
  dispatch_cuda(dtype, name, [&](auto element) {
    bool full = cols % kPack<decltype(element)> == 0;
    for (const Tensor& x : tensors) full = full && reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
    if (full) {
      body(element, std::true_type{});
    } else {
      body(element, std::false_type{});
    }
  });
}

}  // namespace bert_fast
