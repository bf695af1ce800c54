// parallel_test.cc -- the thread pool: each task once, errors come back, nesting, several callers, fork
#include "widehead/parallel.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <numeric>
#include <set>
#include <stdexcept>
#include <thread>
#include <vector>

#include "check.h"
#include "widehead/error.h"

namespace {

using widehead::get_num_threads;
using widehead::parallel_for;
using widehead::set_num_threads;

constexpr std::int64_t kSizes[] = {0, 1, 2, 3, 7, 64, 1001};

// Restores the number of threads, so that the tests do not depend on their order.
struct Threads {
  explicit Threads(int n) { set_num_threads(n); }
  ~Threads() { set_num_threads(before); }
  int before = get_num_threads();
};

// How often each index came.
std::vector<int> counts(std::int64_t n) {
  std::vector<std::atomic<int>> seen(static_cast<std::size_t>(n));
  parallel_for(n, [&](std::int64_t i) { ++seen[static_cast<std::size_t>(i)]; });
  return {seen.begin(), seen.end()};
}

TEST(every_index_once) {
  for (int threads = 1; threads <= 8; ++threads) {
    Threads guard(threads);
    CHECK_EQ(get_num_threads(), threads);
    for (std::int64_t n : kSizes) CHECK(counts(n) == std::vector<int>(static_cast<std::size_t>(n), 1));
  }
}

TEST(negative_count_runs_nothing) {
  int calls = 0;
  parallel_for(-3, [&](std::int64_t) { ++calls; });
  CHECK_EQ(calls, 0);
}

TEST(workers_take_part) {
  // Each task waits until all have begun: only four threads at once can end it.
  Threads guard(4);
  std::atomic<int> begun{0};
  std::mutex mutex;
  std::set<std::thread::id> ids;
  parallel_for(4, [&](std::int64_t) {
    ++begun;
    while (begun.load() < 4) std::this_thread::yield();
    std::lock_guard<std::mutex> lock(mutex);
    ids.insert(std::this_thread::get_id());
  });
  CHECK_EQ(ids.size(), std::size_t{4});
  CHECK(ids.count(std::this_thread::get_id()) == 1);
}

TEST(never_more_threads_than_asked) {
  Threads many(8);
  counts(1001);  // eight threads exist from here on
  for (int threads : {1, 2, 3}) {
    Threads guard(threads);
    std::atomic<int> now{0}, most{0};
    parallel_for(64, [&](std::int64_t) {
      const int here = ++now;
      for (int seen = most.load(); seen < here && !most.compare_exchange_weak(seen, here);) {
      }
      std::this_thread::sleep_for(std::chrono::microseconds(200));
      --now;
    });
    CHECK(most.load() >= 1 && most.load() <= threads);
  }
}

TEST(exceptions_come_back) {
  for (int threads : {1, 2, 4}) {
    Threads guard(threads);
    CHECK_THROWS(std::out_of_range,
                 parallel_for(100,
                              [](std::int64_t i) {
                                if (i == 37) throw std::out_of_range("task 37");
                              }),
                 "task 37");
    // From every task: one of them arrives, and the pool lives on.
    CHECK_THROWS(widehead::ShapeError,
                 parallel_for(100, [](std::int64_t) { throw widehead::ShapeError("all of them"); }), "all of them");
    CHECK(counts(64) == std::vector<int>(64, 1));
  }
}

TEST(exception_stops_the_handing_out) {
  for (int threads : {1, 3}) {
    Threads guard(threads);
    std::atomic<int> calls{0};
    CHECK_THROWS(std::runtime_error,
                 parallel_for(1000000,
                              [&](std::int64_t) {
                                ++calls;
                                throw std::runtime_error("stop");
                              }),
                 "stop");
    CHECK(calls.load() >= 1 && calls.load() <= threads);
  }
}

TEST(nested_regions_are_serial) {
  Threads guard(4);
  std::vector<std::vector<std::int64_t>> order(16);
  std::atomic<int> elsewhere{0};
  parallel_for(16, [&](std::int64_t i) {
    const auto here = std::this_thread::get_id();
    parallel_for(10, [&](std::int64_t j) {
      if (std::this_thread::get_id() != here) ++elsewhere;
      order[static_cast<std::size_t>(i)].push_back(j);
    });
  });
  CHECK_EQ(elsewhere.load(), 0);
  std::vector<std::int64_t> expected(10);
  std::iota(expected.begin(), expected.end(), 0);
  for (const auto& row : order) CHECK(row == expected);
  // An error from the inner region passes through the outer one, and leaves it able to nest again.
  CHECK_THROWS(std::runtime_error,
               parallel_for(4,
                            [](std::int64_t) {
                              parallel_for(4, [](std::int64_t j) {
                                if (j == 2) throw std::runtime_error("inner");
                              });
                            }),
               "inner");
  CHECK(counts(64) == std::vector<int>(64, 1));
}

TEST(several_callers_at_once) {
  Threads guard(3);
  constexpr int kCallers = 4, kRounds = 300;
  std::vector<std::int64_t> sums(kCallers, 0);
  std::vector<std::thread> callers;
  for (int c = 0; c < kCallers; ++c) {
    callers.emplace_back([c, &sums] {
      for (int round = 0; round < kRounds; ++round) {
        std::vector<std::int64_t> part(17, 0);
        parallel_for(17, [&](std::int64_t i) { part[static_cast<std::size_t>(i)] = i + c; });
        sums[static_cast<std::size_t>(c)] += std::accumulate(part.begin(), part.end(), std::int64_t{0});
      }
    });
  }
  for (auto& caller : callers) caller.join();
  for (int c = 0; c < kCallers; ++c) CHECK_EQ(sums[static_cast<std::size_t>(c)], kRounds * (136 + 17 * c));
}

TEST(plain_writes_are_seen_by_the_caller) {
  // Unsynchronised memory on both sides of many short regions: what a data race would break, and TSan report.
  Threads guard(4);
  std::vector<std::int64_t> values(33, 0);
  for (int round = 1; round <= 2000; ++round) {
    parallel_for(33, [&](std::int64_t i) { values[static_cast<std::size_t>(i)] += i; });
    if (round % 500 == 0) {
      for (std::int64_t i = 0; i < 33; ++i) CHECK_EQ(values[static_cast<std::size_t>(i)], round * i);
    }
  }
}

TEST(number_of_threads_may_change_between_regions) {
  Threads guard(1);
  for (int round = 0; round < 200; ++round) {
    set_num_threads(1 + round * 5 % 8);
    CHECK(counts(29) == std::vector<int>(29, 1));
  }
}

TEST(number_of_threads_is_checked) {
  const int before = get_num_threads();
  CHECK_THROWS(widehead::ShapeError, set_num_threads(0), "at least 1, got 0");
  CHECK_THROWS(widehead::ShapeError, set_num_threads(-2), "got -2");
  CHECK_EQ(get_num_threads(), before);
}

// ThreadSanitizer cannot follow threads that begin in the child of a fork.
#if !defined(__SANITIZE_THREAD__)
// The exit status of a child that runs `body`; -1 when a signal ended it. A child that hangs is ended by its alarm.
template <class F>
int in_child(F body) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);
    int status = 99;
    try {
      status = body();
    } catch (...) {
    }
    _exit(status);
  }
  int status = 0;
  if (child < 0 || waitpid(child, &status, 0) != child || !WIFEXITED(status)) return -1;
  return WEXITSTATUS(status);
}

