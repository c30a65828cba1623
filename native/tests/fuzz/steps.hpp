// Chains of calls that `wk_run_steps` makes: the same numbers as from the calls one at a time.
//
// Intermediate values share memory as soon as they are no longer read, as in the chains of fused blocks.
#pragma once

#include "approximate.hpp"
#include "depthwise.hpp"

#include <deque>

namespace {

// An image, or the factors of one, and what it is in memory of its own.
struct Held {
    Shape shape;
    bool channels_last, factors;
    std::vector<float> alone;
    size_t last_read = 0;  // the step

    int64_t bytes() const { return static_cast<int64_t>(alone.size() * sizeof(float)); }
    wk_tensor tensor() {
        const auto [n, c, h, w] = shape;
        return channels_last ? wk_tensor{alone.data(), h * w * c, 1, w * c, c} : wk_tensor{alone.data(), c * h * w, h * w, w, 1};
    }
};

// The operands of a step among the values; -1 for none.
struct Operands {
    int x, factors = -1, residual = -1;
};

class Chain {
  public:
    Chain(uint64_t seed, Random random) : random_(random) {
        char text[100];
        std::snprintf(text, sizeof text, "chain, seed %llu, %s:", static_cast<unsigned long long>(seed), library.isa());
        name_ = text;
        const Shape shape{random_.integer(1, 2), random_.integer(2, 40), random_.integer(1, 14), random_.integer(1, 14)};
        hold(shape, false).alone = random_.numbers(shape.elements());
        for (int count = random_.integer(2, 7); count; count--) add_step();
    }
    ~Chain() {
        for (const wk_step &step : steps_) library.pointwise_free(const_cast<wk_pointwise *>(step.packed));
    }
    Chain(const Chain &) = delete;
    Chain &operator=(const Chain &) = delete;

    void test() {
        for (size_t i = 0; i < steps_.size(); i++) succeed(run_alone(i), name_);
        const int64_t space_bytes = place_values();
        const std::vector<float> &x = values_.front().alone, &want = values_.back().alone, before = x;
        const std::vector<float> filled(want.size() + 2, NAN);
        std::vector<float> y = filled;
        std::vector<unsigned char> space(static_cast<size_t>(space_bytes + 128), 0xff);
        char *aligned = reinterpret_cast<char *>((reinterpret_cast<uintptr_t>(space.data()) + 63) / 64 * 64);
        void *bases[] = {const_cast<float *>(x.data()), y.data(), aligned};
        const auto count = static_cast<int32_t>(steps_.size());

        // A step that does not exist ends the chain before the last one, which alone writes the result.
        std::vector<wk_step> broken = steps_;
        broken[static_cast<size_t>(random_.integer(0, count - 1))].kind = 7;
        if (library.run_steps(broken.data(), count, bases) != WK_BAD_ARGUMENT) stop(1, "%s: an unknown step is accepted", name_.c_str());
        if (!same(y, filled)) stop(1, "%s: steps after one that fails are made", name_.c_str());

        succeed(library.run_steps(steps_.data(), count, bases), name_);
        if (!same({y.begin() + 1, y.end() - 1}, want)) stop(1, "%s: the result differs from that of the calls one at a time", name_.c_str());
        if (!same({y.front(), y.back()}, {NAN, NAN})) stop(1, "%s: memory outside the result has changed", name_.c_str());
        if (!same(x, before)) stop(1, "%s: the input has changed", name_.c_str());
        for (const unsigned char *end = space.data() + space.size(), *at = end - 64; at < end; at++)
            if (*at != 0xff) stop(1, "%s: memory behind the values has changed", name_.c_str());
    }

  private:
    static bool same(const std::vector<float> &a, const std::vector<float> &b) {
        return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
    }

