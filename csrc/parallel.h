// Work in chunks on several threads, so that no call takes longer than one thread would.
//
// at::parallel_for returns when every thread of torch's pool has come. One that slept comes late,
// by 5 to 15 ms where another program holds its core, long after the work is done. So torch's pool
// takes the chunks only while its threads are awake, as in a hot loop or right after an optimizer's
// step. Otherwise this thread begins alone, and calls threads of our own once the work has proved
// long; it waits for none of them that has taken nothing. A thread that has taken something may
// lose its core to another program, so where sharing has lost of late this thread works alone
// (choice.h).
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <typeinfo>

namespace fused_ema {

// Who takes the chunks. Between a call and a launch this thread alone: a pool thread that the
// machine didn't run just then held up kernels of 15 us for milliseconds.
enum class Threads { kAll, kThisOne };

// How kAll shares: as above, or always in one of the ways, for tests and measurements.
enum class Sharing { kAuto, kTorch, kHelpers };
// Chooses for this process by name, "auto", "torch" or "helpers"; false for another name.
bool set_sharing(const char* name);

// What a call does, and to how much: two calls alike take equally long.
struct Kind {
  uintptr_t what = 0;
  int64_t size = 0;
  bool operator==(const Kind&) const = default;
};

using ChunkFunction = std::function<void(int64_t)>;

// Calls f(i) for i in [0, num_chunks), on up to at::get_num_threads() threads. What f throws is
// thrown here, when no thread is at work any more. kind: what was learnt of earlier calls like it.
void share_chunks(int64_t num_chunks, const Kind& kind, const ChunkFunction& f);

// Calls f(begin, end) for consecutive chunks of [0, size), each thread taking the next when it has
// done one. Up to one chunk runs on this thread alone. what: tells apart what one F does, where it
// does several things.
template <typename F>
void parallel_chunks(Threads threads, int64_t size, int64_t chunk, const F& f, uintptr_t what = 0) {
  if (threads == Threads::kThisOne || size <= chunk) {
    if (size > 0) f(0, size);
    return;
  }
  const auto run = [&](int64_t i) { f(i * chunk, std::min((i + 1) * chunk, size)); };
  const Kind kind = {what != 0 ? what : reinterpret_cast<uintptr_t>(&typeid(F)), size};
  // A reference to run, so that nothing is allocated.
  share_chunks((size + chunk - 1) / chunk, kind, std::cref(run));
}

}  // namespace fused_ema
