// dropout(LayerNorm(word[id] + position[position id] + token_type[type id]) * weight + bias), ids (T,) and tables
// (rows, E), on the CPU.
#include "common/dropout.h"
#include "common/reduce.h"

namespace bert_fast {

template <class T>
struct EmbeddingTables {
  const int64_t *input_ids, *token_type_ids, *position_ids;
  const T *word, *token_type, *position;
  int64_t cols;
};

template <class O>
struct EmbeddingRows {
  const float *weight, *bias;
  O* out;
  float *mean, *rstd;
  float eps;
  Dropout drop;
};

template <class O>
struct EmbeddingGradRows {
  const O* dout;
  const float *weight, *mean, *rstd;
  float* dsum;
  Dropout drop;
};

}  // namespace bert_fast

#define BF_KERNELS "embedding_layer_norm/cpu_kernels.h"
#include "common/foreach_isa.h"

namespace bert_fast {
namespace {

constexpr int64_t kGrain = 8192;  // the fewest elements of a thread
constexpr int64_t kChunk = 64;    // tokens of a partial sum; fixed, so that the result doesn't depend on the threads
constexpr int64_t kStrips =
    256;  // of the chunks, assigned round-robin, since frequent ids are adjacent in a vocabulary

// A table and the ids that index it, contiguous int64 and checked to be in range.
struct Lookup {
  Lookup(const char* name, const Tensor& index, const Tensor& from) : table(as_contiguous(from)) {
    STD_TORCH_CHECK(index.dim() == 1 && from.dim() == 2, name, ": expected ids of shape (T,) into a table (rows, E)");
    STD_TORCH_CHECK(index.scalar_type() == ScalarType::Long || index.scalar_type() == ScalarType::Int, name,
                    ": expected int64 or int32");
    ids = as_contiguous(index.scalar_type() == ScalarType::Long ? index : torch::stable::to(index, ScalarType::Long));
    const int64_t* id = data<int64_t>(ids);
    const int64_t rows = table.size(0);
    for (int64_t token = 0; token < ids.size(0); ++token) {
      STD_TORCH_CHECK(id[token] >= 0 && id[token] < rows, name, " has the value ", id[token], " at ", token,
                      "; expected 0 to ", rows - 1);
    }
  }
  Tensor ids, table;
};

struct Inputs {
  Inputs(const Tensor& input_ids, const Tensor& token_type_ids, const Tensor& position_ids, const Tensor& word,
         const Tensor& token_type, const Tensor& position, const Tensor& weight)
      : words("input_ids", input_ids, word),
        types("token_type_ids", token_type_ids, token_type),
        positions("position_ids", position_ids, position),
        tokens(input_ids.size(0)),
        cols(word.size(1)) {
    check_shape(token_type_ids, "token_type_ids", {tokens});
    check_shape(position_ids, "position_ids", {tokens});
    check_shape(token_type, "token_type", {token_type.size(0), cols});
    check_shape(position, "position", {position.size(0), cols});
    check_shape(weight, "weight", {cols});
    check_dtype(token_type, "token_type", word.scalar_type());
    check_dtype(position, "position", word.scalar_type());
  }

  template <class T>
  EmbeddingTables<T> tables() const {
    return {data<int64_t>(words.ids),
            data<int64_t>(types.ids),
            data<int64_t>(positions.ids),
            data<T>(words.table),
            data<T>(types.table),
            data<T>(positions.table),
            cols};
  }

  Lookup words, types, positions;
  int64_t tokens, cols;
};

template <class T, class O>
void forward(const EmbeddingTables<T>& tables, const EmbeddingRows<O>& to, int64_t tokens) {
  const auto rows_of = BF_DISPATCH(embedding_rows<T, O>);
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, tables.cols));
  parallel_for(0, tokens, grain, [&](int64_t begin, int64_t end) {
    RowScratch scratch(tables.cols);
    rows_of(tables, to, begin, end, scratch.row.data(), scratch.bytes.data());
  });
}

