// The module `bert_fast._CUDA`: importing it registers the CUDA kernels, each of which is listed where it is
// implemented (csrc/<op>/cuda.cu, csrc/attention/cuda/dispatch.cu).
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <atomic>

namespace bert_fast {
extern std::atomic<int> refused_tensor_map;  // csrc/attention/cuda/dispatch.cu
}

namespace {

PyObject* refused_tensor_map(PyObject*, PyObject*) {
  return PyLong_FromLong(bert_fast::refused_tensor_map);
}

PyMethodDef methods[] = {
    {"refused_tensor_map", refused_tensor_map, METH_NOARGS,
     "The driver's error for the last tensor map of attention that it refused in this process, or 0."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_CUDA", "CUDA kernels of bert_fast.", -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__CUDA() {
  return PyModule_Create(&module);
}
