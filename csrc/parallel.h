// at::parallel_for gives each thread one equal part. A thread that has slept for long starts late,
// and the others would wait for its part; here they work on meanwhile.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

namespace fused_ema {

// Who takes the chunks. Between a call and a launch this thread alone: a pool thread that the
// machine didn't run just then held up kernels of 15 us for milliseconds.
enum class Threads { kAll, kThisOne };

// Calls f(begin, end) for consecutive chunks of [0, size), each thread taking the next when it has
// done one. Up to one chunk runs on this thread alone.
template <typename F>
void parallel_chunks(Threads threads, int64_t size, int64_t chunk, const F& f) {
  if (threads == Threads::kThisOne || size <= chunk) {
    if (size > 0) f(0, size);
    return;
  }
  const int64_t num_chunks = (size + chunk - 1) / chunk;
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), num_chunks), 1,
                   [&](int64_t, int64_t) {
                     for (int64_t i = next++; i < num_chunks; i = next++) {
                       f(i * chunk, std::min((i + 1) * chunk, size));
                     }
                   });
}

}  // namespace fused_ema