// partial (parts, 2 E): dweight and dbias of each part of the tokens.
template <class T, class O>
void backward(const EmbeddingTables<T>& tables, const EmbeddingGradRows<O>& in, const RowParts& parts, float* partial) {
  const auto rows_of = BF_DISPATCH(embedding_grad_rows<T, O>);
  const int64_t cols = tables.cols;
  parallel_for(0, parts.count, 1, [&](int64_t begin, int64_t end) {
    RowScratch scratch(cols);
    for (int64_t part = begin; part < end; ++part) {
      float* sums = partial + part * 2 * cols;
      const int64_t first = parts.begin(part);
      rows_of(tables, in, first, first + parts.length(part), sums, sums + cols, scratch.row.data(),
              scratch.bytes.data());
    }
  });
}

// Up to kChunk tokens of one row of a table: [begin, end) of the sorted tokens. `slot` is the index of their partial
// sum, or -1 if they are all tokens of the row.
struct Chunk {
  int64_t row, begin, end, slot;
};

// The partial sums [begin, end) of one row of a table.
struct PartialSums {
  int64_t row, begin, end;
};

struct ScatterPlan {
  ScatterPlan(const Lookup& lookup, std::optional<int64_t> skipped) : order(lookup.ids.size(0)) {
    const int64_t tokens = lookup.ids.size(0), rows = lookup.table.size(0);
    const int64_t* ids = data<int64_t>(lookup.ids);
    std::vector<int64_t> next(rows + 1, 0);
    for (int64_t token = 0; token < tokens; ++token) ++next[ids[token] + 1];
    for (int64_t row = 0; row < rows; ++row) next[row + 1] += next[row];
    for (int64_t token = 0; token < tokens; ++token) order[next[ids[token]]++] = token;
    int64_t begin = 0;
    for (int64_t row = 0; row < rows; begin = next[row++]) {  // next[row] is now the end of its tokens
      if (next[row] > begin && row != skipped) add_row(row, begin, next[row]);
    }
  }

  void add_row(int64_t row, int64_t begin, int64_t end) {
    const bool one_chunk = end - begin <= kChunk;
    const int64_t first_slot = slots;
    for (; begin < end; begin += kChunk) {
      chunks.push_back({row, begin, std::min(begin + kChunk, end), one_chunk ? -1 : slots++});
    }
    if (!one_chunk) partial_sums.push_back({row, first_slot, slots});
  }

  std::vector<int64_t> order;  // the tokens stably sorted by id
  std::vector<Chunk> chunks;
  std::vector<PartialSums> partial_sums;
  int64_t slots = 0;
};

// The gradient of a table: row r is the sum of dsum over the tokens whose id is r. Row `skipped` stays zero.
template <class T>
Tensor scatter_sum(const Lookup& lookup, const float* dsum, int64_t cols, std::optional<int64_t> skipped) {
  const ScatterPlan plan(lookup, skipped);
  const Tensor grad = zeros({lookup.table.size(0), cols}, lookup.table.scalar_type());
  T* to = mutable_data<T>(grad);
  std::vector<float> partial(plan.slots * cols);
  const auto to_grad = BF_DISPATCH(sum_rows<T>);
  const auto to_partial = BF_DISPATCH(sum_rows<float>);

  const int64_t strips = std::min<int64_t>(kStrips, plan.chunks.size());
  parallel_for(0, strips, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(cols);
    for (int64_t strip = begin; strip < end; ++strip) {
      for (size_t i = strip; i < plan.chunks.size(); i += strips) {
        const Chunk& chunk = plan.chunks[i];
        const int64_t* order = plan.order.data() + chunk.begin;
        if (chunk.slot < 0) {
          to_grad(dsum, order, chunk.end - chunk.begin, cols, to + chunk.row * cols, scratch.data());
        } else {
          to_partial(dsum, order, chunk.end - chunk.begin, cols, partial.data() + chunk.slot * cols, scratch.data());
        }
      }
    }
  });

  std::vector<int64_t> slots(plan.slots);
  for (int64_t slot = 0; slot < plan.slots; ++slot) slots[slot] = slot;
  parallel_for(0, plan.partial_sums.size(), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(cols);
    for (int64_t i = begin; i < end; ++i) {
      const PartialSums& row = plan.partial_sums[i];
      to_grad(partial.data(), slots.data() + row.begin, row.end - row.begin, cols, to + row.row * cols, scratch.data());
    }
  });
  return grad;
}

