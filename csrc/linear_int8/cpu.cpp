// INT8 quantization of rows, and the epilogue of an integer product that a library computed, on the CPU.
#include <vector>

#include "common/activation.h"
#include "linear_int8/scales.h"

#define BF_KERNELS "linear_int8/cpu_kernels.h"
#include "common/foreach_isa.h"

namespace bert_fast {
namespace {

constexpr int64_t kGrain = 8192;  // the fewest elements of a thread

int64_t grain(int64_t cols) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, cols));
}

// The values of an optional tensor (2,), or null.
struct Range {
  explicit Range(const std::optional<Tensor>& range)
      : values(range ? as_float(*range) : empty({0}, ScalarType::Float)) {
    if (range) {
      check_shape(values, "range", {2});
      data = bert_fast::data<float>(values);
    }
  }
  Tensor values;
  const float* data = nullptr;
};

// A library's integer product and the scales of its epilogue.
struct Product {
  Product(const Tensor& product, const Tensor& scale, const Tensor& low, const Tensor& weight_scale,
          const Tensor& weight_sums, const std::optional<Tensor>& bias)
      : product(checked(product)),
        rows(product.size(0)),
        cols(product.size(1)),
        scales(rows, cols, scale, low, weight_scale, weight_sums, bias) {}
  static Tensor checked(const Tensor& product) {
    STD_TORCH_CHECK(product.dim() == 2, "linear_int8: expected product (T, N)");
    check_dtype(product, "product", ScalarType::Float);
    return as_contiguous(product);
  }
  Tensor product;
  int64_t rows, cols;
  Int8Scales scales;
};

template <class T, int ACTIVATION>
void epilogue(const Product& p, const Tensor& out) {
  parallel_for(0, p.rows, grain(p.cols), [&](int64_t begin, int64_t end) {
    const auto rows_of = BF_DISPATCH(epilogue_rows<T, ACTIVATION>);
    rows_of(data<float>(p.product) + begin * p.cols, data<float>(p.scales.scale) + begin,
            data<float>(p.scales.low) + begin, p.scales.columns(), mutable_data<T>(out) + begin * p.cols, end - begin,
            p.cols);
  });
}

template <int ACTIVATION>
void epilogue_quantize(const Product& p, const float* range, const Tensor& u, const Tensor& scale, const Tensor& low) {
  parallel_for(0, p.rows, grain(p.cols), [&](int64_t begin, int64_t end) {
    const auto rows_of = BF_DISPATCH(epilogue_quantize_rows<ACTIVATION>);
    std::vector<float> buffer(p.cols);
    rows_of(data<float>(p.product) + begin * p.cols, data<float>(p.scales.scale) + begin,
            data<float>(p.scales.low) + begin, p.scales.columns(), range, buffer.data(),
            mutable_data<uint8_t>(u) + begin * p.cols, mutable_data<float>(scale) + begin,
            mutable_data<float>(low) + begin, end - begin, p.cols);
  });
}

// x (T, K) float32 or bfloat16 -> u (T, K) uint8, scale (T,), low (T,). `range` is float32 (2,), the lowest and the
// highest value of all rows; without it each row has its own.
std::tuple<Tensor, Tensor, Tensor> linear_int8_quantize(const Tensor& x, const std::optional<Tensor>& range) {
  STD_TORCH_CHECK(x.dim() == 2, "linear_int8: expected x (T, K)");
  const Tensor in = as_contiguous(x);
  const Range bounds(range);
  const int64_t rows = x.size(0), cols = x.size(1);
  const Tensor u = empty({rows, cols}, ScalarType::Byte);
  const Tensor scale = empty({rows}, ScalarType::Float), low = empty({rows}, ScalarType::Float);
  dispatch_float(x.scalar_type(), "linear_int8", [&](auto element) {
    using T = decltype(element);
    const auto rows_of = BF_DISPATCH(quantize_rows<T>);
    parallel_for(0, rows, grain(cols), [&](int64_t begin, int64_t end) {
      rows_of(data<T>(in) + begin * cols, bounds.data, mutable_data<uint8_t>(u) + begin * cols,
              mutable_data<float>(scale) + begin, mutable_data<float>(low) + begin, end - begin, cols);
    });
  });
  return {u, scale, low};
}

// product (T, N), scale and low (T,) -> act(...) (T, N), bfloat16 or float32
Tensor linear_int8_epilogue(const Tensor& product, const Tensor& scale, const Tensor& low, const Tensor& weight_scale,
                            const Tensor& weight_sums, const std::optional<Tensor>& bias, int64_t activation,
                            bool bf16) {
  const Product p(product, scale, low, weight_scale, weight_sums, bias);
  const ScalarType dtype = bf16 ? ScalarType::BFloat16 : ScalarType::Float;
  const Tensor out = empty({p.rows, p.cols}, dtype);
  dispatch_float(dtype, "linear_int8", [&](auto element) {
    using T = decltype(element);
    dispatch_activation(activation, "linear_int8",
                        [&](auto constant) { epilogue<T, decltype(constant)::value>(p, out); });
  });
  return out;
}

// The same epilogue fused with the quantization for the next product: no row of act(...) is written to memory.
std::tuple<Tensor, Tensor, Tensor> linear_int8_epilogue_quantize(const Tensor& product, const Tensor& scale,
                                                                 const Tensor& low, const Tensor& weight_scale,
                                                                 const Tensor& weight_sums,
                                                                 const std::optional<Tensor>& bias, int64_t activation,
                                                                 const std::optional<Tensor>& range) {
  const Product p(product, scale, low, weight_scale, weight_sums, bias);
  const Range bounds(range);
  const Tensor u = empty({p.rows, p.cols}, ScalarType::Byte);
  const Tensor next_scale = empty({p.rows}, ScalarType::Float), next_low = empty({p.rows}, ScalarType::Float);
  dispatch_activation(activation, "linear_int8", [&](auto constant) {
    epilogue_quantize<decltype(constant)::value>(p, bounds.data, u, next_scale, next_low);
  });
  return {u, next_scale, next_low};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bert_fast, CPU, m) {
  m.impl("linear_int8_quantize", TORCH_BOX(&linear_int8_quantize));
  m.impl("linear_int8_epilogue", TORCH_BOX(&linear_int8_epilogue));
  m.impl("linear_int8_epilogue_quantize", TORCH_BOX(&linear_int8_epilogue_quantize));
}

}  // namespace bert_fast
