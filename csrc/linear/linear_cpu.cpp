#include "linear/linear.h"

#define BF_KERNELS "linear/linear_cpu_kernels.h"
#include "common/foreach_isa.h"

namespace bert_fast {
namespace {

constexpr int64_t kGrain = 8192;  // elements a thread should have at least

template <int ACTIVATION>
void finish(const Tensor& product, const float* bias, const Tensor& out) {
  const int64_t cols = product.size(1);
  const auto rows_of = BF_DISPATCH(linear_finish_rows<ACTIVATION>);
  parallel_for(0, product.size(0), std::max<int64_t>(1, kGrain / std::max<int64_t>(1, cols)),
               [&](int64_t begin, int64_t end) {
                 const int64_t start = begin * cols;
                 rows_of(data<float>(product) + start, bias, mutable_data<bfloat16>(out) + start, end - begin, cols);
               });
}

}  // namespace

Tensor linear_finish_cpu(const Tensor& product, const std::optional<Tensor>& bias, int64_t activation) {
  STD_TORCH_CHECK(product.dim() == 2, "linear_finish: expected product (T, N)");
  STD_TORCH_CHECK(activation >= 0 && activation <= 2, "linear_finish: unknown activation ", activation);
  check_dtype(product, "product", ScalarType::Float);
  if (bias) check_size(*bias, "bias", 0, product.size(1));
  const Tensor in = as_contiguous(product);
  const Tensor shift = bias ? as_float(*bias) : empty({0}, ScalarType::Float);
  const float* shift_data = bias ? data<float>(shift) : nullptr;
  const Tensor out = empty({product.size(0), product.size(1)}, ScalarType::BFloat16);
  if (activation == 0) finish<0>(in, shift_data, out);
  if (activation == 1) finish<1>(in, shift_data, out);
  if (activation == 2) finish<2>(in, shift_data, out);
  return out;
}

}  // namespace bert_fast
