// Threads for the kernels, borrowed from the OpenMP runtime that the caller's process already runs.
#ifndef WIDEKERNEL_THREADS_HPP
#define WIDEKERNEL_THREADS_HPP

#include <cstdint>

namespace wk {

// Runs `run(context, task)` once for every task in 0 … tasks-1, on at most `threads` threads; returns when all are done. Tasks
// are handed out one by one, so that a thread that is slowed down takes fewer. `run` must not throw. It may be called from inside
// another parallel region, and from several threads at the same time.
void parallel(int32_t threads, int64_t tasks, void (*run)(void *context, int64_t task), void *context);

}  // namespace wk

#endif
