// Depthwise convolutions with strides.
#pragma once

#include "random.hpp"

namespace {

void test_depthwise_conv(uint64_t seed, Random random, Judge &judge) {
    constexpr double LIMIT = 4e-6;
    const Format &format = FORMATS[WK_FLOAT32];
    constexpr Layout WITH_ADJACENT_CHANNELS[] = {CHANNELS_LAST, SOME_CHANNELS, TRANSPOSED};
    const bool wide = random.integer(0, 7) == 0;
    const Shape in{random.integer(1, 3), random.integer(1, wide ? 1100 : 70), random.integer(1, wide ? 6 : 24), random.integer(1, wide ? 6 : 24)};
    const wk_patch patch{random.integer(1, 6), random.integer(1, 6), random.integer(1, 4), random.integer(1, 4), random.integer(0, 4), random.integer(0, 4)};
    // Also rows and columns of results that a convolution with this padding would not have, under which there may be no pixels.
    const Shape out{in.images, in.channels, random.integer(1, static_cast<int>(in.height + 9) / patch.row_stride + 1),
                    random.integer(1, static_cast<int>(in.width + 9) / patch.column_stride + 1)};
    const Layout from = WITH_ADJACENT_CHANNELS[random.integer(0, 2)], to = WITH_ADJACENT_CHANNELS[random.integer(0, 2)];
    std::vector<double> values = random_image(in, from, format, random);
    if (random.integer(0, 3) == 0) spoil(values, in, from, true, random);
    Image x(in, from, format), y(out, to, format);
    x.fill(values);
    const Image x_before = x, untouched = y;
    const int64_t area = int64_t{patch.rows} * patch.columns;
    const std::vector<float> taps = random.numbers(area * in.channels), shift = random.numbers(in.channels);
    wk_depthwise_conv call{};
    call.threads = random.integer(1, 5), call.images = static_cast<int32_t>(in.images), call.channels = static_cast<int32_t>(in.channels);
    call.height = static_cast<int32_t>(out.height), call.width = static_cast<int32_t>(out.width);
    call.x_height = static_cast<int32_t>(in.height), call.x_width = static_cast<int32_t>(in.width);
    call.relu = random.often(), call.x = x.tensor(), call.y = y.tensor(), call.patch = patch;
    call.taps = taps.data(), call.shift = random.often() ? shift.data() : nullptr;
    char name[300];
    std::snprintf(name, sizeof name,
                  "depthwise convolution, seed %llu, %s: %dx%dx%dx%d to %dx%d, kernel %dx%d, strides %d and %d, padding %d and %d, "
                  "%s and %s, shift %d, relu %d, %d threads",
                  static_cast<unsigned long long>(seed), library.isa(), call.images, call.channels, call.x_height, call.x_width,
                  call.height, call.width, patch.rows, patch.columns, patch.row_stride, patch.column_stride, patch.top, patch.left,
                  LAYOUT_NAMES[from], LAYOUT_NAMES[to], !!call.shift, call.relu, call.threads);
    succeed(library.depthwise_conv_run(&call), name);

    std::vector<double> want(static_cast<size_t>(out.elements()));
    double heaviest = 1;
    over(out, [&](auto n, auto c, auto i, auto j, auto at) {
        double sum = call.shift ? shift[static_cast<size_t>(c)] : 0, weight = std::abs(sum);
        for (int64_t u = 0; u < patch.rows; u++)
            for (int64_t v = 0; v < patch.columns; v++) {
                const int64_t row = i * patch.row_stride + u - patch.top, column = j * patch.column_stride + v - patch.left;
                if (row < 0 || row >= in.height || column < 0 || column >= in.width) continue;
                const double pixel = values[static_cast<size_t>(((n * in.channels + c) * in.height + row) * in.width + column)];
                const double product = pixel * taps[static_cast<size_t>((u * patch.columns + v) * in.channels + c)];
                sum += product;
                if (std::isfinite(product)) weight += std::abs(product);
            }
        want[static_cast<size_t>(at)] = call.relu && sum < 0 ? 0 : sum, heaviest = std::max(heaviest, weight);
    });
    const std::vector<double> got = y.values();
    for (size_t i = 0; i < want.size(); i++) {
        if (std::isinf(want[i]) && got[i] == want[i]) continue;
        judge.check(i, got[i], want[i], LIMIT * heaviest, true, name);
    }
    if (!y.same_around(untouched)) stop(1, "%s: memory outside the result has changed", name);
    if (x.bytes() != x_before.bytes()) stop(1, "%s: the input has changed", name);
    call.x.channel = 2;
    if (library.depthwise_conv_run(&call) != WK_BAD_ARGUMENT) stop(1, "%s: channels that are not adjacent are accepted", name);
}

}  // namespace
