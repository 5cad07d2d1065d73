#include <pybind11/pybind11.h>

#include "host/host.h"

PYBIND11_MODULE(_host, module) {
  namespace host = bert_fast::host;
  using namespace pybind11::literals;
  module.doc() = "Planning, packing and masking of training examples; see bert_fast.data.host_numpy.";
  module.def("plan", &host::plan, "unit_ends"_a, "document_units"_a, "unit_texts"_a, "document_texts"_a, "key"_a,
             "max_tokens"_a, "short_threshold"_a, "pairs"_a);
  module.def("pack", &host::pack, "lengths"_a, "token_budget"_a);
  module.def("build_batch", &host::build_batch, "tokens"_a, "a_lengths"_a, "b_lengths"_a, "indices"_a, "key"_a,
             "masking"_a);
}
