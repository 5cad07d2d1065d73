// A head of one sequence at a time. Keys and values are packed to float once, then blocks of query rows go through
// scores, softmax and the product with the values, so that memory grows with the length, not with its square.
// Compiled once for each instruction set by foreach_isa.h.

#include "attention/attention_cpu_tiles.h"
#include "common/dropout_kernels.h"

namespace bert_fast {
namespace BF_ISA {

// Where everything lies in a thread's scratch, in floats.
struct AttentionScratch {
  AttentionScratch(int64_t length, int64_t dim, bool backward) {
    cols = round_up(dim, kPanel);
    keys = round_up(length, kPanel);
    stride = keys + kPanel;  // room for whole tiles of keys, and never a power of two, which would collide in the cache
    // A block of scores of a quarter of a megabyte at most: half of a usual L2 cache.
    block =
        std::min(std::max<int64_t>(65536 / stride, 12), std::min<int64_t>(48, round_up(length, kRows))) / kRows * kRows;
    keys_t = take(dim * keys);
    query = take(block * cols);
    scores = take(block * stride);
    result = take(block * cols);
    row_scale = take(block);
    panel_rows = take(round_up(kPanel, kRows) * cols);
    bytes = take(dropout_bytes_size(length) / 4);
    values = take(backward ? dim * keys : length * cols);
    if (backward) {
      key_panels = take(length * cols);
      dout = take(block * cols);
      dscores = take(block * stride);
      dkeys = take(round_up(length, kRows) * cols);
      dvalues = take(round_up(length, kRows) * cols);
    }
  }

  int64_t take(int64_t floats) {
    const int64_t start = total;
    total += round_up(floats, 16);
    return start;
  }

