// The body of one instruction set's translation unit; simd.hpp lists the macros that must be defined before it.
#pragma once

#include "batch_norm.hpp"
#include "depthwise_conv.hpp"
#include "gate.hpp"
#include "pointwise_grad.hpp"
#include "products_unit.hpp"
#include "sum.hpp"
#include "weight_grad.hpp"

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

inline const char *sum_form(const wk_sum &call) { return Sum(call).form(); }

inline void weight_grad_workspace(const wk_weight_grad &call, int64_t &per_thread, int64_t &shared) {
    WeightGrad grad(call);
    per_thread = grad.own_bytes(), shared = grad.shared_bytes();
}

inline int32_t gate(const wk_gate &call) { return Gate(call).run(); }

inline int32_t depthwise_conv(const wk_depthwise_conv &call) { return DepthwiseConv(call).run(); }

inline int32_t pointwise_weight_grad(const wk_pointwise_grad &call) { return PointwiseGrad(call).run(); }

inline int32_t batch_norm(const wk_batch_norm &call) { return BatchNorm(call).run(); }

}  // namespace WK_NAMESPACE

#define WK_KERNELS(symbol, name)                                                                                                \
    extern const Kernels symbol;                                                                                                \
    const Kernels symbol = {name,                                                                                               \
                            WK_NAMESPACE::LANES,                                                                                \
                            WK_NAMESPACE::depthwise_sum,                                                                        \
                            WK_NAMESPACE::depthwise_weight_grad,                                                                \
                            WK_NAMESPACE::sum_workspace,                                                                        \
                            WK_NAMESPACE::sum_form,                                                                             \
                            WK_NAMESPACE::weight_grad_workspace,                                                                \
                            WK_NAMESPACE::gate,                                                                                 \
                            WK_NAMESPACE::depthwise_conv,                                                                       \
                            WK_NAMESPACE::pointwise_weight_grad,                                                                \
                            WK_NAMESPACE::batch_norm,                                                                           \
                            WK_PRODUCTS};

}  // namespace wk
