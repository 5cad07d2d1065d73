// Attention of one head of one sequence. Keys and values are packed once, as float or as pairs of bfloat16; then
// scores, softmax and the product with the values are computed for blocks of queries, so that memory is linear in the
// length. Compiled once for each instruction set by foreach_isa.h.

#include "attention/cpu_tiles.h"
#include "common/dropout_kernels.h"

namespace bert_fast {
namespace BF_ISA {

// The layout of a thread's scratch memory, in 32-bit words: floats, and factors F of products. Rows of scores have
// stride `stride`; in the backward pass they alternate with rows of their gradients.
template <class F>
struct AttentionScratch {
  AttentionScratch(int64_t length, int64_t dim, bool backward) {
    cols = round_up(dim, kPanel);
    keys = round_up(length, kPanel);
    stride = keys + kPanel;  // full tiles of keys; and never a power of two, which would cause cache conflicts
    // At most 256 KB of scores in a block: half of a typical L2 cache.
    block =
        std::min(std::max<int64_t>(65536 / stride, 12), std::min<int64_t>(48, round_up(length, kRows))) / kRows * kRows;
    padded = round_up(length, kStep);
    keys_t = take(depth_of<F>(dim) * keys);
    query = take(block * cols);
    scores = take((backward ? 2 : 1) * block * stride);
    result = take(block * cols);
    row_scale = take(block);
    panel_rows = take(round_up(kPanel, kStep) * cols);
    bytes = take(dropout_bytes_size(length) / 4);
    values = take(backward ? depth_of<F>(dim) * keys : depth_of<F>(length) * cols);
    if (backward) {
      key_panels = take(depth_of<F>(length) * cols);
      dout = take(block * cols);
      joined = take(block * cols);
      dkeys = take(padded * cols);
      dvalues = take(padded * cols);
    }
  }

  int64_t take(int64_t words) {
    const int64_t start = total;
    total += round_up(words, 16);
    return start;
  }

