// Depthwise sums, of all channels or some, and of branches; weight gradients; conversions.
#pragma once

#include "depthwise.hpp"

namespace {

void test_sum(const Problem &p, uint64_t seed, Random random, Judge &judge) {
    const std::string name = described(p, seed, "sum");
    const Format &format = FORMATS[p.dtype];
    const int64_t channels = p.shape.channels;
    Image x(p.shape, p.from, format), y(p.shape, p.to, format);
    const std::vector<double> values = random_image(p.shape, p.from, format, random);
    x.fill(values);
    const Image x_before = x, y_before = y;
    std::vector<std::vector<float>> taps;
    for (const Extent &e : p.kernels) taps.push_back(random.numbers(channels * e.rows * e.columns));
    const std::vector<float> scale = random.numbers(channels), shift = random.numbers(channels);

    std::vector<wk_rect> rects(p.kernels.size());
    std::vector<const float *> addresses;
    for (size_t i = 0; i < rects.size(); i++) {
        const Extent &e = p.kernels[i];
        rects[i] = {p.elsewhere ? nullptr : taps[i].data(), e.rows, e.columns, e.row, e.column, e.dilation, p.targets[i]};
        addresses.push_back(taps[i].data());
    }
    wk_sum call = call_of(p);
    call.x = x.tensor(), call.y = y.tensor(), call.rects = static_cast<int32_t>(rects.size()), call.rect = rects.data();
    call.scale = p.scaled ? scale.data() : nullptr, call.shift = p.shifted ? shift.data() : nullptr, call.relu = p.rectified;
    int64_t own = 0, shared = 0;
    library.sum_workspace(&call, &own, &shared);
    check_workspace(own, shared, name);
    if (p.elsewhere) {
        wk_sum empty = call;
        empty.x.data = empty.y.data = nullptr, empty.scale = empty.shift = nullptr, empty.relu = 0;
        succeed(library.depthwise_sum_at(&empty, call.x.data, call.y.data, addresses.data(), call.scale, call.shift, call.relu,
                                         nullptr),
                name);
    } else {
        succeed(library.depthwise_sum(&call), name);
    }

    Sums sums(p.shape);
    for (size_t k = 0; k < p.kernels.size(); k++)
        sums.add(values, taps[k], p.kernels[k], p.passes[static_cast<size_t>(p.targets[k])]);
    std::vector<double> &want = sums.sums;
    double weight = 0;
    over(p.shape, [&](auto, auto c, auto, auto, auto at) {
        const double factor = p.scaled ? scale[c] : 1, start = p.shifted ? shift[c] : 0;
        want[at] = want[at] * factor + start;
        if (p.rectified) want[at] = std::max(want[at], 0.0);
        weight = std::max(weight, sums.sizes[at] * std::abs(factor) + std::abs(start));
    });
    judge.compare(y.values(), want, limit_of(p.passes), weight, format, name);
    if (x.bytes() != x_before.bytes()) stop(1, "%s: the input has changed", name.c_str());
    if (!y.same_around(y_before)) stop(1, "%s: memory outside the output has changed", name.c_str());
}

// The sum of some channels of a larger image, in any order, with others behind it.
void test_partial(const Problem &p, uint64_t seed, Random random, Judge &judge) {
    if (p.dtype != WK_FLOAT32) return;
    const std::string name = described(p, seed, "sum of some channels");
    const Format &format = FORMATS[p.dtype];
    const Layout pixels_first[] = {CHANNELS_LAST, SOME_CHANNELS, TRANSPOSED}, planes_first[] = {CONTIGUOUS, PART_OF_A_MAP, BATCH_INSIDE};
    const Layout(&alike)[3] = random.often() ? pixels_first : planes_first;
    const Layout from = alike[random.integer(0, 2)], to = alike[random.integer(0, 2)];
    const int64_t count = p.shape.channels;
    wk_partial partial{};
    partial.inputs = static_cast<int32_t>(count) + random.integer(0, 40), partial.others = random.integer(0, 40);
    Shape large = p.shape, result = p.shape;
    // With a single channel, none are adjacent.
    partial.inputs = std::max(partial.inputs, 2);
    large.channels = partial.inputs, result.channels = count + partial.others;
    std::vector<int32_t> selected(count), other(partial.others);
    for (int32_t &channel : selected) channel = random.integer(0, partial.inputs - 1);
    if (random.often()) std::sort(selected.begin(), selected.end());
    for (int32_t &channel : other) channel = random.integer(0, partial.inputs - 1);
    const std::vector<float> scale = random.numbers(partial.others), plus = random.numbers(partial.others);
    partial.selected = selected.data(), partial.other = other.data(), partial.scale = scale.data(), partial.shift = plus.data();

    Image x(large, from, format), y(result, to, format);
    const std::vector<double> values = random_image(large, from, format, random);
    x.fill(values);
    const Image x_before = x, y_before = y;
    std::vector<std::vector<float>> taps;
    std::vector<wk_rect> rects;
    for (size_t i = 0; i < p.kernels.size(); i++) {
        const Extent &e = p.kernels[i];
        taps.push_back(random.numbers(count * e.rows * e.columns));
        rects.push_back({taps[i].data(), e.rows, e.columns, e.row, e.column, e.dilation, p.targets[i]});
    }
    const std::vector<float> shift = random.numbers(count);
    wk_sum call = call_of(p);
    call.x = x.tensor(), call.y = y.tensor(), call.rects = static_cast<int32_t>(rects.size()), call.rect = rects.data();
    call.shift = p.shifted ? shift.data() : nullptr, call.partial = &partial;
    succeed(library.depthwise_sum(&call), name);

    const int64_t pixels = p.shape.height * p.shape.width;
    std::vector<double> chosen(static_cast<size_t>(p.shape.elements()));
    over(p.shape, [&](auto n, auto c, auto i, auto j, auto at) {
        chosen[at] = values[(n * large.channels + selected[c]) * pixels + i * p.shape.width + j];
    });
    Sums sums(p.shape);
    for (size_t k = 0; k < p.kernels.size(); k++)
        sums.add(chosen, taps[k], p.kernels[k], p.passes[static_cast<size_t>(p.targets[k])]);
    std::vector<double> want(static_cast<size_t>(result.elements()));
    double weight = 1;
    over(result, [&](auto n, auto c, auto i, auto j, auto at) {
        const int64_t pixel = i * p.shape.width + j;
        if (c >= count) {
            const double value = values[(n * large.channels + other[c - count]) * pixels + pixel];
            want[at] = scale[c - count] * value + plus[c - count];
            weight = std::max(weight, std::abs(want[at]));
            return;
        }
        const size_t within = static_cast<size_t>((n * count + c) * pixels + pixel);
        want[at] = sums.sums[within] + (p.shifted ? shift[c] : 0);
        weight = std::max(weight, sums.sizes[within] + (p.shifted ? std::abs(shift[c]) : 0));
    });
    judge.compare(y.values(), want, limit_of(p.passes), weight, format, name);
    if (x.bytes() != x_before.bytes()) stop(1, "%s: the input has changed", name.c_str());
    if (!y.same_around(y_before)) stop(1, "%s: memory outside the output has changed", name.c_str());
    for (int32_t wrong : {-1, partial.inputs}) {
        selected[count / 2] = wrong;
        if (library.depthwise_sum(&call) != WK_BAD_ARGUMENT) stop(1, "%s: a channel outside the image is accepted", name.c_str());
    }
}

// The passes separately: of one input, each to its own output, or each from its own input, to one output.
void test_branches(Problem p, uint64_t seed, Random random, Judge &judge) {
    const bool forward = random.often();
    if (p.passes.size() != p.kernels.size() || p.passes.size() < 2) return;
    const std::string name = described(p, seed, forward ? "branches" : "sum of branches");
    const Format &format = FORMATS[p.dtype];
    const size_t count = p.passes.size();
    std::vector<Image> xs(forward ? 1 : count, Image(p.shape, p.from, format));
    std::vector<Image> ys(forward ? count : 1, Image(p.shape, p.to, format));
    const Image untouched = ys[0];
    std::vector<std::vector<double>> values;
    for (Image &x : xs) x.fill(values.emplace_back(random_image(p.shape, p.from, format, random)));
    std::vector<const void *> inputs;
    std::vector<void *> outputs;
    for (Image &x : xs) inputs.push_back(x.tensor().data);
    for (Image &y : ys) outputs.push_back(y.tensor().data);
    std::vector<std::vector<float>> taps;
    std::vector<const float *> addresses;
    std::vector<wk_rect> rects;
    std::vector<Sums> sums(ys.size(), Sums(p.shape));
    for (size_t i = 0; i < count; i++) {
        const Extent &e = p.kernels[i];
        taps.push_back(random.numbers(p.shape.channels * e.rows * e.columns));
        rects.push_back({nullptr, e.rows, e.columns, e.row, e.column, e.dilation, p.targets[i]});
        (forward ? p.passes[i].output : p.passes[i].input) = static_cast<int32_t>(i);
        sums[forward ? i : 0].add(values[forward ? 0 : i], taps[i], e, p.passes[i]);
    }
    for (const std::vector<float> &kernel : taps) addresses.push_back(kernel.data());
    wk_sum call = call_of(p);
    call.x = xs[0].tensor(), call.y = ys[0].tensor(), call.x.data = call.y.data = nullptr;
    call.inputs = static_cast<int32_t>(xs.size()), call.outputs = static_cast<int32_t>(ys.size());
    call.rects = static_cast<int32_t>(rects.size()), call.rect = rects.data();
    succeed(library.depthwise_branches_at(&call, inputs.data(), outputs.data(), addresses.data()), name);
    for (size_t i = 0; i < ys.size(); i++) {
        judge.compare(ys[i].values(), sums[i].sums, limit_of(p.passes), sums[i].largest(), format, name);
        if (!ys[i].same_around(untouched)) stop(1, "%s: memory outside an output has changed", name.c_str());
    }
}

void test_weight_grad(const Problem &p, uint64_t seed, Random random, Judge &judge) {
    const std::string name = described(p, seed, "weight gradient");
    const Format &format = FORMATS[p.dtype];
    const auto [images, channels, height, width] = p.shape;
    const Extent &e = p.kernels[0];
    const wk_pass pass = pass_for(e, random);
    Image x(p.shape, p.from, format), grad(p.shape, p.to, format);
    const std::vector<double> values = random_image(p.shape, p.from, format, random);
    const std::vector<double> grads = random_image(p.shape, p.to, format, random);
    x.fill(values), grad.fill(grads);
    const Image x_before = x, grad_before = grad;

    const int64_t area = int64_t{e.rows} * e.columns;
    std::vector<float> taps(static_cast<size_t>(channels * area + 2), 7.0f);
    wk_weight_grad call{};
    call.dtype = p.dtype, call.threads = p.threads;
    call.images = static_cast<int32_t>(images), call.channels = static_cast<int32_t>(channels);
    call.height = static_cast<int32_t>(height), call.width = static_cast<int32_t>(width);
    call.x = x.tensor(), call.grad = grad.tensor();
    call.pass = pass, call.taps = taps.data() + 1;
    call.rows = e.rows, call.columns = e.columns, call.row = e.row, call.column = e.column;
    call.dilation = e.dilation;
    int64_t own = 0, shared = 0;
    library.weight_grad_workspace(&call, &own, &shared);
    check_workspace(own, shared, name);
    if (p.elsewhere) {
        wk_weight_grad empty = call;
        empty.x.data = empty.grad.data = nullptr, empty.taps = nullptr;
        succeed(library.depthwise_weight_grad_at(&empty, call.x.data, call.grad.data, call.taps), name);
    } else {
        succeed(library.depthwise_weight_grad(&call), name);
    }

    std::vector<double> want(static_cast<size_t>(channels * area));
    double weight = 0;
    over_taps(e, pass, [&](int u, int v, int down, int right) {
        const int64_t top = std::max(0, -down), bottom = std::min(height, height - down);
        const int64_t left = std::max(0, -right), end = std::min(width, width - right);
        for (int64_t c = 0; c < channels; c++) {
            double sum = 0, size = 0;
            for (int64_t n = 0; n < images; n++)
                for (int64_t i = top; i < bottom; i++)
                    for (int64_t j = left; j < end; j++) {
                        const int64_t plane = n * channels + c;
                        const double product = grads[(plane * height + i) * width + j] *
                                               values[(plane * height + i + down) * width + j + right];
                        sum += product, size += std::abs(product);
                    }
            want[c * area + u * e.columns + v] = sum;
            weight = std::max(weight, size);
        }
    });
    const std::vector<double> got(taps.begin() + 1, taps.end() - 1);
    judge.compare(got, want, limit_of({pass}), weight, FORMATS[WK_FLOAT32], name);
    if (taps.front() != 7.0f || taps.back() != 7.0f) stop(1, "%s: memory outside the gradient has changed", name.c_str());
    if (x.bytes() != x_before.bytes() || grad.bytes() != grad_before.bytes()) stop(1, "%s: an input has changed", name.c_str());
}

// Every number of a 16-bit type, plus shifts that leave ties and subnormal numbers to be rounded, through one tap of 1.
void test_conversions(int dtype, Layout layout) {
    const Format &format = FORMATS[dtype];
    constexpr int64_t CHANNELS = 19;
    const Shape shape{1, CHANNELS, 256, 256};
    std::vector<double> values(static_cast<size_t>(shape.elements()));
    for (size_t i = 0; i < values.size(); i++) values[i] = decoded(static_cast<uint32_t>(i % 65536), format);
    Image x(shape, layout, format), y(shape, layout, format);
    x.fill(values);
    std::vector<float> taps(CHANNELS, 1.0f), shift(CHANNELS);
    for (int c = 1; c < CHANNELS; c++)
        shift[static_cast<size_t>(c)] = static_cast<float>(std::ldexp(c % 2 ? 1.0 : -1.0 - 1.0 / 64, 2 - 2 * c));
    const wk_pass pass = pass_of({1, 1, 0, 0, 1}, WK_DIRECT);
    const wk_rect rect{taps.data(), 1, 1, 0, 0, 1, 0};
    wk_sum call{};
    call.dtype = dtype, call.threads = 1, call.images = 1, call.channels = CHANNELS, call.height = call.width = 256;
    call.x = x.tensor(), call.y = y.tensor(), call.inputs = call.outputs = call.passes = call.rects = 1;
    call.pass = &pass, call.rect = &rect;
    call.shift = shift.data();
    succeed(library.depthwise_sum(&call), "conversions");
    const std::vector<double> got = y.values();
    over(shape, [&](auto, auto c, auto, auto, auto at) {
        const float sum = static_cast<float>(values[at]) + shift[c];
        const double want = rounded(sum, format);
        if (got[at] != want && !(std::isnan(got[at]) && std::isnan(want)))
            stop(1, "%s, %s, %s: %.9g + %.9g is rounded to %.9g instead of %.9g", library.isa(), DTYPES[dtype],
                 LAYOUT_NAMES[layout], values[at], double(shift[c]), got[at], want);
    });
}

}  // namespace
