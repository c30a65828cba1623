// Storage types, and tensors in memory.
#pragma once

#include "widekernel.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace {

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

}  // namespace
