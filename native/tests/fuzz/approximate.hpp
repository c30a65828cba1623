// Numbers with bounds of their errors, and the operations of pointwise products on them.
//
// Where a library rounds to factors of 8 bits, a number near a tie may go either way, and then differs by a whole step. The bounds
// therefore count the steps that a number can take within its own error, so that most numbers, far from ties, add nothing.
#pragma once

#include "random.hpp"

namespace {

// The library's number is at most `error` away from `value`. If `value` is NaN, so is the library's. What depends on an infinity has
// an infinite error, and may be anything: an infinity times the zeros that fill up vectors is NaN.
struct Approximate {
    double value = 0, error = 0;
};
typedef std::vector<Approximate> Approximates;

// Half a unit in the last place of a float32, relative to the number. Errors of float32 sums relative to sums of absolute products,
// and of normalized numbers relative to themselves, or 1.
constexpr double ROUNDING = 5.9604644775390625e-8, SUM_LIMIT = 4e-6, NORM_LIMIT = 2e-6;

double activated(double value, int32_t activation) {
    switch (activation) {
    case WK_RELU: return std::max(value, 0.0);
    case WK_GELU: return 0.5 * value * std::erfc(-value / std::sqrt(2.0));
    case WK_GELU_TANH: return 0.5 * value * (1 + std::tanh(std::sqrt(2 / M_PI) * (value + 0.044715 * value * value * value)));
    default: return value;
    }
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

// A result and its error, which the rules above decide if the result is not finite.
Approximate settled(double value, double error) {
    return {value, std::isnan(value) ? 0 : std::isinf(value) ? INFINITY : error};
}

Approximate scaled(const Approximate &a, double factor) {
    return settled(a.value * factor, a.error * std::abs(factor) + ROUNDING * std::abs(a.value * factor));
}

Approximate sum(const Approximate &a, double b) {
    return settled(a.value + b, a.error + ROUNDING * (std::abs(a.value) + std::abs(b)));
}

Approximate activated(const Approximate &a, int32_t activation) {
    const bool gelu = activation == WK_GELU || activation == WK_GELU_TANH;
    if (std::isinf(a.value)) return {std::max(a.value, 0.0), INFINITY};
    // The slope of GELU is at most 1.13.
    return settled(activated(a.value, activation), gelu ? 1.13 * a.error + 4 * ROUNDING * std::abs(a.value) : a.error);
}

// The same. The deviation is known up to the root mean square of all errors.
void normalize(Approximates &numbers, double eps) {
    std::vector<double> values;
    double mean_error = 0, square = 0;
    for (const Approximate &a : numbers) values.push_back(a.value), mean_error += a.error, square += a.error * a.error;
    const double count = static_cast<double>(numbers.size()), uncertain = std::sqrt(square / count);
    const double deviation = normalized(values, eps), least = std::max(deviation - uncertain, std::sqrt(eps));
    for (size_t i = 0; i < numbers.size(); i++) {
        const double size = std::abs(values[i]), error = numbers[i].error + mean_error / count + size * uncertain;
        numbers[i] = settled(values[i], error / least + NORM_LIMIT * (1 + size));
    }
}

// The steps that rounding can take if a number, in steps, is only known up to `error`.
double steps_within(double number, double error) {
    const double to_tie = std::abs(number - std::floor(number) - 0.5);
    return error < to_tie ? 0 : std::floor(error - to_tie) + 1;
}

Approximate in_bfloat16(const Approximate &a) {
    if (!std::isfinite(a.value)) return a;
    const Format &format = FORMATS[WK_BFLOAT16];
    const auto step_at = [&](double value) {
        return std::ldexp(1.0, (value == 0 ? format.least : std::max(std::ilogb(value), format.least)) - format.fraction);
    };
    const double step = step_at(a.value), further = step_at(std::abs(a.value) + a.error);
    const bool known = a.error == 0 || steps_within(a.value / step, a.error / step) == 0;
    // Subnormal numbers may count as zero.
    return {rounded(a.value, format), (known ? 0 : a.error + (step + further) / 2) + std::ldexp(1.0, format.least)};
}

// Numbers of a pixel with one scale: 255 steps from the lowest to the highest, or 0.
void make_int8(Approximate *numbers, int64_t count) {
    double low = 0, high = 0, lowest = 0, highest = 0, low_most = 0, high_least = 0;
    bool finite = true;
    for (int64_t i = 0; i < count; i++) {
        const auto [value, error] = numbers[i];
        finite = finite && std::isfinite(value);
        low = std::min(low, value), lowest = std::min(lowest, value - error), low_most = std::min(low_most, value + error);
        high = std::max(high, value), highest = std::max(highest, value + error), high_least = std::max(high_least, value - error);
    }
    const double scale = (high - low) / 255, range = std::max(highest - lowest - (high - low), (high - low) - (high_least - low_most));
    if (!finite || scale < 1e-30) {
        std::fill_n(numbers, count, Approximate{finite ? 0 : NAN, 0});
        return;
    }
    // How far the library's scale may be off, and, in steps, a number: also because of its computation in float32.
    const double off = range / 255 + 4 * ROUNDING * scale, least = std::max(scale - off, 1e-30);
    const auto shift = [&](double value, double error) {
        return (error + std::abs(value / scale) * off) / least + 4 * 256 * ROUNDING;
    };
    const double zero = std::nearbyint(-low / scale), shift_of_zero = shift(low, std::max(low - lowest, low_most - low));
    // If the zero may be another one, the ends of the range are.
    const double ends = steps_within(-low / scale, shift_of_zero) > 0 ? shift_of_zero : 0;
    for (int64_t i = 0; i < count; i++) {
        const auto [value, error] = numbers[i];
        const double steps = std::min(std::max(std::nearbyint(value / scale + zero), 0.0), 255.0) - zero;
        const double wrong = steps_within(value / scale, shift(value, error) + ends);
        numbers[i] = {steps * scale, std::abs(steps) * off + wrong * (scale + off)};
    }
}

// The types of factors that the library has for this instruction set, one of them at random.
int32_t random_type(Random &random) {
    const int32_t types[] = {WK_FLOAT32, WK_BFLOAT16, WK_INT8}, type = types[random.integer(0, 2)];
    return library.why_no_products(type) ? WK_FLOAT32 : type;
}

// Numbers that have one scale in int8: those of the inputs all have it, hidden units by chunks.
int64_t chunk_of(int64_t units) {
    const int64_t chunks = (units + 511) / 512, each = (units + chunks - 1) / chunks;
    return (each + 63) / 64 * 64;
}

// Replaces numbers of a pixel by the factors of a product of that type, with one scale for each `chunk`.
void make_factors(Approximates &numbers, int64_t chunk, int32_t type) {
    const auto count = static_cast<int64_t>(numbers.size());
    for (int64_t i = 0; type == WK_INT8 && i < count; i += chunk) make_int8(numbers.data() + i, std::min(chunk, count - i));
    if (type == WK_BFLOAT16) std::transform(numbers.begin(), numbers.end(), numbers.begin(), in_bfloat16);
}

// The factors that stand for weights, of which each output has a row. In float32 as in the library: a tie would change all pixels.
std::vector<double> weight_factors(const std::vector<float> &weights, int64_t row, int32_t type) {
    std::vector<double> factors(weights.begin(), weights.end());
    if (type == WK_BFLOAT16)
        for (double &value : factors) value = rounded(value, FORMATS[type]);
    for (size_t begin = 0; type == WK_INT8 && begin < weights.size(); begin += static_cast<size_t>(row)) {
        float largest = 0;
        for (int64_t i = 0; i < row; i++) largest = std::max(largest, std::abs(weights[begin + i]));
        const float scale = largest / 127;
        for (int64_t i = 0; i < row; i++)
            factors[begin + i] = scale < 1e-30f ? 0 : std::nearbyint(weights[begin + i] / scale) * double(scale);
    }
    return factors;
}

// bias + row · factors. In int8, sums within a chunk are exact, and then rounded a few times.
Approximate product(const double *row, const Approximates &factors, int64_t chunk, double bias, int32_t type) {
    double sum = 0, propagated = 0, size = 0, chunks = 0;
    const auto count = static_cast<int64_t>(factors.size());
    for (int64_t begin = 0; begin < count; begin += chunk, chunks++) {
        double part = 0;
        for (int64_t i = begin; i < std::min(begin + chunk, count); i++) {
            const Approximate &factor = factors[static_cast<size_t>(i)];
            const double term = row[i] * factor.value;
            part += term, propagated += std::abs(row[i]) * factor.error;
            if (type != WK_INT8) size += std::abs(term);
        }
        sum += part;
        if (type == WK_INT8) size += std::abs(part);
    }
    const double limit = type == WK_INT8 ? (4 + chunks) * ROUNDING : SUM_LIMIT;
    return settled(sum + bias, propagated * (1 + 1e-6) + limit * (size + std::abs(bias)));
}

void compare(Judge &judge, const std::vector<double> &got, const Approximates &want, int32_t type, const std::string &problem) {
    for (size_t i = 0; i < want.size(); i++)
        if (!std::isinf(want[i].error)) judge.check(i, got[i], want[i].value, want[i].error, type == WK_FLOAT32, problem);
}

}  // namespace
