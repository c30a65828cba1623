// Tasks in phases: those of one phase start when all of the phase before have ended.
#pragma once

#include "simd.hpp"
#include "threads.hpp"

#include <sched.h>

namespace wk {
namespace WK_NAMESPACE {

// Tasks start in order, so others are already at work on what a task waits for.
inline void wait_for(const int64_t *finished, int64_t count) {
    while (__atomic_load_n(finished, __ATOMIC_ACQUIRE) < count) sched_yield();
}

// The phases of a call, an object of class Call whose methods compute the tasks.
template <class Call> class Phases {
  public:
    // The next phase. One without tasks is left out: the one after it would wait for nothing.
    void add(int64_t tasks, void (Call::*run)(int64_t task)) {
        if (tasks == 0) return;
        if (count_ == MOST) __builtin_trap();
        phases_[count_++] = {tasks, run, 0};
    }

    void run(Call &call, int32_t threads) {
        call_ = &call;
        int64_t tasks = 0;
        for (int i = 0; i < count_; i++) tasks += phases_[i].tasks;
        parallel(threads, tasks, [](void *self, int64_t task) { static_cast<Phases *>(self)->start(task); }, this);
    }

  private:
    struct Phase {
        int64_t tasks;
        void (Call::*run)(int64_t task);
        int64_t finished;
    };

    void start(int64_t task) {
        Phase *phase = phases_;
        for (; task >= phase->tasks; phase++) task -= phase->tasks;
        if (phase != phases_) wait_for(&phase[-1].finished, phase[-1].tasks);
        (call_->*phase->run)(task);
        __atomic_fetch_add(&phase->finished, 1, __ATOMIC_RELEASE);
    }

    static constexpr int MOST = 5;
    Phase phases_[MOST];
    int count_ = 0;
    Call *call_ = nullptr;
};

}  // namespace WK_NAMESPACE
}  // namespace wk
