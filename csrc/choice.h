// Whether work is done sooner by one thread or by several, learnt from the calls before.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "parallel.h"

namespace fused_ema {

// Of one kind of call. It shares while more than three of four shared calls take no longer than
// this thread alone does at the median, and fewer than one in 25 clearly longer than its p90; so
// neither a median nor a p90 tells of those that lost. Otherwise some calls are made alone, and
// more after each further loss.
class Choice {
 public:
  // Asked once before each call.
  bool is_alone() {
    if (alone_left_ > 0) {
      --alone_left_;
      return true;
    }
    // What one thread takes has to be known, also when the machine has changed since.
    if (++since_asked_ < ask_after_) return false;
    since_asked_ = 0;
    ask_after_ = std::min(2 * ask_after_, kAskedEvery);
    return true;
  }

  void was_alone(int64_t ns) {
    // Steps, so that a call during which another program ran tells no more than any other. They err
    // on the side of being alone.
    if (median_ns_ == 0) {
      median_ns_ = p90_ns_ = ns;
      return;
    }
    if (ns > median_ns_) {
      median_ns_ += std::min(median_ns_ / 8 + 1, ns - median_ns_);
    } else {
      median_ns_ -=
          2 * ns < median_ns_ ? median_ns_ / 2 : std::min(median_ns_ / 8, median_ns_ - ns);
    }
    // One call in ten goes up, by as much as nine go down.
    if (ns > p90_ns_) {
      p90_ns_ += std::min(p90_ns_ / 4 + 1, ns - p90_ns_);
    } else {
      p90_ns_ -= std::min(p90_ns_ / 36, p90_ns_ - ns);
    }
    p90_ns_ = std::max(p90_ns_, median_ns_);
  }

  void was_shared(int64_t ns) {
    if (median_ns_ == 0) return;
    // Where most shared calls gain nothing, and where a few are clearly late.
    alone_left_ = std::max(gains_.next(ns <= median_ns_, kNoGain),
                           prompt_.next(4 * ns <= 5 * p90_ns_, kLate));
  }

 private:
  // How many calls to make alone after a bad one: twice as many for each 8 steps, of which a bad
  // call goes up several and a good one down one. So they grow where more than 1 in (steps + 1) is
  // bad.
  class Backoff {
   public:
    int64_t next(bool is_good, int steps) {
      exponent_ = std::clamp(exponent_ + (is_good ? -1 : steps), 0, kMost);
      return is_good ? 0 : (int64_t{1} << (exponent_ / 8)) - 1;
    }

   private:
    static constexpr int kMost = 8 * 8;  // 255 calls: a load that has gone is soon forgotten
    int exponent_ = 0;
  };
  static constexpr int kNoGain = 3;
  static constexpr int kLate = 24;
  static constexpr int kAskedEvery = 128;

  int64_t median_ns_ = 0;  // about that of calls alone; 0: unknown
  int64_t p90_ns_ = 0;
  int64_t alone_left_ = 0;
  Backoff gains_, prompt_;
  int since_asked_ = 0;
  int ask_after_ = 2;
};

// Those of a thread, by the kind of call; by the pause since the last such call, as what slept or
// left the caches is slow whoever does the work; and by who would share.
class Choices {
 public:
  static Choices& of_this_thread() {
    thread_local Choices choices;
    return choices;
  }

  struct Entry {
    int64_t last_end = 0;
    std::array<std::array<Choice, 2>, 3> choices{};

    // Times in ns, of one clock.
    Choice& at(int64_t start, bool is_with_pool) {
      const int64_t pause = start - last_end;
      return choices[pause < kShort ? 0 : pause < kLong ? 1 : 2][is_with_pool];
    }
  };

  Entry& of(const Kind& kind) {
    const auto found = std::find(kinds_.begin(), kinds_.end(), kind);
    if (found != kinds_.end()) return entries_[found - kinds_.begin()];
    // In place of what is longest unused.
    const auto oldest =
        std::min_element(entries_.begin(), entries_.end(),
                         [](const Entry& a, const Entry& b) { return a.last_end < b.last_end; });
    kinds_[oldest - entries_.begin()] = kind;
    return *oldest = {};
  }

 private:
  static constexpr int64_t kShort = 200'000;   // Nothing sleeps yet.
  static constexpr int64_t kLong = 5'000'000;  // GNU's threads sleep.
  static constexpr int kKinds = 32;

  std::array<Kind, kKinds> kinds_{};  // apart, so that a search reads few cache lines
  std::array<Entry, kKinds> entries_{};
};

}  // namespace fused_ema
