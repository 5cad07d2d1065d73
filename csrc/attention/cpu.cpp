#include <algorithm>
#include <atomic>
#include <memory>
#include <numeric>

#include "attention/attention.h"
#include "attention/cpu_head.h"
#include "common/reduce.h"

#define BF_KERNELS "attention/cpu_kernels.h"
#define BF_KERNELS_IN_PAIRS
#include "common/foreach_isa.h"

namespace bert_fast {
namespace {

// The checked arguments that both passes share.
struct Batch {
  Batch(const Tensor& qkv_in, const std::optional<Tensor>& bias_in, const Tensor& cu_seqlens, int64_t max_seqlen,
        double softmax_scale, double dropout_p, const std::optional<Tensor>& rng_state);

  int64_t items() const { return static_cast<int64_t>(order.size()) * heads; }

  template <class T>
  AttentionHead<T> head(int64_t sequence, int64_t index) const {
    const int64_t first = starts[sequence], length = starts[sequence + 1] - first;
    const float* from_bias = bias ? data<float>(*bias) + index * dim : nullptr;
    return {data<T>(qkv) + first * qkv.stride(0) + index * qkv.stride(2),
            qkv.stride(0),
            qkv.stride(1),
            from_bias,
            heads * dim,
            length,
            dim,
            scale,
            &dropout,
            static_cast<uint32_t>(index),
            static_cast<uint32_t>(first)};
  }

  Tensor qkv;
  std::optional<Tensor> bias;
  int64_t total, heads, dim, longest = 0;
  float scale;
  Dropout dropout;
  std::vector<int64_t> starts;
  std::vector<int64_t> order;  // the sequences that are not empty, the longest first
};

// The kernels read `dim` neighbours at a time; every other stride is theirs to follow.
Tensor with_dense_rows(const Tensor& x) {
  return x.stride(3) == 1 ? x : torch::stable::contiguous(x);
}

Batch::Batch(const Tensor& qkv_in, const std::optional<Tensor>& bias_in, const Tensor& cu_seqlens, int64_t max_seqlen,
             double softmax_scale, double dropout_p, const std::optional<Tensor>& rng_state)
    : qkv(qkv_in), scale(static_cast<float>(softmax_scale)), dropout(make_dropout(dropout_p, rng_state)) {
  STD_TORCH_CHECK(qkv.dim() == 4 && qkv.size(1) == 3, "attention: expected qkv (T, 3, N, D)");
  qkv = with_dense_rows(qkv);
  total = qkv.size(0), heads = qkv.size(2), dim = qkv.size(3);
  if (bias_in.has_value()) {
    STD_TORCH_CHECK(bias_in->dim() == 3, "attention: expected bias (3, N, D)");
    for (int64_t i = 0; i < 3; ++i) check_size(*bias_in, "bias", i, qkv.size(i + 1));
    bias = as_float(*bias_in);
  }
  check_dtype(cu_seqlens, "cu_seqlens", ScalarType::Int);
  STD_TORCH_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1, "attention: expected cu_seqlens (B+1,)");
  const Tensor ends = as_contiguous(cu_seqlens);
  starts.assign(data<int32_t>(ends), data<int32_t>(ends) + ends.size(0));
  STD_TORCH_CHECK(starts.front() == 0 && starts.back() == total, "cu_seqlens runs from ", starts.front(), " to ",
                  starts.back(), "; expected from 0 to ", total);
  for (size_t i = 0; i + 1 < starts.size(); ++i) {
    const int64_t length = starts[i + 1] - starts[i];
    STD_TORCH_CHECK(length >= 0 && length <= max_seqlen, "cu_seqlens steps by ", length, " at index ", i + 1,
                    "; expected 0 to max_seqlen = ", max_seqlen);
    if (length > 0) order.push_back(static_cast<int64_t>(i));
    longest = std::max(longest, length);
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return starts[a + 1] - starts[a] > starts[b + 1] - starts[b]; });
}

// Run body(sequence, head, scratch) once for each. The threads draw from one queue, the longest sequences first, so
// that none waits for another for longer than an item takes; which thread computes an item doesn't change its result.
template <class Body>
void for_each_head(const Batch& batch, int64_t floats, const Body& body) {
  if (batch.items() == 0) return;
  std::atomic<int64_t> next{0};
  parallel_for(0, batch.items(), 1, [&](int64_t, int64_t) {
    constexpr uintptr_t kLine = 64;
    const std::unique_ptr<float[]> memory(new float[floats + kLine / sizeof(float)]);
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory.get());
    float* scratch = memory.get() + ((kLine - address % kLine) % kLine) / sizeof(float);
    for (int64_t item = next++; item < batch.items(); item = next++) {
      body(batch.order[item / batch.heads], item % batch.heads, scratch);
    }
  });
}

