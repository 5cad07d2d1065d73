// Views of one-dimensional numpy arrays, whose dtype, shape and contiguity are checked: else a ValueError.
#pragma once

#include <pybind11/numpy.h>

#include <cstdint>
#include <string>

namespace bert_fast::host {

namespace py = pybind11;

template <typename T>
struct View {
  const T* data;
  int64_t size;
  const T& operator[](int64_t i) const { return data[i]; }
};

template <typename T>
View<T> view(const py::array& array, const std::string& name) {
  if (!py::isinstance<py::array_t<T>>(array)) {
    throw py::value_error(name + " has dtype " + py::str(array.dtype()).cast<std::string>() + "; expected " +
                          py::str(py::dtype::of<T>()).cast<std::string>());
  }
  if (array.ndim() != 1) {
    throw py::value_error(name + " has " + std::to_string(array.ndim()) + " dimensions; expected 1");
  }
  if (!(array.flags() & py::array::c_style)) {
    throw py::value_error(name + " is not contiguous; pass numpy.ascontiguousarray(" + name + ")");
  }
  return {static_cast<const T*>(array.data()), static_cast<int64_t>(array.size())};
}

template <typename T>
View<T> view(const py::array& array, const std::string& name, int64_t size) {
  const View<T> checked = view<T>(array, name);
  if (checked.size != size) {
    throw py::value_error(name + " has " + std::to_string(checked.size) + " elements; expected " +
                          std::to_string(size));
  }
  return checked;
}

// Maps 32 random bits to 0 .. count - 1, count <= 2^32.
inline int64_t below(uint32_t random, int64_t count) {
  return static_cast<int64_t>((uint64_t{random} * static_cast<uint64_t>(count)) >> 32);
}

// The purpose of a random stream: the last word of every counter, so that no two purposes share random bits.
enum Purpose : uint32_t { kKey = 0, kPlan = 1, kShuffle = 2, kWords = 3, kReplace = 4, kSpans = 5 };

}  // namespace bert_fast::host
