// Pointwise products, with all options but the response norm.
#pragma once

#include "approximate.hpp"

namespace {

// A pair of products over channels or patches, or one, with factors, an activation, layer norms and a residual. A number that is not
// finite may change the results that depend on it, and no others.
void test_pointwise(uint64_t seed, Random random, Judge &judge) {
    const Format &format = FORMATS[WK_FLOAT32];
    // Patches of few channels are packed in another way, and wide images by whole vectors.
    const bool patches = random.often();
    const int most_channels = !patches ? 70 : random.often() ? 5 : 40, most_rows = patches ? 19 : 9, most_columns = patches ? 40 : 9;
    const Shape in{random.integer(1, 2), random.integer(1, most_channels), random.integer(1, most_rows), random.integer(1, most_columns)};
    // Many hidden units are computed in several chunks.
    const bool chunks = !patches && random.integer(0, 7) == 0;
    const int32_t hidden = chunks ? random.integer(450, 1150) : random.integer(1, 90);
    const int32_t inputs = static_cast<int32_t>(in.channels), type = random_type(random);
    const bool pair = random.often(), normalize = random.often() && inputs > 1, after = !pair && hidden > 1 && random.often();
    const int32_t outputs = pair ? random.integer(1, 70) : 0, last = pair ? outputs : hidden;
    wk_patch patch{};
    if (patches) {
        const int height = static_cast<int>(in.height), width = static_cast<int>(in.width);
        patch = {random.integer(1, std::min(height, 4)), random.integer(1, std::min(width, 5)), random.integer(1, 4), random.integer(1, 3), 0, 0};
        patch.top = random.integer(0, patch.rows), patch.left = random.integer(0, patch.columns);
    }
    const int64_t rows = std::max(patch.rows, 1), columns = std::max(patch.columns, 1), taps = rows * columns, depth = inputs * taps;
    const int64_t down = std::max(patch.row_stride, 1), right = std::max(patch.column_stride, 1);
    const Shape out{in.images, last, (in.height + 2 * patch.top - rows) / down + 1, (in.width + 2 * patch.left - columns) / right + 1};
    const Layout from = static_cast<Layout>(random.integer(0, LAYOUTS - 1)), to = static_cast<Layout>(random.integer(0, ONE_IMAGE - 1));
    const std::vector<float> first = random.numbers(hidden * depth), first_bias = random.numbers(hidden);
    const std::vector<float> second = random.numbers(int64_t{outputs} * hidden), second_bias = random.numbers(outputs);
    const std::vector<float> scale = random.numbers(hidden), shift = random.numbers(hidden), factors = random.numbers(in.images * inputs);
    wk_pointwise_weights weights{};
    weights.type = type, weights.inputs = inputs, weights.hidden = hidden, weights.outputs = outputs, weights.patch = patch;
    weights.activation = random.integer(0, 3), weights.normalize = normalize, weights.eps = 1e-6f;
    weights.first = first.data(), weights.first_bias = random.often() ? first_bias.data() : nullptr;
    weights.second = pair ? second.data() : nullptr, weights.second_bias = pair && random.often() ? second_bias.data() : nullptr;
    weights.normalize_after = after, weights.after_eps = 1e-3f;
    weights.after_scale = after && random.often() ? scale.data() : nullptr;
    weights.after_shift = after && random.often() ? shift.data() : nullptr;
    char name[300];
    std::snprintf(name, sizeof name,
                  "pointwise, seed %llu, %s, type %d: %lldx%dx%lldx%lld, hidden %d, outputs %d, activation %d, norms %d %d, patches "
                  "%dx%d by %dx%d, padding %d %d",
                  static_cast<unsigned long long>(seed), library.isa(), type, static_cast<long long>(in.images), inputs,
                  static_cast<long long>(in.height), static_cast<long long>(in.width), hidden, outputs, weights.activation, normalize,
                  after, patch.rows, patch.columns, patch.row_stride, patch.column_stride, patch.top, patch.left);
    Image x(in, from, format), y(out, to, format), residual(out, to, format);
    std::vector<double> values = random_image(in, from, format, random);
    const std::vector<double> added = random_image(out, to, format, random);
    if (random.often()) spoil(values, in, from, true, random);
    x.fill(values), residual.fill(added);
    const Image untouched = y, x_before = x;
    wk_pointwise *packed = nullptr;
    succeed(library.pointwise_pack(&weights, &packed), name);
    wk_pointwise_call call{};
    call.threads = random.integer(1, 3), call.images = static_cast<int32_t>(in.images);
    call.height = static_cast<int32_t>(out.height), call.width = static_cast<int32_t>(out.width);
    call.x_height = static_cast<int32_t>(in.height), call.x_width = static_cast<int32_t>(in.width);
    call.x = x.tensor(), call.y = y.tensor(), call.factors = random.often() ? factors.data() : nullptr;
    const bool adds = random.often();
    if (adds) call.residual = residual.tensor();
    succeed(library.pointwise_run(packed, &call), name);
    library.pointwise_free(packed);

    // Inputs of the first product: pixels times factors, normalized.
    Approximates prepared(values.size()), pixel(inputs);
    for (int64_t n = 0; n < in.images; n++)
        for (int64_t at = 0; at < in.area(); at++) {
            for (int32_t c = 0; c < inputs; c++) {
                pixel[c] = {values[(n * inputs + c) * in.area() + at], 0};
                if (call.factors) pixel[c] = scaled(pixel[c], factors[n * inputs + c]);
            }
            if (normalize) ::normalize(pixel, weights.eps);
            for (int32_t c = 0; c < inputs; c++) prepared[(n * inputs + c) * in.area() + at] = pixel[c];
        }
    const std::vector<double> firsts = weight_factors(first, depth, type), seconds = weight_factors(second, hidden, type);
    Approximates want(static_cast<size_t>(out.elements())), units(hidden), numbers(depth);
    for (int64_t n = 0; n < in.images; n++)
        for (int64_t at = 0; at < out.area(); at++) {
            const int64_t top = at / out.width * down - patch.top, left = at % out.width * right - patch.left;
            for (int64_t k = 0; k < depth; k++) {
                const int64_t c = k / taps, row = top + k % taps / columns, column = left + k % columns;
                const bool inside = row >= 0 && row < in.height && column >= 0 && column < in.width;
                numbers[k] = inside ? prepared[(n * inputs + c) * in.area() + row * in.width + column] : Approximate{};
            }
            make_factors(numbers, depth, type);
            for (int32_t h = 0; h < hidden; h++)
                units[h] = product(&firsts[h * depth], numbers, depth, weights.first_bias ? first_bias[h] : 0, type);
            if (after) ::normalize(units, weights.after_eps);
            for (int32_t h = 0; h < hidden; h++) {
                if (weights.after_scale) units[h] = scaled(units[h], scale[h]);
                if (weights.after_shift) units[h] = sum(units[h], shift[h]);
                units[h] = activated(units[h], weights.activation);
            }
            if (pair) make_factors(units, chunk_of(hidden), type);
            for (int32_t o = 0; o < last; o++) {
                const double bias = weights.second_bias ? second_bias[o] : 0;
                const Approximate y = pair ? product(&seconds[o * hidden], units, chunk_of(hidden), bias, type) : units[o];
                const auto place = static_cast<size_t>((n * last + o) * out.area() + at);
                want[place] = adds ? sum(y, added[place]) : y;
            }
        }
    compare(judge, y.values(), want, type, name);
    if (!y.same_around(untouched)) stop(1, "%s: memory outside the output has changed", name);
    if (x.bytes() != x_before.bytes()) stop(1, "%s: the input has changed", name);
}

}  // namespace
