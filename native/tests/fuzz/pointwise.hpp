// Pointwise products, with all their options, and squeeze-excite.
#pragma once

#include "random.hpp"

namespace {

double activated(double value, int32_t activation) {
    switch (activation) {
    case WK_RELU: return std::max(value, 0.0);
    case WK_GELU: return 0.5 * value * std::erfc(-value / std::sqrt(2.0));
    case WK_GELU_TANH: return 0.5 * value * (1 + std::tanh(std::sqrt(2 / M_PI) * (value + 0.044715 * value * value * value)));
    default: return value;
    }
}

// The types of factors that the library has for this instruction set, one of them at random.
int32_t random_type(Random &random) {
    const int32_t types[] = {WK_FLOAT32, WK_BFLOAT16, WK_INT8}, type = types[random.integer(0, 2)];
    return library.why_no_products(type) ? WK_FLOAT32 : type;
}

// Replaces the channels of a pixel, `count` of them, by the factors of a product of that type.
void make_factors(double *pixel, int64_t count, int32_t type) {
    if (type == WK_BFLOAT16)
        for (int64_t i = 0; i < count; i++) pixel[i] = rounded(pixel[i], FORMATS[type]);
    if (type != WK_INT8) return;
    double low = 0, high = 0;
    for (int64_t i = 0; i < count; i++) low = std::min(low, pixel[i]), high = std::max(high, pixel[i]);
    const double scale = (high - low) / 255;
    if (scale < 1e-30) {
        std::fill_n(pixel, count, 0.0);
        return;
    }
    const double zero = std::nearbyint(-low / scale);
    for (int64_t i = 0; i < count; i++)
        pixel[i] = (std::min(std::max(std::nearbyint(pixel[i] / scale + zero), 0.0), 255.0) - zero) * scale;
}

// The factors that stand for weights, of which each output has a row.
std::vector<float> weight_factors(std::vector<float> weights, int64_t row, int32_t type) {
    if (type == WK_BFLOAT16)
        for (float &value : weights) value = static_cast<float>(rounded(value, FORMATS[type]));
    for (size_t begin = 0; type == WK_INT8 && begin < weights.size(); begin += static_cast<size_t>(row)) {
        float largest = 0;
        for (int64_t i = 0; i < row; i++) largest = std::max(largest, std::abs(weights[begin + i]));
        const float scale = largest / 127;
        for (int64_t i = 0; i < row; i++) weights[begin + i] = scale < 1e-30f ? 0 : std::nearbyint(weights[begin + i] / scale) * scale;
    }
    return weights;
}

// Rounding errors relative to sums of absolute products; `products` in turn. Two factors are rounded to 8 bits. In int8, a factor
// near a tie may differ by a step, of which there are 255 in the range of a pixel.
double limit_of_products(int32_t type, double in_float32, int products) {
    return type == WK_FLOAT32 ? in_float32 : products * std::ldexp(1.0, type == WK_INT8 ? -6 : -7);
}

// Subtracts the mean, and divides by the standard deviation; returns the latter.
double normalized(std::vector<double> &values, double eps) {
    double mean = 0, variance = 0;
    for (double value : values) mean += value / static_cast<double>(values.size());
    for (double value : values) variance += (value - mean) * (value - mean) / static_cast<double>(values.size());
    const double deviation = std::sqrt(variance + eps);
    for (double &value : values) value = (value - mean) / deviation;
    return deviation;
}

// A pair of products over channels or patches, or one, with factors, an activation, layer norms and a residual.
void test_pointwise(uint64_t seed, Random random, Judge &judge) {
    const Format &format = FORMATS[WK_FLOAT32];
    // Patches of few channels are packed in another way, and wide images by whole vectors.
    const bool patches = random.often();
    const int most_channels = !patches ? 70 : random.often() ? 5 : 40, most_rows = patches ? 19 : 9, most_columns = patches ? 40 : 9;
    const Shape in{random.integer(1, 2), random.integer(1, most_channels), random.integer(1, most_rows), random.integer(1, most_columns)};
    const int32_t inputs = static_cast<int32_t>(in.channels), hidden = random.integer(1, 90), type = random_type(random);
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
    const std::vector<double> values = random_image(in, from, format, random), added = random_image(out, to, format, random);
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
    std::vector<double> prepared(values.size()), pixel(inputs);
    for (int64_t n = 0; n < in.images; n++)
        for (int64_t at = 0; at < in.area(); at++) {
            for (int32_t c = 0; c < inputs; c++)
                pixel[c] = values[(n * inputs + c) * in.area() + at] * (call.factors ? factors[n * inputs + c] : 1);
            if (normalize) normalized(pixel, weights.eps);
            for (int32_t c = 0; c < inputs; c++) prepared[(n * inputs + c) * in.area() + at] = pixel[c];
        }
    const std::vector<float> firsts = weight_factors(first, depth, type), seconds = weight_factors(second, hidden, type);
    std::vector<double> want(static_cast<size_t>(out.elements())), units(hidden), sizes(hidden), numbers(depth);
    double weight = 0;
    for (int64_t n = 0; n < in.images; n++)
        for (int64_t at = 0; at < out.area(); at++) {
            const int64_t top = at / out.width * down - patch.top, left = at % out.width * right - patch.left;
            for (int64_t k = 0; k < depth; k++) {
                const int64_t c = k / taps, row = top + k % taps / columns, column = left + k % columns;
                const bool inside = row >= 0 && row < in.height && column >= 0 && column < in.width;
                numbers[k] = inside ? prepared[(n * inputs + c) * in.area() + row * in.width + column] : 0;
            }
            make_factors(numbers.data(), depth, type);
            for (int32_t h = 0; h < hidden; h++) {
                units[h] = weights.first_bias ? first_bias[h] : 0, sizes[h] = std::abs(units[h]);
                for (int64_t k = 0; k < depth; k++) {
                    const double product = firsts[h * depth + k] * numbers[k];
                    units[h] += product, sizes[h] += std::abs(product);
                }
            }
            const double deviation = after ? normalized(units, weights.after_eps) : 1;
            const double largest = *std::max_element(sizes.begin(), sizes.end());
            for (int32_t h = 0; h < hidden; h++) {
                if (after) {
                    const double times = weights.after_scale ? scale[h] : 1, plus = weights.after_shift ? shift[h] : 0;
                    // An error of a unit, or of the deviation, in units of the latter.
                    sizes[h] = std::abs(plus) + std::abs(times) * (largest / deviation) * (1 + std::abs(units[h]));
                    units[h] = units[h] * times + plus;
                }
                units[h] = activated(units[h], weights.activation);
            }
            if (pair) make_factors(units.data(), hidden, type);
            for (int32_t o = 0; o < last; o++) {
                double sum = pair ? (weights.second_bias ? second_bias[o] : 0) : units[o], size = pair ? std::abs(sum) : sizes[o];
                for (int32_t h = 0; pair && h < hidden; h++) {
                    const double times = seconds[o * hidden + h];
                    sum += times * units[h], size += std::abs(times) * sizes[h];
                }
                const auto place = static_cast<size_t>((n * last + o) * out.area() + at);
                want[place] = sum + (adds ? added[place] : 0);
                weight = std::max(weight, size + std::abs(adds ? added[place] : 0));
            }
        }
    judge.compare(y.values(), want, limit_of_products(type, 4e-6, pair ? 2 : 1), weight, format, name);
    if (!y.same_around(untouched)) stop(1, "%s: memory outside the output has changed", name);
    if (x.bytes() != x_before.bytes()) stop(1, "%s: the input has changed", name);
}

// bias + matrix · vector for one row, and the sum of absolute values.
double row_product(const std::vector<float> &matrix, int64_t row, const float *bias, const double *vector, int64_t columns, double &size) {
    double sum = bias ? bias[row] : 0;
    size = std::abs(sum);
    for (int64_t c = 0; c < columns; c++) {
        const double product = double(matrix[row * columns + c]) * vector[c];
        sum += product, size += std::abs(product);
    }
    return sum;
}

// Squeeze-excite, and a pair of products with a response norm whose input is multiplied by its factors.
void test_response(uint64_t seed, Random random, Judge &judge) {
    constexpr double LIMIT = 1e-5;
    const Format &format = FORMATS[WK_FLOAT32];
    const int32_t type = random_type(random);
    const int side = random.often() ? 18 : 4;
    const Shape in{random.integer(1, 3), random.integer(1, 70), random.integer(1, side), random.integer(1, side)};
    const int32_t channels = static_cast<int32_t>(in.channels), hidden = random.integer(1, 90), outputs = random.integer(1, 70);
    const int32_t squeezed = random.integer(1, 40);
    const int64_t area = in.area();
    const Shape out{in.images, outputs, in.height, in.width};
    const Layout from = static_cast<Layout>(random.integer(0, LAYOUTS - 1)), to = static_cast<Layout>(random.integer(0, ONE_IMAGE - 1));
    const std::vector<float> first = random.numbers(hidden * channels), first_bias = random.numbers(hidden);
    const std::vector<float> second = random.numbers(int64_t{outputs} * hidden), response = random.numbers(hidden);
    const std::vector<float> down = random.numbers(squeezed * channels), up = random.numbers(channels * squeezed);
    const std::vector<float> down_bias = random.numbers(squeezed), up_bias = random.numbers(channels);
    char name[200];
    std::snprintf(name, sizeof name, "response, seed %llu, %s, type %d: %lldx%dx%lldx%lld, hidden %d, outputs %d, squeezed %d",
                  static_cast<unsigned long long>(seed), library.isa(), type, static_cast<long long>(in.images), channels,
                  static_cast<long long>(in.height), static_cast<long long>(in.width), hidden, outputs, squeezed);
    Image x(in, from, format), y(out, to, format);
    const std::vector<double> values = random_image(in, from, format, random);
    x.fill(values);
    const Image untouched = y;

    std::vector<float> factors(static_cast<size_t>(in.images * channels + 1), 7.0f);
    wk_gate gate{};
    gate.threads = random.integer(1, 3), gate.images = static_cast<int32_t>(in.images), gate.channels = channels;
    gate.height = static_cast<int32_t>(in.height), gate.width = static_cast<int32_t>(in.width), gate.x = x.tensor();
    gate.hidden = squeezed, gate.activation = random.integer(0, 3), gate.y = factors.data();
    gate.first = down.data(), gate.first_bias = random.often() ? down_bias.data() : nullptr;
    gate.second = up.data(), gate.second_bias = random.often() ? up_bias.data() : nullptr;
    succeed(library.gate_run(&gate), name);
    if (factors.back() != 7.0f) stop(1, "%s: memory behind the factors has changed", name);
    factors.pop_back();

    wk_pointwise_weights weights{};
    weights.type = type;
    weights.inputs = channels, weights.hidden = hidden, weights.outputs = outputs, weights.activation = random.integer(0, 3);
    weights.first = first.data(), weights.first_bias = random.often() ? first_bias.data() : nullptr;
    weights.second = second.data(), weights.response = response.data(), weights.response_eps = 1e-6f;
    wk_pointwise *packed = nullptr;
    succeed(library.pointwise_pack(&weights, &packed), name);
    wk_pointwise_call call{};
    call.threads = random.integer(1, 9), call.images = gate.images, call.height = gate.height, call.width = gate.width;
    call.x = x.tensor(), call.y = y.tensor(), call.factors = factors.data();
    succeed(library.pointwise_run(packed, &call), name);
    library.pointwise_free(packed);

    const std::vector<float> firsts = weight_factors(first, channels, type), seconds = weight_factors(second, hidden, type);
    std::vector<double> opened(factors.size()), want(static_cast<size_t>(out.elements()));
    double widest = 0, weight = 0, size;
    for (int64_t n = 0; n < in.images; n++) {
        std::vector<double> means(channels), low(squeezed);
        for (int32_t c = 0; c < channels; c++)
            for (int64_t at = 0; at < area; at++) means[c] += values[(n * channels + c) * area + at] / static_cast<double>(area);
        for (int32_t h = 0; h < squeezed; h++)
            low[h] = activated(row_product(down, h, gate.first_bias, means.data(), channels, size), gate.activation);
        for (int32_t c = 0; c < channels; c++) {
            opened[n * channels + c] = 1 / (1 + std::exp(-row_product(up, c, gate.second_bias, low.data(), squeezed, size)));
            widest = std::max(widest, size);
        }
        std::vector<double> units(static_cast<size_t>(area) * hidden), sizes(hidden), pixel(channels);
        double largest = 0, mean = 0;
        for (int64_t at = 0; at < area; at++) {
            for (int32_t c = 0; c < channels; c++)
                pixel[c] = values[(n * channels + c) * area + at] * factors[static_cast<size_t>(n * channels + c)];
            make_factors(pixel.data(), channels, type);
            for (int32_t h = 0; h < hidden; h++) {
                const double unit = activated(row_product(firsts, h, weights.first_bias, pixel.data(), channels, size), weights.activation);
                units[at * hidden + h] = unit, sizes[h] += unit * unit, largest = std::max(largest, size);
            }
        }
        for (double &value : sizes) value = std::sqrt(value), mean += value / hidden;
        double strongest = 0;
        for (int32_t h = 0; h < hidden; h++) {
            const double factor = 1 + response[h] * sizes[h] / (mean + weights.response_eps);
            strongest = std::max(strongest, std::abs(factor) + 1);
            for (int64_t at = 0; at < area; at++) units[at * hidden + h] *= factor;
        }
        for (int64_t at = 0; at < area; at++) make_factors(&units[at * hidden], hidden, type);
        for (int64_t at = 0; at < area; at++)
            for (int32_t o = 0; o < outputs; o++) {
                want[(n * outputs + o) * area + at] = row_product(seconds, o, nullptr, &units[at * hidden], hidden, size);
                double row = 0;
                for (int32_t h = 0; h < hidden; h++) row += std::abs(second[o * hidden + h]);
                weight = std::max(weight, row * largest * strongest);
            }
    }
    judge.compare({factors.begin(), factors.end()}, opened, LIMIT, std::max(1.0, widest), format, std::string("gate of ") + name);
    judge.compare(y.values(), want, limit_of_products(type, LIMIT, 2), weight, format, name);
    if (!y.same_around(untouched)) stop(1, "%s: memory outside the output has changed", name);
}

}  // namespace
