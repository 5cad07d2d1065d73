// The module `bert_fast._CUDA`: importing it registers the CUDA kernels, each of which is listed where it is
// implemented (csrc/<op>/cuda.cu, csrc/attention/cuda/dispatch.cu).
#define PY_SSIZE_T_CLEAN
#include <Python.h>

namespace {

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_CUDA", "CUDA kernels of bert_fast.", -1, nullptr, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__CUDA() {
  return PyModule_Create(&module);
}
