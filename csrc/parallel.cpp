#include "parallel.h"

#include <ATen/Parallel.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <time.h>

#include <array>
#include <atomic>
#include <cfenv>
#include <cstring>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>

#include "choice.h"

namespace fused_ema {
namespace {

std::atomic<Sharing> sharing{Sharing::kAuto};

constexpr int64_t kMicrosecond = 1000;
constexpr int64_t kMillisecond = 1000 * kMicrosecond;

int64_t nanoseconds(clockid_t clock) {
  timespec time{};
  if (clock_gettime(clock, &time) != 0) return -1;
  return int64_t{time.tv_sec} * 1000 * kMillisecond + time.tv_nsec;
}
int64_t now() { return nanoseconds(CLOCK_MONOTONIC); }

// Some kernels wake a thread on the core of the one that woke it, where it waits for that one or
// holds it up, though another core is idle. Forbidding it this core for a moment moves it.
void leave_core(int core) {
  cpu_set_t allowed;
  if (sched_getcpu() != core || sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return;
  cpu_set_t others = allowed;
  CPU_CLR(core, &others);
  if (CPU_COUNT(&others) == 0) return;
  if (sched_setaffinity(0, sizeof(others), &others) != 0) return;
  sched_setaffinity(0, sizeof(allowed), &allowed);
}

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// ---- threads of our own

// Helpers sleep between jobs. They are never joined, and what they read is never deleted, so that
// neither the process's exit nor a fork has to ask where they are.
class Helpers {
 public:
  // Those of this process: a fork has none of its parent's threads and starts with new ones.
  static Helpers& here() { return *current().load(); }
  static std::atomic<Helpers*>& current() {
    static std::atomic<Helpers*> helpers{new Helpers};
    return helpers;
  }

  // Runs a job with up to `wanted` helpers, called once it has taken patience_ns. False, and
  // nothing done, while another thread's job has them.
  bool run(int64_t num_chunks, int wanted, int64_t patience_ns, const ChunkFunction& f) {
    if (busy_.exchange(true, std::memory_order_acquire)) return false;
    f_ = &f;
    num_chunks_ = num_chunks;
    wanted_ = std::min<int64_t>({wanted, num_chunks - 1, kMost});
    core_.store(sched_getcpu(), std::memory_order_relaxed);
    std::fegetenv(&float_environment_);
    num_called_.store(0, std::memory_order_relaxed);
    num_done_.store(0, std::memory_order_relaxed);
    const uint32_t job = job_of(ticket_.load(std::memory_order_relaxed)) + 1;
    ticket_.store(uint64_t{job} << 32 | static_cast<uint64_t>(num_chunks),
                  std::memory_order_release);

    const int64_t call_at = now() + patience_ns;
    int64_t own = 0;
    for (int64_t i = 0; take(job, &i);) {
      if (now() >= call_at) call_another(job);
      own += run_chunk(i);
    }
    // The rest is in the hands of helpers that are at work on it. One of them may need this core.
    for (int tries = 0; own + num_done_.load(std::memory_order_acquire) < num_chunks; ++tries) {
      if (tries < 1000) {
        relax();
      } else {
        std::this_thread::yield();
      }
    }
    const std::exception_ptr error = std::exchange(error_, nullptr);
    busy_.store(false, std::memory_order_release);
    if (error) std::rethrow_exception(error);
    return true;
  }

 private:
  static constexpr int kMost = 255;
  struct alignas(64) Seat {
    std::atomic<uint32_t> job{0};  // for which its helper was called last
    std::atomic<bool> is_taken{false};
  };

  static uint32_t job_of(uint64_t ticket) { return static_cast<uint32_t>(ticket >> 32); }

  // A chunk of that job, or false when none is left.
  bool take(uint32_t job, int64_t* chunk) {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    while (job_of(ticket) == job && static_cast<uint32_t>(ticket) > 0) {
      if (ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel)) {
        // Whoever holds a chunk is waited for: the job's fields are its own from here on.
        *chunk = num_chunks_ - static_cast<uint32_t>(ticket);
        return true;
      }
    }
    return false;
  }

  // Returns how many chunks are done by it: after an error those that nobody will take too.
  int64_t run_chunk(int64_t chunk) {
    try {
      (*f_)(chunk);
      return 1;
    } catch (...) {
      const std::lock_guard<std::mutex> lock(error_mutex_);
      if (!error_) error_ = std::current_exception();
      return 1 + static_cast<uint32_t>(ticket_.fetch_and(~uint64_t{UINT32_MAX}));
    }
  }

  // Each thread that takes a chunk calls one more helper: a call is a system call, and thirty of
  // them one after another would take one thread longer than the work.
  void call_another(uint32_t job) {
    if (num_called_.load(std::memory_order_relaxed) >= wanted_) return;
    const int index = num_called_.fetch_add(1, std::memory_order_relaxed);
    if (index >= wanted_) return;
    Seat& seat = seats_[index];
    if (!seat.is_taken.exchange(true)) seat.is_taken = start(seat);
    seat.job.store(job, std::memory_order_release);
    seat.job.notify_one();
  }

  // False where the system gives no thread: the others do the work.
  bool start(Seat& seat) {
    // Signals are for the threads that know of them: Python's, which then wake from their waits.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    bool has_started = true;
    try {
      std::thread([this, &seat] {
        pthread_setname_np(pthread_self(), "fused_ema");
        serve(seat.job);
      }).detach();
    } catch (const std::exception&) {
      has_started = false;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return has_started;
  }

  void serve(const std::atomic<uint32_t>& called_for) {
    uint32_t job = 0;
    while (true) {
      called_for.wait(job, std::memory_order_acquire);
      job = called_for.load(std::memory_order_acquire);
      leave_core(core_.load(std::memory_order_relaxed));
      bool is_first = true;
      for (int64_t i = 0; take(job, &i);) {
        // Rounding and subnormals are a thread's own setting: those of the caller count.
        if (std::exchange(is_first, false)) std::fesetenv(&float_environment_);
        call_another(job);
        num_done_.fetch_add(run_chunk(i), std::memory_order_release);
      }
    }
  }

  // Number of the job << 32 | chunks left: who comes late for a job takes nothing of the next.
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<int64_t> num_done_{0};  // by helpers
  alignas(64) std::atomic<int> num_called_{0};
  std::atomic<int> core_{0};  // that the caller began on
  std::atomic<bool> busy_{false};

  // Of the job.
  const ChunkFunction* f_ = nullptr;
  int64_t num_chunks_ = 0;
  int wanted_ = 0;
  std::fenv_t float_environment_{};

  std::mutex error_mutex_;
  std::exception_ptr error_;
  std::array<Seat, kMost> seats_;
};

// ---- torch's pool

// In a fork torch's pool has lost its threads, and GNU's OpenMP would wait for them forever.
std::atomic<bool> is_fork{false};
const bool watches_forks = [] {
  return pthread_atfork(nullptr, nullptr,
                        [] {
                          is_fork = true;
                          Helpers::current() = new Helpers;  // the parent's may be amid a job
                        }) == 0 &&
         Helpers::current() != nullptr;
}();

// What a thread knows of torch's pool: OpenMP keeps one for each thread that asks.
class Pool {
 public:
  static Pool& of_this_thread() {
    thread_local Pool pool;
    return pool;
  }

  // Whether its threads will come at once, or should be woken for what is yet to come.
  bool is_worth_asking(int num_threads) {
    const int64_t start = now();
    credit_ = std::min(kCredit, credit_ + (start - credited_at_) / kShare);
    credited_at_ = start;
    if (is_fork || credit_ < 0) return false;
    const bool is_known = num_threads == num_threads_;
    if (is_known && (start - last_end_ < kPause || are_running())) return true;
    if (is_known && start - last_alone_ > kShortPause) ns_alone_ = 0;
    return ns_alone_ > kWorthWaking;
  }

  void run(int64_t num_chunks, int num_threads, const ChunkFunction& f) {
    const int64_t start = now();
    int64_t done = start;
    int64_t a_chunk = 0;
    std::atomic<int64_t> next{0};
    const int64_t parts = std::min<int64_t>(num_threads, num_chunks);
    const bool meets = parts == num_threads && num_threads != num_threads_;
    if (meets) num_threads_ = 0;
    std::atomic<int> num_met{0};
    at::parallel_for(0, parts, 1, [&](int64_t part, int64_t) {
      if (meets && 0 < part && part <= kWatched) {
        num_met += pthread_getcpuclockid(pthread_self(), &clocks_[part - 1]) == 0;
      }
      int64_t own = 0;
      for (int64_t i = next++; i < num_chunks; i = next++, ++own) f(i);
      if (part == 0) {
        done = now();
        a_chunk = (done - start) / std::max<int64_t>(own, 1);
      }
    });
    if (meets && num_met == std::min(num_threads - 1, kWatched)) num_threads_ = num_threads;
    last_end_ = now();
    ns_alone_ = 0;
    // A thread at work is done within a chunk; one that is waited for longer has no core.
    const int64_t waited = last_end_ - done;
    if (waited > 2 * a_chunk + kPause) credit_ -= waited;
  }

  // A job that was done without it.
  void was_not_asked(int64_t start, int64_t end) {
    ns_alone_ += end - start;
    last_alone_ = end;
  }

 private:
  static constexpr int64_t kPause = 100 * kMicrosecond;
  static constexpr int64_t kShortPause = 2 * kMillisecond;  // GNU's threads spin for 5 to 10 ms
  // Waking the pool takes some 10 ms once, so not before as much would have been won by it.
  static constexpr int64_t kWorthWaking = 5 * kMillisecond;
  // Waits for threads that have no core may take one part in so many of the time, so that neither a
  // median nor a p90 tells of them. What is saved up is for the first few, until the system has
  // given each thread a core.
  static constexpr int64_t kShare = 40;
  static constexpr int64_t kCredit = 20 * kMillisecond;
  // They fall asleep together, so a few tell of all.
  static constexpr int kWatched = 4;

  // A thread that waits for work and is awake spins: its processor time passes.
  bool are_running() const {
    std::array<int64_t, kWatched> first;
    const int count = std::min(num_threads_ - 1, kWatched);
    for (int i = 0; i < count; ++i) first[i] = nanoseconds(clocks_[i]);
    for (int i = 0; i < count; ++i) {
      if (nanoseconds(clocks_[i]) <= first[i]) return false;  // a thread that has ended: -1
    }
    return true;
  }

  int num_threads_ = 0;  // 0: not met yet
  std::array<clockid_t, kWatched> clocks_{};
  int64_t last_end_ = 0;
  int64_t last_alone_ = 0;
  int64_t credit_ = kCredit;
  int64_t credited_at_ = 0;
  int64_t ns_alone_ = 0;
};

// Calling a helper is a system call, and the helper may come a time slice later.
constexpr int64_t kPatience = 500 * kMicrosecond;

}  // namespace

bool set_sharing(const char* name) {
  constexpr std::pair<const char*, Sharing> kNames[] = {
      {"auto", Sharing::kAuto}, {"torch", Sharing::kTorch}, {"helpers", Sharing::kHelpers}};
  for (const auto& [known, value] : kNames) {
    if (std::strcmp(name, known) != 0) continue;
    sharing = value;
    return true;
  }
  return false;
}

void share_chunks(int64_t num_chunks, const Kind& kind, const ChunkFunction& f) {
  const auto alone = [&] {
    for (int64_t i = 0; i < num_chunks; ++i) f(i);
  };
  const int num_threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  if (num_threads == 1) return alone();
  Pool& pool = Pool::of_this_thread();
  switch (sharing.load()) {
    case Sharing::kTorch:
      return pool.run(num_chunks, num_threads, f);
    case Sharing::kHelpers:
      if (!Helpers::here().run(num_chunks, num_threads - 1, 0, f)) alone();
      return;
    case Sharing::kAuto:
      break;
  }
  const bool asks_pool = pool.is_worth_asking(num_threads);
  Choices::Entry& entry = Choices::of_this_thread().of(kind);
  const int64_t start = now();
  Choice& choice = entry.at(start, asks_pool);
  const bool is_alone = choice.is_alone();
  bool is_shared = !is_alone && asks_pool;
  if (is_shared) {
    pool.run(num_chunks, num_threads, f);
  } else {
    is_shared = !is_alone && Helpers::here().run(num_chunks, num_threads - 1, kPatience, f);
    if (!is_shared) alone();
  }
  const int64_t end = now();
  entry.last_end = end;
  if (!is_shared || !asks_pool) pool.was_not_asked(start, end);
  if (is_shared) {
    choice.was_shared(end - start);
  } else {
    choice.was_alone(end - start);
  }
}

}  // namespace fused_ema
