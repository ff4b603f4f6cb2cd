// Tensors that somebody else keeps alive, without references of their own.
//
// torch exchanges the insides of two Python objects (torch.utils.swap_tensors, as module.to() and
// load_state_dict() may do it) only where nothing in C++ counts as a reference to them.
#pragma once

#include <ATen/core/Tensor.h>

#include "checks.h"

namespace fused_ema {

class BorrowedTensors {
 public:
  BorrowedTensors() = default;
  BorrowedTensors(BorrowedTensors&& other) noexcept { tensors_.swap(other.tensors_); }
  BorrowedTensors& operator=(BorrowedTensors&& other) noexcept {
    tensors_.swap(other.tensors_);
    return *this;
  }
  ~BorrowedTensors() { clear(); }

  void reserve(size_t size) { tensors_.reserve(size); }
  void push_back(const at::Tensor& tensor) { tensors_.push_back(Traits::createBorrow(tensor)); }
  void clear() {
    for (at::Tensor& tensor : tensors_) Traits::destroyBorrow(tensor);
    tensors_.clear();
  }
  // A copy of one of these is a reference.
  const Tensors& get() const { return tensors_; }

 private:
  using Traits = c10::MaybeOwnedTraits<at::Tensor>;
  Tensors tensors_;
};

// Two lists of Python objects with tensors inside, which may come to be others. The first may be
// several, of averages of the same params, one after the other.
class TensorLists {
 public:
  virtual ~TensorLists() = default;
  // Of the last reading.
  virtual const Tensors& first() const = 0;
  virtual const Tensors& second() const = 0;
  virtual int num_averages() const = 0;
  virtual void reread() = 0;
  // Whether a pair's objects, of every average, hold the tensors still. Of one that they don't
  // nothing may be asked.
  virtual bool are_in_place(size_t pair) const = 0;
};

}  // namespace fused_ema
