// Threads for the kernels, borrowed from the OpenMP runtime that the caller's process already runs.
#ifndef WIDEKERNEL_THREADS_HPP
#define WIDEKERNEL_THREADS_HPP

#include <cstdint>

namespace wk {

// Runs `run(context, task, next_task)` once for every task in 0 … tasks-1, on at most `threads` threads, and returns when all are
// done. `next_task` is what the same thread runs next, so that its data can be fetched early; -1 where that is not settled yet,
// which is so for the last tasks: none is held back for a busy thread while another one could take it.
// `run` must not throw. It may be called from inside another parallel region, and from several threads at once.
void parallel(int32_t threads, int64_t tasks, void (*run)(void *context, int64_t task, int64_t next_task), void *context);

}  // namespace wk

#endif
