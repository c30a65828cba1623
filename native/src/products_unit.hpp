// The pointwise products of one unit; operands.hpp says which macro selects the type of their factors.
#pragma once

#include "peak.hpp"
#include "response.hpp"

namespace wk {
namespace WK_NAMESPACE {

inline int32_t pointwise_run(const wk_pointwise &packed, const wk_pointwise_call &call) {
    return packed.response ? RespondingPointwise(packed, call).run() : Pointwise(packed, call).run();
}

}  // namespace WK_NAMESPACE

#define WK_PRODUCTS                                                                                                             \
    {WK_NAMESPACE::pointwise_pack, WK_NAMESPACE::pointwise_run, WK_NAMESPACE::products_workspace, WK_NAMESPACE::product_peak}

}  // namespace wk
