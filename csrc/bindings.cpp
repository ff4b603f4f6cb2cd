// pybind11 and the torch library: names and argument types, no logic.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/library.h>

#include "cpu/launch.h"
#include "members.h"
#include "ops.h"
#include "parallel.h"
#include "plan.h"
#include "records.h"
#include "repeat.h"
#ifdef FUSED_EMA_WITH_CUDA
#include "cuda/launch.h"
#endif

namespace py = pybind11;

namespace fused_ema {
namespace {

// The objects of a long list are cold, and each leads to the next: the Python object, then the
// tensor. Fetched at two distances ahead their misses overlap.
void prefetch_tensors(PyObject** items) {
  const auto* object = reinterpret_cast<const char*>(items[kTensorsAhead]);
  prefetch(object + offsetof(PyObject, ob_type));
  prefetch(object + offsetof(THPVariable, cdata));
  if (PyObject* nearer = items[kTensorsAhead / 2]; THPVariable_Check(nearer)) {
    prefetch(THPVariable_Unpack(nearer).unsafeGetTensorImpl());
  }
}

// The tensors of a Python list. The objects are held, not the tensors: where Python alone held a
// tensor, torch takes and drops the object's reference with the tensor's second one, under the GIL
// each time, a third of a one-shot call on 500.
class Held {
 public:
  Held() = default;
  Held(Held&&) = default;
  ~Held() {
    for (PyObject* object : objects_) Py_DECREF(object);
  }
  void reserve(size_t size) {
    tensors_.reserve(size);
    objects_.reserve(size);
  }
  void add(PyObject* object) {
    objects_.push_back(Py_NewRef(object));
    tensors_.push_back(THPVariable_Unpack(object));
  }
  void reread() {
    tensors_.clear();
    for (PyObject* object : objects_) tensors_.push_back(THPVariable_Unpack(object));
  }
  bool is_in_place(size_t i) const {
    return THPVariable_Unpack(objects_[i]).is_same(tensors_.get()[i]);
  }
  const Tensors& tensors() const { return tensors_.get(); }

 private:
  BorrowedTensors tensors_;
  std::vector<PyObject*> objects_;
};

class HeldLists : public TensorLists {
 public:
  // first: the lists of so many averages, one after the other.
  HeldLists(Held first, Held second, int num_averages)
      : first_(std::move(first)), second_(std::move(second)), num_averages_(num_averages) {}
  void reread() override {
    first_.reread();
    second_.reread();
  }
  const Tensors& first() const override { return first_.tensors(); }
  const Tensors& second() const override { return second_.tensors(); }
  int num_averages() const override { return num_averages_; }
  bool are_in_place(size_t pair) const override {
    const size_t size = second_.tensors().size();
    for (int k = 0; k < num_averages_; ++k) {
      if (!first_.is_in_place(k * size + pair)) return false;
    }
    return second_.is_in_place(pair);
  }

