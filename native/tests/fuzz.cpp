// Random problems: a built library against the definition, tap by tap in double precision. Needs neither Python nor PyTorch, so
// it also runs where they do not, for instance in an emulator of another processor.
//
//     fuzz LIBRARY [problems=200] [seed=0] [isa=NAME] [openmp=FILE]
//
// Every instruction set of the library that the processor has, or the named one, computes the same problems. Problem i of seed s
// is problem 0 of seed s + i. The exit status is 1 if a result is wrong, and 2 if nothing could be tested.
#include "widekernel.h"

#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

namespace {

#define FUNCTION(name) decltype(&wk_##name) name = nullptr
struct Library {
    FUNCTION(abi);
    FUNCTION(isa);
    FUNCTION(use_isa);
    FUNCTION(bind_openmp);
    FUNCTION(depthwise_sum);
    FUNCTION(depthwise_weight_grad);
    FUNCTION(depthwise_sum_at);
    FUNCTION(depthwise_weight_grad_at);
    FUNCTION(depthwise_branches_at);
    FUNCTION(pointwise_pack);
    FUNCTION(pointwise_free);
    FUNCTION(pointwise_run);
    FUNCTION(gate_run);
    FUNCTION(pointwise_weight_grad);
    FUNCTION(batch_norm_run);
    FUNCTION(sum_workspace);
    FUNCTION(weight_grad_workspace);
    FUNCTION(why_no_products);
    FUNCTION(error_text);
};
#undef FUNCTION

Library library;

[[noreturn]] void stop(int status, const char *format, ...) {
    va_list values;
    va_start(values, format);
    std::vfprintf(stderr, format, values);
    va_end(values);
    std::fputc('\n', stderr);
    std::exit(status);
}

void open_library(const char *path) {
    void *file = dlopen(path, RTLD_NOW);
    if (!file) stop(2, "%s cannot be loaded: %s", path, dlerror());
    auto find = [&](auto &function, const char *name) {
        void *symbol = dlsym(file, name);
        if (!symbol) stop(2, "%s has no %s", path, name);
        function = reinterpret_cast<std::decay_t<decltype(function)>>(symbol);
    };
#define FIND(name) find(library.name, "wk_" #name)
    FIND(abi);
    if (library.abi() != WK_ABI) stop(2, "%s has interface version %d, this program %d", path, library.abi(), WK_ABI);
    FIND(isa);
    FIND(use_isa);
    FIND(bind_openmp);
    FIND(depthwise_sum);
    FIND(depthwise_weight_grad);
    FIND(depthwise_sum_at);
    FIND(depthwise_weight_grad_at);
    FIND(depthwise_branches_at);
    FIND(pointwise_pack);
    FIND(pointwise_free);
    FIND(pointwise_run);
    FIND(gate_run);
    FIND(pointwise_weight_grad);
    FIND(batch_norm_run);
    FIND(sum_workspace);
    FIND(weight_grad_workspace);
    FIND(why_no_products);
    FIND(error_text);
#undef FIND
}

// ---- storage types -------------------------------------------------------------------------------------------------------

// Bits of the significand without the leading one, and the exponent of the smallest normal number.
struct Format {
    int bytes, fraction, least;
};
constexpr Format FORMATS[] = {{4, 23, -126}, {2, 7, -126}, {2, 10, -14}};

// The nearest number of the format, ties to even; beyond the largest one, infinity.
double rounded(double value, const Format &format) {
    if (!std::isfinite(value) || value == 0) return value;
    const int exponent = std::max(std::ilogb(value), format.least) - format.fraction;
    const double nearest = std::ldexp(std::nearbyint(std::ldexp(value, -exponent)), exponent);
    // For all three formats, the exponents of the largest and the smallest normal number add up to 1.
    return std::abs(nearest) >= std::ldexp(1.0, 2 - format.least) ? std::copysign(INFINITY, value) : nearest;
}

uint32_t encoded(double value, const Format &format) {
    const int exponents = format.bytes * 8 - 1 - format.fraction;
    const uint32_t sign = uint32_t{std::signbit(value)} << (format.bytes * 8 - 1), infinite = (1u << exponents) - 1;
    value = std::abs(rounded(value, format));
    if (std::isnan(value)) return sign | (infinite << format.fraction) | (1u << (format.fraction - 1));
    if (std::isinf(value)) return sign | (infinite << format.fraction);
    const int exponent = value == 0 ? format.least : std::max(std::ilogb(value), format.least);
    const auto units = static_cast<uint32_t>(std::ldexp(value, format.fraction - exponent));
    // The leading one of a normal number adds 1 to the exponent's field.
    return sign | ((static_cast<uint32_t>(exponent - format.least) << format.fraction) + units);
}

double decoded(uint32_t bits, const Format &format) {
    const int exponents = format.bytes * 8 - 1 - format.fraction;
    const uint32_t field = (bits >> format.fraction) & ((1u << exponents) - 1), fraction = bits & ((1u << format.fraction) - 1);
    double value;
    if (field == (1u << exponents) - 1)
        value = fraction ? NAN : INFINITY;
    else
        value = std::ldexp(double(fraction) + (field ? std::ldexp(1.0, format.fraction) : 0.0),
                           format.least - format.fraction + std::max(0, static_cast<int>(field) - 1));
    return bits >> (format.bytes * 8 - 1) ? -value : value;
}

// ---- tensors in memory ---------------------------------------------------------------------------------------------------

struct Shape {
    int64_t images, channels, height, width;
    int64_t area() const { return height * width; }
    int64_t elements() const { return images * channels * area(); }
};

// Calls f(image, channel, row, column, place), where `place` counts from 0.
template <class F> void over(const Shape &s, F &&f) {
    int64_t place = 0;
    for (int64_t n = 0; n < s.images; n++)
        for (int64_t c = 0; c < s.channels; c++)
            for (int64_t i = 0; i < s.height; i++)
                for (int64_t j = 0; j < s.width; j++) f(n, c, i, j, place++);
}

enum Layout { CONTIGUOUS, CHANNELS_LAST, SOME_CHANNELS, PART_OF_A_MAP, BATCH_INSIDE, TRANSPOSED, ONE_IMAGE, LAYOUTS };
const char *const LAYOUT_NAMES[] = {"contiguous",   "channels last", "some channels", "part of a map",
                                    "batch inside", "transposed",    "one image"};

// An image in a larger block of memory, whose other elements no result may depend on and no call may change.
class Image {
  public:
    Image(const Shape &shape, Layout layout, const Format &format) : shape_(shape), format_(format) {
        const auto [n, c, h, w] = shape;
        int64_t first = 0, elements = shape.elements();
        switch (layout) {
        case CHANNELS_LAST: tensor_ = {nullptr, h * w * c, 1, w * c, c}; break;
        case SOME_CHANNELS:
            tensor_ = {nullptr, h * w * (c + 3), 1, w * (c + 3), c + 3};
            first = 2, elements = n * h * w * (c + 3);
            break;
        case PART_OF_A_MAP:
            tensor_ = {nullptr, c * (h + 2) * (w + 5), (h + 2) * (w + 5), w + 5, 1};
            first = (w + 5) + 4, elements = n * c * (h + 2) * (w + 5);
            break;
        case BATCH_INSIDE: tensor_ = {nullptr, h * w, n * h * w, w, 1}; break;
        case TRANSPOSED: tensor_ = {nullptr, h * w * c, 1, c, h * c}; break;
        case ONE_IMAGE:
            tensor_ = {nullptr, 0, h * w, w, 1};
            elements = c * h * w;
            break;
        default: tensor_ = {nullptr, c * h * w, h * w, w, 1};
        }
        // The margin keeps the address of the first element from being aligned to more than an element.
        first_ = first + 1;
        bytes_.resize(static_cast<size_t>((elements + 2) * format.bytes));
        for (int64_t i = 0; i < elements + 2; i++) set(i, decoded(~0u, format));
    }