    Held &hold(const Shape &shape, bool factors) {
        values_.push_back({shape, random_.often(), factors, std::vector<float>(static_cast<size_t>(shape.elements()), NAN)});
        return values_.back();
    }
    const float *numbers(int64_t count) { return constants_.emplace_back(random_.numbers(count)).data(); }
    const float *maybe(int64_t count) { return random_.often() ? numbers(count) : nullptr; }
    const int32_t *channels(int64_t count, int64_t among) {
        std::vector<int32_t> table(static_cast<size_t>(count));
        for (int32_t &channel : table) channel = random_.integer(0, static_cast<int>(among) - 1);
        return tables_.emplace_back(table).data();
    }

    // A value of this kind, and with this shape if one is given, or -1.
    int find(bool factors, const Shape *shape) {
        std::vector<int> found;
        for (size_t i = 0; i < values_.size(); i++) {
            const Shape &s = values_[i].shape;
            const bool fits = !shape || (s.channels == shape->channels && s.height == shape->height && s.width == shape->width);
            if (values_[i].factors == factors && fits) found.push_back(static_cast<int>(i));
        }
        return found.empty() ? -1 : found[static_cast<size_t>(random_.integer(0, static_cast<int>(found.size()) - 1))];
    }

    void add_step() {
        wk_step step{};
        step.kind = random_.integer(0, 3);
        // Factors are of use to a product of the same image only.
        Operands from{find(false, nullptr)};
        if (step.kind == WK_PRODUCTS_STEP)
            add_products(step, from);
        else if (step.kind == WK_DEPTHWISE_STEP)
            add_depthwise(step, from);
        else if (step.kind == WK_CONV_STEP)
            add_conv(step, from);
        else
            add_gate(step, from);
        for (int operand : {from.x, from.factors, from.residual})
            if (operand >= 0) values_[static_cast<size_t>(operand)].last_read = steps_.size();
        steps_.push_back(step), operands_.push_back(from);
    }

    void add_products(wk_step &step, Operands &from) {
        const Shape in = values_[static_cast<size_t>(from.x)].shape;
        const bool pair = random_.often(), patches = in.height > 1 && in.width > 1 && random_.integer(0, 3) == 0;
        wk_pointwise_weights weights{};
        weights.type = random_type(random_), weights.inputs = static_cast<int32_t>(in.channels), weights.hidden = random_.integer(2, 60);
        if (patches) weights.patch = {2, 2, 2, 2, 0, 0};
        weights.outputs = pair ? static_cast<int32_t>(random_.often() ? in.channels : random_.integer(2, 40)) : 0;
        weights.activation = random_.integer(0, 3), weights.normalize = random_.often(), weights.eps = 1e-6f;
        weights.first = numbers(weights.hidden * in.channels * (patches ? 4 : 1)), weights.first_bias = maybe(weights.hidden);
        weights.second = numbers(int64_t{weights.outputs} * weights.hidden), weights.second_bias = maybe(weights.outputs);
        weights.response = pair && random_.integer(0, 3) == 0 ? numbers(weights.hidden) : nullptr, weights.response_eps = 1e-6f;
        wk_pointwise *packed = nullptr;
        succeed(library.pointwise_pack(&weights, &packed), name_);
        step.packed = packed;
        const int64_t last = pair ? weights.outputs : weights.hidden, each = patches ? 2 : 1;
        const Shape out{in.images, last, in.height / each, in.width / each}, of_factors{in.images, in.channels, 1, 1};
        if (random_.often()) from.residual = find(false, &out);
        if (random_.integer(0, 3)) from.factors = find(true, &of_factors);
        wk_pointwise_call &call = products_.emplace_back();
        call.threads = random_.integer(1, 3), call.images = static_cast<int32_t>(in.images);
        call.height = static_cast<int32_t>(out.height), call.width = static_cast<int32_t>(out.width);
        call.x_height = static_cast<int32_t>(in.height), call.x_width = static_cast<int32_t>(in.width);
        call.y = hold(out, false).tensor(), call.x = values_[static_cast<size_t>(from.x)].tensor();
        if (from.residual >= 0) call.residual = values_[static_cast<size_t>(from.residual)].tensor();
        step.call = &call;
        name_ += from.factors >= 0 ? " products with factors" : " products";
    }

