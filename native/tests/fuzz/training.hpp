// Operators of training: weight gradients of pointwise layers, and batch norm.
#pragma once

#include "random.hpp"

namespace {

// The gradients of a pointwise layer's weights and bias.
void test_pointwise_grad(uint64_t seed, Random random, Judge &judge) {
    constexpr double LIMIT = 4e-6;
    const Format &format = FORMATS[WK_FLOAT32];
    // Several pieces of pixels in some problems, and several parts of the weights in others.
    const bool deep = random.integer(0, 3) == 0, wide = !deep && random.integer(0, 3) == 0;
    const int side = deep ? 24 : 9;
    const Shape in{random.integer(1, 3), random.integer(1, wide ? 450 : 70), random.integer(1, side), random.integer(1, side)};
    const Shape out{in.images, random.integer(1, wide ? 560 : 70), in.height, in.width};
    const Layout from = static_cast<Layout>(random.integer(0, LAYOUTS - 1)), to = static_cast<Layout>(random.integer(0, LAYOUTS - 1));
    const std::vector<double> values = random_image(in, from, format, random), grads = random_image(out, to, format, random);
    Image x(in, from, format), grad(out, to, format);
    x.fill(values), grad.fill(grads);
    const Image x_before = x, grad_before = grad;
    const bool biased = random.often();
    std::vector<float> weight(static_cast<size_t>(in.channels * out.channels + 2), 7.0f), bias(static_cast<size_t>(out.channels + 2), 7.0f);
    wk_pointwise_grad call{};
    call.threads = random.integer(1, 5), call.images = static_cast<int32_t>(in.images);
    call.height = static_cast<int32_t>(in.height), call.width = static_cast<int32_t>(in.width);
    call.inputs = static_cast<int32_t>(in.channels), call.outputs = static_cast<int32_t>(out.channels);
    call.x = x.tensor(), call.grad = grad.tensor(), call.weight = weight.data() + 1, call.bias = biased ? bias.data() + 1 : nullptr;
    char name[200];
    std::snprintf(name, sizeof name, "pointwise gradient, seed %llu, %s: %lldx%dx%lldx%lld, outputs %d, %s and %s, bias %d, %d threads",
                  static_cast<unsigned long long>(seed), library.isa(), static_cast<long long>(in.images), call.inputs,
                  static_cast<long long>(in.height), static_cast<long long>(in.width), call.outputs, LAYOUT_NAMES[from],
                  LAYOUT_NAMES[to], biased, call.threads);
    succeed(library.pointwise_weight_grad(&call), name);

    std::vector<double> want(weight.size() - 2), sums(bias.size() - 2, biased ? 0.0 : 7.0);
    double heaviest = 0, heaviest_sum = 7;
    for (int64_t o = 0; o < out.channels; o++) {
        double weight_of_sum = 0;
        for (int64_t i = 0; i < in.channels; i++) {
            double sum = 0, size = 0;
            for (int64_t n = 0; n < in.images; n++)
                for (int64_t p = 0; p < in.area(); p++) {
                    const double product = grads[(n * out.channels + o) * in.area() + p] * values[(n * in.channels + i) * in.area() + p];
                    sum += product, size += std::abs(product);
                }
            want[static_cast<size_t>(o * in.channels + i)] = sum, heaviest = std::max(heaviest, size);
        }
        for (int64_t n = 0; biased && n < in.images; n++)
            for (int64_t p = 0; p < in.area(); p++) {
                const double value = grads[(n * out.channels + o) * in.area() + p];
                sums[static_cast<size_t>(o)] += value, weight_of_sum += std::abs(value);
            }
        heaviest_sum = std::max(heaviest_sum, weight_of_sum);
    }
    judge.compare(std::vector<double>(weight.begin() + 1, weight.end() - 1), want, LIMIT, heaviest, format, name);
    judge.compare(std::vector<double>(bias.begin() + 1, bias.end() - 1), sums, LIMIT, heaviest_sum, format, name);
    if (weight.front() != 7.0f || weight.back() != 7.0f || bias.front() != 7.0f || bias.back() != 7.0f)
        stop(1, "%s: memory outside the gradients has changed", name);
    if (x.bytes() != x_before.bytes() || grad.bytes() != grad_before.bytes()) stop(1, "%s: an input has changed", name);
}

// Batch norm in training, and its gradients.
void test_batch_norm(uint64_t seed, Random random, Judge &judge) {
    constexpr double LIMIT = 2e-5, EPS = 1e-3;
    const Format &format = FORMATS[WK_FLOAT32];
    const Shape shape{random.integer(1, 3), random.integer(1, 140), random.integer(1, 20), random.integer(1, 20)};
    const Layout layout = random.often() ? CONTIGUOUS : CHANNELS_LAST;
    const double offset = 10 * random.number();
    std::vector<double> values = random_image(shape, layout, format, random);
    const std::vector<double> grads = random_image(shape, layout, format, random);
    for (double &value : values) value = rounded(value + offset, format);
    Image x(shape, layout, format), grad(shape, layout, format), y(shape, layout, format), x_grad(shape, layout, format);
    x.fill(values), grad.fill(grads);
    const Image x_before = x, untouched = y;
    const auto channels = static_cast<size_t>(shape.channels);
    const std::vector<float> weight = random.numbers(shape.channels), bias = random.numbers(shape.channels);
    std::vector<float> mean(channels + 1, 7.0f), variance = mean, factor = mean, weight_grad = mean, bias_grad = mean;
    wk_batch_norm call{};
    call.threads = random.integer(1, 4), call.images = static_cast<int32_t>(shape.images);
    call.channels = static_cast<int32_t>(shape.channels);
    call.height = static_cast<int32_t>(shape.height), call.width = static_cast<int32_t>(shape.width);
    call.x = x.tensor(), call.y = y.tensor(), call.eps = static_cast<float>(EPS);
    call.weight = random.often() ? weight.data() : nullptr, call.bias = random.often() ? bias.data() : nullptr;
    call.mean = mean.data(), call.variance = variance.data(), call.factor = factor.data();
    char name[200];
    std::snprintf(name, sizeof name, "batch norm, seed %llu, %s: %dx%dx%dx%d, %s, %d threads", static_cast<unsigned long long>(seed),
                  library.isa(), call.images, call.channels, call.height, call.width, LAYOUT_NAMES[layout], call.threads);
    succeed(library.batch_norm_run(&call), name);
    wk_batch_norm back = call;
    back.backward = 1, back.grad = grad.tensor(), back.y = x_grad.tensor();
    back.weight_grad = weight_grad.data(), back.bias_grad = random.often() ? bias_grad.data() : nullptr;
    succeed(library.batch_norm_run(&back), name);

    std::vector<double> want(values.size()), want_grad(values.size()), of_weight(channels), of_bias(channels, 7.0);
    double largest = 1, steepest = 1, weight_of_weight = 1, weight_of_bias = 7;
    for (int64_t c = 0; c < shape.channels; c++) {
        const double count = double(shape.images * shape.area());
        auto over_channel = [&](auto &&f) {
            for (int64_t n = 0; n < shape.images; n++)
                for (int64_t p = 0; p < shape.area(); p++) f(static_cast<size_t>((n * shape.channels + c) * shape.area() + p));
        };
        double center = 0, spread = 0, sum = 0, product = 0, size = 0, size_of_product = 0;
        over_channel([&](size_t at) { center += values[at] / count; });
        over_channel([&](size_t at) { spread += (values[at] - center) * (values[at] - center) / count; });
        const double scale = 1 / std::sqrt(spread + EPS), slope = call.weight ? weight[c] : 1, shift = call.bias ? bias[c] : 0;
        over_channel([&](size_t at) {
            const double normal = (values[at] - center) * scale;
            want[at] = normal * slope + shift, largest = std::max(largest, std::abs(want[at]));
            sum += grads[at], product += grads[at] * normal;
            size += std::abs(grads[at]), size_of_product += std::abs(grads[at] * normal);
        });
        over_channel([&](size_t at) {
            const double normal = (values[at] - center) * scale;
            want_grad[at] = slope * scale * (grads[at] - sum / count - normal * product / count);
            steepest = std::max(steepest, std::abs(slope * scale) * (std::abs(grads[at]) + std::abs(normal * product / count)));
        });
        of_weight[static_cast<size_t>(c)] = product, weight_of_weight = std::max(weight_of_weight, size_of_product);
        if (back.bias_grad) of_bias[static_cast<size_t>(c)] = sum, weight_of_bias = std::max(weight_of_bias, size);
    }
    // Numbers near a large mean are rounded like the mean, and differences of few of them are divided by a small deviation.
    const double rounding = (1 + std::abs(offset)) / std::sqrt(EPS) / 10;
    judge.compare(y.values(), want, LIMIT, largest * rounding, format, name);
    judge.compare(x_grad.values(), want_grad, LIMIT, steepest * rounding, format, name);
    judge.compare({weight_grad.begin(), weight_grad.end() - 1}, of_weight, LIMIT, weight_of_weight * rounding, format, name);
    judge.compare({bias_grad.begin(), bias_grad.end() - 1}, of_bias, LIMIT, weight_of_bias, format, name);
    for (const std::vector<float> *part : {&mean, &variance, &factor, &weight_grad, &bias_grad})
        if (part->back() != 7.0f) stop(1, "%s: memory outside the statistics has changed", name);
    if (!y.same_around(untouched) || !x_grad.same_around(untouched)) stop(1, "%s: memory outside a result has changed", name);
    if (x.bytes() != x_before.bytes()) stop(1, "%s: an input has changed", name);
}

}  // namespace