  int64_t cols, keys, stride, block;
  int64_t keys_t, values, query, scores, result, row_scale, panel_rows, bytes;
  int64_t key_panels = 0, dout = 0, dscores = 0, dkeys = 0, dvalues = 0;
  int64_t total = 0;
};

inline int64_t attention_scratch_floats(int64_t length, int64_t dim, bool backward) {
  return AttentionScratch(length, dim, backward).total;
}

struct RowSum {
  float top, sum;
};

// scores[0, length) become exp(scores - top), top their maximum, and 0 where dropout drops; the sum is from before
// that.
BF_INLINE RowSum exp_row(float* scores, int64_t length, const uint8_t* bytes, const Dropout& dropout) {
  const int64_t padded = round_up(length, kWidth);
  for (int64_t col = length; col < padded; ++col) scores[col] = -INFINITY;
  vfloat most = set1(-INFINITY);
  for (int64_t col = 0; col < padded; col += kWidth) most = vmax(load(scores + col), most);
  const float top = reduce_max(most);
  vfloat sum{};
  for (int64_t col = 0; col < padded; col += kWidth) {
    const vfloat p = vexp(load(scores + col) - top);
    sum += p;
    store(scores + col, dropout.threshold ? p * dropout_multiplier(dropout, bytes + col) : p);
  }
  return {top, reduce_add(sum)};
}

template <class T>
inline void attention_forward(const AttentionHead<T>& head, T* out, int64_t out_stride, float* lse, float* scratch) {
  const int64_t length = head.length, dim = head.dim;
  const AttentionScratch at(length, dim, false);
  const Dropout& dropout = *head.dropout;
  float *query = scratch + at.query, *scores = scratch + at.scores, *result = scratch + at.result;
  uint8_t* bytes = reinterpret_cast<uint8_t*>(scratch + at.bytes);
  pack_transposed(head.part(kKey), head.token_stride, head.part_bias(kKey), length, dim, scratch + at.keys_t,
                  scratch + at.panel_rows);
  pack_panels(head.part(kValue), head.token_stride, head.part_bias(kValue), length, dim, scratch + at.values);

  for (int64_t start = 0; start < length; start += at.block) {
    const int64_t rows = std::min(at.block, length - start), tiles = round_up(rows, kRows);
    pack_rows(head.part(kQuery) + start * head.token_stride, head.token_stride, head.part_bias(kQuery), head.scale,
              rows, dim, query, at.cols);
    product(query, at.cols, scratch + at.keys_t, scores, at.stride, tiles, at.keys / kPanel, dim);
    for (int64_t row = 0; row < rows; ++row) {
      if (dropout.threshold) {
        dropout_bytes(dropout, head.plane, head.first_row + static_cast<uint32_t>(start + row), length, bytes);
      }
      const RowSum row_sum = exp_row(scores + row * at.stride, length, bytes, dropout);
      lse[start + row] = row_sum.top + std::log(row_sum.sum);
      scratch[at.row_scale + row] = 1.0f / row_sum.sum;
    }
    product(scores, at.stride, scratch + at.values, result, at.cols, tiles, at.cols / kPanel, length);
    for (int64_t row = 0; row < rows; ++row) {
      const float scale = scratch[at.row_scale + row];
      for_columns(dim, [&](int64_t col, int n) {
        store_n(out + (start + row) * out_stride + col, load(result + row * at.cols + col) * scale, n);
      });
    }
  }
}

// From scores and the gradient of the dropped probabilities to dropped probabilities and the gradient of the scores,
// both in place, with zeros behind the last key as far as whole tiles reach.
//
// The probabilities are made to sum to 1 again, since the rounding of lse is up to eps |lse| of each; and delta, the
// mean of dp under p, is summed here and not taken from dout and out, whose product is the same in exact arithmetic
// only: so a single key gets a gradient of exactly 0.
BF_INLINE void softmax_grad_row(float* scores, float* dscores, int64_t length, int64_t stride, float lse,
                                const uint8_t* bytes, const Dropout& dropout) {
  const int64_t padded = round_up(length, kWidth);
  for (int64_t col = length; col < padded; ++col) scores[col] = -INFINITY;
  vfloat sum{}, weighted{};
  for (int64_t col = 0; col < padded; col += kWidth) {
    const vfloat p = vexp(load(scores + col) - lse);
    vfloat dp = load(dscores + col);
    if (dropout.threshold) {
      dp *= dropout_multiplier(dropout, bytes + col);
      store(dscores + col, dp);
    }
    sum += p;
    weighted += p * dp;
    store(scores + col, p);
  }
  const float total = reduce_add(sum), inverse = 1.0f / total, delta = reduce_add(weighted) / total;
  for (int64_t col = 0; col < padded; col += kWidth) {
    const vfloat p = load(scores + col) * inverse;
    store(dscores + col, p * (load(dscores + col) - delta));
    store(scores + col, dropout.threshold ? p * dropout_multiplier(dropout, bytes + col) : p);
  }
  std::memset(scores + length, 0, (stride - length) * sizeof(float));
  std::memset(dscores + length, 0, (stride - length) * sizeof(float));
}

// to (rows, dim) = from * scale, and its column sums are added to dbias: 16 rows at a time, since one running sum over
// a long sequence would lose digits.
template <class T>
inline void write_grad(const float* from, int64_t from_stride, float scale, int64_t rows, int64_t dim, T* to,
                       int64_t to_stride, float* dbias) {
  for (int64_t start = 0; start < rows; start += 16) {
    const int64_t end = std::min<int64_t>(start + 16, rows);
    for_columns(dim, [&](int64_t col, int n) {
      vfloat sum{};
      for (int64_t row = start; row < end; ++row) {
        const vfloat x = load(from + row * from_stride + col) * scale;
        store_n(to + row * to_stride + col, x, n);
        sum += x;
      }
      store_n(dbias + col, load_n(dbias + col, n) + sum, n);
    });
  }
}

template <class T>
inline void attention_backward(const AttentionHead<T>& head, const AttentionGrad<T>& grad, float* scratch) {
  const int64_t length = head.length, dim = head.dim, out_stride = grad.heads * dim, qkv_stride = 3 * out_stride;
  const AttentionScratch at(length, dim, true);
  const Dropout& dropout = *head.dropout;
  float *query = scratch + at.query, *dout = scratch + at.dout, *result = scratch + at.result;
  float *scores = scratch + at.scores, *dscores = scratch + at.dscores;
  uint8_t* bytes = reinterpret_cast<uint8_t*>(scratch + at.bytes);
  const int64_t whole = round_up(length, kRows);
  std::memset(scratch + at.dkeys, 0, whole * at.cols * sizeof(float));
  std::memset(scratch + at.dvalues, 0, whole * at.cols * sizeof(float));
  pack_transposed(head.part(kKey), head.token_stride, head.part_bias(kKey), length, dim, scratch + at.keys_t,
                  scratch + at.panel_rows);
  pack_transposed(head.part(kValue), head.token_stride, head.part_bias(kValue), length, dim, scratch + at.values,
                  scratch + at.panel_rows);
  pack_panels(head.part(kKey), head.token_stride, head.part_bias(kKey), length, dim, scratch + at.key_panels);

  for (int64_t start = 0; start < length; start += at.block) {
    const int64_t rows = std::min(at.block, length - start), tiles = round_up(rows, kRows);
    pack_rows(head.part(kQuery) + start * head.token_stride, head.token_stride, head.part_bias(kQuery), head.scale,
              rows, dim, query, at.cols);
    pack_rows(grad.dout + start * out_stride, out_stride, nullptr, 1.0f, rows, dim, dout, at.cols);
    product(query, at.cols, scratch + at.keys_t, scores, at.stride, tiles, at.keys / kPanel, dim);
    product(dout, at.cols, scratch + at.values, dscores, at.stride, tiles, at.keys / kPanel, dim);
    for (int64_t row = 0; row < rows; ++row) {
      if (dropout.threshold) {
        dropout_bytes(dropout, head.plane, head.first_row + static_cast<uint32_t>(start + row), length, bytes);
      }
      softmax_grad_row(scores + row * at.stride, dscores + row * at.stride, length, at.stride, grad.lse[start + row],
                       bytes, dropout);
    }
    add_transposed_product(scores, at.stride, dout, scratch + at.dvalues, at.cols, whole, rows);
    add_transposed_product(dscores, at.stride, query, scratch + at.dkeys, at.cols, whole, rows);
    product(dscores, at.stride, scratch + at.key_panels, result, at.cols, tiles, at.cols / kPanel, length);
    write_grad(result, at.cols, head.scale, rows, dim, grad.dqkv + start * qkv_stride, qkv_stride, grad.dbias);
  }
  // The packed queries hold the scale already, so dkeys needs it no more.
  write_grad(scratch + at.dkeys, at.cols, 1.0f, length, dim, grad.dqkv + out_stride, qkv_stride,
             grad.dbias + out_stride);
  write_grad(scratch + at.dvalues, at.cols, 1.0f, length, dim, grad.dqkv + 2 * out_stride, qkv_stride,
             grad.dbias + 2 * out_stride);
}

}  // namespace BF_ISA
}  // namespace bert_fast
