// Whether the arguments of the C interface fit together.
#pragma once

#include "widekernel.h"

namespace wk {
namespace {

bool is_tensor(const wk_tensor &t) { return t.channel == 1 || t.column == 1; }

template <class Address> bool are_addresses(const Address *at, int32_t count) {
    for (int32_t i = 0; i < count; i++)
        if (!at || !at[i]) return false;
    return true;
}

bool is_kernel(int32_t rows, int32_t columns, int32_t row, int32_t column) {
    return rows > 0 && columns > 0 && row >= 0 && row < rows && column >= 0 && column < columns;
}

bool is_pass(const wk_pass &p) {
    return is_kernel(p.rows, p.columns, p.row, p.column) && p.method >= WK_DIRECT && p.method <= WK_HYBRID_ALONG_COLUMNS &&
           p.dilation >= 1 && (p.dilation == 1 || p.method == WK_DIRECT);
}

template <class Call> bool has_sizes(const Call &call) {
    return call.dtype >= WK_FLOAT32 && call.dtype <= WK_FLOAT16 && call.threads > 0 && call.images > 0 && call.channels > 0 &&
           call.height > 0 && call.width > 0;
}

bool has_images(const wk_sum &call) {
    if (!is_tensor(call.x) || !is_tensor(call.y) || call.inputs < 1 || call.outputs < 1) return false;
    if (call.inputs > WK_MOST_PASSES || call.outputs > WK_MOST_PASSES || (call.inputs > 1 && call.outputs > 1)) return false;
    if (call.inputs == 1 ? !call.x.data : !are_addresses(call.xs, call.inputs)) return false;
    if (call.outputs == 1 ? !call.y.data : !are_addresses(call.ys, call.outputs)) return false;
    uint32_t read = 0, written = 0;
    for (int32_t i = 0; i < call.passes; i++) {
        const wk_pass &p = call.pass[i];
        if (p.input < 0 || p.input >= call.inputs || p.output < 0 || p.output >= call.outputs) return false;
        read |= 1u << p.input, written |= 1u << p.output;
    }
    return read == (1u << call.inputs) - 1 && written == (1u << call.outputs) - 1;
}

bool are_channels(const int32_t *table, int32_t count, int32_t channels) {
    bool inside = count == 0 || table;
    for (int32_t i = 0; i < count && inside; i++) inside = 0 <= table[i] && table[i] < channels;
    return inside;
}

bool is_valid(const wk_partial &partial, const wk_sum &call) {
    const bool alike = call.x.channel == 1 ? call.y.channel == 1 : call.x.column == 1 && call.y.column == 1;
    if (call.dtype != WK_FLOAT32 || call.inputs != 1 || call.outputs != 1 || !alike) return false;
    if (partial.others < 0 || (partial.others > 0 && !(partial.scale && partial.shift))) return false;
    return are_channels(partial.selected, call.channels, partial.inputs) &&
           are_channels(partial.other, partial.others, partial.inputs);
}

bool is_valid(const wk_sum &call) {
    if (call.partial && !is_valid(*call.partial, call)) return false;
    if (!has_sizes(call) || call.passes < 1 || call.passes > WK_MOST_PASSES || !has_images(call)) return false;
    if (call.rects < 1 || call.rects > WK_MOST_RECTS) return false;
    for (int32_t i = 0; i < call.passes; i++)
        if (!is_pass(call.pass[i])) return false;
    for (int32_t i = 0; i < call.rects; i++) {
        const wk_rect &r = call.rect[i];
        if (!r.taps || !is_kernel(r.rows, r.columns, r.row, r.column) || r.pass < 0 || r.pass >= call.passes) return false;
        if (r.dilation < 1 || r.dilation % call.pass[r.pass].dilation) return false;
    }
    return true;
}

// Whether the taps of a pass, of which `before` precede the anchor, lie within those of a kernel.
bool is_within(int32_t taps, int32_t before, int32_t dilation, int32_t outer_taps, int32_t outer_before, int32_t outer_dilation) {
    return int64_t{before} * dilation <= int64_t{outer_before} * outer_dilation &&
           int64_t{taps - 1 - before} * dilation <= int64_t{outer_taps - 1 - outer_before} * outer_dilation;
}

bool is_valid(const wk_weight_grad &call) {
    if (!has_sizes(call) || !is_tensor(call.x) || !is_tensor(call.grad) || !call.x.data || !call.grad.data || !call.taps) return false;
    const wk_pass &p = call.pass;
    if (!is_pass(p) || !is_kernel(call.rows, call.columns, call.row, call.column)) return false;
    return call.dilation >= 1 && call.dilation % p.dilation == 0 &&
           is_within(p.rows, p.row, p.dilation, call.rows, call.row, call.dilation) &&
           is_within(p.columns, p.column, p.dilation, call.columns, call.column, call.dilation);
}

bool has_patches(const wk_patch &patch) { return patch.rows != 0; }

bool is_valid(const wk_patch &patch) {
    if (!has_patches(patch)) return true;
    return patch.rows > 0 && patch.columns > 0 && patch.row_stride > 0 && patch.column_stride > 0 && patch.top >= 0 && patch.left >= 0;
}

bool is_valid(const wk_pointwise_weights &weights) {
    return weights.inputs > 0 && weights.hidden > 0 && weights.outputs >= 0 && weights.first &&
           (weights.outputs == 0 || weights.second) && weights.activation >= WK_NO_ACTIVATION &&
           weights.activation <= WK_GELU_TANH && weights.type >= WK_FLOAT32 && weights.type <= WK_INT8 &&
           (!weights.normalize || weights.eps >= 0) && is_valid(weights.patch) &&
           (!weights.normalize_after || (weights.outputs == 0 && weights.after_eps >= 0)) &&
           (!weights.response || (weights.outputs > 0 && weights.response_eps >= 0));
}

bool is_valid(const wk_gate &call) {
    return call.threads > 0 && call.images > 0 && call.channels > 0 && call.height > 0 && call.width > 0 && call.hidden > 0 &&
           call.activation >= WK_NO_ACTIVATION && call.activation <= WK_GELU_TANH && call.x.data && call.first && call.second && call.y;
}

bool is_valid(const wk_depthwise_conv &call) {
    return call.threads > 0 && call.images > 0 && call.channels > 0 && call.height > 0 && call.width > 0 && call.x_height > 0 &&
           call.x_width > 0 && has_patches(call.patch) && is_valid(call.patch) && call.x.data && call.y.data && call.taps &&
           call.x.channel == 1 && call.y.channel == 1;
}

bool is_valid(const wk_pointwise_call &call) {
    return call.threads > 0 && call.images > 0 && call.height > 0 && call.width > 0 && call.x.data && call.y.data;
}

bool is_valid(const wk_pointwise_grad &call) {
    return call.threads > 0 && call.images > 0 && call.height > 0 && call.width > 0 && call.inputs > 0 && call.outputs > 0 &&
           call.x.data && call.grad.data && call.weight;
}

bool is_dense(const wk_tensor &t, const wk_batch_norm &call) {
    const int64_t width = call.width, height = call.height, channels = call.channels;
    if (t.channel == 1 && t.column == channels && t.row == width * channels && t.image == height * width * channels) return true;
    return t.column == 1 && t.row == width && t.channel == height * width && t.image == height * width * channels;
}

bool is_valid(const wk_batch_norm &call) {
    if (call.threads <= 0 || call.images <= 0 || call.channels <= 0 || call.height <= 0 || call.width <= 0 || call.eps < 0) return false;
    if (!call.x.data || !call.y.data || !call.mean || !call.factor || !(call.backward ? !!call.grad.data : !!call.variance)) return false;
    if (!is_dense(call.x, call) || call.y.channel != call.x.channel || !is_dense(call.y, call)) return false;
    return !call.backward || (call.grad.channel == call.x.channel && is_dense(call.grad, call));
}

}  // namespace
}  // namespace wk
