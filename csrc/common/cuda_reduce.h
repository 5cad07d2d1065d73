// Sums over rows in two steps, always in the same order: each part of the rows on its own, then the parts.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "common/cuda.h"

namespace bert_fast {

// Parts whose number depends on the rows alone: at least 16 rows each, and at most `most` parts, by default so many
// that with a few blocks of columns every multiprocessor of a large GPU has some.
struct DeviceParts {
  explicit DeviceParts(int64_t rows, int64_t most = 256)
      : size(std::max<int64_t>(16, ceil_div(rows, most))), count(ceil_div(rows, size)) {}
  int64_t size, count;
};

constexpr int kSumGroups = 8;  // warps of a block, each adds up every eighth part; then the eight sums in order

// An inline kernel, since two translation units use it.
template <class T>
__global__ void __launch_bounds__(kWarp* kSumGroups)
    sum_parts_kernel(const T* partial, T* total, int64_t parts, int64_t stride, int64_t cols) {
  T* sums = dynamic_shared<T>();
  const int lane = threadIdx.x % kWarp, group = threadIdx.x / kWarp;
  const int64_t col = int64_t{blockIdx.x} * kWarp + lane;
  T sum = 0;
  if (col < cols) {
    for (int64_t part = group; part < parts; part += kSumGroups) sum += partial[part * stride + col];
  }
  sums[group * kWarp + lane] = sum;
  __syncthreads();
  if (group == 0 && col < cols) {
    for (int other = 1; other < kSumGroups; ++other) sum += sums[other * kWarp + lane];
    total[col] = sum;
  }
}

// The sums of columns [first, first + cols) of partial (parts, stride) float32 -> (cols,) float32.
inline Tensor sum_parts_cuda(const Tensor& partial, int64_t first, int64_t cols) {
  const Tensor total = empty_like_rows(partial, {cols}, ScalarType::Float);
  launch(sum_parts_kernel<float>, dim3(static_cast<unsigned>(ceil_div(cols, kWarp))), kWarp * kSumGroups,
         sizeof(float) * kWarp * kSumGroups, partial, data<float>(partial) + first, mutable_data<float>(total),
         partial.size(0), partial.size(1), cols);
  return total;
}

// How many neighbouring columns a thread moves at once: 16 bytes of them.
template <class T>
constexpr int kPack = 16 / sizeof(T);

// Run `body(element, whole)` with the element type of `dtype` and, as std::bool_constant, whether packs of 16 bytes can
// be moved as a whole: rows of `cols` elements are a multiple of that and every tensor's memory is aligned to it.
template <class Body>
inline void dispatch_pack(ScalarType dtype, const char* name, int64_t cols, std::initializer_list<Tensor> tensors,
                          const Body& body) {
  dispatch_cuda(dtype, name, [&](auto element) {
    bool whole = cols % kPack<decltype(element)> == 0;
    for (const Tensor& x : tensors) whole = whole && reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
    if (whole) {
      body(element, std::true_type{});
    } else {
      body(element, std::false_type{});
    }
  });
}

}  // namespace bert_fast
