// The host side of attention on a GPU: checks, allocation, and the choice and order of the kernels. Nothing here
// synchronizes with the device or reads cu_seqlens: the grid is sized for max_seqlen, and blocks without rows return at
// once. Rows after the last sequence become 0.
#include <atomic>

#include "attention/checks.h"
#include "attention/cuda/common.h"
#include "common/cuda_reduce.h"

namespace bert_fast {

// The error of the last tensor map that the driver refused, or 0 (csrc/registration_cuda.cpp).
std::atomic<int> refused_tensor_map{0};

namespace {

// Whether Hopper's kernels apply and the driver accepts their tensor maps. Where it doesn't, the kernels for every GPU
// run, and available_impls() has the reason.
bool uses_hopper(const AttentionBatch& batch, const Tensor& qkv) {
  if (!takes_hopper_path(batch, qkv.scalar_type(), qkv)) return false;
  const int error = qkv.scalar_type() == ScalarType::Half ? tensor_map_error(batch, data<Half>(qkv))
                                                          : tensor_map_error(batch, data<BFloat16>(qkv));
  if (error != 0) refused_tensor_map = error;
  return error == 0;
}

// The checked arguments that both passes share, and the tensors that own their memory.
struct Arguments {
  Arguments(const Tensor& qkv_in, const std::optional<Tensor>& bias_in, const Tensor& cu_seqlens, int64_t max_seqlen,
            double softmax_scale, double dropout_p, const std::optional<Tensor>& rng_state);

  // Whether there is nothing to compute.
  bool empty() const { return batch.total == 0 || batch.sequences == 0 || batch.max_seqlen == 0; }

  void align_to(const Tensor& x) {
    batch.aligned = batch.aligned && reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
  }

