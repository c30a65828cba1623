// Random problems of depthwise operators, and their definition.
#pragma once

#include "random.hpp"

namespace {

// Largest error in float, as a share of the largest sum of absolute products: of the direct algorithm, and of the hybrid one.
constexpr double DIRECT_LIMIT = 5e-6, HYBRID_LIMIT = 2e-6;
// Products in the definition of one problem.
constexpr int64_t MOST_WORK = 600000;
const char *const DTYPES[] = {"float32", "bfloat16", "float16"};
const char *const METHODS[] = {"direct", "hybrid along rows", "hybrid along columns"};

struct Extent {
    int32_t rows, columns, row, column, dilation;
};

struct Problem {
    int dtype;
    Shape shape;
    int32_t threads;
    Layout from, to;
    std::vector<Extent> kernels;
    std::vector<wk_pass> passes;
    std::vector<int32_t> targets;
    bool scaled, shifted, rectified, elsewhere;
};

wk_pass pass_of(const Extent &e, int32_t method) {
    wk_pass pass{};
    pass.rows = e.rows, pass.columns = e.columns, pass.row = e.row, pass.column = e.column;
    pass.method = method, pass.dilation = e.dilation;
    return pass;
}

// The smallest undilated kernel that covers all, with the anchors aligned.
Extent bounding(const std::vector<Extent> &kernels) {
    Extent all{0, 0, 0, 0, 1};
    int32_t below = 0, right = 0;
    for (const Extent &k : kernels) {
        all.row = std::max(all.row, k.row * k.dilation), all.column = std::max(all.column, k.column * k.dilation);
        below = std::max(below, (k.rows - 1 - k.row) * k.dilation), right = std::max(right, (k.columns - 1 - k.column) * k.dilation);
    }
    all.rows = all.row + below + 1, all.columns = all.column + right + 1;
    return all;
}


// A part of the kernel that contains the anchor.
Extent part_of(Extent e, Random &random) {
    const int32_t top = random.integer(0, e.row), left = random.integer(0, e.column);
    e.rows -= top, e.row -= top, e.columns -= left, e.column -= left;
    e.rows -= random.integer(0, e.rows - 1 - e.row), e.columns -= random.integer(0, e.columns - 1 - e.column);
    return e;
}

// A pass for one kernel: with its dilation or with zeros in the gaps, and perhaps without some taps.
wk_pass pass_for(const Extent &kernel, Random &random) {
    const Extent whole = kernel.dilation > 1 && random.often() ? bounding({kernel}) : kernel;
    const Extent extent = random.often() ? whole : part_of(whole, random);
    return pass_of(extent, extent.dilation > 1 ? WK_DIRECT : random.integer(0, 2));
}

Problem drawn(Random &random) {
    constexpr int CHANNELS[] = {1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 17, 31, 33, 70};
    // Pixels that are 2 KiB apart, and several groups of channels.
    constexpr int MANY[] = {512, 528, 1041};
    constexpr int LONG[] = {3, 5, 7, 13, 31, 51};
    Problem p{};
    p.dtype = random.integer(0, 2);
    p.threads = random.integer(1, 4);
    p.from = static_cast<Layout>(random.integer(0, LAYOUTS - 1)), p.to = static_cast<Layout>(random.integer(0, ONE_IMAGE - 1));
    if (random.often()) p.to = p.from == ONE_IMAGE ? CONTIGUOUS : p.from;
    p.scaled = random.often(), p.shifted = random.often(), p.rectified = random.often(), p.elsewhere = random.often();
    const bool large = random.integer(0, 7) == 0;  // several bands of rows, or several tiles of a transform
    const bool many = !large && random.integer(0, 15) == 0;
    do {
        if (many)
            p.shape = {1, MANY[random.integer(0, 2)], random.integer(6, 12), random.integer(2, 6)};
        else
            p.shape = {large ? 1 : random.integer(1, 3), CHANNELS[random.integer(0, 13)], random.integer(1, large ? 160 : 32),
                       random.integer(1, large ? 160 : 32)};
        p.kernels.clear();
        for (int count = random.integer(1, 3); count; count--) {
            Extent e{random.integer(1, 19), random.integer(1, 19), 0, 0, 1};
            if (random.integer(0, 2) == 0)
                e = {random.integer(1, 7), random.integer(1, 7), 0, 0, random.integer(2, 5)};
            else if (random.often())
                (random.often() ? e.rows : e.columns) = LONG[random.integer(0, 5)];
            e.row = random.integer(0, e.rows - 1), e.column = random.integer(0, e.columns - 1);
            p.kernels.push_back(e);
        }
        int64_t taps = 0;
        for (const Extent &e : p.kernels) taps += int64_t{e.rows} * e.columns;
        if (p.shape.elements() * taps <= MOST_WORK) break;
    } while (true);
    if (random.often()) {
        p.passes.push_back(pass_of(bounding(p.kernels), random.integer(0, 2)));
        p.targets.assign(p.kernels.size(), 0);
    } else {
        for (const Extent &e : p.kernels) {
            p.targets.push_back(static_cast<int32_t>(p.passes.size()));
            p.passes.push_back(pass_for(e, random));
        }
    }
    return p;
}

std::string described(const Problem &p, uint64_t seed, const char *operation) {
    char text[400];
    std::snprintf(text, sizeof text, "%s, seed %llu, %s: %s, images %lldx%lldx%lldx%lld, %s to %s, %d threads", operation,
                  static_cast<unsigned long long>(seed), library.isa(), DTYPES[p.dtype], static_cast<long long>(p.shape.images),
                  static_cast<long long>(p.shape.channels), static_cast<long long>(p.shape.height),
                  static_cast<long long>(p.shape.width), LAYOUT_NAMES[p.from], LAYOUT_NAMES[p.to], p.threads);
    std::string all = text;
    for (size_t i = 0; i < p.kernels.size(); i++) {
        const Extent &e = p.kernels[i];
        const wk_pass &s = p.passes[static_cast<size_t>(p.targets[i])];
        std::snprintf(text, sizeof text, "; kernel %dx%d at (%d, %d), dilation %d, in pass %dx%d at (%d, %d), dilation %d, %s",
                      e.rows, e.columns, e.row, e.column, e.dilation, s.rows, s.columns, s.row, s.column, s.dilation,
                      METHODS[s.method]);
        all += text;
    }
    return all;
}

// Whether a pass has a tap at this distance from its anchor, along one axis.
bool reaches(int taps, int anchor, int dilation, int distance) {
    return distance >= -anchor * dilation && distance <= (taps - 1 - anchor) * dilation && distance % dilation == 0;
}

// Calls f(u, v, row offset, column offset) for the taps that lie in the pass.
template <class F> void over_taps(const Extent &e, const wk_pass &pass, F &&f) {
    for (int u = 0; u < e.rows; u++)
        for (int v = 0; v < e.columns; v++) {
            const int down = (u - e.row) * e.dilation, right = (v - e.column) * e.dilation;
            if (reaches(pass.rows, pass.row, pass.dilation, down) && reaches(pass.columns, pass.column, pass.dilation, right))
                f(u, v, down, right);
        }
}

double limit_of(const std::vector<wk_pass> &passes) {
    double limit = 0;
    for (const wk_pass &pass : passes) limit += pass.method == WK_DIRECT ? DIRECT_LIMIT : HYBRID_LIMIT;
    return limit;
}

// The definition, and the sum of the absolute values of the products.
struct Sums {
    Shape shape;
    std::vector<double> sums, sizes;

