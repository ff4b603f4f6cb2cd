// Whether a module tree still holds the objects that it held.
#pragma once

#include <Python.h>

namespace fused_ema {

// Whether the values of these dicts, one dict after the other, are exactly these objects in this
// order; an Ellipsis among them stands for any. Takes two tuples, and a bytearray of 8 bytes a
// dict, zero at first, that is this function's own: with it, dicts that nobody wrote to since the
// last call cost a comparison each. Returns -1 with a Python error set where an argument is none of
// these.
int hold_exactly(PyObject* dicts, PyObject* objects, PyObject* versions);

}  // namespace fused_ema