    wk_tensor tensor() {
        wk_tensor tensor = tensor_;
        tensor.data = bytes_.data() + first_ * format_.bytes;
        return tensor;
    }

    void fill(const std::vector<double> &values) {
        over(shape_, [&](auto n, auto c, auto i, auto j, auto at) { set(index(n, c, i, j), values[at]); });
    }

    // The stored numbers, in the order of `over`.
    std::vector<double> values() const {
        std::vector<double> values(static_cast<size_t>(shape_.elements()));
        over(shape_, [&](auto n, auto c, auto i, auto j, auto at) { values[at] = get(index(n, c, i, j)); });
        return values;
    }

    const std::vector<unsigned char> &bytes() const { return bytes_; }

    // Whether both have the same bytes outside the image.
    bool same_around(Image before) const {
        over(shape_, [&](auto n, auto c, auto i, auto j, auto) {
            const auto at = static_cast<size_t>(index(n, c, i, j) * format_.bytes);
            std::memcpy(&before.bytes_[at], &bytes_[at], static_cast<size_t>(format_.bytes));
        });
        return bytes_ == before.bytes_;
    }

  private:
    int64_t index(int64_t n, int64_t c, int64_t i, int64_t j) const {
        return first_ + n * tensor_.image + c * tensor_.channel + i * tensor_.row + j * tensor_.column;
    }
    void set(int64_t at, double value) {
        const uint32_t bits = encoded(value, format_);
        std::memcpy(&bytes_[static_cast<size_t>(at * format_.bytes)], &bits, static_cast<size_t>(format_.bytes));
    }
    double get(int64_t at) const {
        uint32_t bits = 0;
        std::memcpy(&bits, &bytes_[static_cast<size_t>(at * format_.bytes)], static_cast<size_t>(format_.bytes));
        return decoded(bits, format_);
    }

