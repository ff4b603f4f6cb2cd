// Whether a module tree, and its DTensors, still hold the objects that they held.
#pragma once

#include <Python.h>

namespace fused_ema {

// Which of these dicts don't hold exactly what they held: a new list of their indices, ascending.
// Takes a tuple of dicts, a tuple of as many lists of keys and values in turn, in which an Ellipsis
// stands for any value, and a bytearray of 8 bytes a dict, zero at first, that is this function's
// own: with it, dicts that nobody wrote to since the last call cost a comparison each. Whoever
// changes a list clears its dict's bytes. Returns null with a Python error set where an argument is
// none of these.
PyObject* changed_dicts(PyObject* dicts, PyObject* held, PyObject* versions);

// Whether each of these objects has in a slot of its class exactly what it had: a bool. Takes the
// slot's descriptor, a tuple of objects and a tuple of as many values. Returns null with a Python
// error set where an argument is none of these.
PyObject* slots_hold(PyObject* slot, PyObject* objects, PyObject* held);

// Whether two lists or tuples hold the very same objects: a bool. Returns null with a Python error
// set where an argument is neither.
PyObject* hold_same(PyObject* a, PyObject* b);

}  // namespace fused_ema
