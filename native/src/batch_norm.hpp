// Batch norm in training, forward and backward. A task computes some channels from the statistics to the results, so that the second
// reading of a map comes from the cache.
#pragma once

#include "stack.hpp"
#include "threads.hpp"

namespace wk {
namespace WK_NAMESPACE {

// Vectors of adjacent channels that are read together: a few cache lines of every pixel.
constexpr int64_t MOST_VECTORS = 4;
// Numbers that are added one by one. Adding up the sums of short pieces keeps the error small.
constexpr int64_t SHORT_SUM = 64;
// Numbers of adjacent channels that a task computes one after the other, at least: more, smaller tasks would make the threads write to
// neighboring cache lines.
constexpr int64_t NUMBERS_OF_A_TASK = 1 << 14;
// Pixels to fetch in advance.
constexpr int64_t AHEAD = 12;

WK_INLINE Vec load_lanes(const float *at, int count) { return count == LANES ? Float32::load(at) : load_some<Float32>(at, count); }
WK_INLINE void store_lanes(float *at, const Vec &value, int count) {
    if (count == LANES)
        Float32::store(at, value);
    else
        store_some<Float32>(at, value, count);
}

// One call. If the channels of a pixel are adjacent, lanes are channels; otherwise they are pixels of the same channel, and added up in
// the end.
class BatchNorm {
  public:
    explicit BatchNorm(const wk_batch_norm &call)
        : call_(call), adjoin_(call.x.channel == 1 && call.channels > 1),
          pixels_(int64_t{call.images} * call.height * call.width), plane_(int64_t{call.height} * call.width) {
        const int64_t vectors = adjoin_ ? ceil_div(call.channels, LANES) : call.channels;
        together_ = adjoin_ ? MOST_VECTORS : ceil_div(NUMBERS_OF_A_TASK, pixels_);
        while (together_ > 1 && ceil_div(vectors, together_) < 2 * call.threads) together_ /= 2;
        vectors_ = vectors, tasks_ = ceil_div(vectors, together_);
        threads_ = pixels_ * call.channels < WORTH_SHARING ? 1 : call.threads;
    }

    int32_t run() {
        parallel(threads_, tasks_, [](void *self, int64_t task) { static_cast<BatchNorm *>(self)->compute(task); }, this);
        return WK_OK;
    }

  private:
    static constexpr int64_t WORTH_SHARING = 1 << 16;

    void compute(int64_t task) const {
        for (int64_t v = task * together_, end = least(v + together_, vectors_); v < end;) {
            if (!adjoin_) {
                call_.backward ? plane_grad(v) : plane_norm(v);
                v++;
                continue;
            }
            const bool whole = (end * LANES <= call_.channels);
            const int64_t full = whole ? end - v : end - 1 - v;
            if (full >= 4)
                channels<4, true>(v), v += 4;
            else if (full >= 2)
                channels<2, true>(v), v += 2;
            else if (full == 1)
                channels<1, true>(v), v += 1;
            else
                channels<1, false>(v), v += 1;
        }
    }

    template <int V, bool WHOLE> void channels(int64_t vector) const {
        call_.backward ? channels_grad<V, WHOLE>(vector * LANES) : channels_norm<V, WHOLE>(vector * LANES);
    }

    // Calls f(pixel) for all pixels, and `pause` after at most SHORT_SUM of them.
    template <class F, class Pause> WK_INLINE void in_pieces(F &&f, Pause &&pause) const {
        for (int64_t p = 0; p < pixels_;) {
            const int64_t end = least(p + SHORT_SUM, pixels_);
            for (; p < end; p++) f(p);
            pause();
        }
    }

    Vec per_channel(const float *values, int64_t channel, int count, float missing) const {
        return values ? load_lanes(values + channel, count) : all(missing);
    }

