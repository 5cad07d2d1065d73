// add_layer_norm on a GPU. Forward, a block owns one row; backward, it loops over a part of the rows.
//
// A thread holds 8 elements of the row in registers, in packs of 16 bytes, so a row is read once. Forward
// there are two block reductions (two-pass variance), backward one (both means of the gradient). Backward a thread has
// the same columns of every row, so it accumulates dweight, dbias and dx_bias by itself over its part. Memory traffic:
// 3 T E elements forward, 5 T E backward, and 24 E bytes for each part.
#include "add_layer_norm/checks.h"
#include "common/cuda_philox.h"
#include "common/cuda_reduce.h"

namespace bert_fast {
namespace {

constexpr int kElems = 8;  // of a thread
// Backward a thread of wider rows holds 16: 1024 threads would leave each 64 registers, of which it needs about 100.
constexpr int kWideElems = 16, kBackwardThreads = 512;
constexpr int64_t kMaxCols = 8192;
// The most parts of the rows in the backward pass: about 4 blocks for each multiprocessor of an H200.
constexpr int64_t kParts = 512;

template <class T>
struct Rows {
  const T *x, *residual;
  const float *x_bias, *weight, *bias;  // x_bias may be null
  T* out;
  float *mean, *rstd;
  int64_t rows, cols;
  float eps;
  DropoutArguments drop;
};

template <class T>
struct GradRows {
  const T *dout, *x, *residual;
  const float *x_bias, *weight, *mean, *rstd;
  T *dx, *dresidual;
  float* partial;  // (parts, kColumnSums, E); dx_bias is not written without x_bias
  int64_t rows, cols, part_rows;
  DropoutArguments drop;
};

template <class T, int ELEMS = kElems>
using RowElems = float[ELEMS / kPack<T>][kPack<T>];

// Calls body(first column, number of the pack) for each of the thread's packs, ELEMS elements, that begins inside the
// row. Packs of one number are adjacent across threads, so that accesses are coalesced.
template <class T, int ELEMS = kElems, class Body>
__device__ __forceinline__ void for_packs(int64_t cols, const Body& body) {
#pragma unroll
  for (int pack = 0; pack < ELEMS / kPack<T>; ++pack) {
    const int64_t col = (static_cast<int64_t>(pack) * blockDim.x + threadIdx.x) * kPack<T>;
    if (col < cols) body(col, pack);
  }
}

template <bool FULL, class T, int PACKS>
__device__ __forceinline__ void load_row(const T* from, int64_t cols, float (&to)[PACKS][kPack<T>]) {
  for_packs<T, PACKS * kPack<T>>(
      cols, [&](int64_t col, int pack) { load_pack<kPack<T>, FULL>(from + col, cols - col, to[pack]); });
}

// sum = residual + dropout(x + x_bias) of a row. Returns which elements dropout keeps: bit pack * kPack<T> + i.
template <bool FULL, class T, int PACKS>
__device__ __forceinline__ uint32_t load_sum(const T* x, const T* residual, const float* x_bias,
                                             const DropoutState& drop, int64_t row, int64_t cols,
                                             float (&sum)[PACKS][kPack<T>]) {
  float stream[PACKS][kPack<T>];
  uint32_t kept_bits = 0;
  load_row<FULL>(x + row * cols, cols, sum);
  load_row<FULL>(residual + row * cols, cols, stream);
  for_packs<T, PACKS * kPack<T>>(cols, [&](int64_t col, int pack) {
    float shift[kPack<T>] = {};
    if (x_bias) load_pack<kPack<T>, FULL>(x_bias + col, cols - col, shift);
    uint32_t words[4];
    if (drop.threshold) dropout_words(drop, 0, static_cast<uint32_t>(row), static_cast<uint32_t>(col) / 16, words);
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) {
      float branch = sum[pack][i] + shift[i];
      if (drop.threshold) {
        const bool keep = dropout_keeps(drop, words, static_cast<uint32_t>(col) + i);
        kept_bits |= static_cast<uint32_t>(keep) << (pack * kPack<T> + i);
        branch = keep ? branch * drop.scale : 0.0f;
      }
      sum[pack][i] = stream[pack][i] + branch;
    }
  });
  return kept_bits;
}

// The floats of shared memory that block_sums uses.
__host__ __device__ constexpr unsigned scratch_floats(unsigned threads) {
  return 4 * (threads / kWarp);
}

// Sums a and b over the block, in every thread. Consecutive calls alternate between the halves of `scratch`, so that
// one barrier per call suffices.
__device__ __forceinline__ void block_sums(float* scratch, int turn, float& a, float& b) {
  const int warps = blockDim.x / kWarp;
  a = warp_sum(a);
  b = warp_sum(b);
  if (warps == 1) return;
  float* sums = scratch + (turn & 1) * 2 * warps;
  if (threadIdx.x % kWarp == 0) {
    sums[threadIdx.x / kWarp] = a;
    sums[warps + threadIdx.x / kWarp] = b;
  }
  __syncthreads();
  a = b = 0.0f;
  for (int warp = 0; warp < warps; ++warp) {
    a += sums[warp];
    b += sums[warps + warp];
  }
}

template <class T, bool FULL>
__global__ void __launch_bounds__(1024) add_layer_norm_forward(Rows<T> in) {
  float* scratch = dynamic_shared<float>();
  const int64_t row = blockIdx.x;
  const float count = static_cast<float>(in.cols);
  RowElems<T> sum = {};
  load_sum<FULL>(in.x, in.residual, in.x_bias, load_dropout(in.drop), row, in.cols, sum);
  float total = 0.0f, deviations = 0.0f, squares = 0.0f, unused = 0.0f;
  for_packs<T>(in.cols, [&](int64_t, int pack) {
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) total += sum[pack][i];
  });
  block_sums(scratch, 0, total, unused);
  const float first_mean = total / count;
  for_packs<T>(in.cols, [&](int64_t col, int pack) {
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) {
      const float d = FULL || col + i < in.cols ? sum[pack][i] - first_mean : 0.0f;
      deviations += d;
      squares += d * d;
    }
  });
  block_sums(scratch, 1, deviations, squares);
  // The mean of the deviations corrects the rounding error of the first sum.
  const float shift = deviations / count, mean = first_mean + shift;
  const float variance = squares / count - shift * shift;
  const float rstd = 1.0f / sqrtf((variance < 0.0f ? 0.0f : variance) + in.eps);
  if (threadIdx.x == 0) {
    in.mean[row] = mean;
    in.rstd[row] = rstd;
  }
  for_packs<T>(in.cols, [&](int64_t col, int pack) {
    float gain[kPack<T>], bias[kPack<T>];
    load_pack<kPack<T>, FULL>(in.weight + col, in.cols - col, gain);
    load_pack<kPack<T>, FULL>(in.bias + col, in.cols - col, bias);
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) bias[i] += (sum[pack][i] - mean) * rstd * gain[i];
    store_pack<kPack<T>, FULL>(in.out + row * in.cols + col, in.cols - col, bias);
  });
}

