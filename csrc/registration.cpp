// The module `bert_fast._C`: importing it registers the CPU kernels, each of which is listed where it is implemented
// (csrc/<op>/cpu.cpp). Their schemas are declared in Python (kernels/<op>/op.py).
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstring>

#include "common/cpu_features.h"

namespace {

PyObject* cpu_isa(PyObject*, PyObject*) {
  return PyUnicode_FromString(bert_fast::isa_name());
}

// FNV-1a over 64 evenly spaced eight-byte words, the last of which ends with the memory.
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
     "fingerprint(address, size): a hash of 64 words spread over `size` bytes of memory."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", "Compiled kernels of bert_fast.", -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  return PyModule_Create(&module);
}
