// parallel.cc -- the thread pool: sleeping workers, one region at a time, tasks handed out by an atomic counter
#include "widehead/parallel.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <new>
#include <string>
#include <system_error>
#include <thread>

#include "widehead/error.h"

namespace widehead {
namespace {

using Body = void (*)(void*, std::int64_t);

// True on a thread while it runs tasks: a region that such a thread opens is run serially.
thread_local bool inside_region = false;

class InsideRegion {
 public:
  InsideRegion() { inside_region = true; }
  ~InsideRegion() { inside_region = false; }
  InsideRegion(const InsideRegion&) = delete;
  InsideRegion& operator=(const InsideRegion&) = delete;
};

int processors() {
#if defined(__linux__)
  // The kernel refuses a mask smaller than its own, so grow it until it fits.
  for (int bits = 1024; bits <= (1 << 20); bits *= 2) {
    cpu_set_t* set = CPU_ALLOC(static_cast<std::size_t>(bits));
    if (set == nullptr) break;
    const std::size_t bytes = CPU_ALLOC_SIZE(static_cast<std::size_t>(bits));
    const int rc = sched_getaffinity(0, bytes, set);
    const int reason = errno;
    const int count = rc == 0 ? CPU_COUNT_S(bytes, set) : 0;
    CPU_FREE(set);
    if (count > 0) return count;
    if (reason != EINVAL) break;
  }
#endif
  const unsigned n = std::thread::hardware_concurrency();
  return n > 0 ? static_cast<int>(n) : 1;
}

int initial_threads() {
  const char* text = std::getenv("WIDEHEAD_NUM_THREADS");
  if (text == nullptr || *text == '\0') return processors();
  int n = 0;
  const char* end = text + std::strlen(text);
  const auto [stop, reason] = std::from_chars(text, end, n);
  if (reason != std::errc() || stop != end || n < 1) {
    throw ShapeError(std::string("WIDEHEAD_NUM_THREADS: expected a whole number of at least 1, got \"") + text + "\"");
  }
  return n;
}

// A region that follows the last one closely finds its workers awake; 30 us is what a sleep and a wake-up cost here,
// and little enough to take from the other users of a shared machine.
constexpr std::chrono::microseconds kSpin{30};

template <class Done>
void spin_until(Done done) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 16; ++i) {
      if (done()) return;
#if defined(__x86_64__) || defined(__i386__)
      __builtin_ia32_pause();
#endif
    }
  } while (std::chrono::steady_clock::now() < end);
}

struct Region {
  std::int64_t n;
  Body body;
  void* context;
  std::atomic<std::int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error{};

  void drain() {
    InsideRegion inside;
    for (std::int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) {
      try {
        body(context, i);
      } catch (...) {
        if (!failed.exchange(true)) error = std::current_exception();
        next.store(n, std::memory_order_relaxed);
      }
    }
  }
};

// Workers are detached and the pool is never destroyed, so that a process may exit with its workers asleep.
class Pool {
 public:
  // Runs the region with at most `threads` threads. False, with nothing done, when another caller's region is running.
  bool run(Region& region, int threads) {
    std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    if (!owner) return false;
    spin_ = threads <= processors_;
    int to_wake;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      const auto wanted = static_cast<int>(std::min<std::int64_t>(threads, region.n)) - 1;
      start_workers(wanted);
      region_ = &region;
      seats_ = wanted;
      to_wake = std::min(wanted, asleep_);
      generation_.fetch_add(1, std::memory_order_release);
    }
    for (int i = 0; i < to_wake; ++i) wake_.notify_one();
    region.drain();
    if (spin_) spin_until([this] { return active_.load(std::memory_order_relaxed) == 0; });
    // Only workers that have joined are waited for: one that wakes up late finds the region closed.
    std::unique_lock<std::mutex> lock(mutex_);
    region_ = nullptr;
    done_.wait(lock, [this] { return active_.load(std::memory_order_relaxed) == 0; });
    return true;
  }

 private:
  void start_workers(int wanted) {
    try {
      for (; workers_ < wanted; ++workers_) std::thread(&Pool::work, this).detach();
    } catch (const std::system_error&) {
      // No more threads to be had: the region runs on those there are.
    }
  }

  void work() {
    for (std::uint64_t seen = 0;;) {
      const auto published = [&] { return generation_.load(std::memory_order_acquire) != seen; };
      if (spin_) spin_until(published);
      std::unique_lock<std::mutex> lock(mutex_);
      ++asleep_;
      wake_.wait(lock, published);
      --asleep_;
      seen = generation_.load(std::memory_order_relaxed);
      if (region_ == nullptr || seats_ == 0) continue;
      --seats_;
      active_.fetch_add(1, std::memory_order_relaxed);
      Region& region = *region_;
      lock.unlock();
      region.drain();
      lock.lock();
      if (active_.fetch_sub(1, std::memory_order_relaxed) == 1) done_.notify_one();
    }
  }

  const int processors_ = processors();
  std::mutex owner_;              // held by the caller whose region runs
  std::atomic<bool> spin_{true};  // more threads than processors: whoever spins keeps another from working
  std::atomic<std::uint64_t> generation_{0};
  std::atomic<int> active_{0};  // workers inside the region; changed under mutex_
  std::mutex mutex_;            // guards what follows
  std::condition_variable wake_, done_;
  Region* region_ = nullptr;  // null: closed
  int seats_ = 0;             // workers that may still join
  int workers_ = 0;
  int asleep_ = 0;
};

alignas(Pool) unsigned char pool_memory[sizeof(Pool)];

// A forked child has no workers, and the locks may be held by threads that it does not have: it begins with a new pool
// in the same memory.
void forget_workers() { new (pool_memory) Pool; }

Pool& pool() {
  static Pool* const instance = [] {
    Pool* p = new (pool_memory) Pool;
    pthread_atfork(nullptr, nullptr, forget_workers);
    return p;
  }();
  return *std::launder(instance);
}

// 0 until it is asked for or set.
std::atomic<int> num_threads{0};

}  // namespace

void set_num_threads(int n) {
  if (n < 1) throw ShapeError("set_num_threads: n must be at least 1, got " + std::to_string(n));
  num_threads.store(n, std::memory_order_relaxed);
}

int get_num_threads() {
  int n = num_threads.load(std::memory_order_relaxed);
  if (n == 0) {
    const int first = initial_threads();
    // Another thread may have set a number meanwhile; then that one stands.
    if (num_threads.compare_exchange_strong(n, first)) n = first;
  }
  return n;
}

void detail::run_tasks(std::int64_t n, void (*body)(void*, std::int64_t), void* context) {
  if (n <= 0) return;
  if (inside_region) {
    for (std::int64_t i = 0; i < n; ++i) body(context, i);
    return;
  }
  const int threads = get_num_threads();
  if (threads > 1 && n > 1) {
    Region region{n, body, context};
    if (pool().run(region, threads)) {
      if (region.error) std::rethrow_exception(region.error);
      return;
    }
  }
  InsideRegion inside;
  for (std::int64_t i = 0; i < n; ++i) body(context, i);
}

}  // namespace widehead
