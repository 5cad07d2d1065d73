// The module `bert_fast._C`: importing it registers the CPU kernels, each of which is listed where it is implemented
// (csrc/<op>/cpu.cpp). Their schemas are declared in Python (kernels/<op>/op.py).
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "common/cpu_features.h"

namespace {

PyObject* cpu_isa(PyObject*, PyObject*) {
  return PyUnicode_FromString(bert_fast::isa_name());
}

PyObject* has_int8_dot(PyObject*, PyObject*) {
  return PyBool_FromLong(bert_fast::has_int8_dot());
}

// A hash of `size` bytes, eight of them a step in lanes of their own. Every step is a bijection of the lane's state and
// of the word, so a changed word always changes the hash unless a later one in its lane makes up for it.
uint64_t hash_part(const char* bytes, int64_t size) {
  constexpr int kLanes = 8;
  constexpr uint64_t kFactor = 0x9e3779b97f4a7c15ull;
  const auto mix = [](uint64_t state, uint64_t word) {
    state = (state ^ word) * kFactor;
    return state ^ (state >> 29);  // the highest bits, otherwise, would never reach the lower ones
  };
  uint64_t lanes[kLanes] = {1, 2, 3, 4, 5, 6, 7, 8};
  int64_t at = 0;
  for (; at + 8 * kLanes <= size; at += 8 * kLanes) {
    uint64_t words[kLanes];
    std::memcpy(words, bytes + at, sizeof(words));
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = mix(lanes[lane], words[lane]);
  }
  uint64_t hash = static_cast<uint64_t>(size);
  for (; at < size; at += 8) {
    uint64_t word = 0;
    std::memcpy(&word, bytes + at, std::min<int64_t>(8, size - at));
    hash = mix(hash, word);
  }
  for (uint64_t lane : lanes) hash = mix(hash, lane);
  return hash;
}

PyObject* fingerprint(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 2) {
    PyErr_SetString(PyExc_TypeError, "fingerprint: expected an address and a size in bytes");
    return nullptr;
  }
  const auto* bytes = static_cast<const char*>(PyLong_AsVoidPtr(arguments[0]));
  const int64_t size = PyLong_AsLongLong(arguments[1]);
  if (PyErr_Occurred()) return nullptr;
  uint64_t hash = 0;
  Py_BEGIN_ALLOW_THREADS;
  constexpr int64_t kPart = 1 << 18;  // hashed by one thread
  const int64_t parts = (size + kPart - 1) / kPart;
  std::vector<uint64_t> hashes(parts);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      hashes[part] = hash_part(bytes + part * kPart, std::min(kPart, size - part * kPart));
    }
  });
  hash = hash_part(reinterpret_cast<const char*>(hashes.data()), parts * static_cast<int64_t>(sizeof(uint64_t)));
  Py_END_ALLOW_THREADS;
  return PyLong_FromUnsignedLongLong(hash);
}

PyMethodDef methods[] = {
    {"cpu_isa", cpu_isa, METH_NOARGS, "The instruction set of the CPU kernels: generic, avx2, avx512 or avx512bf16."},
    {"has_int8_dot", has_int8_dot, METH_NOARGS, "Whether the CPU kernels add four products of bytes in INT32 (VNNI)."},
    {"fingerprint", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(fingerprint)), METH_FASTCALL,
     "fingerprint(address, size): a 64-bit hash of `size` bytes of memory."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", "Compiled kernels of bert_fast.", -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  return PyModule_Create(&module);
}