  int64_t cols, keys, stride, block, padded;
  int64_t keys_t, values, query, scores, result, row_scale, panel_rows, bytes;
  int64_t key_panels = 0, dout = 0, joined = 0, dkeys = 0, dvalues = 0;
  int64_t total = 0;
};

template <class T>
inline int64_t attention_scratch_floats(int64_t length, int64_t dim, bool backward) {
  return AttentionScratch<Factor<T>>(length, dim, backward).total;
}

template <class T>
BF_INLINE HeadRows<T> rows_of(const AttentionHead<T>& head, QkvPart part) {
  return {head.part(part), head.token_stride, head.part_bias(part), head.length, head.dim, 0};
}

template <class F>
BF_INLINE F* factors(float* scratch) {
  return reinterpret_cast<F*>(scratch);
}

// Scores are scale Q K^T: the sign of the scale is multiplied into the packed queries, which is exact in bfloat16, its
// absolute value into the softmax, where the multiplication is free.
struct Scale {
  explicit Scale(float scale) : sign(scale < 0.0f ? -1.0f : scale == 0.0f ? 0.0f : 1.0f) {
    size = scale == 0.0f ? 1.0f : std::fabs(scale);
  }
  float sign, size;
};

struct RowSum {
  float top, sum;
};

// The highest of scores[0, length); those up to a full vector are set to -inf.
BF_INLINE float highest_score(float* scores, int64_t length) {
  const int64_t padded = round_up(length, kWidth);
  for (int64_t col = length; col < padded; ++col) scores[col] = -INFINITY;
  vfloat highest = set1(-INFINITY);
  for (int64_t col = 0; col < padded; col += kWidth) highest = vmax(load(scores + col), highest);
  return reduce_max(highest);
}

// exp(scale (score - highest)): the difference is taken before the product, so that it is exactly 0 for the highest
// score. A multiply-add of scale score and the rounded scale highest would be as large as the rounding error.
BF_INLINE vfloat exp_score(const float* score, float highest, float scale) {
  return vexp((load(score) - highest) * scale);
}

// Replaces scores[0, length) by exp(scale scores - top), with top / scale the highest score, and by 0 where dropout
// drops, as factors of the next product. The sum is taken before dropout.
template <class F>
BF_INLINE RowSum exp_row(float* scores, int64_t length, float scale, const uint8_t* bytes, const Dropout& dropout) {
  const int64_t padded = round_up(length, kWidth);
  const float highest = highest_score(scores, length);
  vfloat sum{};
  // In place: bfloat16 vectors are stored no further than the scores have been read.
  auto* to = reinterpret_cast<std::conditional_t<kPerFactor<F> == 1, float, bfloat16>*>(scores);
  for (int64_t col = 0; col < padded; col += kWidth) {
    const vfloat p = exp_score(scores + col, highest, scale);
    sum += p;
    store_factors(to + col, dropout.threshold ? p * dropout_multiplier(dropout, bytes + col) : p);
  }
  return {highest, reduce_add(sum)};
}

template <class T>
inline void attention_forward(const AttentionHead<T>& head, T* out, int64_t out_stride, float* stats,
                              int64_t stats_stride, float* scratch) {
  using F = Factor<T>;
  const int64_t length = head.length, dim = head.dim;
  const AttentionScratch<F> at(length, dim, false);
  const Dropout& dropout = *head.dropout;
  const Scale scale(head.scale);
  F *query = factors<F>(scratch + at.query), *keys_t = factors<F>(scratch + at.keys_t);
  F* values = factors<F>(scratch + at.values);
  float *scores = scratch + at.scores, *result = scratch + at.result;
  uint8_t* bytes = reinterpret_cast<uint8_t*>(scratch + at.bytes);
  pack_transposed(rows_of(head, kKey), keys_t, factors<F>(scratch + at.panel_rows));
  pack_panels(rows_of(head, kValue), values);

  for (int64_t start = 0; start < length; start += at.block) {
    const int64_t rows = std::min(at.block, length - start), padded_rows = round_up(rows, kStep);
    pack_rows(rows_of(head, kQuery).part(start, rows), scale.sign, query, at.cols);
    product(query, at.cols, keys_t, scores, at.stride, padded_rows, at.keys / kPanel, depth_of<F>(dim));
    for (int64_t row = 0; row < rows; ++row) {
      if (dropout.threshold) {
        dropout_bytes(dropout, head.plane, head.first_row + static_cast<uint32_t>(start + row), length, bytes);
      }
      const RowSum row_sum = exp_row<F>(scores + row * at.stride, length, scale.size, bytes, dropout);
      stats[start + row] = row_sum.top;
      stats[stats_stride + start + row] = std::log2(row_sum.sum);
      scratch[at.row_scale + row] = 1.0f / row_sum.sum;
    }
    product(factors<F>(scores), at.stride, values, result, at.cols, padded_rows, at.cols / kPanel, depth_of<F>(length));
    for (int64_t row = 0; row < rows; ++row) {
      const float inverse = scratch[at.row_scale + row];
      for_columns(dim, [&](int64_t col, int n) {
        store_n(out + (start + row) * out_stride + col, load(result + row * at.cols + col) * inverse, n);
      });
    }
  }
}

// Replaces scores by the probabilities after dropout and the gradient of those by the gradient of the scores,
// zero-padded to full tiles.
//
// The softmax is computed again: the rows are complete, and reading `stats` would save a sum alone. delta, the mean of
// dp under p, is summed here and not computed from dout and out, which is equal in exact arithmetic only: so the
// gradient of a single key is exactly 0.
BF_INLINE void softmax_grad_row(float* scores, float* dscores, int64_t length, int64_t stride, float scale,
                                const uint8_t* bytes, const Dropout& dropout) {
  const int64_t padded = round_up(length, kWidth);
  const float highest = highest_score(scores, length);
  vfloat sum{}, weighted{};
  for (int64_t col = 0; col < padded; col += kWidth) {
    const vfloat p = exp_score(scores + col, highest, scale);
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

// to (rows, dim) = from * scale, and dbias += its column sums, 16 rows at a time, since one running sum over a long
// sequence has a larger rounding error.
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

// A block's operands of the products of the backward pass: the probabilities after dropout and the gradients of the
// scores, (queries, keys), as factors along the queries with stride `stride`; and the gradients as factors along the
// keys, for dquery.
template <class F>
struct ScoreFactors {
  const F *p, *ds, *ds_along_keys;
  int64_t stride;
};

// Floats already are factors.
inline ScoreFactors<float> score_factors(float* scores, int64_t, int64_t stride, const float*) {
  return {scores, scores + stride, scores + stride, 2 * stride};
}

inline const float* join_rows(const float* rows, int64_t, int64_t, float*) {
  return rows;
}

// Of consecutive rows p0, ds0, p1, ds1, p0 is replaced by the pairs of p0 and p1, p1 by the pairs of ds0 and ds1, and
// ds0 and ds1 by themselves in bfloat16. An odd last row is paired with zeros.
inline ScoreFactors<uint32_t> score_factors(float* scores, int64_t rows, int64_t stride, const uint32_t*) {
  for (int64_t row = 0; row < rows; row += 2) {
    float *p0 = scores + 2 * row * stride, *ds0 = p0 + stride, *p1 = ds0 + stride, *ds1 = p1 + stride;
    if (row + 1 == rows) std::memset(p1, 0, 2 * stride * sizeof(float));
    for (int64_t col = 0; col < stride; col += kWidth) {
      const vfloat p[2] = {load(p0 + col), load(p1 + col)}, ds[2] = {load(ds0 + col), load(ds1 + col)};
      store(reinterpret_cast<uint32_t*>(p0) + col, join(p));
      store(reinterpret_cast<uint32_t*>(p1) + col, join(ds));
      store_factors(reinterpret_cast<bfloat16*>(ds0) + col, ds[0]);
      store_factors(reinterpret_cast<bfloat16*>(ds1) + col, ds[1]);
    }
  }
  const uint32_t* first = factors<uint32_t>(scores);
  return {first, first + 2 * stride, first + stride, 4 * stride};
}

// to (rows / 2, cols) = pairs along the columns of bfloat16 rows, which are (rows, cols) words.
inline const uint32_t* join_rows(const uint32_t* rows, int64_t count, int64_t cols, uint32_t* to) {
  for (int64_t row = 0; row < count; row += 2) {
    const auto* low = reinterpret_cast<const bfloat16*>(rows + row * cols);
    const auto* high = reinterpret_cast<const bfloat16*>(rows + (row + 1) * cols);
    for (int64_t col = 0; col < cols; col += kWidth) {
      store(to + row / 2 * cols + col, bit_cast<vuint>(load(low + col)) >> 16 | bit_cast<vuint>(load(high + col)));
    }
  }
  return to;
}

template <class T>
inline void attention_backward(const AttentionHead<T>& head, const AttentionGrad<T>& grad, float* scratch) {
  using F = Factor<T>;
  const int64_t length = head.length, dim = head.dim, out_stride = grad.heads * dim, qkv_stride = 3 * out_stride;
  const AttentionScratch<F> at(length, dim, true);
  const Dropout& dropout = *head.dropout;
  const Scale scale(head.scale);
  const int64_t stride = at.stride, depth = depth_of<F>(dim), panels = at.keys / kPanel;
  F *query = factors<F>(scratch + at.query), *dout = factors<F>(scratch + at.dout);
  F *keys_t = factors<F>(scratch + at.keys_t), *values_t = factors<F>(scratch + at.values);
  F *key_panels = factors<F>(scratch + at.key_panels), *joined = factors<F>(scratch + at.joined);
  float *scores = scratch + at.scores, *result = scratch + at.result;
  float *dkeys = scratch + at.dkeys, *dvalues = scratch + at.dvalues;
  uint8_t* bytes = reinterpret_cast<uint8_t*>(scratch + at.bytes);
  std::memset(dkeys, 0, at.padded * at.cols * sizeof(float));
  std::memset(dvalues, 0, at.padded * at.cols * sizeof(float));
  pack_transposed(rows_of(head, kKey), keys_t, factors<F>(scratch + at.panel_rows));
  pack_transposed(rows_of(head, kValue), values_t, factors<F>(scratch + at.panel_rows));
  pack_panels(rows_of(head, kKey), key_panels);
  const HeadRows<T> dout_rows = {grad.dout, out_stride, nullptr, length, dim, 0};

  for (int64_t start = 0; start < length; start += at.block) {
    const int64_t rows = std::min(at.block, length - start), padded_rows = round_up(rows, kStep);
    const int64_t depth_rows = depth_of<F>(rows);
    pack_rows(rows_of(head, kQuery).part(start, rows), scale.sign, query, at.cols);
    pack_rows(dout_rows.part(start, rows), 1.0f, dout, at.cols);
    product(query, at.cols, keys_t, scores, 2 * stride, padded_rows, panels, depth);
    product(dout, at.cols, values_t, scores + stride, 2 * stride, padded_rows, panels, depth);
    for (int64_t row = 0; row < rows; ++row) {
      if (dropout.threshold) {
        dropout_bytes(dropout, head.plane, head.first_row + static_cast<uint32_t>(start + row), length, bytes);
      }
      float* row_scores = scores + 2 * row * stride;
      softmax_grad_row(row_scores, row_scores + stride, length, stride, scale.size, bytes, dropout);
    }
    const ScoreFactors<F> of_scores = score_factors(scores, rows, stride, static_cast<const F*>(nullptr));
    add_transposed_product(of_scores.p, of_scores.stride, join_rows(dout, rows, at.cols, joined), dvalues, at.cols,
                           at.padded, depth_rows);
    add_transposed_product(of_scores.ds, of_scores.stride, join_rows(query, rows, at.cols, joined), dkeys, at.cols,
                           at.padded, depth_rows);
    product(of_scores.ds_along_keys, 2 * stride, key_panels, result, at.cols, padded_rows, at.cols / kPanel,
            depth_of<F>(length));
    write_grad(result, at.cols, head.scale, rows, dim, grad.dqkv + start * qkv_stride, qkv_stride, grad.dbias);
  }
  // The packed queries already include the sign of the scale.
  write_grad(dkeys, at.cols, scale.size, length, dim, grad.dqkv + out_stride, qkv_stride, grad.dbias + out_stride);
  write_grad(dvalues, at.cols, 1.0f, length, dim, grad.dqkv + 2 * out_stride, qkv_stride, grad.dbias + 2 * out_stride);
}

}  // namespace BF_ISA
}  // namespace bert_fast
