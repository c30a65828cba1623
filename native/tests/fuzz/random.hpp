// Random numbers, and the comparison of results.
#pragma once

#include "images.hpp"
#include "library.hpp"

#include <random>

namespace {

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
            check(i, got[i], want[i], limit * weight + rounding * (1 + 1e-6), format.bytes == 4, problem);
        }
    }

    // NaN must be NaN. `counts` is whether the error counts as one of computing, not of rounding to a type of fewer bits.
    void check(size_t i, double got, double want, double allowed, bool counts, const std::string &problem) {
        const double error = std::isnan(want) && std::isnan(got) ? 0 : std::abs(got - want);
        if (!(error <= allowed))
            stop(1, "%s: element %zu is %.9g instead of %.9g, where an error of %.3g is allowed", problem.c_str(), i, got, want, allowed);
        if (counts) largest_ = std::max(largest_, error / std::max(allowed, 1e-300));
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

// Replaces a number of one image by NaN or, if allowed, infinity; of all images if they share their memory.
void spoil(std::vector<double> &values, const Shape &shape, Layout layout, bool infinity, Random &random) {
    constexpr double SPOILED[] = {NAN, -NAN, INFINITY, -INFINITY};
    const double spoiled = SPOILED[random.integer(0, infinity ? 3 : 1)];
    const int64_t image = shape.channels * shape.area(), at = random.integer(0, static_cast<int>(image) - 1);
    const int64_t only = random.integer(0, static_cast<int>(shape.images) - 1);
    for (int64_t n = 0; n < shape.images; n++)
        if (layout == ONE_IMAGE || n == only) values[static_cast<size_t>(n * image + at)] = spoiled;
}

}  // namespace
