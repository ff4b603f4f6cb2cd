// What is worked out once for a pair of lists and run many times.
#pragma once

#include <memory>
#include <mutex>

#include "borrowed.h"
#include "checks.h"
#include "groups.h"
#include "records.h"

namespace fused_ema {

class Plan {
 public:
  // Raises what check_lists raises. only_moves: for exchanges and copies, of other dtypes too.
  // only_borrows: hold the objects of the lists, emas and params, but not their tensors, so that
  // torch can exchange what is inside of them. Each call then asks every object first.
  Plan(std::unique_ptr<TensorLists> lists, std::vector<std::string> names, bool only_moves,
       bool only_borrows);
  ~Plan();

  // Any of these first compares every tensor with what the plan was made for, and makes the plan
  // anew where one has moved: never a write through an old pointer.
  void update(const Operation& operation);
  void swap(int average = 0);
  void copy_to_ema(int average = 0);
  void copy_to_params(int average = 0);
  int num_averages() const { return lists_->num_averages(); }
  // Raises what any of these would raise now.
  void check();
  // Whether every tensor is where it was.
  bool is_current();
  // The update where they are; elsewhere false, and nothing is done.
  bool update_if_current(const Operation& operation);

  struct GroupFacts {
    std::string backend;
    std::string device;
    std::string ema_dtype;
    std::string param_dtype;
    int64_t num_tensors;
    int64_t num_elements;
    int num_averages;
  };
  // Of the tensors that the plan was made, or made anew, for.
  std::vector<GroupFacts> describe() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return state_->facts;
  }
  int64_t num_refreshes() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return num_refreshes_;
  }
  // Calls that have done all of their work. Whoever is interrupted right after one can tell by it.
  int64_t num_runs() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return num_runs_;
  }

  // For the child of a fork: a thread that was inside a call is lost, and its lock with it.
  void forget_lock() { new (&mutex_) std::mutex; }

 private:
  // What one tensor was when the plan was made.
  struct Seen {
    const c10::TensorImpl* tensor;
    const void* data;
    int64_t numel;
    caffe2::TypeMeta dtype;
    uint8_t itemsize;  // of the dtype; asking that for it costs 500 pairs 1 us
    bool is_contiguous;
    uint32_t geometry;  // otherwise: where what has_geometry() compares begins in the state's
  };

  // All that follows from where the tensors are. Made anew as a whole or not at all: a call that
  // fails for want of memory, or a fork in the middle of one, leaves the old one behind.
  struct State {
    Groups groups;
    std::vector<Seen> seen;
    std::vector<int64_t> geometry;
    // Wrappers, whose memory is their own affair; but torch would broadcast a changed shape.
    BorrowedTensors wrappers;
    std::vector<std::vector<int64_t>> wrapper_sizes;
    std::vector<at::ScalarType> wrapper_dtypes;
    Tensors held;
    // Pairs that aren't held. Those with a wrapper never are: torch always exchanges these.
    std::vector<size_t> borrowed;
    std::vector<GroupFacts> facts;
  };

  void refresh();
  bool is_unchanged(const Seen& seen) const;
  template <Cache kTo>
  bool are_unchanged(int64_t begin, int64_t end) const;
  bool is_stale() const;
  void run_checked(const Operation& operation);

  const Signature& signature_;
  const bool only_borrows_;
  std::unique_ptr<TensorLists> lists_;
  std::vector<std::string> names_;
  std::unique_ptr<State> state_;
  int64_t num_refreshes_ = -1;  // the first making is none
  int64_t num_runs_ = 0;
  mutable std::mutex mutex_;  // two Python threads may run one plan; never wait for it with the GIL
};

}  // namespace fused_ema