    explicit Sums(const Shape &s) : shape(s), sums(static_cast<size_t>(s.elements())), sizes(sums) {}

    void add(const std::vector<double> &x, const std::vector<float> &taps, const Extent &e, const wk_pass &pass) {
        const auto [images, channels, height, width] = shape;
        over_taps(e, pass, [&](int u, int v, int down, int right) {
            const int64_t top = std::max(0, -down), bottom = std::min(height, height - down);
            const int64_t left = std::max(0, -right), end = std::min(width, width - right);
            for (int64_t plane = 0; plane < images * channels; plane++) {
                const double tap = taps[static_cast<size_t>((plane % channels * e.rows + u) * e.columns + v)];
                for (int64_t i = top; i < bottom; i++)
                    for (int64_t j = left; j < end; j++) {
                        const double product = tap * x[(plane * height + i + down) * width + j + right];
                        sums[(plane * height + i) * width + j] += product;
                        sizes[(plane * height + i) * width + j] += std::abs(product);
                    }
            }
        });
    }
    double largest() const { return *std::max_element(sizes.begin(), sizes.end()); }
};

wk_sum call_of(const Problem &p) {
    wk_sum call{};
    call.dtype = p.dtype, call.threads = p.threads;
    call.images = static_cast<int32_t>(p.shape.images), call.channels = static_cast<int32_t>(p.shape.channels);
    call.height = static_cast<int32_t>(p.shape.height), call.width = static_cast<int32_t>(p.shape.width);
    call.inputs = call.outputs = 1;
    call.passes = static_cast<int32_t>(p.passes.size()), call.pass = p.passes.data();
    return call;
}

}  // namespace
