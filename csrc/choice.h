// Whether work is done sooner by one thread or by several, learnt from the calls before.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

namespace fused_ema {

// Of one kind of call. It shares until that takes longer, by a quarter, than this thread alone
// does: then some calls are made alone, and more after each further loss. Their number grows where
// more than one shared call in 13 loses, so that a p90 doesn't tell of them, and shrinks otherwise.
class Choice {
 public:
  // Asked once before each call.
  bool is_alone() {
    if (alone_left_ > 0) {
      --alone_left_;
      return true;
    }
    // What one thread takes has to be known, also when the machine has changed since.
    const bool is_unknown = alone_ns_ == 0 && has_shared_;
    if (is_unknown || ++since_alone_ >= kAskedEvery) {
      since_alone_ = 0;
      return true;
    }
    return false;
  }

  void was_alone(int64_t ns) {
    // Steps, so that a call during which another program ran tells no more than any other: up by an
    // eighth, down by half where it took less than that. So it errs on the side of being alone.
    if (alone_ns_ == 0) {
      alone_ns_ = ns;
    } else if (ns > alone_ns_) {
      alone_ns_ += std::min(alone_ns_ / 8 + 1, ns - alone_ns_);
    } else {
      alone_ns_ -= 2 * ns < alone_ns_ ? alone_ns_ / 2 : std::min(alone_ns_ / 8, alone_ns_ - ns);
    }
  }

  void was_shared(int64_t ns) {
    has_shared_ = true;
    if (alone_ns_ == 0) return;
    if (4 * ns <= 5 * alone_ns_) {
      exponent_ = std::max(exponent_ - 1, 0);
    } else {
      exponent_ = std::min(exponent_ + kStep, kMost);
      alone_left_ = (int64_t{1} << (exponent_ / 8)) - 1;
    }
  }

 private:
  static constexpr int kStep = 12;      // of the exponent, in eighths, after a loss; 1 after a win
  static constexpr int kMost = 8 * 10;  // 1024 calls
  static constexpr int kAskedEvery = 128;

  int64_t alone_ns_ = 0;  // about the median; 0: unknown
  int64_t alone_left_ = 0;
  int exponent_ = 0;
  int since_alone_ = 0;
  bool has_shared_ = false;
};

// Those of a thread, by what they do, how much of it, and with whom.
class Choices {
 public:
  static Choices& of_this_thread() {
    thread_local Choices choices;
    return choices;
  }

  Choice& of(const void* kind, int64_t num_chunks, bool is_with_pool) {
    const uint64_t mixed = (reinterpret_cast<uintptr_t>(kind) >> 4) * 31 + num_chunks;
    Entry& entry = entries_[(2 * mixed + is_with_pool) % entries_.size()];
    if (entry.kind != kind || entry.num_chunks != num_chunks) entry = {kind, num_chunks, {}};
    return entry.choice;
  }

 private:
  struct Entry {
    const void* kind = nullptr;
    int64_t num_chunks = 0;
    Choice choice;
  };
  std::array<Entry, 64> entries_{};
};

}  // namespace fused_ema
