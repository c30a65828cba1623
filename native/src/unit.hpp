// The body of one instruction set's translation unit; simd.hpp lists the macros that must be defined before it.
#pragma once

#include "gate.hpp"
#include "response.hpp"
#include "sum.hpp"
#include "weight_grad.hpp"

#include <ctime>

namespace wk {
namespace WK_NAMESPACE {

inline int32_t depthwise_sum(const wk_sum &call) {
    Sum sum(call);
    return sum.possible() ? sum.run() : WK_BAD_ARGUMENT;
}

inline int32_t depthwise_weight_grad(const wk_weight_grad &call) {
    WeightGrad grad(call);
    return grad.possible() ? grad.run() : WK_BAD_ARGUMENT;
}

inline void sum_workspace(const wk_sum &call, int64_t &per_thread, int64_t &shared) {
    Sum sum(call);
    per_thread = sum.own_bytes(), shared = sum.shared_bytes();
}

inline void weight_grad_workspace(const wk_weight_grad &call, int64_t &per_thread, int64_t &shared) {
    WeightGrad grad(call);
    per_thread = grad.own_bytes(), shared = grad.shared_bytes();
}

inline int32_t pointwise_run(const wk_pointwise &packed, const wk_pointwise_call &call) {
    return packed.response ? RespondingPointwise(packed, call).run() : Pointwise(packed, call).run();
}

inline int32_t gate(const wk_gate &call) { return Gate(call).run(); }

// Enough independent chains to keep two multiply-add units of latency four or five busy.
inline int64_t multiply_add_for(double seconds) {
    auto now = [] {
        timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
    };
    constexpr int CHAINS = 12;
    Vec chain[CHAINS];
    Vec factor = all(0.999f), step = all(0.001f);
    unroll<CHAINS>([&](auto i) { chain[i] = all(float(i)); });
    int64_t rounds = 0;
    for (double end = now() + seconds; now() < end; rounds++)
        for (int i = 0; i < 10000; i++)
            unroll<CHAINS>([&](auto c) {
                hold(chain[c]);
                chain[c] = chain[c] * factor + step;
            });
    // The compiler would discard unused results.
    volatile float seen = 0;
    unroll<CHAINS>([&](auto i) { seen = seen + chain[i][0]; });
    return rounds * 10000 * CHAINS * LANES * 2;
}

inline double fma_peak(int32_t threads, double seconds) {
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

#define WK_KERNELS(symbol, name)                                                                                                \
    extern const Kernels symbol;                                                                                                \
    const Kernels symbol = {name,                                                                                               \
                            WK_NAMESPACE::LANES,                                                                                \
                            WK_NAMESPACE::depthwise_sum,                                                                        \
                            WK_NAMESPACE::depthwise_weight_grad,                                                                \
                            WK_NAMESPACE::sum_workspace,                                                                        \
                            WK_NAMESPACE::weight_grad_workspace,                                                                \
                            WK_NAMESPACE::pointwise_pack,                                                                       \
                            WK_NAMESPACE::pointwise_run,                                                                        \
                            WK_NAMESPACE::products_workspace,                                                                   \
                            WK_NAMESPACE::gate,                                                                                 \
                            WK_NAMESPACE::fma_peak};

}  // namespace wk
