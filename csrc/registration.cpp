// The module `bert_fast._C`: importing it registers the kernels for their dispatch keys. The schemas are Python's
// (kernels/<op>/ops.py).
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "add_layer_norm/add_layer_norm.h"
#include "attention/attention.h"
#include "bias_gelu/bias_gelu.h"
#include "common/cpu_features.h"
#include "embedding_layer_norm/embedding_layer_norm.h"
#include "linear/linear.h"
#include "linear_int8/linear_int8.h"
#include "masked_lm_loss/masked_lm_loss.h"
#include "padding/padding.h"

STABLE_TORCH_LIBRARY_IMPL(bert_fast, CPU, m) {
  m.impl("add_layer_norm_fwd", TORCH_BOX(&bert_fast::add_layer_norm_fwd_cpu));
  m.impl("add_layer_norm_bwd", TORCH_BOX(&bert_fast::add_layer_norm_bwd_cpu));
  m.impl("attention_fwd", TORCH_BOX(&bert_fast::attention_fwd_cpu));
  m.impl("attention_bwd", TORCH_BOX(&bert_fast::attention_bwd_cpu));
  m.impl("bias_gelu_fwd", TORCH_BOX(&bert_fast::bias_gelu_fwd_cpu));
  m.impl("bias_gelu_bwd", TORCH_BOX(&bert_fast::bias_gelu_bwd_cpu));
  m.impl("embedding_layer_norm_fwd", TORCH_BOX(&bert_fast::embedding_layer_norm_fwd_cpu));
  m.impl("embedding_layer_norm_bwd", TORCH_BOX(&bert_fast::embedding_layer_norm_bwd_cpu));
  m.impl("linear_pack", TORCH_BOX(&bert_fast::linear_pack_cpu));
  m.impl("linear_tiles", TORCH_BOX(&bert_fast::linear_tiles_cpu));
  m.impl("linear_int8_quantize", TORCH_BOX(&bert_fast::linear_int8_quantize_cpu));
  m.impl("linear_int8_epilogue", TORCH_BOX(&bert_fast::linear_int8_finish_cpu));
  m.impl("linear_int8_pack", TORCH_BOX(&bert_fast::linear_int8_pack_cpu));
  m.impl("linear_int8_tiles", TORCH_BOX(&bert_fast::linear_int8_tiles_cpu));
  m.impl("linear_int8_epilogue_quantize", TORCH_BOX(&bert_fast::linear_int8_finish_quantize_cpu));
  m.impl("masked_lm_loss_rows", TORCH_BOX(&bert_fast::masked_lm_loss_rows_cpu));
  m.impl("gather_rows", TORCH_BOX(&bert_fast::gather_rows_cpu));
  m.impl("scatter_rows", TORCH_BOX(&bert_fast::scatter_rows_cpu));
  m.impl("unpad_indices", TORCH_BOX(&bert_fast::unpad_indices_cpu));
}

namespace {

PyObject* cpu_isa(PyObject*, PyObject*) {
  return PyUnicode_FromString(bert_fast::isa_name());
}

// FNV-1a over 64 eight-byte words, evenly spread; the last one ends where the memory does.
PyObject* fingerprint(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 2) {
    PyErr_SetString(PyExc_TypeError, "fingerprint: expected an address and a size in bytes");
    return nullptr;
  }
  const auto* bytes = static_cast<const char*>(PyLong_AsVoidPtr(arguments[0]));
  const long long size = PyLong_AsLongLong(arguments[1]);
  if (PyErr_Occurred()) return nullptr;
  constexpr long long kWords = 64;
  unsigned long long hash = 14695981039346656037ull;
  for (long long word = 0; word < kWords && size > 0; ++word) {
    const long long width = size < 8 ? size : 8;
    unsigned long long value = 0;
    std::memcpy(&value, bytes + (size - width) * word / (kWords - 1), width);
    hash = (hash ^ value) * 1099511628211ull;
    hash ^= hash >> 29;
  }
  return PyLong_FromUnsignedLongLong(hash);
}

PyMethodDef methods[] = {
    {"cpu_isa", cpu_isa, METH_NOARGS, "The instruction set of the CPU kernels: generic, avx2, avx512 or avx512bf16."},
    {"fingerprint", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(fingerprint)), METH_FASTCALL,
     "A hash of 64 words spread over the memory at an address of a size in bytes."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", "Compiled kernels of bert_fast.", -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  return PyModule_Create(&module);
}
