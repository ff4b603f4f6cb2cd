#include "members.h"

#include <cstdint>
#include <cstring>

// Before 3.13 the GIL is all that can be held.
#ifndef Py_BEGIN_CRITICAL_SECTION
#define Py_BEGIN_CRITICAL_SECTION(object) {
#define Py_END_CRITICAL_SECTION() }
#endif

namespace fused_ema {
namespace {

// The dicts of a large model are cold, and nothing else tells the processor where they are.
constexpr Py_ssize_t kDictsAhead = 16;

// Changes whenever the dict is written to, and is never 0; or 0 where Python has no such number
// (PEP 509 added it, PEP 699 removed it in 3.14).
uint64_t version_of(PyObject* dict) {
#if PY_VERSION_HEX < 0x030E0000
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
  return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
#pragma GCC diagnostic pop
#else
  (void)dict;
  return 0;
#endif
}

bool is_known(PyObject* dict, const char* seen) {
  uint64_t version;
  std::memcpy(&version, seen, sizeof(version));
  return version != 0 && version == version_of(dict);
}

}  // namespace

int hold_exactly(PyObject* dicts, PyObject* objects, PyObject* versions) {
  if (!PyTuple_Check(dicts) || !PyTuple_Check(objects) || !PyByteArray_Check(versions)) {
    PyErr_SetString(PyExc_TypeError, "hold_exactly takes two tuples and a bytearray");
    return -1;
  }
  const Py_ssize_t num_dicts = PyTuple_GET_SIZE(dicts);
  const Py_ssize_t num_objects = PyTuple_GET_SIZE(objects);
  if (PyByteArray_GET_SIZE(versions) != num_dicts * static_cast<Py_ssize_t>(sizeof(uint64_t))) {
    PyErr_Format(PyExc_ValueError, "hold_exactly: %zd bytes of versions for %zd dicts",
                 PyByteArray_GET_SIZE(versions), num_dicts);
    return -1;
  }
  char* seen = PyByteArray_AS_STRING(versions);
  bool same = true;
  for (Py_ssize_t i = 0; same && i < num_dicts; ++i) {
    if (i + kDictsAhead < num_dicts) __builtin_prefetch(PyTuple_GET_ITEM(dicts, i + kDictsAhead));
    PyObject* dict = PyTuple_GET_ITEM(dicts, i);
    same = PyDict_Check(dict) && is_known(dict, seen + i * sizeof(uint64_t));
  }
  if (same) return 1;

  same = true;
  Py_ssize_t next = 0;
  for (Py_ssize_t i = 0; same && i < num_dicts; ++i) {
    PyObject* dict = PyTuple_GET_ITEM(dicts, i);
    if (!PyDict_Check(dict)) {
      PyErr_Format(PyExc_TypeError, "hold_exactly: item %zd is a %s, not a dict", i,
                   Py_TYPE(dict)->tp_name);
      return -1;
    }
    Py_BEGIN_CRITICAL_SECTION(dict);
    Py_ssize_t position = 0;
    PyObject* value = nullptr;
    while (same && PyDict_Next(dict, &position, nullptr, &value)) {
      PyObject* expected = next < num_objects ? PyTuple_GET_ITEM(objects, next++) : nullptr;
      same = value == expected || expected == Py_Ellipsis;
    }
    const uint64_t version = same ? version_of(dict) : 0;
    std::memcpy(seen + i * sizeof(uint64_t), &version, sizeof(version));
    Py_END_CRITICAL_SECTION();
  }
  same = same && next == num_objects;
  // Known versions stand for known values of all dicts.
  if (!same) std::memset(seen, 0, PyByteArray_GET_SIZE(versions));
  return same;
}

}  // namespace fused_ema
