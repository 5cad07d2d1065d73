// bias_gelu on a GPU: one pass forward; backward one pass that recomputes GeLU's derivative and accumulates dbias in
// registers, then a small sum over the parts of the rows.
//
// A thread owns kPack adjacent columns, 16 bytes, and loops over the rows of its block: the bias is read once, and
// dbias needs no exchange between threads. Memory traffic: 2 T F elements forward, 3 T F backward.
#include "bias_gelu/checks.h"
#include "common/cuda.h"
#include "common/cuda_reduce.h"

namespace bert_fast {
namespace {

constexpr int kThreads = 128;
constexpr int kForwardRows = 8;  // of a block: enough blocks for every multiprocessor at T = 1024, F = 3072

// The upper tail of the normal distribution at a >= 0, and exp(-a^2 / 2): kernels/_common/triton_gelu.py derives it and
// states its error. No branch, and the exponential serves the derivative too. exp2f would be the same instruction and
// three more for subnormal results, which are 0 here: Q is below 1e-39 there.
struct Tail {
  float q, e;
};

__device__ __forceinline__ Tail tail(float a) {
  const float t = __fdividef(1.0f, 1.0f + 0.3111269772052765f * a);
  float p = 0.035647228360176086f * t - 0.13912904262542725f;
  p = p * t + 0.14862486720085144f;
  p = p * t - 0.010363727807998657f;
  p = p * t + 0.10805947333574295f;
  p = p * t + 0.10860736668109894f;
  p = p * t + 0.12444401532411575f;
  p = p * t + 0.1241098940372467f;
  const float e = exp2_fast(-0.7213475204444817f * a * a);
  return {p * t * e, e};
}

template <bool TANH>
__device__ __forceinline__ float gelu(float u) {
  if (TANH) {
    const float e = expf(-1.5957691216057308f * (u + 0.044715f * u * u * u));
    return u * (1.0f / (1.0f + e));  // e = infinity leaves -0
  }
  const float a = fabsf(u);
  return fmaxf(u, 0.0f) - fminf(a, 15.0f) * tail(a).q;  // q is 0 from 15 on, and NaN for NaN
}

template <bool TANH>
__device__ __forceinline__ float gelu_grad(float u) {
  if (TANH) {
    const float z = 1.5957691216057308f * (u + 0.044715f * u * u * u);
    const float q = expf(-fabsf(z)), r = 1.0f / (1.0f + q);
    const float v = fminf(fabsf(u), 10.0f);  // beyond, q is 0 to 1e-38 and u * u may be infinite
    return (z >= 0.0f ? r : q * r) + u * (q * r * r) * 1.5957691216057308f * (1.0f + 0.134145f * v * v);
  }
  const Tail at = tail(fabsf(u));
  return (u >= 0.0f ? 1.0f - at.q : at.q) + fminf(fmaxf(u, -15.0f), 15.0f) * (0.39894228040143268f * at.e);
}

template <class T, bool FULL, bool TANH>
__global__ void __launch_bounds__(kThreads)
    bias_gelu_forward(const T* x, const float* bias, T* out, int64_t rows, int64_t cols) {
  const int64_t col = (int64_t{blockIdx.y} * kThreads + threadIdx.x) * kPack<T>;
  if (col >= cols) return;
  float shift[kPack<T>];
  load_pack<kPack<T>, FULL>(bias + col, cols - col, shift);
  const int64_t first = int64_t{blockIdx.x} * kForwardRows;
#pragma unroll 4
  for (int i = 0; i < kForwardRows; ++i) {
    if (first + i >= rows) return;
    const int64_t at = (first + i) * cols + col;
    float u[kPack<T>];
    load_pack<kPack<T>, FULL>(x + at, cols - col, u);
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) u[j] = gelu<TANH>(u[j] + shift[j]);
    store_pack<kPack<T>, FULL>(out + at, cols - col, u);
  }
}

template <class T, bool FULL, bool TANH>
__global__ void __launch_bounds__(kThreads)
    bias_gelu_backward(const T* dout, const T* x, const float* bias, T* dx, float* partial, int64_t rows, int64_t cols,
                       int64_t part_rows) {
  const int64_t col = (int64_t{blockIdx.y} * kThreads + threadIdx.x) * kPack<T>;
  if (col >= cols) return;
  float shift[kPack<T>], dbias[kPack<T>] = {};
  load_pack<kPack<T>, FULL>(bias + col, cols - col, shift);
  const int64_t first = int64_t{blockIdx.x} * part_rows;
  const int64_t end = first + part_rows < rows ? first + part_rows : rows;
  [[maybe_unused]] constexpr int kUnroll = FULL ? 2 : 1;  // two partial packs spill
#pragma unroll kUnroll
  for (int64_t row = first; row < end; ++row) {
    const int64_t at = row * cols + col;
    float u[kPack<T>], grad[kPack<T>];
    load_pack<kPack<T>, FULL>(x + at, cols - col, u);
    load_pack<kPack<T>, FULL>(dout + at, cols - col, grad);
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) {
      grad[j] *= gelu_grad<TANH>(u[j] + shift[j]);
      dbias[j] += grad[j];
    }
    store_pack<kPack<T>, FULL>(dx + at, cols - col, grad);
  }
  store_pack<kPack<T>, FULL>(partial + blockIdx.x * cols + col, cols - col, dbias);
}