template <class T>
void forward(const Batch& batch, const Tensor& out, const Tensor& lse) {
  const auto kernel = BF_DISPATCH_PAIRS(attention_forward<T>);
  const int64_t floats = BF_DISPATCH_PAIRS(attention_scratch_floats<T>(batch.longest, batch.dim, false));
  for_each_head(batch, floats, [&](int64_t sequence, int64_t index, float* scratch) {
    const int64_t first = batch.starts[sequence];
    kernel(batch.head<T>(sequence, index), mutable_data<T>(out) + (first * batch.heads + index) * batch.dim,
           batch.heads * batch.dim, mutable_data<float>(lse) + index * batch.total + first, scratch);
  });
}

template <class T>
void backward(const Batch& batch, const Tensor& dout, const Tensor& lse, const Tensor& dqkv, const Tensor& partial) {
  const auto kernel = BF_DISPATCH_PAIRS(attention_backward<T>);
  const int64_t floats = BF_DISPATCH_PAIRS(attention_scratch_floats<T>(batch.longest, batch.dim, true));
  const int64_t width = batch.heads * batch.dim;
  for_each_head(batch, floats, [&](int64_t sequence, int64_t index, float* scratch) {
    const int64_t first = batch.starts[sequence], row = first * width + index * batch.dim;
    kernel(batch.head<T>(sequence, index),
           {data<T>(dout) + row, data<float>(lse) + index * batch.total + first,
            mutable_data<T>(dqkv) + 3 * first * width + index * batch.dim,
            mutable_data<float>(partial) + sequence * 3 * width + index * batch.dim, batch.heads},
           scratch);
  });
}

void check_like_out(const Tensor& x, const char* name, const Batch& batch) {
  STD_TORCH_CHECK(x.dim() == 3, name, ": expected (T, N, D)");
  check_size(x, name, 0, batch.total);
  check_size(x, name, 1, batch.heads);
  check_size(x, name, 2, batch.dim);
  check_dtype(x, name, batch.qkv.scalar_type());
}

}  // namespace

std::tuple<Tensor, Tensor> attention_fwd_cpu(const Tensor& qkv, const std::optional<Tensor>& bias,
                                             const Tensor& cu_seqlens, int64_t max_seqlen, double softmax_scale,
                                             double dropout_p, const std::optional<Tensor>& rng_state) {
  const Batch batch(qkv, bias, cu_seqlens, max_seqlen, softmax_scale, dropout_p, rng_state);
  const Tensor out = empty({batch.total, batch.heads, batch.dim}, qkv.scalar_type());
  const Tensor lse = empty({batch.heads, batch.total}, ScalarType::Float);
  dispatch_float(qkv.scalar_type(), "attention", [&](auto element) { forward<decltype(element)>(batch, out, lse); });
  return {out, lse};
}

std::tuple<Tensor, Tensor> attention_bwd_cpu(const Tensor& dout, const Tensor& qkv, const std::optional<Tensor>& bias,
                                             const Tensor& out, const Tensor& lse, const Tensor& cu_seqlens,
                                             int64_t max_seqlen, double softmax_scale, double dropout_p,
                                             const std::optional<Tensor>& rng_state) {
  const Batch batch(qkv, bias, cu_seqlens, max_seqlen, softmax_scale, dropout_p, rng_state);
  check_like_out(dout, "dout", batch);
  check_like_out(out, "out", batch);
  check_dtype(lse, "lse", ScalarType::Float);
  STD_TORCH_CHECK(lse.dim() == 2, "lse: expected (N, T)");
  check_size(lse, "lse", 0, batch.heads);
  check_size(lse, "lse", 1, batch.total);
  const Tensor grad = as_contiguous(dout), sums = as_contiguous(lse);
  const Tensor dqkv = empty({batch.total, 3, batch.heads, batch.dim}, qkv.scalar_type());
  const int64_t sequences = static_cast<int64_t>(batch.starts.size()) - 1, width = 3 * batch.heads * batch.dim;
  const Tensor partial = zeros({sequences, width}, ScalarType::Float);
  dispatch_float(qkv.scalar_type(), "attention",
                 [&](auto element) { backward<decltype(element)>(batch, grad, sums, dqkv, partial); });
  const Tensor dbias = sum_parts(partial, sequences, width);
  return {dqkv, torch::stable::view(dbias, {3, batch.heads, batch.dim})};
}

}  // namespace bert_fast
