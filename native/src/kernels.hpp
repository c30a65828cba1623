// The interface of each instruction set's translation unit to the rest of the library.
//
// The units are compiled with different flags, so they must not share inline functions: the linker keeps one copy of each,
// perhaps the one with instructions that this processor lacks. Therefore, everything below lives in one namespace per unit, and
// the units use no templates of the standard library except compile-time ones.
#pragma once

#include "widekernel.h"

namespace wk {
struct Products;
}

struct wk_pointwise {
    const wk::Products *products;
    int32_t inputs, hidden, outputs, activation, normalize;
    float eps;
    void *memory;
    int64_t bytes;
    float *first, *first_bias, *second, *second_bias;  // parts of `memory`
};

namespace wk {

// Pointwise products with factors of one type.
struct Products {
    int32_t (*pack)(const wk_pointwise_weights &weights, wk_pointwise &packed);
    int32_t (*run)(const wk_pointwise &packed, const wk_pointwise_call &call);
    void (*workspace)(const wk_pointwise &packed, int32_t threads, int64_t &per_thread, int64_t &shared);
    double (*peak)(int32_t threads, double seconds);
};

struct Kernels {
    const char *isa;
    int lanes;
    int32_t (*depthwise_sum)(const wk_sum &call);
    int32_t (*depthwise_weight_grad)(const wk_weight_grad &call);
    void (*sum_workspace)(const wk_sum &call, int64_t &per_thread, int64_t &shared);
    void (*weight_grad_workspace)(const wk_weight_grad &call, int64_t &per_thread, int64_t &shared);
    Products products;  // of float32
};

}  // namespace wk