TEST(child_of_a_fork_has_a_pool_of_its_own) {
  Threads guard(4);
  CHECK(counts(64) == std::vector<int>(64, 1));
  const auto body = [] {
    // All four threads must be there: the tasks wait for one another.
    std::atomic<int> begun{0};
    parallel_for(4, [&](std::int64_t) {
      ++begun;
      while (begun.load() < 4) std::this_thread::yield();
    });
    return get_num_threads() == 4 && counts(1001) == std::vector<int>(1001, 1) ? 7 : 1;
  };
  CHECK_EQ(in_child(body), 7);
  // The parent's pool is untouched, and a child may fork in its turn.
  CHECK(counts(64) == std::vector<int>(64, 1));
  CHECK_EQ(in_child([&] { return in_child(body) + 1; }), 8);
}

TEST(fork_while_another_thread_is_in_a_region) {
  Threads guard(2);
  std::atomic<bool> begun{false}, release{false};
  std::thread other([&] {
    parallel_for(2, [&](std::int64_t) {
      begun = true;
      while (!release.load()) std::this_thread::yield();
    });
  });
  while (!begun.load()) std::this_thread::yield();
  CHECK_EQ(in_child([] { return counts(100) == std::vector<int>(100, 1) ? 7 : 1; }), 7);
  release = true;
  other.join();
  CHECK(counts(100) == std::vector<int>(100, 1));
}

#endif

TEST(environment_sets_the_number_at_first) {
  // A fresh program, for the number is read once: this one, asked for its own test below.
  const auto status = [](const char* value) {
    const pid_t child = fork();
    if (child == 0) {
      setenv("WIDEHEAD_NUM_THREADS", value, 1);
      setenv("WIDEHEAD_TEST_CHILD", value, 1);
      execl("/proc/self/exe", "parallel_test", "child_reads_the_environment", static_cast<char*>(nullptr));
      _exit(98);
    }
    int code = 0;
    return child > 0 && waitpid(child, &code, 0) == child && WIFEXITED(code) ? WEXITSTATUS(code) : -1;
  };
  std::fflush(stdout);
  for (const char* value : {"1", "3", "0", "-1", "two", "2x", "", " 2", "99999999999"}) CHECK_EQ(status(value), 0);
}

TEST(child_reads_the_environment) {
  const char* value = std::getenv("WIDEHEAD_TEST_CHILD");
  if (value == nullptr) return;
  const std::string text = value;
  if (text == "1" || text == "3") {
    CHECK_EQ(get_num_threads(), std::stoi(text));
  } else if (text.empty()) {
    CHECK(get_num_threads() >= 1);
  } else {
    CHECK_THROWS(widehead::ShapeError, get_num_threads(), "WIDEHEAD_NUM_THREADS");
    CHECK_THROWS(widehead::ShapeError, parallel_for(5, [](std::int64_t) {}), "\"" + text + "\"");
    set_num_threads(2);
    CHECK_EQ(get_num_threads(), 2);
  }
}

}  // namespace