    void add_depthwise(wk_step &step, Operands &from) {
        const Shape in = values_[static_cast<size_t>(from.x)].shape;
        const bool last = values_[static_cast<size_t>(from.x)].channels_last;
        Shape out = in;
        wk_sum &call = sums_.emplace_back();
        call.channels = static_cast<int32_t>(in.channels);
        if (random_.integer(0, 2) == 0) {
            wk_partial &partial = partials_.emplace_back();
            call.channels = random_.integer(1, 20);
            partial.inputs = static_cast<int32_t>(in.channels), partial.others = random_.integer(1, 20);
            partial.selected = channels(call.channels, in.channels), partial.other = channels(partial.others, in.channels);
            partial.scale = numbers(partial.others), partial.shift = numbers(partial.others);
            out.channels = call.channels + partial.others, step.partial = &partial;
        } else {
            step.scale = maybe(call.channels), step.relu = random_.often();
        }
        step.shift = maybe(call.channels);
        Extent e{random_.integer(1, 7), random_.integer(1, 7), 0, 0, 1};
        e.row = random_.integer(0, e.rows - 1), e.column = random_.integer(0, e.columns - 1);
        const wk_pass &pass = passes_.emplace_back(pass_of(e, random_.integer(0, 2)));
        rects_.push_back({nullptr, e.rows, e.columns, e.row, e.column, 1, 0});
        step.taps = &addresses_.emplace_back(numbers(int64_t{call.channels} * e.rows * e.columns));
        call.threads = random_.integer(1, 3), call.images = static_cast<int32_t>(in.images);
        call.height = static_cast<int32_t>(in.height), call.width = static_cast<int32_t>(in.width);
        call.inputs = call.outputs = call.passes = call.rects = 1, call.pass = &pass, call.rect = &rects_.back();
        Held &y = hold(out, false);
        if (step.partial) y.channels_last = last;
        call.y = y.tensor(), call.x = values_[static_cast<size_t>(from.x)].tensor();
        step.call = &call;
        name_ += step.partial ? " sum of some channels" : " sum";
    }

    void add_gate(wk_step &step, const Operands &from) {
        const Shape in = values_[static_cast<size_t>(from.x)].shape;
        wk_gate &call = gates_.emplace_back();
        call.threads = random_.integer(1, 3), call.images = static_cast<int32_t>(in.images);
        call.channels = static_cast<int32_t>(in.channels);
        call.height = static_cast<int32_t>(in.height), call.width = static_cast<int32_t>(in.width);
        call.hidden = random_.integer(1, 20), call.activation = random_.integer(0, 3);
        call.first = numbers(call.hidden * in.channels), call.first_bias = maybe(call.hidden);
        call.second = numbers(in.channels * call.hidden), call.second_bias = maybe(in.channels);
        hold({in.images, in.channels, 1, 1}, true);
        call.x = values_[static_cast<size_t>(from.x)].tensor();
        step.call = &call;
        name_ += " gate";
    }

    // The values of a convolution have adjacent channels; without any, the step is one of squeeze-excite.
    void add_conv(wk_step &step, const Operands &from) {
        const Held &x = values_[static_cast<size_t>(from.x)];
        if (!x.channels_last) {
            step.kind = WK_GATE_STEP;
            add_gate(step, from);
            return;
        }
        const Shape in = x.shape;
        wk_depthwise_conv &call = convs_.emplace_back();
        call.threads = random_.integer(1, 3), call.images = static_cast<int32_t>(in.images);
        call.channels = static_cast<int32_t>(in.channels), call.relu = random_.often();
        call.x_height = static_cast<int32_t>(in.height), call.x_width = static_cast<int32_t>(in.width);
        call.patch = {3, 3, random_.integer(1, 2), random_.integer(1, 2), 1, 1};
        const Shape out{in.images, in.channels, (in.height - 1) / call.patch.row_stride + 1,
                        (in.width - 1) / call.patch.column_stride + 1};
        call.height = static_cast<int32_t>(out.height), call.width = static_cast<int32_t>(out.width);
        call.taps = numbers(9 * in.channels), call.shift = maybe(in.channels);
        Held &y = hold(out, false);
        y.channels_last = true;
        call.y = y.tensor(), call.x = values_[static_cast<size_t>(from.x)].tensor();
        step.call = &call;
        name_ += " convolution";
    }

