// softmax(scale Q K^T) V of every sequence of a packed batch, with QKV bias and dropout, on the CPU; see
// kernels/attention/README.md.
#include <algorithm>
#include <atomic>
#include <memory>
#include <numeric>

#include "attention/checks.h"
#include "attention/cpu_head.h"
#include "common/reduce.h"

#define BF_KERNELS "attention/cpu_kernels.h"
#define BF_KERNELS_BF16_DOT
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
  std::vector<int64_t> order;  // the non-empty sequences, longest first
};

Batch::Batch(const Tensor& qkv_in, const std::optional<Tensor>& bias_in, const Tensor& cu_seqlens, int64_t max_seqlen,
             double softmax_scale, double dropout_p, const std::optional<Tensor>& rng_state)
    : qkv(qkv_in), scale(static_cast<float>(softmax_scale)), dropout(make_dropout(dropout_p, rng_state)) {
  attention::check_inputs(qkv, bias_in, cu_seqlens);
  if (qkv.stride(3) != 1) qkv = torch::stable::contiguous(qkv);  // the kernels take any other strides
  total = qkv.size(0), heads = qkv.size(2), dim = qkv.size(3);
  if (bias_in.has_value()) bias = as_float(*bias_in);
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

// Runs body(sequence, head, scratch) for each head of each sequence. The threads take items from one queue, longest
// sequences first, so that they finish at about the same time; the result doesn't depend on which thread takes an item.
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
void forward(const Batch& batch, const Tensor& out, const Tensor& stats) {
  const auto kernel = BF_DISPATCH_BF16_DOT(attention_forward<T>);
  const int64_t floats = BF_DISPATCH_BF16_DOT(attention_scratch_floats<T>(batch.longest, batch.dim, false));
  for_each_head(batch, floats, [&](int64_t sequence, int64_t index, float* scratch) {
    const int64_t first = batch.starts[sequence];
    kernel(batch.head<T>(sequence, index), mutable_data<T>(out) + (first * batch.heads + index) * batch.dim,
           batch.heads * batch.dim, mutable_data<float>(stats) + index * batch.total + first, batch.heads * batch.total,
           scratch);
  });
}

template <class T>
void backward(const Batch& batch, const Tensor& dout, const Tensor& dqkv, const Tensor& partial) {
  const auto kernel = BF_DISPATCH_BF16_DOT(attention_backward<T>);
  const int64_t floats = BF_DISPATCH_BF16_DOT(attention_scratch_floats<T>(batch.longest, batch.dim, true));
  const int64_t width = batch.heads * batch.dim;
  for_each_head(batch, floats, [&](int64_t sequence, int64_t index, float* scratch) {
    const int64_t first = batch.starts[sequence], row = first * width + index * batch.dim;
    kernel(batch.head<T>(sequence, index),
           {data<T>(dout) + row, mutable_data<T>(dqkv) + 3 * first * width + index * batch.dim,
            mutable_data<float>(partial) + sequence * 3 * width + index * batch.dim, batch.heads},
           scratch);
  });
}

// qkv (T, 3, N, D) with any strides, bias (3, N, D) -> out (T, N, D), stats (2, N, T) float32
std::tuple<Tensor, Tensor> attention_fwd(const Tensor& qkv, const std::optional<Tensor>& bias, const Tensor& cu_seqlens,
                                         int64_t max_seqlen, double softmax_scale, double dropout_p,
                                         const std::optional<Tensor>& rng_state) {
  const Batch batch(qkv, bias, cu_seqlens, max_seqlen, softmax_scale, dropout_p, rng_state);
  const Tensor out = empty({batch.total, batch.heads, batch.dim}, qkv.scalar_type());
  const Tensor stats = empty({2, batch.heads, batch.total}, ScalarType::Float);
  dispatch_float(qkv.scalar_type(), "attention", [&](auto element) { forward<decltype(element)>(batch, out, stats); });
  return {out, stats};
}

// -> dqkv (T, 3, N, D), dbias (3, N, D) float32
std::tuple<Tensor, Tensor> attention_bwd(const Tensor& dout, const Tensor& qkv, const std::optional<Tensor>& bias,
                                         const Tensor& out, const Tensor& stats, const Tensor& cu_seqlens,
                                         int64_t max_seqlen, double softmax_scale, double dropout_p,
                                         const std::optional<Tensor>& rng_state) {
  const Batch batch(qkv, bias, cu_seqlens, max_seqlen, softmax_scale, dropout_p, rng_state);
  attention::check_saved(dout, out, stats, qkv);
  const Tensor dout_in = as_contiguous(dout);
  const Tensor dqkv = empty({batch.total, 3, batch.heads, batch.dim}, qkv.scalar_type());
  const int64_t sequences = static_cast<int64_t>(batch.starts.size()) - 1, width = 3 * batch.heads * batch.dim;
  const Tensor partial = zeros({sequences, width}, ScalarType::Float);
  dispatch_float(qkv.scalar_type(), "attention",
                 [&](auto element) { backward<decltype(element)>(batch, dout_in, dqkv, partial); });
  const Tensor dbias = sum_parts(partial, sequences, width);
  return {dqkv, torch::stable::view(dbias, {3, batch.heads, batch.dim})};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bert_fast, CPU, m) {
  m.impl("attention_fwd", TORCH_BOX(&attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&attention_bwd));
}

}  // namespace bert_fast