constexpr int kColumnSums = 3;  // dweight, dbias, dx_bias

// The thread's sums over rows, for each of its elements: of wide rows in shared memory, those of a warp in different
// banks.
template <class T, int ELEMS>
struct ColumnSums {
  static constexpr bool kShared = ELEMS > kElems;

  __device__ __forceinline__ explicit ColumnSums(float* memory) : shared(memory + threadIdx.x) {
#pragma unroll
    for (int i = 0; i < kColumnSums * ELEMS; ++i) at(i) = 0.0f;
  }

  __device__ __forceinline__ void add(int which, int pack, int i, float x) {
    at(which * ELEMS + pack * kPack<T> + i) += x;
  }

  template <bool FULL>
  __device__ __forceinline__ void store(int which, int pack, float* to, int64_t count) {
    float sums[kPack<T>];
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) sums[i] = at(which * ELEMS + pack * kPack<T> + i);
    store_pack<kPack<T>, FULL>(to, count, sums);
  }

 private:
  __device__ __forceinline__ float& at(int index) {
    if constexpr (kShared) {
      return shared[index * kBackwardThreads];
    } else {
      return registers[index];
    }
  }

  float* shared;
  float registers[kShared ? 1 : kColumnSums * ELEMS];
};

template <class T, bool FULL, int ELEMS>
__global__ void __launch_bounds__(kBackwardThreads) add_layer_norm_backward(GradRows<T> in) {
  float* scratch = dynamic_shared<float>();
  const DropoutState drop = load_dropout(in.drop);
  const float count = static_cast<float>(in.cols);
  const int64_t first = int64_t{blockIdx.x} * in.part_rows;
  const int64_t end = first + in.part_rows < in.rows ? first + in.part_rows : in.rows;
  ColumnSums<T, ELEMS> sums(scratch + scratch_floats(blockDim.x));
  for (int64_t row = first; row < end; ++row) {
    RowElems<T, ELEMS> xhat, grad;
    const uint32_t kept_bits = load_sum<FULL>(in.x, in.residual, in.x_bias, drop, row, in.cols, xhat);
    load_row<FULL>(in.dout + row * in.cols, in.cols, grad);
    const float mean = in.mean[row], rstd = in.rstd[row];
    float sum_grad = 0.0f, sum_both = 0.0f;
    for_packs<T, ELEMS>(in.cols, [&](int64_t col, int pack) {
      float gain[kPack<T>];
      load_pack<kPack<T>, FULL>(in.weight + col, in.cols - col, gain);
#pragma unroll
      for (int i = 0; i < kPack<T>; ++i) {
        xhat[pack][i] = (xhat[pack][i] - mean) * rstd;
        sums.add(0, pack, i, grad[pack][i] * xhat[pack][i]);
        sums.add(1, pack, i, grad[pack][i]);
        grad[pack][i] *= gain[i];
        sum_grad += grad[pack][i];
        sum_both += grad[pack][i] * xhat[pack][i];
      }
    });
    block_sums(scratch, static_cast<int>(row - first), sum_grad, sum_both);
    const float mean_grad = sum_grad / count, mean_both = sum_both / count;
    for_packs<T, ELEMS>(in.cols, [&](int64_t col, int pack) {
#pragma unroll
      for (int i = 0; i < kPack<T>; ++i) grad[pack][i] = (grad[pack][i] - mean_grad - xhat[pack][i] * mean_both) * rstd;
      store_pack<kPack<T>, FULL>(in.dresidual + row * in.cols + col, in.cols - col, grad[pack]);
#pragma unroll
      for (int i = 0; i < kPack<T>; ++i) {
        if (drop.threshold) grad[pack][i] = kept_bits >> (pack * kPack<T> + i) & 1 ? grad[pack][i] * drop.scale : 0.0f;
        sums.add(2, pack, i, grad[pack][i]);
      }
      store_pack<kPack<T>, FULL>(in.dx + row * in.cols + col, in.cols - col, grad[pack]);
    });
  }
  float* partial = in.partial + int64_t{blockIdx.x} * kColumnSums * in.cols;
  for_packs<T, ELEMS>(in.cols, [&](int64_t col, int pack) {
#pragma unroll
    for (int which = 0; which < kColumnSums; ++which) {
      if (which == 2 && in.x_bias == nullptr) break;
      sums.template store<FULL>(which, pack, partial + which * in.cols + col, in.cols - col);
    }
  });
}

