// LAMB on the CPU, a tensor at a time: moments and norms, then the weights, while a tensor that fits is still in cache.
// The sums of a chunk are float32, those of the chunks float64, in order: the bits don't depend on the threads.
#include <cmath>

#include "common/tensor.h"

namespace bert_fast {

struct LambNumbers {
  float one_minus_beta1, beta2, one_minus_beta2, correction, correction_sq, eps, weight_decay, grad_scale;
};

struct LambSquares {
  float weight, update;
};

}  // namespace bert_fast

#define BF_KERNELS "lamb/cpu_kernels.h"
#include "common/foreach_isa.h"

namespace bert_fast {
namespace {

constexpr int64_t kChunk = 2048;     // elements; four arrays of them fit in L1 or nearly
constexpr int64_t kGrainChunks = 8;  // the fewest chunks of a thread

// body(chunk, first element, elements) for every chunk of `size` elements.
template <class Body>
void for_chunks(int64_t size, const Body& body) {
  parallel_for(0, (size + kChunk - 1) / kChunk, kGrainChunks, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      body(chunk, chunk * kChunk, std::min(kChunk, size - chunk * kChunk));
    }
  });
}

// The sum over chunks of of_chunk(first element, elements), an array of N floats.
template <size_t N, class OfChunk>
std::array<double, N> sum_of_chunks(int64_t size, const OfChunk& of_chunk) {
  std::vector<std::array<float, N>> partial((size + kChunk - 1) / kChunk);
  for_chunks(size, [&](int64_t chunk, int64_t first, int64_t count) { partial[chunk] = of_chunk(first, count); });
  std::array<double, N> total{};
  for (const auto& part : partial) {
    for (size_t i = 0; i < N; ++i) total[i] += part[i];
  }
  return total;
}

Tensor lamb_norm(const std::vector<Tensor>& grads) {
  STD_TORCH_CHECK(!grads.empty(), "lamb_norm: expected at least one gradient");
  double squares = 0.0;
  for (const Tensor& grad : grads) {
    dispatch_float(grad.scalar_type(), "lamb_norm", [&](auto element) {
      using G = decltype(element);
      const auto of = BF_DISPATCH(lamb_squares<G>);
      const G* from = data<G>(grad);
      squares += sum_of_chunks<1>(
          grad.numel(), [&](int64_t first, int64_t count) { return std::array<float, 1>{of(from + first, count)}; })[0];
    });
  }
  Tensor norm = empty({}, ScalarType::Float);
  *mutable_data<float>(norm) = static_cast<float>(std::sqrt(squares));
  return norm;
}

template <class W, class G, class M>
void step_of(const Tensor& param, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq, double lr,
             const LambNumbers& numbers) {
  W* w = mutable_data<W>(param);
  const G* g = data<G>(grad);
  M *m = mutable_data<M>(exp_avg), *v = mutable_data<M>(exp_avg_sq);
  const auto moments = BF_DISPATCH(lamb_moments<W, G, M>);
  const auto squares = sum_of_chunks<2>(param.numel(), [&](int64_t at, int64_t count) {
    const LambSquares of = moments(w + at, g + at, m + at, v + at, count, numbers);
    return std::array<float, 2>{of.weight, of.update};
  });
  const double ratio = squares[0] > 0.0 && squares[1] > 0.0 ? std::sqrt(squares[0] / squares[1]) : 1.0;
  const float rate = static_cast<float>(lr * ratio);
  const auto weights = BF_DISPATCH(lamb_weights<W, M>);
  for_chunks(param.numel(),
             [&](int64_t, int64_t at, int64_t count) { weights(w + at, m + at, v + at, count, rate, numbers); });
}

void lamb_step(const std::vector<Tensor>& params, const std::vector<Tensor>& grads, const std::vector<Tensor>& exp_avgs,
               const std::vector<Tensor>& exp_avg_sqs, const Tensor& numbers, double beta1, double beta2, double eps,
               double weight_decay) {
  check_dtype(numbers, "numbers", ScalarType::Double);
  check_shape(numbers, "numbers", {3});
  const Tensor values = as_contiguous(numbers);
  const double step = data<double>(values)[0], lr = data<double>(values)[1], grad_scale = data<double>(values)[2];
  const auto number = [](double x) { return static_cast<float>(x); };
  const LambNumbers of_step = {number(1.0 - beta1),
                               number(beta2),
                               number(1.0 - beta2),
                               number(1.0 - std::pow(beta1, step)),
                               number(1.0 - std::pow(beta2, step)),
                               number(eps),
                               number(weight_decay),
                               number(grad_scale)};
  const size_t count = params.size();
  STD_TORCH_CHECK(grads.size() == count && exp_avgs.size() == count && exp_avg_sqs.size() == count,
                  "lamb_step: expected lists of ", count, " tensors");
  for (size_t i = 0; i < count; ++i) {
    const int64_t size = params[i].numel();
    STD_TORCH_CHECK(grads[i].numel() == size && exp_avgs[i].numel() == size && exp_avg_sqs[i].numel() == size,
                    "lamb_step: expected a gradient and moments of ", size, " elements");
    check_dtype(exp_avg_sqs[i], "exp_avg_sqs", exp_avgs[i].scalar_type());
    dispatch_float(params[i].scalar_type(), "lamb_step", [&](auto w) {
      dispatch_float(grads[i].scalar_type(), "lamb_step", [&](auto g) {
        dispatch_float(exp_avgs[i].scalar_type(), "lamb_step", [&](auto m) {
          step_of<decltype(w), decltype(g), decltype(m)>(params[i], grads[i], exp_avgs[i], exp_avg_sqs[i], lr, of_step);
        });
      });
    });
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bert_fast, CPU, m) {
  m.impl("lamb_norm", TORCH_BOX(&lamb_norm));
  m.impl("lamb_step", TORCH_BOX(&lamb_step));
}

}  // namespace bert_fast
