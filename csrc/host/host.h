// The hot loops of data preparation. bert_fast/data/host_numpy.py documents each and implements the same in numpy, bit
// for bit.
#pragma once

#include <pybind11/numpy.h>

#include <cstdint>

namespace bert_fast::host {

namespace py = pybind11;

py::tuple plan(const py::array& unit_ends, const py::array& document_units, const py::array& unit_texts,
               const py::array& document_texts, const py::array& key, int64_t max_tokens, int64_t short_threshold,
               bool pairs);

py::array_t<int64_t> pack(const py::array& lengths, int64_t token_budget);

py::tuple build_batch(const py::array& tokens, const py::array& a_lengths, const py::array& b_lengths,
                      const py::array& indices, const py::array& key, const py::object& masking);

}  // namespace bert_fast::host
