// Squeeze-excite, and pointwise products with a response norm.
#pragma once

#include "approximate.hpp"

namespace {

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

// Squeeze-excite, and a pair of products with a response norm whose input is multiplied by its factors. Both depend on whole images,
// so that one number that is not finite changes all results of its image, and of no other one.
void test_response(uint64_t seed, Random random, Judge &judge) {
    constexpr double LIMIT = 1e-5;
    const Format &format = FORMATS[WK_FLOAT32];
    const int32_t type = random_type(random);
    const int side = random.often() ? 18 : 4;
    const Shape in{random.integer(1, 3), random.integer(1, 70), random.integer(1, side), random.integer(1, side)};
    const int32_t hidden = side == 4 && random.integer(0, 3) == 0 ? random.integer(450, 1150) : random.integer(1, 90);
    const int32_t channels = static_cast<int32_t>(in.channels), outputs = random.integer(1, 70);
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
    std::vector<double> values = random_image(in, from, format, random);
    if (random.integer(0, 3) == 0) spoil(values, in, from, false, random);
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

    const std::vector<double> firsts = weight_factors(first, channels, type), seconds = weight_factors(second, hidden, type);
    std::vector<double> opened(factors.size());
    Approximates want(static_cast<size_t>(out.elements()));
    double widest = 0, size;
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
        std::vector<Approximates> units(static_cast<size_t>(area), Approximates(hidden));
        std::vector<double> squares(hidden), errors(hidden);
        Approximates pixel(channels);
        for (int64_t at = 0; at < area; at++) {
            for (int32_t c = 0; c < channels; c++)
                pixel[c] = scaled({values[(n * channels + c) * area + at], 0}, factors[static_cast<size_t>(n * channels + c)]);
            make_factors(pixel, channels, type);
            for (int32_t h = 0; h < hidden; h++) {
                const double bias = weights.first_bias ? first_bias[h] : 0;
                const Approximate unit = activated(product(&firsts[h * channels], pixel, channels, bias, type), weights.activation);
                units[at][h] = unit, squares[h] += unit.value * unit.value, errors[h] += unit.error * unit.error;
            }
        }
        double mean = 0, mean_error = 0;
        for (int32_t h = 0; h < hidden; h++) {
            squares[h] = std::sqrt(squares[h]), errors[h] = std::sqrt(errors[h]) + NORM_LIMIT * squares[h];
            mean += squares[h] / hidden, mean_error += errors[h] / hidden;
        }
        mean += weights.response_eps, mean_error += NORM_LIMIT * mean;
        const double least = std::max(mean - mean_error, double(weights.response_eps));
        for (int32_t h = 0; h < hidden; h++) {
            const double ratio = squares[h] / mean, factor = 1 + response[h] * ratio;
            const double error = std::abs(response[h]) * (errors[h] + ratio * mean_error) / least + NORM_LIMIT * (1 + std::abs(factor));
            for (int64_t at = 0; at < area; at++) {
                Approximate &unit = units[at][h];
                const double size = std::abs(unit.value) + unit.error;
                unit = scaled(unit, factor), unit = settled(unit.value, unit.error + size * error);
            }
        }
        for (int64_t at = 0; at < area; at++) {
            make_factors(units[at], chunk_of(hidden), type);
            for (int32_t o = 0; o < outputs; o++)
                want[(n * outputs + o) * area + at] = product(&seconds[o * hidden], units[at], chunk_of(hidden), 0, type);
        }
    }
    judge.compare({factors.begin(), factors.end()}, opened, LIMIT, std::max(1.0, widest), format, std::string("gate of ") + name);
    compare(judge, y.values(), want, type, name);
    if (!y.same_around(untouched)) stop(1, "%s: memory outside the output has changed", name);
}

}  // namespace