unsigned threads_of(int64_t cols, int elems) {
  return static_cast<unsigned>(ceil_div(std::max<int64_t>(cols, 1), elems * kWarp) * kWarp);
}

size_t scratch_of(unsigned threads) {
  return sizeof(float) * scratch_floats(threads);
}

void check_inputs(const Tensor& x, const Tensor& residual, const Tensor& weight, const std::optional<Tensor>& x_bias) {
  add_layer_norm::check_inputs(x, residual, weight, x_bias);
  STD_TORCH_CHECK(x.size(1) <= kMaxCols, "add_layer_norm: impl='cuda' takes E up to ", kMaxCols, "; it is ", x.size(1));
}

// -> out (T, E), mean (T,), rstd (T,)
std::tuple<Tensor, Tensor, Tensor> add_layer_norm_fwd(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                                      const Tensor& bias, const std::optional<Tensor>& x_bias,
                                                      double dropout_p, double eps,
                                                      const std::optional<Tensor>& rng_state) {
  check_inputs(x, residual, weight, x_bias);
  const int64_t rows = x.size(0), cols = x.size(1);
  check_shape(bias, "bias", {cols});
  const DropoutArguments drop = dropout_arguments(dropout_p, rng_state);
  const Tensor x_in = as_contiguous(x), residual_in = as_contiguous(residual), weight_in = as_float(weight);
  const Tensor bias_in = as_float(bias), x_bias_in = x_bias ? as_float(*x_bias) : bias_in;
  const Tensor out = empty_like_rows(x, {rows, cols}, x.scalar_type());
  const Tensor mean = empty_like_rows(x, {rows}, ScalarType::Float),
               rstd = empty_like_rows(x, {rows}, ScalarType::Float);
  dispatch_pack(x.scalar_type(), "add_layer_norm", cols, {x_in, residual_in, weight_in, bias_in, x_bias_in, out},
                [&](auto element, auto full) {
                  using T = decltype(element);
                  const Rows<T> in = {data<T>(x_in),
                                      data<T>(residual_in),
                                      x_bias ? data<float>(x_bias_in) : nullptr,
                                      data<float>(weight_in),
                                      data<float>(bias_in),
                                      mutable_data<T>(out),
                                      mutable_data<float>(mean),
                                      mutable_data<float>(rstd),
                                      rows,
                                      cols,
                                      static_cast<float>(eps),
                                      drop};
                  const unsigned threads = threads_of(cols, kElems);
                  launch(add_layer_norm_forward<T, decltype(full)::value>, dim3(static_cast<unsigned>(rows)), threads,
                         scratch_of(threads), x, in);
                });
  return {out, mean, rstd};
}

