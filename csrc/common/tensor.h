// Short names for torch's stable ABI, and the checks that every kernel makes before it accesses memory.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "common/simd_prelude.h"

namespace bert_fast {

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

inline Tensor empty(std::vector<int64_t> shape, ScalarType dtype) {
  return torch::stable::empty(shape, dtype);
}

inline Tensor zeros(std::vector<int64_t> shape, ScalarType dtype) {
  Tensor x = empty(shape, dtype);
  return torch::stable::zero_(x);
}

inline Tensor as_contiguous(const Tensor& x) {
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

// A parameter vector as contiguous float32, converted at every call: it has a few thousand elements.
inline Tensor as_float(const Tensor& x) {
  return as_contiguous(x.scalar_type() == ScalarType::Float ? x : torch::stable::to(x, ScalarType::Float));
}

template <class T>
inline const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <class T>
inline T* mutable_data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// Every tensor that a kernel reads is checked by this before its pointer is taken.
inline void check_shape(const Tensor& x, const char* name, const std::vector<int64_t>& expected) {
  const auto dims = static_cast<int64_t>(expected.size());
  STD_TORCH_CHECK(x.dim() == dims, name, " has ", x.dim(), " dimensions; expected ", dims);
  for (int64_t dim = 0; dim < dims; ++dim) {
    STD_TORCH_CHECK(x.size(dim) == expected[dim], name, " has size ", x.size(dim), " in dimension ", dim, "; expected ",
                    expected[dim]);
  }
}

inline void check_dtype(const Tensor& x, const char* name, ScalarType expected) {
  STD_TORCH_CHECK(x.scalar_type() == expected, name, " has an unexpected dtype");
}

// Run `body` with the storage type of `dtype`: float or bfloat16, those that the CPU kernels support.
template <class Body>
inline void dispatch_float(ScalarType dtype, const char* name, const Body& body) {
  if (dtype == ScalarType::Float) {
    body(float{});
  } else if (dtype == ScalarType::BFloat16) {
    body(bfloat16{});
  } else {
    STD_TORCH_CHECK(false, name, ": the CPU kernels take float32 and bfloat16");
  }
}

}  // namespace bert_fast