    Shape shape_;
    Format format_;
    wk_tensor tensor_;
    int64_t first_;
    std::vector<unsigned char> bytes_;
};

// ---- problems ------------------------------------------------------------------------------------------------------------

// Largest error in float, as a share of the largest sum of absolute products: of the direct algorithm, and of the hybrid one.
constexpr double DIRECT_LIMIT = 5e-6, HYBRID_LIMIT = 2e-6;
// Products in the definition of one problem.
constexpr int64_t MOST_WORK = 600000;
const char *const DTYPES[] = {"float32", "bfloat16", "float16"};
const char *const METHODS[] = {"direct", "hybrid along rows", "hybrid along columns"};

class Random {
  public:
    explicit Random(uint64_t seed) : engine_(seed) {}
    int integer(int least, int most) { return least + static_cast<int>(engine_() % static_cast<uint64_t>(most - least + 1)); }
    bool often() { return engine_() % 2; }
    // The sum of four uniform numbers, nearly normal; the same on every platform.
    double number() {
        double sum = 0;
        for (int i = 0; i < 4; i++) sum += double(engine_() >> 11) / 9007199254740992.0 - 0.5;
        return sum * 1.7;
    }
    std::vector<float> numbers(int64_t count) {
        std::vector<float> values(static_cast<size_t>(count));
        for (float &value : values) value = static_cast<float>(number());
        return values;
    }

