#include "threads.hpp"

#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>

// Only the functions that the C interface declares are exported.
#pragma GCC visibility push(default)
#include "widekernel.h"
#pragma GCC visibility pop

namespace {

using Region = void (*)(void *);
// The function that compilers call for `#pragma omp parallel`; GNU's, LLVM's and Intel's runtimes export it.
using OpenRegion = void (*)(Region, void *, unsigned threads, unsigned flags);

constexpr int32_t most_threads = 1024;

std::atomic<OpenRegion> open_region{nullptr};
std::atomic<bool> forked{false};

void pause_for(int times) {
    for (int i = 0; i < times; ++i) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }
}

struct Job {
    void (*run)(void *, int64_t);
    void *context;
    int64_t tasks;
    pthread_t caller;
    alignas(64) std::atomic<int64_t> unclaimed{0}, finished{0};
};

// The caller waits for the last tasks of the others without sleeping: they take less time than waking it up. Threads that have
// no processor of their own get this one, and after some tenths of a millisecond at most the runtime takes over.
void wait_briefly(const Job &job) {
    constexpr int ROUNDS = 100, PAUSES = 64;
    for (int round = 0; round < ROUNDS && job.finished.load(std::memory_order_acquire) < job.tasks; ++round) {
        pause_for(PAUSES);
        sched_yield();
    }
    pause_for(PAUSES);  // until they have left as well
}

void work(void *pointer) noexcept {
    Job &job = *static_cast<Job *>(pointer);
    int64_t mine = 0;
    for (int64_t task; (task = job.unclaimed.fetch_add(1, std::memory_order_relaxed)) < job.tasks; ++mine) job.run(job.context, task);
    job.finished.fetch_add(mine, std::memory_order_release);
    if (pthread_equal(job.caller, pthread_self())) wait_briefly(job);
}

void *crew_member(void *job) {
    work(job);
    return nullptr;
}

// New threads for one call: slower than a pool (some ten microseconds each), but a fork cannot have broken them.
void work_with_new_threads(Job &job, int32_t threads) {
    pthread_t crew[most_threads];
    int32_t hired = 0;
    while (hired < threads - 1 && pthread_create(&crew[hired], nullptr, crew_member, &job) == 0) ++hired;
    work(&job);
    for (int32_t i = 0; i < hired; ++i) pthread_join(crew[i], nullptr);
}

void note_fork() { forked.store(true, std::memory_order_relaxed); }

// Whether this process is a copy of another one, made by fork without exec. The parent may have used its pool before this
// library was loaded. Works on Linux only, by the flags of the process; elsewhere, only forks after loading are noticed.
bool is_forked_copy() {
#ifdef __linux__
    int file = open("/proc/self/stat", O_RDONLY | O_CLOEXEC);
    if (file < 0) return false;
    char text[1024];
    ssize_t length = read(file, text, sizeof text - 1);
    close(file);
    if (length <= 0) return false;
    text[length] = 0;
    // pid (name) state parent group session terminal foreground flags …; the name may contain anything, including parentheses.
    const char *field = strrchr(text, ')');
    for (int i = 0; field && i < 7; ++i) field = strchr(field + 1, ' ');
    constexpr unsigned long fork_without_exec = 0x40;  // PF_FORKNOEXEC of the kernel
    return field && (strtoul(field, nullptr, 10) & fork_without_exec);
#else
    return false;
#endif
}

bool watch_forks() {
    if (is_forked_copy()) note_fork();
    return pthread_atfork(nullptr, nullptr, note_fork) == 0;
}

}  // namespace

namespace wk {

void parallel(int32_t threads, int64_t tasks, void (*run)(void *context, int64_t task), void *context) {
    threads = std::min(threads, most_threads);
    OpenRegion open = open_region.load(std::memory_order_acquire);
    if (threads <= 1 || tasks <= 1 || !open) {
        for (int64_t task = 0; task < tasks; ++task) run(context, task);
        return;
    }
    Job job{run, context, tasks, pthread_self()};
    if (forked.load(std::memory_order_relaxed)) {
        // A pool does not survive a fork: its threads stay behind in the parent, and GNU's runtime waits for them forever.
        work_with_new_threads(job, static_cast<int32_t>(std::min<int64_t>(threads, tasks)));
    } else {
        // Never a smaller team for fewer tasks: GNU's runtime would end the surplus threads and start them again for the next
        // operator of PyTorch. Threads that find no task return at once.
        open(work, &job, static_cast<unsigned>(threads), 0);
    }
}

}  // namespace wk

int32_t wk_bind_openmp(const char *path) {
    // A second runtime would have a second pool, and the two would compete for the cores: use the loaded runtime or none.
    void *runtime = path ? dlopen(path, RTLD_NOW | RTLD_NOLOAD) : nullptr;
    void *symbol = runtime ? dlsym(runtime, "GOMP_parallel") : nullptr;
    if (!symbol) return 0;
    static const bool watching = watch_forks();
    if (!watching) return 0;
    open_region.store(reinterpret_cast<OpenRegion>(symbol), std::memory_order_release);
    return 1;
}
