// Squeeze-excite: factors = sigmoid(second · activation(first · mean(x) + first_bias) + second_bias) for the channels of an image.
#pragma once

#include "activation.hpp"
#include "phases.hpp"
#include "stack.hpp"
#include "workspace.hpp"

namespace wk {
namespace WK_NAMESPACE {

// Of two numbers whose absolute values differ much, the sigmoid of the larger one is 1; beyond this it is a subnormal number.
constexpr float STEEP = 87.0f;

WK_INLINE Vec sigmoid(const Vec &x) {
    const Vec a = at_most((Vec)((Bits)x & 0x7fffffffu), all(STEEP)), logarithm[1] = {a * -1.44269504f};
    const Vec shifted = logarithm[0] + 12582912.0f, rest[1] = {logarithm[0] - (shifted - 12582912.0f)};
    Vec power[1];
    polynomial<1, 6>(POWER_OF_TWO, rest, power);
    const Vec tail = (Vec)((Bits)power[0] + ((Bits)shifted << 23));
    const Vec y = (x < 0.0f ? tail : all(1.0f)) / (1.0f + tail);
    return x == x ? y : x;
}

// Of `count` numbers each; `b` has whole vectors.
inline float dot(const float *a, const Vec *b, int64_t count) {
    constexpr int CHAINS = 4;
    Vec sum[CHAINS]{};
    const int64_t groups = count / LANES;
    int64_t g = 0;
    for (; g + CHAINS <= groups; g += CHAINS)
        unroll<CHAINS>([&](auto i) { sum[i] += Float32::load(a + (g + i) * LANES) * b[g + i]; });
    for (; g < groups; g++) sum[0] += Float32::load(a + g * LANES) * b[g];
    if (count % LANES) sum[1] += load_some<Float32>(a + g * LANES, static_cast<int>(count % LANES)) * b[g];
    return sum_of_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// One call. Sums over pixels are made of those over a fixed number of slices, whatever the number of threads is.
class Gate {
  public:
    explicit Gate(const wk_gate &call)
        : call_(call), x_(call.x, call.images, call.height, call.width), pixels_(int64_t{call.height} * call.width),
          slices_(most(1, least(MOST_SLICES, pixels_ / SLICE_PIXELS))), groups_(ceil_div(call.channels, LANES)),
          hidden_groups_(ceil_div(call.hidden, LANES)) {
        const int64_t weights = int64_t{call.hidden} * call.channels * 2;
        threads_ = static_cast<int32_t>(least(call.threads, 1 + (call.images * (call.channels * pixels_ + weights)) / WORTH_READING));
        parts_ = least(least(hidden_groups_, threads_), most(1, weights / WORTH_READING));
    }

    int32_t run() {
        Carver sizes{nullptr};
        carve(sizes);
        Carver carver{shared_memory.at_least(sizes.used)};
        if (!carver.base) return WK_OUT_OF_MEMORY;
        carve(carver);
        Phases<Gate> phases;
        phases.add(call_.images * slices_, &Gate::add_slice);
        phases.add(call_.images, &Gate::average);
        phases.add(call_.images * parts_, &Gate::squeeze);
        phases.add(call_.images * parts_, &Gate::excite);
        phases.run(*this, threads_);
        shared_memory.shrink();
        return WK_OK;
    }

  private:
    static constexpr int64_t MOST_SLICES = 16, SLICE_PIXELS = 128;
    // Vectors of adjacent channels that are added in registers.
    static constexpr int ADDED = 8;
    // Below this number of floats for each thread, waking it would take longer than its share.
    static constexpr int64_t WORTH_READING = 1 << 15;

    void carve(Carver &carver) {
        sums_ = carver.take<Vec>(call_.images * slices_ * groups_);
        hidden_ = carver.take<Vec>(call_.images * hidden_groups_);
    }

    void add_slice(int64_t task) {
        const int64_t image = task / slices_, slice = task % slices_;
        const int64_t begin = image * pixels_ + pixels_ * slice / slices_, end = image * pixels_ + pixels_ * (slice + 1) / slices_;
        Vec *sums = sums_ + task * groups_;
        if (x_.columns_adjoin())
            for (int64_t g = 0; g < groups_; g++) {
                Vec sum{};
                for (int i = 0; i < lanes_of(g, call_.channels); i++) sum[i] = sum_of_channel(g * LANES + i, begin, end);
                sums[g] = sum;
            }
        else
            for (int64_t g = 0; g < groups_; g += ADDED) add_groups(g, least(ADDED, groups_ - g), begin, end, sums + g);
    }

    static int lanes_of(int64_t group, int64_t channels) { return static_cast<int>(least(LANES, channels - group * LANES)); }

    float sum_of_channel(int64_t channel, int64_t begin, int64_t end) const {
        Vec even{}, odd{};
        for (int64_t i = begin; i < end;) {
            const int64_t run = least(end - i, x_.run_from(i));
            const float *at = x_.pixel(i) + channel * x_.channel;
            int64_t j = 0;
            for (; j + 2 * LANES <= run; j += 2 * LANES) even += Float32::load(at + j), odd += Float32::load(at + j + LANES);
            for (; j + LANES <= run; j += LANES) even += Float32::load(at + j);
            if (j < run) odd += load_some<Float32>(at + j, static_cast<int>(run - j));
            i += run;
        }
        return sum_of_lanes(even + odd);
    }

    void add_groups(int64_t group, int64_t count, int64_t begin, int64_t end, Vec *sums) const {
        const int last = lanes_of(group + count - 1, call_.channels);
        const bool whole = count == ADDED && last == LANES && x_.channel == 1;
        Vec sum[ADDED]{};
        for (int64_t i = begin; i < end; i++) {
            const float *at = x_.pixel(i) + group * LANES * x_.channel;
            if (whole)
                unroll<ADDED>([&](auto g) { sum[g] += Float32::load(at + g * LANES); });
            else
                for (int64_t g = 0; g < count; g++)
                    sum[g] += gather(at + g * LANES * x_.channel, x_.channel, g == count - 1 ? last : LANES);
        }
        for (int64_t g = 0; g < count; g++) sums[g] = sum[g];
    }

    // The means of an image replace the sums of its first slice.
    void average(int64_t image) {
        Vec *sums = sums_ + image * slices_ * groups_;
        const float each = 1.0f / static_cast<float>(pixels_);
        for (int64_t g = 0; g < groups_; g++) {
            for (int64_t slice = 1; slice < slices_; slice++) sums[g] += sums[slice * groups_ + g];
            sums[g] *= each;
        }
    }

    // A part of the hidden units of an image.
    void squeeze(int64_t task) {
        const int64_t image = task / parts_, part = task % parts_;
        const Vec *means = sums_ + image * slices_ * groups_;
        for (int64_t g = hidden_groups_ * part / parts_; g < hidden_groups_ * (part + 1) / parts_; g++) {
            Vec &units = hidden_[image * hidden_groups_ + g];
            units = products(call_.first, call_.first_bias, g, call_.hidden, means, call_.channels);
            activate(call_.activation, Vec{}, &units, 1);
        }
    }

    // A part of the factors of an image.
    void excite(int64_t task) {
        const int64_t image = task / parts_, part = task % parts_;
        for (int64_t g = groups_ * part / parts_; g < groups_ * (part + 1) / parts_; g++) {
            const Vec *units = hidden_ + image * hidden_groups_;
            const Vec factors = sigmoid(products(call_.second, call_.second_bias, g, call_.channels, units, call_.hidden));
            scatter(call_.y + image * call_.channels + g * LANES, 1, factors, lanes_of(g, call_.channels));
        }
    }

    // LANES rows of a matrix times a vector; missing rows are zero.
    static Vec products(const float *matrix, const float *bias, int64_t group, int64_t rows, const Vec *vector, int64_t columns) {
        Vec value{};
        for (int i = 0; i < lanes_of(group, rows); i++) {
            const int64_t row = group * LANES + i;
            value[i] = dot(matrix + row * columns, vector, columns) + (bias ? bias[row] : 0.0f);
        }
        return value;
    }

    const wk_gate &call_;
    const Pixels x_;
    const int64_t pixels_, slices_, groups_, hidden_groups_;
    int32_t threads_;
    int64_t parts_;  // of the hidden units, and of the factors
    Vec *sums_ = nullptr, *hidden_ = nullptr;
};

}  // namespace WK_NAMESPACE
}  // namespace wk