// -> dx, dresidual, dweight, dbias, dx_bias (empty without x_bias)
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> add_layer_norm_bwd(const Tensor& dout, const Tensor& x,
                                                                      const Tensor& residual, const Tensor& weight,
                                                                      const std::optional<Tensor>& x_bias,
                                                                      const Tensor& mean, const Tensor& rstd,
                                                                      double dropout_p,
                                                                      const std::optional<Tensor>& rng_state) {
  check_inputs(x, residual, weight, x_bias);
  const int64_t rows = x.size(0), cols = x.size(1);
  add_layer_norm::check_saved(dout, x, mean, rstd);
  const DropoutArguments drop = dropout_arguments(dropout_p, rng_state);
  const Tensor dout_in = as_contiguous(dout), x_in = as_contiguous(x), residual_in = as_contiguous(residual);
  const Tensor weight_in = as_float(weight), x_bias_in = x_bias ? as_float(*x_bias) : weight_in;
  const Tensor mean_in = as_float(mean), rstd_in = as_float(rstd);
  const Tensor dx = empty_like_rows(x, {rows, cols}, x.scalar_type());
  const Tensor dresidual = empty_like_rows(x, {rows, cols}, x.scalar_type());
  const DeviceParts parts(rows, kParts);
  const Tensor partial = empty_like_rows(x, {parts.count, kColumnSums * cols}, ScalarType::Float);
  dispatch_pack(
      x.scalar_type(), "add_layer_norm", cols,
      {dout_in, x_in, residual_in, weight_in, x_bias_in, dx, dresidual, partial}, [&](auto element, auto full) {
        using T = decltype(element);
        const GradRows<T> in = {data<T>(dout_in),
                                data<T>(x_in),
                                data<T>(residual_in),
                                x_bias ? data<float>(x_bias_in) : nullptr,
                                data<float>(weight_in),
                                data<float>(mean_in),
                                data<float>(rstd_in),
                                mutable_data<T>(dx),
                                mutable_data<T>(dresidual),
                                mutable_data<float>(partial),
                                rows,
                                cols,
                                parts.size,
                                drop};
        constexpr bool kFull = decltype(full)::value;
        const auto launch_with = [&](auto kernel, int elems, size_t sums) {
          const unsigned threads = threads_of(cols, elems);
          launch(kernel, dim3(static_cast<unsigned>(parts.count)), threads, scratch_of(threads) + sums, x, in);
        };
        if (cols <= kBackwardThreads * kElems) {
          launch_with(add_layer_norm_backward<T, kFull, kElems>, kElems, 0);
        } else {
          launch_with(add_layer_norm_backward<T, kFull, kWideElems>, kWideElems,
                      sizeof(float) * kColumnSums * kWideElems * kBackwardThreads);
        }
      });
  std::vector<Tensor> sums = sum_parts_cuda(partial, cols, x_bias ? kColumnSums : 2);
  if (!x_bias) sums.push_back(empty_like_rows(x, {0}, ScalarType::Float));
  return {dx, dresidual, sums[0], sums[1], sums[2]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bert_fast_cuda, BERT_FAST_CUDA_KEY, m) {
  m.impl("add_layer_norm_fwd", TORCH_BOX(&add_layer_norm_fwd));
  m.impl("add_layer_norm_bwd", TORCH_BOX(&add_layer_norm_bwd));
}

}  // namespace bert_fast
