// The module `bert_fast._CUDA`: importing it registers the CUDA kernels. With BERT_FAST_EMULATOR it is the same kernels
// on CPU tensors (csrc/emulator), for tests.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "add_layer_norm/add_layer_norm.h"
#include "attention/attention.h"
#include "bias_gelu/bias_gelu.h"

#ifdef BERT_FAST_EMULATOR
#define BF_KEY CPU
#else
#define BF_KEY CUDA
#endif

STABLE_TORCH_LIBRARY_IMPL(bert_fast_cuda, BF_KEY, m) {
  m.impl("add_layer_norm_fwd", TORCH_BOX(&bert_fast::add_layer_norm_fwd_cuda));
  m.impl("add_layer_norm_bwd", TORCH_BOX(&bert_fast::add_layer_norm_bwd_cuda));
  m.impl("attention_fwd", TORCH_BOX(&bert_fast::attention_fwd_cuda));
  m.impl("attention_bwd", TORCH_BOX(&bert_fast::attention_bwd_cuda));
  m.impl("bias_gelu_fwd", TORCH_BOX(&bert_fast::bias_gelu_fwd_cuda));
  m.impl("bias_gelu_bwd", TORCH_BOX(&bert_fast::bias_gelu_bwd_cuda));
}

namespace {

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_CUDA", "CUDA kernels of bert_fast.", -1, nullptr, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__CUDA() {
  return PyModule_Create(&module);
}
