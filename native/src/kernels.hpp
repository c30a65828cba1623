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
    int32_t channels;  // of the tensor
    int32_t inputs;    // of the first product: channels, or numbers of a patch
    int32_t hidden, outputs, activation, normalize, normalize_after;
    float eps, after_eps, response_eps;
    wk_patch patch;
    int32_t dense;  // whether the numbers of a patch follow each other without gaps; otherwise, each tap has whole vectors
    void *memory;
    int64_t bytes;
    // Parts of `memory`. `after_scale` and `after_shift` exist with `normalize_after`; `response` may be null.
    float *first, *first_bias, *second, *second_bias, *after_scale, *after_shift, *response;
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
    const char *(*sum_form)(const wk_sum &call);
    void (*weight_grad_workspace)(const wk_weight_grad &call, int64_t &per_thread, int64_t &shared);
    int32_t (*gate)(const wk_gate &call);
    int32_t (*depthwise_conv)(const wk_depthwise_conv &call);
    int32_t (*pointwise_weight_grad)(const wk_pointwise_grad &call);
    int32_t (*batch_norm)(const wk_batch_norm &call);
    Products products;  // of float32
};

}  // namespace wk