  private:
    std::mt19937_64 engine_;
};

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
    constexpr int LONG[] = {3, 5, 7, 13, 31, 51};
    Problem p{};
    p.dtype = random.integer(0, 2);
    p.threads = random.integer(1, 4);
    p.from = static_cast<Layout>(random.integer(0, LAYOUTS - 1)), p.to = static_cast<Layout>(random.integer(0, ONE_IMAGE - 1));
    if (random.often()) p.to = p.from == ONE_IMAGE ? CONTIGUOUS : p.from;
    p.scaled = random.often(), p.shifted = random.often(), p.rectified = random.often(), p.elsewhere = random.often();
    const bool large = random.integer(0, 7) == 0;  // several bands of rows, or several tiles of a transform
    do {
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

// The largest error of all comparisons, as a share of what is allowed.
class Judge {
  public:
    // `weight` is the largest sum of absolute products, to which rounding errors are relative.
    void compare(const std::vector<double> &got, const std::vector<double> &want, double limit, double weight,
                 const Format &format, const std::string &problem) {
        for (size_t i = 0; i < want.size(); i++) {
            // Half a unit of the stored type, or of its smallest numbers.
            const double rounding = format.bytes == 4 ? 0 : std::max(std::ldexp(std::abs(want[i]), -format.fraction - 1),
                                                                     std::ldexp(1.0, format.least - format.fraction - 1));
            const double allowed = limit * weight + rounding * (1 + 1e-6), error = std::abs(got[i] - want[i]);
            if (!(error <= allowed))
                stop(1, "%s: element %zu is %.9g instead of %.9g, %.3g more than allowed", problem.c_str(), i, got[i], want[i],
                     error - allowed);
            if (format.bytes == 4) largest_ = std::max(largest_, error / std::max(allowed, 1e-300));
        }
    }
    double largest() const { return largest_; }

  private:
    double largest_ = 0;
};

std::vector<double> random_image(const Shape &shape, Layout layout, const Format &format, Random &random) {
    std::vector<double> values(static_cast<size_t>(shape.elements()));
    const size_t image = values.size() / static_cast<size_t>(shape.images);
    for (size_t i = 0; i < values.size(); i++)
        values[i] = layout == ONE_IMAGE && i >= image ? values[i % image] : rounded(random.number(), format);
    return values;
}

void succeed(int32_t error, const std::string &problem) {
    if (error != WK_OK) stop(1, "%s: refused, %s", problem.c_str(), library.error_text(error));
}

void check_workspace(int64_t own, int64_t shared, const std::string &problem) {
    if (own <= 0 || shared <= 0)
        stop(1, "%s: working memory of %lld and %lld bytes", problem.c_str(), static_cast<long long>(own),
             static_cast<long long>(shared));
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

uint64_t number_of(const char *text) {
    char *end;
    const unsigned long long value = std::strtoull(text, &end, 10);
    if (!*text || *end || *text == '-') stop(2, "%s is not a number", text);
    return value;
}

}  // namespace

int main(int count, char **arguments) {
    if (count < 2) stop(2, "usage: fuzz LIBRARY [problems=200] [seed=0] [isa=NAME] [openmp=FILE]");
    open_library(arguments[1]);
    uint64_t problems = 200, seed = 0;
    const char *openmp = nullptr, *only = nullptr;
    for (int i = 2; i < count; i++) {
        const std::string option = arguments[i];
        const char *value = arguments[i] + std::min(option.find('=') + 1, option.size());
        if (option.rfind("problems=", 0) == 0)
            problems = number_of(value);
        else if (option.rfind("seed=", 0) == 0)
            seed = number_of(value);
        else if (option.rfind("isa=", 0) == 0)
            only = value;
        else if (option.rfind("openmp=", 0) == 0)
            openmp = value;
        else
            stop(2, "%s is not an option of this program", arguments[i]);
    }
    if (openmp && (!dlopen(openmp, RTLD_NOW) || !library.bind_openmp(openmp))) stop(2, "%s provides no threads", openmp);
    if (only && library.use_isa(only) != WK_OK) stop(2, "%s, or this processor, lacks %s", arguments[1], only);
    for (const char *isa : {"avx512", "avx2", "neon", "portable"}) {
        if ((only && std::strcmp(isa, only)) || library.use_isa(isa) != WK_OK) continue;
        for (int dtype : {WK_BFLOAT16, WK_FLOAT16})
            for (Layout layout : {CONTIGUOUS, CHANNELS_LAST}) test_conversions(dtype, layout);
        Judge judge;
        for (uint64_t i = 0; i < problems; i++) {
            Random random(seed + i);
            const Problem problem = drawn(random);
            test_sum(problem, seed + i, random, judge);
            if (i % 4 == 0) test_partial(problem, seed + i, random, judge);
            test_weight_grad(problem, seed + i, random, judge);
            test_branches(problem, seed + i, random, judge);
            test_pointwise(seed + i, random, judge);
            test_response(seed + i, random, judge);
            test_pointwise_grad(seed + i, random, judge);
            test_batch_norm(seed + i, random, judge);
        }
        std::printf("%s: %llu problems, largest error %.2f of what is allowed\n", isa, static_cast<unsigned long long>(problems),
                    judge.largest());
        std::fflush(stdout);
    }
    return 0;
}