    template <int V, bool WHOLE> void channels_norm(int64_t channel) const {
        const int last = WHOLE ? LANES : static_cast<int>(call_.channels - channel - (V - 1) * LANES);
        const int64_t step = call_.channels;
        const float *x = static_cast<const float *>(call_.x.data) + channel;
        float *y = static_cast<float *>(call_.y.data) + channel;
        auto load = [&](const float *at, auto v) { return WHOLE ? Float32::load(at + v * LANES) : load_some<Float32>(at, last); };
        // Sums of differences from a number near the mean lose nothing to a large mean.
        Vec near[V], sum[V], squares[V], piece[V], square_piece[V];
        unroll<V>([&](auto v) { near[v] = sum[v] = squares[v] = piece[v] = square_piece[v] = Vec{}; });
        const int64_t some = least(SHORT_SUM, pixels_);
        // From the whole map: its first pixels may be a border.
        for (int64_t i = 0; i < some; i++) unroll<V>([&](auto v) { near[v] += load(x + pixels_ * i / some * step, v); });
        unroll<V>([&](auto v) { near[v] *= all(1.0f / static_cast<float>(some)); });
        in_pieces(
            [&](int64_t p) {
                const float *at = x + p * step;
                unroll<V>([&](auto v) {
                    __builtin_prefetch(at + AHEAD * step + v * LANES);
                    const Vec difference = load(at, v) - near[v];
                    piece[v] += difference, square_piece[v] += difference * difference;
                });
            },
            [&] {
                unroll<V>([&](auto v) {
                    sum[v] += piece[v], squares[v] += square_piece[v];
                    piece[v] = square_piece[v] = Vec{};
                });
            });
        Vec factor[V], shift[V];
        unroll<V>([&](auto v) {
            const int64_t at = channel + v * LANES;
            const int count = v == V - 1 ? last : LANES;
            const Vec scale = statistics(sum[v], squares[v], near[v], at, count);
            factor[v] = scale * per_channel(call_.weight, at, count, 1);
            shift[v] = per_channel(call_.bias, at, count, 0) - load_lanes(call_.mean + at, count) * factor[v];
        });
        for (int64_t p = 0; p < pixels_; p++)
            unroll<V>([&](auto v) {
                store_lanes(y + p * step + v * LANES, load(x + p * step, v) * factor[v] + shift[v], WHOLE ? LANES : last);
            });
    }

    // Stores mean and variance, and stores and returns 1 / sqrt(variance + eps).
    Vec statistics(const Vec &sum, const Vec &squares, const Vec &near, int64_t channel, int count) const {
        const Vec each = all(1.0f / static_cast<float>(pixels_)), off = sum * each;
        Vec variance = squares * each - off * off, factor;
        for (int i = 0; i < LANES; i++) {
            if (variance[i] < 0) variance[i] = 0;
            factor[i] = 1.0f / __builtin_sqrtf(variance[i] + call_.eps);
        }
        store_lanes(call_.mean + channel, near + off, count);
        store_lanes(call_.variance + channel, variance, count);
        store_lanes(call_.factor + channel, factor, count);
        return factor;
    }

    template <int V, bool WHOLE> void channels_grad(int64_t channel) const {
        const int last = WHOLE ? LANES : static_cast<int>(call_.channels - channel - (V - 1) * LANES);
        const int64_t step = call_.channels;
        const float *x = static_cast<const float *>(call_.x.data) + channel;
        const float *grad = static_cast<const float *>(call_.grad.data) + channel;
        float *y = static_cast<float *>(call_.y.data) + channel;
        auto load = [&](const float *at, auto v) { return WHOLE ? Float32::load(at + v * LANES) : load_some<Float32>(at, last); };
        Vec mean[V], sum[V], products[V], piece[V], product_piece[V];
        unroll<V>([&](auto v) {
            mean[v] = load_lanes(call_.mean + channel + v * LANES, v == V - 1 ? last : LANES);
            sum[v] = products[v] = piece[v] = product_piece[v] = Vec{};
        });
        in_pieces(
            [&](int64_t p) {
                const float *at = x + p * step, *slope = grad + p * step;
                unroll<V>([&](auto v) {
                    __builtin_prefetch(at + AHEAD * step + v * LANES);
                    __builtin_prefetch(slope + AHEAD * step + v * LANES);
                    const Vec value = load(slope, v);
                    piece[v] += value, product_piece[v] += value * (load(at, v) - mean[v]);
                });
            },
            [&] {
                unroll<V>([&](auto v) {
                    sum[v] += piece[v], products[v] += product_piece[v];
                    piece[v] = product_piece[v] = Vec{};
                });
            });
        Vec of_grad[V], of_x[V], rest[V];
        unroll<V>([&](auto v) {
            const Slopes found = slopes(sum[v], products[v], channel + v * LANES, v == V - 1 ? last : LANES);
            of_grad[v] = found.of_grad, of_x[v] = found.of_x, rest[v] = found.rest;
        });
        for (int64_t p = 0; p < pixels_; p++)
            unroll<V>([&](auto v) {
                const Vec value = load(grad + p * step, v) * of_grad[v] + ((load(x + p * step, v) - mean[v]) * of_x[v] + rest[v]);
                store_lanes(y + p * step + v * LANES, value, WHOLE ? LANES : last);
            });
    }

