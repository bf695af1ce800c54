// parallel.h -- the thread pool of the library: a handful of workers, the caller takes part, exceptions come back
#pragma once
#include <cstdint>
#include <type_traits>

namespace widehead {

// Number of threads that parallel regions use, the caller included. At first the number of processors this process
// may run on, or the environment variable WIDEHEAD_NUM_THREADS. Throws ShapeError for n < 1.
void set_num_threads(int n);
int get_num_threads();

namespace detail {
void run_tasks(std::int64_t n, void (*body)(void*, std::int64_t), void* context);
}

// Calls body(i) for every i in [0, n), each once, on the pool. Tasks are handed out in order to whichever thread is free;
// so results that must not depend on the number of threads are written per task and combined by the caller.
// A region inside a region runs serially. The first exception stops the handing out and is thrown here.
template <class Body>
void parallel_for(std::int64_t n, Body&& body) {
  using B = std::remove_reference_t<Body>;
  detail::run_tasks(
      n, [](void* context, std::int64_t i) { (*static_cast<B*>(context))(i); },
      const_cast<std::remove_const_t<B>*>(&body));
}

}  // namespace widehead
