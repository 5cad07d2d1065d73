// Softmax cross-entropy over the rows of logits (C, V), whose gradient overwrites them, on the CPU.
#include <memory>

#include "common/tensor.h"

namespace bert_fast {
namespace {

// The weights of the terms of a row's loss, and the factor of its gradient.
struct Terms {
  double scale, label_smoothing, z_loss;
};

}  // namespace
}  // namespace bert_fast

#define BF_KERNELS "masked_lm_loss/cpu_kernels.h"
#include "common/foreach_isa.h"

namespace bert_fast {
namespace {

constexpr int64_t kGrain = 8192;        // the fewest logits of a thread
constexpr int64_t kBiasColumns = 1024;  // columns of dbias that stay in L1

void check_labels(const int64_t* labels, int64_t rows, int64_t cols) {
  for (int64_t row = 0; row < rows; ++row) {
    STD_TORCH_CHECK(labels[row] >= 0 && labels[row] < cols, "labels has the value ", labels[row],
                    ", which is not ignore_index; expected 0 to ", cols - 1);
  }
}

template <class T, bool GRAD>
void rows_loss(const Tensor& logits, const int64_t* labels, const float* bias, const Terms& terms, double* losses,
               bool* hits) {
  const int64_t cols = logits.size(1);
  const auto loss_of = BF_DISPATCH(softmax_row<T, GRAD>);
  parallel_for(
      0, logits.size(0), std::max<int64_t>(1, kGrain / std::max<int64_t>(1, cols)), [&](int64_t begin, int64_t end) {
        const std::unique_ptr<float[]> exps(new float[cols]);
        for (int64_t row = begin; row < end; ++row) {
          losses[row] =
              loss_of(mutable_data<T>(logits) + row * cols, bias, exps.get(), labels[row], terms, cols, hits + row);
        }
      });
}

template <class T>
void bias_grad(const Tensor& logits, float* dbias) {
  const int64_t rows = logits.size(0), cols = logits.size(1);
  const auto add = BF_DISPATCH(add_rows<T>);
  parallel_for(0, (cols + kBiasColumns - 1) / kBiasColumns, 1, [&](int64_t begin, int64_t end) {
    for (int64_t col = begin * kBiasColumns; col < std::min(cols, end * kBiasColumns); col += kBiasColumns) {
      add(data<T>(logits) + col, dbias + col, rows, cols, std::min(kBiasColumns, cols - col));
    }
  });
}

// -> the sum of the losses (float64) and the number of correct predictions (int64), both scalars.
std::tuple<Tensor, Tensor> masked_lm_loss_rows(const Tensor& logits, const Tensor& labels, const Tensor& bias,
                                               const Tensor& dbias, double scale, double label_smoothing, double z_loss,
                                               bool grad) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous(), "masked_lm_loss: expected contiguous logits (C, V)");
  const int64_t rows = logits.size(0), cols = logits.size(1);
  check_shape(labels, "labels", {rows});
  check_dtype(labels, "labels", ScalarType::Long);
  check_shape(bias, "bias", {cols});
  if (grad) {
    check_shape(dbias, "dbias", {cols});
    check_dtype(dbias, "dbias", ScalarType::Float);
    STD_TORCH_CHECK(dbias.is_contiguous(), "masked_lm_loss: expected contiguous dbias (V,)");
  }
  const Tensor labels_in = as_contiguous(labels), bias_in = as_float(bias);
  check_labels(data<int64_t>(labels_in), rows, cols);

  std::vector<double> losses(rows);
  const std::unique_ptr<bool[]> hits(new bool[rows]);
  dispatch_float(logits.scalar_type(), "masked_lm_loss", [&](auto element) {
    using T = decltype(element);
    const auto run = grad ? rows_loss<T, true> : rows_loss<T, false>;
    run(logits, data<int64_t>(labels_in), data<float>(bias_in), {scale, label_smoothing, z_loss}, losses.data(),
        hits.get());
    if (grad) bias_grad<T>(logits, mutable_data<float>(dbias));
  });

  const Tensor loss = zeros({}, ScalarType::Double), correct = zeros({}, ScalarType::Long);
  for (int64_t row = 0; row < rows; ++row) {  // in order, so that the sum is the same for any number of threads
    *mutable_data<double>(loss) += losses[row];
    *mutable_data<int64_t>(correct) += hits[row];
  }
  return {loss, correct};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bert_fast, CPU, m) {
  m.impl("masked_lm_loss_rows", TORCH_BOX(&masked_lm_loss_rows));
}

}  // namespace bert_fast