    // The input gradient is of_grad · grad + of_x · (x - mean) + rest.
    struct Slopes {
        Vec of_grad, of_x, rest;
    };

    // From Σ grad and Σ grad · (x - mean); stores the gradients of bias and weight.
    Slopes slopes(const Vec &sum, const Vec &products, int64_t channel, int count) const {
        const Vec factor = load_lanes(call_.factor + channel, count), each = all(1.0f / static_cast<float>(pixels_));
        const Vec of_grad = factor * per_channel(call_.weight, channel, count, 1);
        if (call_.weight_grad) store_lanes(call_.weight_grad + channel, products * factor, count);
        if (call_.bias_grad) store_lanes(call_.bias_grad + channel, sum, count);
        return {of_grad, Vec{} - of_grad * factor * factor * products * each, Vec{} - of_grad * sum * each};
    }

    // Calls f(place, count) for all pixels of a channel whose columns are adjacent, and `pause` now and then.
    template <class F, class Pause> WK_INLINE void over_planes(int64_t channel, F &&f, Pause &&pause) const {
        for (int64_t n = 0; n < call_.images; n++) {
            const int64_t first = (n * call_.channels + channel) * plane_;
            int64_t i = 0;
            while (i + LANES <= plane_) {
                const int64_t end = least(plane_ - LANES, i + (SHORT_SUM - 1) * LANES);
                for (; i <= end; i += LANES) f(first + i, LANES);
                pause();
            }
            if (i < plane_) f(first + i, static_cast<int>(plane_ - i));
            pause();
        }
    }

    void plane_norm(int64_t channel) const {
        const float *x = static_cast<const float *>(call_.x.data);
        float *y = static_cast<float *>(call_.y.data);
        const int64_t some = least(pixels_, LANES);
        float near = 0;
        for (int64_t i = 0; i < some; i++) {
            const int64_t pixel = pixels_ * i / some;
            near += x[(pixel / plane_ * call_.channels + channel) * plane_ + pixel % plane_] / static_cast<float>(some);
        }
        Vec sum{}, squares{}, piece{}, square_piece{};
        over_planes(
            channel,
            [&](int64_t at, int count) {
                Vec difference = load_lanes(x + at, count) - near;
                if (count < LANES) difference = (Vec)((Bits)difference & lanes_below(count));
                piece += difference, square_piece += difference * difference;
            },
            [&] { sum += piece, squares += square_piece, piece = square_piece = Vec{}; });
        const Vec scale = statistics(all(sum_of_lanes(sum)), all(sum_of_lanes(squares)), all(near), channel, 1);
        const float factor = scale[0] * (call_.weight ? call_.weight[channel] : 1);
        const float shift = (call_.bias ? call_.bias[channel] : 0) - call_.mean[channel] * factor;
        over_planes(
            channel, [&](int64_t at, int count) { store_lanes(y + at, load_lanes(x + at, count) * factor + shift, count); }, [] {});
    }

    void plane_grad(int64_t channel) const {
        const float *x = static_cast<const float *>(call_.x.data), *grad = static_cast<const float *>(call_.grad.data);
        float *y = static_cast<float *>(call_.y.data);
        const float mean = call_.mean[channel];
        Vec sum{}, products{}, piece{}, product_piece{};
        over_planes(
            channel,
            [&](int64_t at, int count) {
                const Vec value = load_lanes(grad + at, count);  // missing lanes are zero
                piece += value, product_piece += value * (load_lanes(x + at, count) - mean);
            },
            [&] { sum += piece, products += product_piece, piece = product_piece = Vec{}; });
        const Slopes found = slopes(all(sum_of_lanes(sum)), all(sum_of_lanes(products)), channel, 1);
        const float of_grad = found.of_grad[0], of_x = found.of_x[0], rest = found.rest[0];
        over_planes(
            channel,
            [&](int64_t at, int count) {
                const Vec value = load_lanes(grad + at, count) * of_grad + ((load_lanes(x + at, count) - mean) * of_x + rest);
                store_lanes(y + at, value, count);
            },
            [] {});
    }

    const wk_batch_norm &call_;
    const bool adjoin_;
    const int64_t pixels_, plane_;
    int64_t together_, vectors_, tasks_;
    int32_t threads_;
};

}  // namespace WK_NAMESPACE
}  // namespace wk