 private:
  Held first_;
  Held second_;
  const int num_averages_;
};

// Walks the list itself: torch's caster for vectors of tensors takes twice as long per tensor.
void unpack_into(Held& tensors, const char* op, const std::string& side, PyObject* list) {
  if (!PyList_Check(list) && !PyTuple_Check(list)) {
    throw py::type_error(std::string("fused_ema.") + op + ": " + side + " is a " +
                         Py_TYPE(list)->tp_name + "; pass a list or tuple of tensors");
  }
  const Py_ssize_t size = PySequence_Fast_GET_SIZE(list);
  PyObject** items = PySequence_Fast_ITEMS(list);
  tensors.reserve(tensors.tensors().size() + size);
  for (Py_ssize_t i = 0; i < size; ++i) {
    if (i + kTensorsAhead < size) prefetch_tensors(items + i);
    if (!THPVariable_Check(items[i])) {
      throw py::type_error(std::string("fused_ema.") + op + ": " + side + "[" + std::to_string(i) +
                           "] is a " + Py_TYPE(items[i])->tp_name + "; pass tensors only");
    }
    tensors.add(items[i]);
  }
}

Held unpack(const char* op, const char* side, PyObject* list) {
  Held tensors;
  unpack_into(tensors, op, side, list);
  return tensors;
}

// The lists of several averages, one after the other, each as long as `size` says.
Held unpack_several(const char* op, PyObject* lists, size_t size) {
  Held tensors;
  const Py_ssize_t num_averages = PySequence_Fast_GET_SIZE(lists);
  for (Py_ssize_t k = 0; k < num_averages; ++k) {
    std::string side = "ema[";
    side.append(std::to_string(k)).append("]");
    unpack_into(tensors, op, side, PySequence_Fast_GET_ITEM(lists, k));
    const size_t own = tensors.tensors().size() - k * size;
    if (own != size) {
      throw py::value_error(std::string("fused_ema.") + op + ": " + side + " holds " +
                            std::to_string(own) + " tensors but params holds " +
                            std::to_string(size) + "; pass lists of the same length");
    }
  }
  return tensors;
}

// Several momenta, as a list or tuple of numbers or a 1-dim tensor, as the update that they ask
// for.
Operation parse_update_several(const char* op, py::handle momenta, int num_averages,
                               const std::string& form) {
  if (THPVariable_Check(momenta.ptr())) {
    return update_operation(op, THPVariable_Unpack(momenta.ptr()), num_averages, form);
  }
  std::vector<double> values;
  const bool is_list = PyList_Check(momenta.ptr()) || PyTuple_Check(momenta.ptr());
  bool are_numbers = is_list;
  for (Py_ssize_t k = 0; are_numbers && k < PySequence_Fast_GET_SIZE(momenta.ptr()); ++k) {
    values.push_back(PyFloat_AsDouble(PySequence_Fast_GET_ITEM(momenta.ptr(), k)));
    are_numbers = values.back() != -1.0 || PyErr_Occurred() == nullptr;
  }
  if (!are_numbers) {
    PyErr_Clear();
    throw py::type_error(
        std::string("fused_ema.") + op + ": momentum is a " + Py_TYPE(momenta.ptr())->tp_name +
        " for " + std::to_string(num_averages) +
        " averages; pass a list of as many floats, or a 1-dim torch.float64 tensor");
  }
  return update_operation(op, std::move(values), num_averages, form);
}

// A number or a 0-dim tensor, as the update that it asks for.
Operation parse_update(const char* op, py::handle momentum, const std::string& form) {
  if (THPVariable_Check(momentum.ptr())) {
    return update_operation(op, THPVariable_Unpack(momentum.ptr()), form);
  }
  const double value = PyFloat_AsDouble(momentum.ptr());
  if (value == -1.0 && PyErr_Occurred()) {
    PyErr_Clear();
    throw py::type_error(std::string("fused_ema.") + op + ": momentum is a " +
                         Py_TYPE(momentum.ptr())->tp_name +
                         "; pass a float, or a 0-dim torch.float64 tensor");
  }
  return update_operation(op, value, form);
}

void py_update(py::handle ema, py::handle params, py::handle momentum, const std::string& form) {
  const Held a = unpack("update_", "ema", ema.ptr());
  const Held b = unpack("update_", "params", params.ptr());
  const Operation operation = parse_update("update_", momentum, form);
  const py::gil_scoped_release no_gil;
  run_once(kUpdateSignature, a.tensors(), b.tensors(), operation);
}

void py_update_averages(py::handle emas, py::handle params, py::handle momenta,
                        const std::string& form) {
  const Held b = unpack("update_", "params", params.ptr());
  const Held a = unpack_several("update_", emas.ptr(), b.tensors().size());
  const auto num_averages = static_cast<int>(PySequence_Fast_GET_SIZE(emas.ptr()));
  const Operation operation = parse_update_several("update_", momenta, num_averages, form);
  const py::gil_scoped_release no_gil;
  run_once(kUpdateSignature, a.tensors(), b.tensors(), operation, num_averages);
}

void py_swap(py::handle first, py::handle second) {
  const Held a = unpack("swap_", "a", first.ptr());
  const Held b = unpack("swap_", "b", second.ptr());
  const py::gil_scoped_release no_gil;
  swap_(a.tensors(), b.tensors());
}

void py_copy(py::handle dst, py::handle src) {
  const Held a = unpack("copy_", "dst", dst.ptr());
  const Held b = unpack("copy_", "src", src.ptr());
  const py::gil_scoped_release no_gil;
  copy_(a.tensors(), b.tensors());
}

py::list describe(const Plan& plan) {
  std::vector<Plan::GroupFacts> facts;
  {
    const py::gil_scoped_release no_gil;
    facts = plan.describe();
  }
  py::list result;
  for (const Plan::GroupFacts& fact : facts) {
    py::dict entry;
    entry["backend"] = fact.backend;
    entry["device"] = fact.device;
    entry["ema_dtype"] = fact.ema_dtype;
    entry["param_dtype"] = fact.param_dtype;
    entry["num_tensors"] = fact.num_tensors;
    entry["num_elements"] = fact.num_elements;
    entry["num_averages"] = fact.num_averages;
    result.append(std::move(entry));
  }
  return result;
}

// (index of the pair, first element, elements, is a block tile) of every tile, for tests.
py::list tiles_of(const std::vector<std::tuple<uint64_t, uint64_t, int64_t>>& spans, int size_a,
                  int size_b) {
  std::vector<Span> list;
  for (const auto& [a, b, n] : spans) {
    list.push_back(Span{{reinterpret_cast<void*>(a), reinterpret_cast<void*>(b)}, n});
  }
  const TileTable<2> table = make_tile_table(tile_shape(size_a, size_b), list);
  py::list result;
  for (size_t i = 0; i < table.tiles.size(); ++i) {
    const Tile& tile = table.tiles[i];
    const Span& span = list[tile.span];
    const auto a = static_cast<char*>(tile.sides[0]) - static_cast<char*>(span.sides[0]);
    const auto b = static_cast<char*>(tile.sides[1]) - static_cast<char*>(span.sides[1]);
    result.append(py::make_tuple(tile.span, a / size_a, b / size_b, tile.n,
                                 static_cast<int64_t>(i) < table.num_block_tiles));
  }
  return result;
}

std::string cuda_architectures() {
#ifdef FUSED_EMA_WITH_CUDA
  return cuda::built_architectures();
#else
  return "";
#endif
}

}  // namespace

// Torch's errors as the Python errors that they stand for, without the C++ backtrace.
void translate_error(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const c10::TypeError& error) {
    PyErr_SetString(PyExc_TypeError, error.what_without_backtrace());
  } catch (const c10::ValueError& error) {
    PyErr_SetString(PyExc_ValueError, error.what_without_backtrace());
  } catch (const c10::Error& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what_without_backtrace());
  }
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled part of fused_ema; fused_ema/ops.py and plan.py are its surface.";
  py::register_local_exception_translator(&translate_error);
  m.def("update_", &py_update);
  m.def("update_averages_", &py_update_averages);
  m.def("swap_", &py_swap);
  m.def("copy_", &py_copy);

  py::class_<Plan>(m, "Plan")
      .def(py::init([](py::handle ema, py::handle params, std::vector<std::string> names,
                       bool only_moves, bool is_several) {
             Held second = unpack("Plan", "params", params.ptr());
             const size_t size = second.tensors().size();
             Held first = is_several ? unpack_several("Plan", ema.ptr(), size)
                                     : unpack("Plan", "ema", ema.ptr());
             const auto num_averages =
                 is_several ? static_cast<int>(PySequence_Fast_GET_SIZE(ema.ptr())) : 1;
             auto lists =
                 std::make_unique<HeldLists>(std::move(first), std::move(second), num_averages);
             const auto exchanges = py::module_::import("torch.__future__")
                                        .attr("get_swap_module_params_on_conversion")();
             return std::make_unique<Plan>(std::move(lists), std::move(names), only_moves,
                                           exchanges.cast<bool>());
           }),
           py::arg("ema"), py::arg("params"), py::arg("names"), py::arg("only_moves") = false,
           py::arg("is_several") = false)
      .def("update",
           [](Plan& plan, py::handle momentum, const std::string& form) {
             const Operation operation = parse_update("Plan.update", momentum, form);
             const py::gil_scoped_release no_gil;
             plan.update(operation);
           })
      .def("update_averages",
           [](Plan& plan, py::handle momenta, const std::string& form) {
             const Operation operation =
                 parse_update_several("Plan.update", momenta, plan.num_averages(), form);
             const py::gil_scoped_release no_gil;
             plan.update(operation);
           })
      .def("swap", &Plan::swap, py::arg("average") = 0, py::call_guard<py::gil_scoped_release>())
      .def("copy_to_ema", &Plan::copy_to_ema, py::arg("average") = 0,
           py::call_guard<py::gil_scoped_release>())
      .def("copy_to_params", &Plan::copy_to_params, py::arg("average") = 0,
           py::call_guard<py::gil_scoped_release>())
      .def("check", &Plan::check, py::call_guard<py::gil_scoped_release>())
      .def("describe", &describe)
      .def_property_readonly("num_refreshes",
                             [](const Plan& plan) {
                               const py::gil_scoped_release no_gil;
                               return plan.num_refreshes();
                             })
      .def_property_readonly("num_runs", [](const Plan& plan) {
        const py::gil_scoped_release no_gil;
        return plan.num_runs();
      });

  m.def("changed_dicts", [](py::handle dicts, py::handle held, py::handle versions) {
    PyObject* changed = changed_dicts(dicts.ptr(), held.ptr(), versions.ptr());
    if (changed == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::list>(changed);
  });
  m.def("slots_hold", [](py::handle slot, py::handle objects, py::handle held) {
    PyObject* same = slots_hold(slot.ptr(), objects.ptr(), held.ptr());
    if (same == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::bool_>(same);
  });
  m.def("hold_same", [](py::handle a, py::handle b) {
    PyObject* same = hold_same(a.ptr(), b.ptr());
    if (same == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::bool_>(same);
  });
  m.def("update_if_unchanged", &update_if_unchanged);
  m.def("service_of", [](const std::string& device) {
    const Service service = service_of(at::Device(device));
    return py::make_tuple(service.backend, service.reason);
  });
  m.def("cuda_architectures", &cuda_architectures);
  m.def("instruction_set", &cpu::instruction_set);
  m.def("set_instruction_set", &cpu::set_instruction_set);
  m.def("runs_parallel", &runs_parallel);
  m.def("set_sharing", &set_sharing);
  m.def("tiles_of", &tiles_of);
}

TORCH_LIBRARY(fused_ema, m) {
  m.def("update_(Tensor(a!)[] ema, Tensor[] params, float momentum, str form='lerp') -> ()");
  m.def(
      "update_.tensor(Tensor(a!)[] ema, Tensor[] params, Tensor momentum, str form='lerp') -> ()");
  // Of several averages: their lists one after the other, each as long as params.
  m.def(
      "update_averages_(Tensor(a!)[] ema, Tensor[] params, float[] momenta, str form='lerp') -> "
      "()");
  m.def(
      "update_averages_.tensor(Tensor(a!)[] ema, Tensor[] params, Tensor momenta, str form='lerp')"
      " -> ()");
  m.def("swap_(Tensor(a!)[] a, Tensor(b!)[] b) -> ()");
  m.def("copy_(Tensor(a!)[] dst, Tensor[] src) -> ()");
}

TORCH_LIBRARY_IMPL(fused_ema, CompositeExplicitAutograd, m) {
  m.impl("update_",
         [](at::TensorList ema, at::TensorList params, double momentum, c10::string_view form) {
           update_(ema.vec(), params.vec(), momentum, std::string(form));
         });
  m.impl("update_.tensor", [](at::TensorList ema, at::TensorList params, const at::Tensor& momentum,
                              c10::string_view form) {
    update_(ema.vec(), params.vec(), momentum, std::string(form));
  });
  m.impl("update_averages_", [](at::TensorList ema, at::TensorList params,
                                at::ArrayRef<double> momenta, c10::string_view form) {
    update_averages_(ema.vec(), params.vec(), momenta.vec(), std::string(form));
  });
  m.impl("update_averages_.tensor", [](at::TensorList ema, at::TensorList params,
                                       const at::Tensor& momenta, c10::string_view form) {
    update_averages_(ema.vec(), params.vec(), momenta, std::string(form));
  });
  m.impl("swap_", [](at::TensorList a, at::TensorList b) { swap_(a.vec(), b.vec()); });
  m.impl("copy_", [](at::TensorList dst, at::TensorList src) { copy_(dst.vec(), src.vec()); });
}

}  // namespace fused_ema