// -> out (T, E), mean (T,), rstd (T,)
std::tuple<Tensor, Tensor, Tensor> embedding_layer_norm_fwd(
    const Tensor& input_ids, const Tensor& token_type_ids, const Tensor& position_ids, const Tensor& word,
    const Tensor& token_type, const Tensor& position, const Tensor& weight, const Tensor& bias, double dropout_p,
    double eps, std::optional<int64_t> padding_idx, const std::optional<Tensor>& rng_state, ScalarType out_dtype) {
  const Inputs in(input_ids, token_type_ids, position_ids, word, token_type, position, weight);
  check_shape(bias, "bias", {in.cols});
  const Dropout drop = make_dropout(dropout_p, rng_state);
  const Tensor weight_in = as_float(weight), bias_in = as_float(bias);
  const Tensor out = empty({in.tokens, in.cols}, out_dtype);
  const Tensor mean = empty({in.tokens}, ScalarType::Float), rstd = empty({in.tokens}, ScalarType::Float);
  dispatch_float(word.scalar_type(), "embedding_layer_norm", [&](auto element) {
    dispatch_float(out_dtype, "embedding_layer_norm", [&](auto out_element) {
      using O = decltype(out_element);
      forward<decltype(element), O>(
          in.tables<decltype(element)>(),
          {data<float>(weight_in), data<float>(bias_in), mutable_data<O>(out), mutable_data<float>(mean),
           mutable_data<float>(rstd), static_cast<float>(eps), drop},
          in.tokens);
    });
  });
  return {out, mean, rstd};
}

// -> dword, dtoken_type, dposition in the dtype of the tables; dweight, dbias in float32
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> embedding_layer_norm_bwd(
    const Tensor& dout, const Tensor& input_ids, const Tensor& token_type_ids, const Tensor& position_ids,
    const Tensor& word, const Tensor& token_type, const Tensor& position, const Tensor& weight, const Tensor& mean,
    const Tensor& rstd, double dropout_p, std::optional<int64_t> padding_idx, const std::optional<Tensor>& rng_state) {
  const Inputs in(input_ids, token_type_ids, position_ids, word, token_type, position, weight);
  check_shape(dout, "dout", {in.tokens, in.cols});
  check_shape(mean, "mean", {in.tokens});
  check_shape(rstd, "rstd", {in.tokens});
  const Dropout drop = make_dropout(dropout_p, rng_state);
  const Tensor dout_in = as_contiguous(dout), weight_in = as_float(weight), mean_in = as_float(mean),
               rstd_in = as_float(rstd);
  const Tensor dsum = empty({in.tokens, in.cols}, ScalarType::Float);
  const RowParts parts(in.tokens);
  const Tensor partial = zeros({parts.count, 2 * in.cols}, ScalarType::Float);
  Tensor dword, dtoken_type, dposition;
  dispatch_float(word.scalar_type(), "embedding_layer_norm", [&](auto element) {
    using T = decltype(element);
    dispatch_float(dout.scalar_type(), "embedding_layer_norm", [&](auto out_element) {
      using O = decltype(out_element);
      backward<T, O>(in.tables<T>(),
                     {data<O>(dout_in), data<float>(weight_in), data<float>(mean_in), data<float>(rstd_in),
                      mutable_data<float>(dsum), drop},
                     parts, mutable_data<float>(partial));
    });
    const float* rows = data<float>(dsum);
    dword = scatter_sum<T>(in.words, rows, in.cols, padding_idx);
    dtoken_type = scatter_sum<T>(in.types, rows, in.cols, std::nullopt);
    dposition = scatter_sum<T>(in.positions, rows, in.cols, std::nullopt);
  });
  const auto sum = [&](int64_t index) {
    return sum_parts(partial, parts.count, in.cols, 2 * in.cols, index * in.cols);
  };
  return {dword, dtoken_type, dposition, sum(0), sum(1)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bert_fast, CPU, m) {
  m.impl("embedding_layer_norm_fwd", TORCH_BOX(&embedding_layer_norm_fwd));
  m.impl("embedding_layer_norm_bwd", TORCH_BOX(&embedding_layer_norm_bwd));
}

}  // namespace bert_fast