dim3 grid_of(int64_t row_blocks, int64_t cols, int pack) {
  return dim3(static_cast<unsigned>(row_blocks), static_cast<unsigned>(ceil_div(cols, int64_t{kThreads} * pack)));
}

Tensor bias_gelu_fwd(const Tensor& x, const Tensor& bias, bool tanh) {
  bias_gelu::check_inputs(x, bias);
  const Tensor x_in = as_contiguous(x), bias_in = as_float(bias);
  const int64_t rows = x.size(0), cols = x.size(1);
  const Tensor out = empty_like_rows(x, {rows, cols}, x.scalar_type());
  dispatch_pack(x.scalar_type(), "bias_gelu", cols, {x_in, bias_in, out}, [&](auto element, auto full) {
    using T = decltype(element);
    constexpr bool kFull = decltype(full)::value;
    const auto kernel = tanh ? bias_gelu_forward<T, kFull, true> : bias_gelu_forward<T, kFull, false>;
    launch(kernel, grid_of(ceil_div(rows, kForwardRows), cols, kPack<T>), kThreads, 0, x, data<T>(x_in),
           data<float>(bias_in), mutable_data<T>(out), rows, cols);
  });
  return out;
}

std::tuple<Tensor, Tensor> bias_gelu_bwd(const Tensor& dout, const Tensor& x, const Tensor& bias, bool tanh) {
  bias_gelu::check_inputs(dout, x, bias);
  const Tensor dout_in = as_contiguous(dout), x_in = as_contiguous(x), bias_in = as_float(bias);
  const int64_t rows = x.size(0), cols = x.size(1);
  const Tensor dx = empty_like_rows(x, {rows, cols}, x.scalar_type());
  const DeviceParts parts(rows);
  const Tensor partial = empty_like_rows(x, {parts.count, cols}, ScalarType::Float);
  dispatch_pack(x.scalar_type(), "bias_gelu", cols, {dout_in, x_in, bias_in, dx}, [&](auto element, auto full) {
    using T = decltype(element);
    constexpr bool kFull = decltype(full)::value;
    const auto kernel = tanh ? bias_gelu_backward<T, kFull, true> : bias_gelu_backward<T, kFull, false>;
    launch(kernel, grid_of(parts.count, cols, kPack<T>), kThreads, 0, x, data<T>(dout_in), data<T>(x_in),
           data<float>(bias_in), mutable_data<T>(dx), mutable_data<float>(partial), rows, cols, parts.size);
  });
  return {dx, sum_parts_cuda(partial, cols, 1)[0]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bert_fast_cuda, BERT_FAST_CUDA_KEY, m) {
  m.impl("bias_gelu_fwd", TORCH_BOX(&bias_gelu_fwd));
  m.impl("bias_gelu_bwd", TORCH_BOX(&bias_gelu_bwd));
}

}  // namespace bert_fast
