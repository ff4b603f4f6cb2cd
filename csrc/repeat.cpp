#include "repeat.h"

#include <torch/csrc/autograd/python_variable.h>

#include <cstdint>
#include <cstring>

#include "members.h"
#include "ops.h"
#include "plan.h"

namespace py = pybind11;

namespace fused_ema {
namespace {

enum { kPlan, kCopies, kForm, kLeast, kMost, kTrees, kSlots, kFrozen, kNoted, kNumParts };

// As fused_ema/_teacher.py packs it.
struct Note {
  int64_t turn;
  int64_t is_seen;
  int64_t version;
};

PyObject* part_of(PyObject* tuple, Py_ssize_t i, Py_ssize_t size) {
  if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != size) {
    throw py::type_error("update_if_unchanged: not a tuple of " + std::to_string(size));
  }
  return PyTuple_GET_ITEM(tuple, i);
}

char* bytes_of(PyObject* bytes, size_t size) {
  if (!PyByteArray_Check(bytes) || PyByteArray_GET_SIZE(bytes) != static_cast<Py_ssize_t>(size)) {
    throw py::type_error("update_if_unchanged: not a bytearray of " + std::to_string(size));
  }
  return PyByteArray_AS_STRING(bytes);
}

bool hold_the_same(PyObject* watch) {
  PyObject* changed =
      changed_dicts(part_of(watch, 0, 3), part_of(watch, 1, 3), part_of(watch, 2, 3));
  if (changed == nullptr) throw py::error_already_set();
  const bool same = PyList_GET_SIZE(changed) == 0;
  Py_DECREF(changed);
  return same;
}

bool is_tree_unchanged(PyObject* tree) {
  if (!hold_the_same(part_of(tree, 0, 3))) return false;
  PyObject* turns = part_of(tree, 1, 3);
  const Py_ssize_t size = PyTuple_Check(turns) ? PyTuple_GET_SIZE(turns) : 0;
  if (size == 0) return true;
  auto* turn = reinterpret_cast<unsigned char*>(bytes_of(part_of(tree, 2, 3), 1));
  const Py_ssize_t next = (*turn + 1) % size;
  // Where it has changed, whoever asks next asks the same one.
  if (!hold_the_same(PyTuple_GET_ITEM(turns, next))) return false;
  *turn = static_cast<unsigned char>(next);
  return true;
}

bool has_slots(PyObject* slots) {
  if (slots == Py_None) return true;
  PyObject* same = slots_hold(part_of(slots, 0, 3), part_of(slots, 1, 3), part_of(slots, 2, 3));
  if (same == nullptr) throw py::error_already_set();
  Py_DECREF(same);  // A bool, which lives for ever.
  return same == Py_True;
}

const at::Tensor& tensor_at(PyObject* tensors, Py_ssize_t i) {
  PyObject* object = PyTuple_GET_ITEM(tensors, i);
  if (!THPVariable_Check(object)) throw py::type_error("update_if_unchanged: not a tensor");
  return THPVariable_Unpack(object);
}

bool are_frozen(PyObject* tensors) {
  const Py_ssize_t size = PyTuple_Check(tensors) ? PyTuple_GET_SIZE(tensors) : 0;
  for (Py_ssize_t i = 0; i < size; ++i) {
    if (tensor_at(tensors, i).requires_grad()) return false;
  }
  return true;
}

int64_t version_of(const at::Tensor& tensor) {
  return tensor.unsafeGetTensorImpl()->version_counter().current_version();
}

}  // namespace

bool update_if_unchanged(py::handle state, double momentum) {
  PyObject* parts = state.ptr();
  PyObject* trees = part_of(parts, kTrees, kNumParts);
  const double least = PyFloat_AsDouble(PyTuple_GET_ITEM(parts, kLeast));
  const double most = PyFloat_AsDouble(PyTuple_GET_ITEM(parts, kMost));
  if (!(momentum >= least && momentum <= most)) return false;
  const Py_ssize_t num_trees = PyTuple_Check(trees) ? PyTuple_GET_SIZE(trees) : 0;
  for (Py_ssize_t i = 0; i < num_trees; ++i) {
    if (!is_tree_unchanged(PyTuple_GET_ITEM(trees, i))) return false;
  }
  if (!has_slots(PyTuple_GET_ITEM(parts, kSlots))) return false;
  if (!are_frozen(PyTuple_GET_ITEM(parts, kFrozen))) return false;

  PyObject* noted = PyTuple_GET_ITEM(parts, kNoted);
  PyObject* tensors = noted == Py_None ? nullptr : part_of(noted, 0, 2);
  const int64_t num_noted = tensors == nullptr ? 0 : PyTuple_Size(tensors);
  char* bytes = tensors == nullptr ? nullptr : bytes_of(part_of(noted, 1, 2), sizeof(Note));
  Note note{};
  if (num_noted > 0) {
    std::memcpy(&note, bytes, sizeof(note));
    if (note.turn < 0 || note.turn >= num_noted) return false;
    if (note.is_seen != 0 && version_of(tensor_at(tensors, note.turn)) != note.version) {
      return false;
    }
  }

  auto& plan = py::handle(PyTuple_GET_ITEM(parts, kPlan)).cast<Plan&>();
  PyObject* other = PyTuple_GET_ITEM(parts, kCopies);
  Plan* copies = other == Py_None ? nullptr : &py::handle(other).cast<Plan&>();
  const std::string form = py::handle(PyTuple_GET_ITEM(parts, kForm)).cast<std::string>();
  const Operation operation = update_operation("Plan.update", momentum, form);
  {
    const py::gil_scoped_release no_gil;
    if (copies != nullptr && !copies->is_current()) return false;
    if (!plan.update_if_current(operation)) return false;
    if (copies != nullptr) copies->copy_to_ema();
  }
  if (num_noted > 0) {
    note.turn = (note.turn + 1) % num_noted;
    note.is_seen = 1;
    note.version = version_of(tensor_at(tensors, note.turn));
    std::memcpy(bytes_of(part_of(noted, 1, 2), sizeof(Note)), &note, sizeof(note));
  }
  return true;
}

}  // namespace fused_ema
