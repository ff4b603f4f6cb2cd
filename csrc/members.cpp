#include "members.h"

#include <structmember.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>

// Before 3.13 the GIL is all that can be held.
#ifndef Py_BEGIN_CRITICAL_SECTION
#define Py_BEGIN_CRITICAL_SECTION(object) {
#define Py_END_CRITICAL_SECTION() }
#define Py_BEGIN_CRITICAL_SECTION2(a, b) {
#define Py_END_CRITICAL_SECTION2() }
#endif

namespace fused_ema {
namespace {

uint64_t version_at(const char* versions, Py_ssize_t i) {
  uint64_t version;
  std::memcpy(&version, versions + i * sizeof(version), sizeof(version));
  return version;
}

// The dicts and tensors of a large model lie anywhere; with less their misses don't overlap.
constexpr Py_ssize_t kObjectsAhead = 64;

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
    if (i + kObjectsAhead < size) __builtin_prefetch(PyTuple_GET_ITEM(dicts, i + kObjectsAhead));
    changed |= version_of(PyTuple_GET_ITEM(dicts, i)) ^ version_at(versions, i);
  }
  return changed == 0;
}

}  // namespace

PyObject* changed_dicts(PyObject* dicts, PyObject* held, PyObject* versions) {
  if (!PyTuple_Check(dicts) || !PyTuple_Check(held) || !PyByteArray_Check(versions)) {
    PyErr_SetString(PyExc_TypeError, "changed_dicts takes two tuples and a bytearray");
    return nullptr;
  }
  const Py_ssize_t size = PyTuple_GET_SIZE(dicts);
  if (PyTuple_GET_SIZE(held) != size ||
      PyByteArray_GET_SIZE(versions) != size * static_cast<Py_ssize_t>(sizeof(uint64_t))) {
    PyErr_Format(PyExc_ValueError,
                 "changed_dicts: %zd lists and %zd bytes of versions for %zd dicts",
                 PyTuple_GET_SIZE(held), PyByteArray_GET_SIZE(versions), size);
    return nullptr;
  }
  PyObject* changed = PyList_New(0);
  char* seen = PyByteArray_AS_STRING(versions);
  if (changed == nullptr || have_versions(dicts, seen)) return changed;

  for (Py_ssize_t i = 0; i < size; ++i) {
    PyObject* dict = PyTuple_GET_ITEM(dicts, i);
    PyObject* list = PyTuple_GET_ITEM(held, i);
    if (kHasVersions && version_at(seen, i) != 0 && version_of(dict) == version_at(seen, i)) {
      continue;  // A version that is not zero was stored for a dict.
    }
    if (!PyDict_Check(dict) || !PyList_Check(list)) {
      PyErr_Format(PyExc_TypeError,
                   "changed_dicts: item %zd is a %s with a %s, not a dict with a list", i,
                   Py_TYPE(dict)->tp_name, Py_TYPE(list)->tp_name);
      Py_DECREF(changed);
      return nullptr;
    }
    Py_BEGIN_CRITICAL_SECTION(dict);
    bool same = 2 * PyDict_Size(dict) == PyList_GET_SIZE(list);
    Py_ssize_t position = 0;
    Py_ssize_t next = 0;
    PyObject* key = nullptr;
    PyObject* value = nullptr;
    while (same && PyDict_Next(dict, &position, &key, &value)) {
      PyObject* expected = PyList_GET_ITEM(list, next + 1);
      same = key == PyList_GET_ITEM(list, next) && (value == expected || expected == Py_Ellipsis);
      next += 2;
    }
    const uint64_t version = same ? version_of(dict) : 0;
    std::memcpy(seen + i * sizeof(uint64_t), &version, sizeof(version));
    if (!same) {
      PyObject* index = PyLong_FromSsize_t(i);
      if (index == nullptr || PyList_Append(changed, index) < 0) Py_CLEAR(changed);
      Py_XDECREF(index);
    }
    Py_END_CRITICAL_SECTION();
    if (changed == nullptr) return nullptr;
  }
  return changed;
}

PyObject* slots_hold(PyObject* slot, PyObject* objects, PyObject* held) {
  if (!Py_IS_TYPE(slot, &PyMemberDescr_Type) || !PyTuple_Check(objects) || !PyTuple_Check(held)) {
    PyErr_SetString(PyExc_TypeError, "slots_hold takes the descriptor of a slot and two tuples");
    return nullptr;
  }
  const auto* descriptor = reinterpret_cast<PyMemberDescrObject*>(slot);
  const Py_ssize_t size = PyTuple_GET_SIZE(objects);
  if (descriptor->d_member->type != T_OBJECT_EX || PyTuple_GET_SIZE(held) != size) {
    PyErr_Format(PyExc_ValueError, "slots_hold: %zd values for %zd objects, or no slot of objects",
                 PyTuple_GET_SIZE(held), size);
    return nullptr;
  }
  PyTypeObject* const type = descriptor->d_common.d_type;
  const Py_ssize_t offset = descriptor->d_member->offset;
  bool same = true;
  for (Py_ssize_t i = 0; i < size && same; ++i) {
    if (i + kObjectsAhead < size) {
      const char* next = reinterpret_cast<char*>(PyTuple_GET_ITEM(objects, i + kObjectsAhead));
      __builtin_prefetch(next);
      __builtin_prefetch(next + offset);
    }
    PyObject* object = PyTuple_GET_ITEM(objects, i);
    if (!PyObject_TypeCheck(object, type)) {
      PyErr_Format(PyExc_TypeError, "slots_hold: item %zd is a %s without that slot", i,
                   Py_TYPE(object)->tp_name);
      return nullptr;
    }
    // By its place in the object: to ask for the attribute is 9 times as long.
    PyObject* value;
    std::memcpy(&value, reinterpret_cast<char*>(object) + offset, sizeof(value));
    same = value == PyTuple_GET_ITEM(held, i);
  }
  return PyBool_FromLong(same);
}

PyObject* hold_same(PyObject* a, PyObject* b) {
  for (PyObject* sequence : {a, b}) {
    if (!PyList_Check(sequence) && !PyTuple_Check(sequence)) {
      PyErr_Format(PyExc_TypeError, "hold_same takes lists or tuples, not a %s",
                   Py_TYPE(sequence)->tp_name);
      return nullptr;
    }
  }
  bool same = false;
  Py_BEGIN_CRITICAL_SECTION2(a, b);
  const Py_ssize_t size = PySequence_Fast_GET_SIZE(a);
  PyObject* const* const left = PySequence_Fast_ITEMS(a);
  PyObject* const* const right = PySequence_Fast_ITEMS(b);
  same = PySequence_Fast_GET_SIZE(b) == size;
  for (Py_ssize_t i = 0; i < size && same; ++i) same = left[i] == right[i];
  Py_END_CRITICAL_SECTION2();
  return PyBool_FromLong(same);
}

}  // namespace fused_ema
