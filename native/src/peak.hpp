// The peak of this unit's multiply-adds, measured in registers.
#pragma once

#include "operands.hpp"
#include "threads.hpp"

#include <ctime>

namespace wk {
namespace WK_NAMESPACE {

// One step of a chain. Of float32, in plain C++: where there is no fused instruction, the compiler would compute the product once.
WK_INLINE void advance(Vec &chain, const Vec &factor, const Vec &step) {
    if constexpr (WORD == 1) {
        hold(chain);
        chain = chain * factor + step;
    } else {
        add_product(chain, factor, step);
    }
}

// Enough independent chains to keep two units of latency four or five busy, and with more registers, of latency twelve.
inline int64_t multiply_add_for(double seconds) {
    auto now = [] {
        timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
    };
    constexpr int CHAINS = WK_REGISTERS >= 32 ? 24 : 12;
    Vec chain[CHAINS];
    Vec factor = all(0.999f), step = all(0.001f);
    unroll<CHAINS>([&](auto i) { chain[i] = all(float(i)); });
    int64_t rounds = 0;
    for (double end = now() + seconds; now() < end; rounds++)
        for (int i = 0; i < 10000; i++) unroll<CHAINS>([&](auto c) { advance(chain[c], factor, step); });
    // The compiler would discard unused results.
    volatile float seen = 0;
    unroll<CHAINS>([&](auto i) { seen = seen + chain[i][0]; });
    return rounds * 10000 * CHAINS * LANES * WORD * 2;
}

inline double product_peak(int32_t threads, double seconds) {
    struct Job {
        double seconds;
        int64_t operations;
    } job{seconds, 0};
    parallel(threads, threads,
             [](void *context, int64_t) {
                 Job *shared = static_cast<Job *>(context);
                 __atomic_fetch_add(&shared->operations, multiply_add_for(shared->seconds), __ATOMIC_RELAXED);
             },
             &job);
    return double(job.operations) / seconds;
}

}  // namespace WK_NAMESPACE
}  // namespace wk
