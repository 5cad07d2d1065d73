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

// A storage that was resized to 0, as FSDP frees a parameter's, leaves a tensor of the old shape without memory.
inline void check_memory(const Tensor& x, const void* pointer) {
  STD_TORCH_CHECK(pointer || !x.numel(), "a tensor of ", x.numel(), " elements has no memory: its storage was freed");
}

template <class T>
inline const T* data(const Tensor& x) {
  const void* pointer = x.const_data_ptr();
  check_memory(x, pointer);
  return static_cast<const T*>(pointer);
}

template <class T>
inline T* mutable_data(const Tensor& x) {
  void* pointer = x.mutable_data_ptr();
  check_memory(x, pointer);
  return static_cast<T*>(pointer);
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
