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

uint64_t version_at(const char* versions, Py_ssize_t i) {
  uint64_t version;
  std::memcpy(&version, versions + i * sizeof(version), sizeof(version));
  return version;
}

// The dicts of a large model lie anywhere; with less their misses don't overlap.
constexpr Py_ssize_t kDictsAhead = 64;

// Python counts the writes to a dict, all dicts together from 1 on (PEP 509), up to 3.13 (PEP 699).
#if PY_VERSION_HEX < 0x030E0000
constexpr bool kHasVersions = true;
uint64_t version_of(PyObject* dict) {
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
  return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
#pragma GCC diagnostic pop
}
#else
constexpr bool kHasVersions = false;
uint64_t version_of(PyObject*) { return 0; }
#endif

// Whether these dicts have these versions. Versions other than 0 were stored by a walk that found
// dicts here, and the tuple can't change; so nothing is asked of an object but its version.
bool have_versions(PyObject* dicts, const char* versions) {
  if (!kHasVersions) return false;
  const Py_ssize_t size = PyTuple_GET_SIZE(dicts);
  if (size > 0 && version_at(versions, 0) == 0) return false;
  uint64_t changed = 0;  // One branch at the end: the loads don't wait for one another.
  for (Py_ssize_t i = 0; i < size; ++i) {
    if (i + kDictsAhead < size) __builtin_prefetch(PyTuple_GET_ITEM(dicts, i + kDictsAhead));
    changed |= version_of(PyTuple_GET_ITEM(dicts, i)) ^ version_at(versions, i);
  }
  return changed == 0;
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
  if (have_versions(dicts, seen)) return 1;

  bool same = true;
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
