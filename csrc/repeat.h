// An update that is made again as long as nothing has changed since the last one.
#pragma once

#include <pybind11/pybind11.h>

namespace fused_ema {

// Updates by a plan where everything is as it was; returns false elsewhere, with nothing done. One
// call, since asking from Python takes longer than the update of a few hundred small tensors.
//
// Takes a tuple, so that Python's garbage collector sees what it refers to:
//   plan, and a plan to copy by after it, or None; the form
//   the least and the largest momentum that ask for nothing else
//   trees: of each what changed_dicts() takes as a tuple of three, asked each time; a tuple of
//     those, of which one is asked, in turns; and a bytearray with the number of the last turn
//   None, or what slots_hold() takes as a tuple of three
//   tensors that mustn't require a gradient
//   None, or tensors and a bytearray of a Note: one of them in turn has had no other writer
bool update_if_unchanged(pybind11::handle state, double momentum);

}  // namespace fused_ema
