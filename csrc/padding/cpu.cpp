// Gathers the real tokens of a padded batch and scatters them back, on the CPU. Rows are copied as bytes, so any dtype
// is accepted.
#include <algorithm>
#include <limits>

#include "common/tensor.h"

namespace bert_fast {
namespace {

constexpr int64_t kGrain = 1 << 16;  // the fewest bytes of a thread

// The rows of x as bytes.
struct Rows {
  explicit Rows(const Tensor& x) : bytes(static_cast<int64_t>(x.element_size())) {
    for (int64_t dim = 1; dim < x.dim(); ++dim) bytes *= x.size(dim);
  }
  int64_t grain() const { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, bytes)); }
  int64_t bytes;
};

std::vector<int64_t> shape_with_rows(const Tensor& x, int64_t rows) {
  std::vector<int64_t> shape = {rows};
  for (int64_t dim = 1; dim < x.dim(); ++dim) shape.push_back(x.size(dim));
  return shape;
}

// Strictly increasing and in range, so that no row is out of bounds or written by two threads.
Tensor checked_indices(const Tensor& indices, int64_t rows) {
  check_dtype(indices, "indices", ScalarType::Long);
  STD_TORCH_CHECK(indices.dim() == 1, "padding: expected indices (T,)");
  const Tensor dense = as_contiguous(indices);
  const int64_t* index = data<int64_t>(dense);
  int64_t before = -1;
  for (int64_t i = 0; i < dense.size(0); ++i) {
    STD_TORCH_CHECK(index[i] > before && index[i] < rows, "indices has ", index[i], " after ", before,
                    "; expected it to rise strictly within 0 to ", rows - 1);
    before = index[i];
  }
  return dense;
}

// mask (B, S) bool -> flat positions of its ones (T,) int64, cu_seqlens (B+1,) int32
std::tuple<Tensor, Tensor> unpad_indices(const Tensor& mask) {
  STD_TORCH_CHECK(mask.dim() == 2 && mask.scalar_type() == ScalarType::Bool, "padding: expected a bool mask (B, S)");
  const Tensor dense = as_contiguous(mask);
  const int64_t batch = mask.size(0), seqlen = mask.size(1);
  const uint8_t* real = data<uint8_t>(dense);
  const Tensor cu_seqlens = empty({batch + 1}, ScalarType::Int);
  int32_t* ends = mutable_data<int32_t>(cu_seqlens);
  int64_t total = 0;
  ends[0] = 0;
  for (int64_t row = 0; row < batch; ++row) {
    for (int64_t col = 0; col < seqlen; ++col) total += real[row * seqlen + col] != 0;
    STD_TORCH_CHECK(total <= std::numeric_limits<int32_t>::max(), "padding: more than 2^31 - 1 tokens");
    ends[row + 1] = static_cast<int32_t>(total);
  }
  const Tensor indices = empty({total}, ScalarType::Long);
  int64_t* to = mutable_data<int64_t>(indices);
  for (int64_t position = 0; position < batch * seqlen; ++position) {
    if (real[position] != 0) *to++ = position;
  }
  return {indices, cu_seqlens};
}

// x (R, ...), increasing indices (T,) -> (T, ...)
Tensor gather_rows(const Tensor& x, const Tensor& indices) {
  STD_TORCH_CHECK(x.dim() >= 1, "padding: expected x (R, ...)");
  const Tensor from = as_contiguous(x), index = checked_indices(indices, x.size(0));
  const Tensor out = empty(shape_with_rows(x, index.size(0)), x.scalar_type());
  const Rows rows(x);
  if (rows.bytes == 0) return out;  // neither tensor has memory
  const char* source = data<char>(from);
  char* target = mutable_data<char>(out);
  parallel_for(0, index.size(0), rows.grain(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      std::memcpy(target + i * rows.bytes, source + data<int64_t>(index)[i] * rows.bytes, rows.bytes);
    }
  });
  return out;
}

// x (T, ...), increasing indices (T,) -> (rows, ...), zeros elsewhere
Tensor scatter_rows(const Tensor& x, const Tensor& indices, int64_t rows) {
  STD_TORCH_CHECK(x.dim() >= 1 && rows >= 0, "padding: expected x (T, ...) and a number of rows");
  const Tensor from = as_contiguous(x), index = checked_indices(indices, rows);
  check_shape(indices, "indices", {x.size(0)});
  const Tensor out = empty(shape_with_rows(x, rows), x.scalar_type());
  const Rows row(x);
  if (row.bytes == 0) return out;
  const int64_t* places = data<int64_t>(index);
  const char* source = data<char>(from);
  char* target = mutable_data<char>(out);
  // Divided by rows of the result, so that a thread writes a contiguous range of it once, zeros included.
  parallel_for(0, rows, row.grain(), [&](int64_t begin, int64_t end) {
    int64_t next = std::lower_bound(places, places + index.size(0), begin) - places;
    for (int64_t place = begin; place < end; ++place) {
      if (next < index.size(0) && places[next] == place) {
        std::memcpy(target + place * row.bytes, source + next++ * row.bytes, row.bytes);
      } else {
        std::memset(target + place * row.bytes, 0, row.bytes);
      }
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bert_fast, CPU, m) {
  m.impl("unpad_indices", TORCH_BOX(&unpad_indices));
  m.impl("gather_rows", TORCH_BOX(&gather_rows));
  m.impl("scatter_rows", TORCH_BOX(&scatter_rows));
}

}  // namespace bert_fast