  Tensor qkv, ends;
  std::optional<Tensor> bias;
  AttentionBatch batch;
};

Arguments::Arguments(const Tensor& qkv_in, const std::optional<Tensor>& bias_in, const Tensor& cu_seqlens,
                     int64_t max_seqlen, double softmax_scale, double dropout_p, const std::optional<Tensor>& rng_state)
    : qkv(qkv_in), ends(as_contiguous(cu_seqlens)) {
  attention::check_inputs(qkv, bias_in, cu_seqlens);
  if (qkv.stride(3) != 1) qkv = torch::stable::contiguous(qkv);
  const int64_t heads = qkv.size(2), dim = qkv.size(3);
  STD_TORCH_CHECK(dim >= 1 && dim <= kMaxDim, "attention: the CUDA kernels take a head dimension D of 1 to ", kMaxDim,
                  ", not ", dim);
  if (bias_in.has_value()) bias = as_float(*bias_in);
  const int64_t longest = std::min(std::max<int64_t>(max_seqlen, 0), qkv.size(0));
  const int64_t blocks = std::max<int64_t>(1, ceil_div(longest, attention_block_rows(qkv.scalar_type(), dim)));
  const int64_t sequences = ends.size(0) - 1;
  STD_TORCH_CHECK(longest <= std::numeric_limits<int>::max() / 2 &&
                      3 * heads * dim <= std::numeric_limits<int>::max() &&
                      sequences * heads * blocks <= std::numeric_limits<int>::max(),
                  "attention: ", sequences, " sequences of up to ", longest, " tokens with ", heads,
                  " heads are more than a grid holds");
  const int64_t pack = 16 / static_cast<int64_t>(qkv.element_size());
  batch.cu_seqlens = data<int32_t>(ends);
  batch.bias = bias ? data<float>(*bias) : nullptr;
  batch.total = qkv.size(0);
  batch.sequences = sequences;
  batch.stride_t = qkv.stride(0);
  batch.stride_part = qkv.stride(1);
  batch.stride_n = qkv.stride(2);
  batch.heads = static_cast<int>(heads);
  batch.dim = static_cast<int>(dim);
  batch.max_seqlen = static_cast<int>(longest);
  batch.blocks = static_cast<int>(blocks);
  batch.aligned =
      dim % pack == 0 && qkv.stride(0) % pack == 0 && qkv.stride(1) % pack == 0 && qkv.stride(2) % pack == 0;
  batch.scale = static_cast<float>(softmax_scale);
  batch.dropout = dropout_arguments(dropout_p, rng_state);
  align_to(qkv);
}

// qkv (T, 3, N, D) with any strides, bias (3, N, D) -> out (T, N, D), stats (2, N, T) float32
std::tuple<Tensor, Tensor> attention_fwd(const Tensor& qkv, const std::optional<Tensor>& bias, const Tensor& cu_seqlens,
                                         int64_t max_seqlen, double softmax_scale, double dropout_p,
                                         const std::optional<Tensor>& rng_state) {
  Arguments arguments(qkv, bias, cu_seqlens, max_seqlen, softmax_scale, dropout_p, rng_state);
  const int64_t total = qkv.size(0), heads = qkv.size(2), dim = qkv.size(3);
  Tensor out = empty_like_rows(qkv, {total, heads, dim}, qkv.scalar_type());
  Tensor stats = empty_like_rows(qkv, {2, heads, total}, ScalarType::Float);
  if (arguments.empty()) return {torch::stable::zero_(out), torch::stable::zero_(stats)};
  arguments.align_to(out);
  dispatch_cuda(qkv.scalar_type(), "attention", [&](auto element) {
    using T = decltype(element);
    const AttentionForward<T> tensors = {data<T>(arguments.qkv), mutable_data<T>(out), mutable_data<float>(stats)};
    if constexpr (!std::is_same<T, float>::value) {
      if (uses_hopper(arguments.batch, arguments.qkv)) {
        return attention_forward_hopper<T>(arguments.batch, tensors, qkv);
      }
    }
    attention_forward_cuda<T>(arguments.batch, tensors, qkv);
  });
  return {out, stats};
}

// -> dqkv (T, 3, N, D), dbias (3, N, D) float32
std::tuple<Tensor, Tensor> attention_bwd(const Tensor& dout, const Tensor& qkv, const std::optional<Tensor>& bias,
                                         const Tensor& out, const Tensor& stats, const Tensor& cu_seqlens,
                                         int64_t max_seqlen, double softmax_scale, double dropout_p,
                                         const std::optional<Tensor>& rng_state) {
  Arguments arguments(qkv, bias, cu_seqlens, max_seqlen, softmax_scale, dropout_p, rng_state);
  const AttentionBatch& batch = arguments.batch;
  const int64_t total = qkv.size(0), heads = qkv.size(2), dim = qkv.size(3);
  attention::check_saved(dout, out, stats, qkv);
  Tensor dqkv = empty_like_rows(qkv, {total, 3, heads, dim}, qkv.scalar_type());
  Tensor dbias = empty_like_rows(qkv, {3, heads, dim}, ScalarType::Float);
  if (arguments.empty()) return {torch::stable::zero_(dqkv), torch::stable::zero_(dbias)};
  const Tensor dout_in = as_contiguous(dout), out_in = as_contiguous(out), stats_in = as_contiguous(stats);
  const bool biased = bias.has_value();
  const bool rounded = qkv.scalar_type() != ScalarType::Float;
  const Tensor biased_q = empty_like_rows(qkv, {biased && rounded ? total : 0, heads, dim}, qkv.scalar_type());
  const Tensor partial =
      empty_like_rows(qkv, {biased ? batch.sequences * batch.blocks : 0, 3 * heads * dim}, ScalarType::Float);
  arguments.align_to(dout_in);
  arguments.align_to(out_in);
  arguments.align_to(dqkv);
  if (biased && rounded) arguments.align_to(biased_q);
  const bool hopper = uses_hopper(batch, arguments.qkv);
  // Hopper's kernels store the statistics of queries in full blocks.
  const int64_t statistics_rows =
      hopper ? batch.sequences * batch.blocks * attention_block_rows(qkv.scalar_type(), dim) : total;
  const Tensor statistics =
      empty_like_rows(qkv, {heads, rounded ? kStatistics : 3, statistics_rows}, ScalarType::Float);
  dispatch_cuda(qkv.scalar_type(), "attention", [&](auto element) {
    using T = decltype(element);
    const AttentionBackward<T> tensors = {data<T>(dout_in),
                                          data<T>(arguments.qkv),
                                          data<T>(out_in),
                                          data<float>(stats_in),
                                          mutable_data<T>(dqkv),
                                          biased && rounded ? mutable_data<T>(biased_q) : nullptr,
                                          mutable_data<float>(statistics),
                                          biased ? mutable_data<float>(partial) : nullptr};
    if constexpr (!std::is_same<T, float>::value) {
      if (hopper) {
        attention_dq_hopper<T>(batch, tensors, qkv);
        return attention_dkv_hopper<T>(batch, tensors, qkv);
      }
    }
    attention_dq_cuda<T>(batch, tensors, qkv);
    attention_dkv_cuda<T>(batch, tensors, qkv);
  });
  if (!biased) return {dqkv, torch::stable::zero_(dbias)};
  return {dqkv, torch::stable::view(sum_parts_cuda(partial, 3 * heads * dim, 1)[0], {3, heads, dim})};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bert_fast_cuda, BERT_FAST_CUDA_KEY, m) {
  m.impl("attention_fwd", TORCH_BOX(&attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&attention_bwd));
}

}  // namespace bert_fast
