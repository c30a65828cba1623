// The functions of the library under test, and the end of the program.
#pragma once

#include "widekernel.h"

#include <dlfcn.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <type_traits>

namespace {

#define FUNCTION(name) decltype(&wk_##name) name = nullptr
struct Library {
    FUNCTION(abi);
    FUNCTION(isa);
    FUNCTION(use_isa);
    FUNCTION(bind_openmp);
    FUNCTION(depthwise_sum);
    FUNCTION(depthwise_weight_grad);
    FUNCTION(depthwise_sum_at);
    FUNCTION(depthwise_weight_grad_at);
    FUNCTION(depthwise_branches_at);
    FUNCTION(pointwise_pack);
    FUNCTION(pointwise_free);
    FUNCTION(pointwise_run);
    FUNCTION(pointwise_run_at);
    FUNCTION(gate_run);
    FUNCTION(gate_run_at);
    FUNCTION(depthwise_conv_run);
    FUNCTION(depthwise_conv_run_at);
    FUNCTION(run_steps);
    FUNCTION(pointwise_weight_grad);
    FUNCTION(batch_norm_run);
    FUNCTION(sum_workspace);
    FUNCTION(weight_grad_workspace);
    FUNCTION(why_no_products);
    FUNCTION(error_text);
};
#undef FUNCTION

Library library;

[[noreturn]] void stop(int status, const char *format, ...) {
    va_list values;
    va_start(values, format);
    std::vfprintf(stderr, format, values);
    va_end(values);
    std::fputc('\n', stderr);
    std::exit(status);
}

void open_library(const char *path) {
    void *file = dlopen(path, RTLD_NOW);
    if (!file) stop(2, "%s cannot be loaded: %s", path, dlerror());
    auto find = [&](auto &function, const char *name) {
        void *symbol = dlsym(file, name);
        if (!symbol) stop(2, "%s has no %s", path, name);
        function = reinterpret_cast<std::decay_t<decltype(function)>>(symbol);
    };
#define FIND(name) find(library.name, "wk_" #name)
    FIND(abi);
    if (library.abi() != WK_ABI) stop(2, "%s has interface version %d, this program %d", path, library.abi(), WK_ABI);
    FIND(isa);
    FIND(use_isa);
    FIND(bind_openmp);
    FIND(depthwise_sum);
    FIND(depthwise_weight_grad);
    FIND(depthwise_sum_at);
    FIND(depthwise_weight_grad_at);
    FIND(depthwise_branches_at);
    FIND(pointwise_pack);
    FIND(pointwise_free);
    FIND(pointwise_run);
    FIND(pointwise_run_at);
    FIND(gate_run);
    FIND(gate_run_at);
    FIND(depthwise_conv_run);
    FIND(depthwise_conv_run_at);
    FIND(run_steps);
    FIND(pointwise_weight_grad);
    FIND(batch_norm_run);
    FIND(sum_workspace);
    FIND(weight_grad_workspace);
    FIND(why_no_products);
    FIND(error_text);
#undef FIND
}

void succeed(int32_t error, const std::string &problem) {
    if (error != WK_OK) stop(1, "%s: refused, %s", problem.c_str(), library.error_text(error));
}

void check_workspace(int64_t own, int64_t shared, const std::string &problem) {
    if (own <= 0 || shared <= 0)
        stop(1, "%s: working memory of %lld and %lld bytes", problem.c_str(), static_cast<long long>(own),
             static_cast<long long>(shared));
}

}  // namespace