    float *memory_of(int value) { return value < 0 ? nullptr : values_[static_cast<size_t>(value)].alone.data(); }

    // Step i reads values that steps before it have written, and writes value i + 1.
    int32_t run_alone(size_t i) {
        const wk_step &s = steps_[i];
        const Operands &from = operands_[i];
        float *x = memory_of(from.x), *y = memory_of(static_cast<int>(i) + 1);
        if (s.kind == WK_PRODUCTS_STEP)
            return library.pointwise_run_at(s.packed, static_cast<const wk_pointwise_call *>(s.call), x, memory_of(from.factors),
                                            memory_of(from.residual), y);
        if (s.kind == WK_CONV_STEP) return library.depthwise_conv_run_at(static_cast<const wk_depthwise_conv *>(s.call), x, y);
        if (s.kind == WK_GATE_STEP) return library.gate_run_at(static_cast<const wk_gate *>(s.call), x, y);
        return library.depthwise_sum_at(static_cast<const wk_sum *>(s.call), x, y, s.taps, s.scale, s.shift, s.relu, s.partial);
    }

    // The first value is at base 0, the last one a float behind base 1, and all others at base 2, in the first gap among those that are
    // still read when they are written. Returns the bytes of these.
    int64_t place_values() {
        struct Taken {
            int64_t begin, end;
            size_t last_read;
        };
        std::vector<wk_place> places{{0, 0}};
        std::vector<Taken> taken;
        int64_t bytes = 0;
        for (size_t i = 0; i < steps_.size(); i++) {
            const Held &y = values_[i + 1];
            if (i + 1 == steps_.size()) {
                places.push_back({1, sizeof(float)});
                break;
            }
            taken.erase(std::remove_if(taken.begin(), taken.end(), [&](const Taken &t) { return t.last_read < i; }), taken.end());
            std::sort(taken.begin(), taken.end(), [](const Taken &a, const Taken &b) { return a.begin < b.begin; });
            const int64_t size = (y.bytes() + 63) / 64 * 64;
            int64_t begin = 0;
            for (const Taken &t : taken) {
                if (begin + size <= t.begin) break;
                begin = t.end;
            }
            taken.push_back({begin, begin + size, std::max(y.last_read, i)});
            places.push_back({2, begin}), bytes = std::max(bytes, begin + size);
        }
        const auto place = [&](int value) { return value < 0 ? wk_place{-1, 0} : places[static_cast<size_t>(value)]; };
        for (size_t i = 0; i < steps_.size(); i++) {
            const Operands &from = operands_[i];
            steps_[i].x = place(from.x), steps_[i].factors = place(from.factors), steps_[i].residual = place(from.residual);
            steps_[i].y = places[i + 1];
        }
        return bytes;
    }

    Random random_;
    std::string name_;
    std::vector<wk_step> steps_;
    std::vector<Operands> operands_;
    // What steps point to; elements of these do not move.
    std::deque<Held> values_;
    std::deque<std::vector<float>> constants_;
    std::deque<std::vector<int32_t>> tables_;
    std::deque<const float *> addresses_;
    std::deque<wk_pass> passes_;
    std::deque<wk_rect> rects_;
    std::deque<wk_partial> partials_;
    std::deque<wk_sum> sums_;
    std::deque<wk_pointwise_call> products_;
    std::deque<wk_gate> gates_;
    std::deque<wk_depthwise_conv> convs_;
};

void test_steps(uint64_t seed, const Random &random) { Chain(seed, random).test(); }

}  // namespace
