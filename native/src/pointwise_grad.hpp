// The gradients of a pointwise layer's weights and bias, sums over all pixels p:
//
//     weight[o][i] = Σ_p grad[p][o] · x[p][i],  bias[o] = Σ_p grad[p][o]
//
// Tiles of the weights stay in registers while a few hundred pixels are added, which have been copied into panels before.
#pragma once

#include "stack.hpp"
#include "threads.hpp"
#include "workspace.hpp"

namespace wk {
namespace WK_NAMESPACE {

// Pixels that are copied together: a panel of inputs and one of gradients fit into the first-level cache.
constexpr int64_t DEPTH = 256;
// Weights of one task: their panels fit into the second-level cache, and are used often enough to be worth copying.
constexpr int64_t MOST_TILES = 36, MOST_PANELS = 12;
// Room for the sums of pixels that are added separately.
constexpr int64_t MOST_SEPARATE_FLOATS = int64_t{8} << 20;
// Multiplications that take longer than waking a thread.
constexpr int64_t WORTH_WAKING = int64_t{1} << 20;

// Channels [begin, end) of DEPTH pixels in panels of `width` channels: channel c of pixel p is in line p of its panel. The last
// panel has lines of the same length.
struct Panels {
    float *at;
    int64_t begin, end, width;

    static constexpr int64_t room(int64_t width) { return DEPTH * width + LANES; }
    int64_t count() const { return ceil_div(end - begin, width); }
    int64_t first(int64_t panel) const { return begin + panel * width; }
    int64_t channels(int64_t panel) const { return least(width, end - first(panel)); }
    float *panel(int64_t index) const { return at + index * room(width); }
};

// Copies `count` pixels from `first` on; the tensor has `all` channels. Whole vectors are written: those at the end of a line
// reach into the next one, which is written later, and behind the last line is room.
inline void pack_panels(const Panels &to, const Pixels &from, int64_t first, int64_t count, int64_t all) {
    for (int64_t p = 0; p < count;) {
        const float *pixel = from.pixel(first + p);
        const int some = static_cast<int>(least(least(LANES, count - p), from.run_from(first + p)));
        for (int64_t panel = 0; panel < to.count(); panel++)
            for (int64_t c = 0; c < to.channels(panel); c += LANES) {
                const int64_t channel = to.first(panel) + c;
                const float *group = pixel + channel * from.channel;
                float *line = to.panel(panel) + p * to.width + c;
                const int lanes = static_cast<int>(least(LANES, all - channel));
                if (from.channel == 1 && lanes == LANES && some == LANES) {
                    unroll<LANES>([&](auto j) { write(line + j * to.width, Float32::load(group + j * from.column)); });
                    continue;
                }
                if (!from.columns_adjoin()) {
                    for (int j = 0; j < some; j++) write(line + j * to.width, gather(group + j * from.column, from.channel, lanes));
                    continue;
                }
                Vec square[LANES];
                for (int i = 0; i < LANES; i++) square[i] = i < lanes ? gather(group + i * from.channel, 1, some) : Vec{};
                transpose(square);
                for (int j = 0; j < some; j++) write(line + j * to.width, square[j]);
            }
        p += some;
    }
}

// Fetches the pixels that are packed next into the second-level cache, some with each tile. Otherwise packing would wait for memory,
// and products leave it idle.
class PixelFetcher {
  public:
    PixelFetcher(const Pixels &from, int64_t first, int64_t count, int64_t begin, int64_t end, int64_t tiles)
        : at_(from.pixel(first) + begin * from.channel) {
        count = least(count, from.run_from(first));
        const bool columns = from.columns_adjoin();
        pieces_ = columns ? end - begin : count, step_ = columns ? from.channel : from.column;
        lines_ = ceil_div(columns ? count : end - begin, CACHE_LINE) + 1;
        share_ = ceil_div(pieces_ * lines_, tiles);
    }

    void fetch() {
        for (int64_t i = 0; i < share_ && pieces_ > 0; i++) {
            __builtin_prefetch(at_ + line_ * CACHE_LINE, 0, 2);
            if (++line_ < lines_) continue;
            line_ = 0, at_ += step_, pieces_--;
        }
    }

  private:
    const float *at_;
    int64_t pieces_, step_, lines_, share_, line_ = 0;  // contiguous pieces of memory, and their cache lines
};

// A tile of the weights, ROWS outputs × VECTORS vectors of inputs: c = Σ_p grad[p] · x[p] over `pixels` lines of a panel of gradients
// and one of inputs.
template <int ROWS, int VECTORS> void tile_gradient(const float *grad, const float *x, int64_t pixels, Vec *c) {
    Vec sum[ROWS][VECTORS];
    unroll<ROWS>([&](auto m) { unroll<VECTORS>([&](auto v) { sum[m][v] = Vec{}; }); });
    for (; pixels > 0; pixels--, grad += TILE_ROWS, x += PANEL) add_word<ROWS, VECTORS, 1>(sum, grad, x);
    unroll<ROWS>([&](auto m) { unroll<VECTORS>([&](auto v) { c[m * VECTORS + v] = sum[m][v]; }); });
}

typedef void (*TileGradient)(const float *grad, const float *x, int64_t pixels, Vec *c);

// The function for each number of rows (from 1) and vectors.
struct TileGradients {
    TileGradient of[PANEL_VECTORS][TILE_ROWS];
    constexpr TileGradients() : of() {
        unroll<TILE_ROWS>([&](auto m) { unroll<PANEL_VECTORS>([&](auto v) { of[v][m] = tile_gradient<m + 1, v + 1>; }); });
    }
};

inline TileGradient tile_gradient_for(int64_t rows, int64_t vectors) {
    static constexpr TileGradients functions;
    return functions.of[vectors - 1][rows - 1];
}

// One call.
class PointwiseGrad {
  public:
    explicit PointwiseGrad(const wk_pointwise_grad &call)
        : call_(call), x_(call.x, call.images, call.height, call.width), grad_(call.grad, call.images, call.height, call.width),
          pixels_(int64_t{call.images} * call.height * call.width), weights_(int64_t{call.outputs} * call.inputs),
          tiles_(ceil_div(call.outputs, TILE_ROWS)), panels_(ceil_div(call.inputs, PANEL)) {
        down_ = ceil_div(tiles_, MOST_TILES), across_ = ceil_div(panels_, MOST_PANELS);
        threads_ = least(call.threads, 1 + weights_ * pixels_ / WORTH_WAKING);
        // If the parts cannot be shared out evenly, each is computed in several chunks of the pixels.
        const int64_t parts = down_ * across_;
        chunks_ = parts >= 3 * threads_ ? 1 : threads_ / common_divisor(threads_, parts);
        chunks_ = least(chunks_, least(ceil_div(pixels_, DEPTH), 1 + MOST_SEPARATE_FLOATS / separate()));
    }

    int32_t run() {
        Carver carver{shared_memory.at_least(shared_bytes())};
        if (!carver.base) return WK_OUT_OF_MEMORY;
        carve_shared(carver);
        for (int64_t part = 0; part < down_ * across_; part++) done_[part] = 0;
        parallel(static_cast<int32_t>(threads_), down_ * across_ * chunks_,
                 [](void *self, int64_t task) { static_cast<PointwiseGrad *>(self)->compute(task); }, this);
        shared_memory.shrink();
        return __atomic_load_n(&out_of_memory_, __ATOMIC_RELAXED) ? WK_OUT_OF_MEMORY : WK_OK;
    }

  private:
    // Outputs and inputs of a part of the weights.
    struct Part {
        int64_t output, outputs_end, input, inputs_end;
    };
    // Where sums go: the weights, and the bias or null.
    struct Sums {
        float *weight, *bias;
    };

    static int64_t common_divisor(int64_t a, int64_t b) { return b == 0 ? a : common_divisor(b, a % b); }

    int64_t separate() const { return weights_ + call_.outputs; }

    int64_t shared_bytes() {
        Carver carver{nullptr};
        carve_shared(carver);
        return carver.used;
    }

    void carve_shared(Carver &carver) {
        done_ = carver.take<int32_t>(down_ * across_);
        separate_ = carver.take<float>((chunks_ - 1) * separate());
    }

    Part part_of(int64_t index) const {
        const int64_t i = index / across_, j = index % across_;
        return {tiles_ * i / down_ * TILE_ROWS, least(tiles_ * (i + 1) / down_ * TILE_ROWS, call_.outputs),
                panels_ * j / across_ * PANEL, least(panels_ * (j + 1) / across_ * PANEL, call_.inputs)};
    }

    // The first chunk is added up in the caller's memory.
    Sums sums_of(int64_t chunk) const {
        if (chunk == 0) return {call_.weight, call_.bias};
        float *weight = separate_ + (chunk - 1) * separate();
        return {weight, call_.bias ? weight + weights_ : nullptr};
    }

    void compute(int64_t task) {
        const int64_t index = task / chunks_, chunk = task % chunks_;
        const Part part = part_of(index);
        Panels grad{nullptr, part.output, part.outputs_end, TILE_ROWS}, x{nullptr, part.input, part.inputs_end, PANEL};
        const int64_t grad_room = grad.count() * Panels::room(TILE_ROWS), x_room = x.count() * Panels::room(PANEL);
        Carver carver{own_memory.at_least((grad_room + x_room) * int64_t{sizeof(float)} + 2 * ALIGNMENT)};
        if (!carver.base) {
            __atomic_store_n(&out_of_memory_, 1, __ATOMIC_RELAXED);
            return;
        }
        grad.at = carver.take<float>(grad_room), x.at = carver.take<float>(x_room);
        const int64_t begin = pixels_ * chunk / chunks_, count = pixels_ * (chunk + 1) / chunks_ - begin;
        const int64_t pieces = ceil_div(count, DEPTH);
        for (int64_t piece = 0; piece < pieces; piece++) {
            const int64_t first = count * piece / pieces, pixels = count * (piece + 1) / pieces - first;
            pack_panels(grad, grad_, begin + first, pixels, call_.outputs);
            pack_panels(x, x_, begin + first, pixels, call_.inputs);
            const int64_t next = first + pixels, more = count * least(piece + 2, pieces) / pieces - next, tiles = grad.count() * x.count();
            const int64_t at = begin + (more > 0 ? next : first);
            PixelFetcher later[2] = {PixelFetcher(grad_, at, more, grad.begin, grad.end, tiles),
                                     PixelFetcher(x_, at, more, x.begin, x.end, tiles)};
            add(grad, x, pixels, sums_of(chunk), piece > 0, later);
        }
        // The thread that finishes last adds up all chunks, in their order.
        if (chunks_ > 1 && __atomic_add_fetch(&done_[index], 1, __ATOMIC_ACQ_REL) == chunks_) join(part);
    }

    void add(const Panels &grad, const Panels &x, int64_t pixels, const Sums &to, bool on_top, PixelFetcher (&later)[2]) const {
        for (int64_t j = 0; j < x.count(); j++) {
            const int64_t vectors = ceil_div(x.channels(j), LANES);
            const int last = static_cast<int>(x.channels(j) - (vectors - 1) * LANES);
            for (int64_t i = 0; i < grad.count(); i++) {
                float *c = to.weight + grad.first(i) * call_.inputs + x.first(j);
                for (int64_t m = 0; m < grad.channels(i); m++)
                    for (int64_t v = 0; v < PANEL; v += CACHE_LINE) __builtin_prefetch(c + m * call_.inputs + v, 1);
                for (PixelFetcher &pixels_to_come : later) pixels_to_come.fetch();
                Vec tile[TILE_ROWS * PANEL_VECTORS];
                const Vec *sum = tile;
                tile_gradient_for(grad.channels(i), vectors)(grad.panel(i), x.panel(j), pixels, tile);
                for (int64_t m = 0; m < grad.channels(i); m++, c += call_.inputs)
                    for (int64_t v = 0; v < vectors; v++, sum++) {
                        float *at = c + v * LANES;
                        const int some = v == vectors - 1 ? last : LANES;
                        scatter(at, 1, on_top ? gather(at, 1, some) + *sum : *sum, some);
                    }
            }
        }
        if (!to.bias || x.begin > 0) return;
        for (int64_t i = 0; i < grad.count(); i++)
            for (int64_t c = 0; c < grad.channels(i); c += LANES) {
                const float *line = grad.panel(i) + c;
                float *at = to.bias + grad.first(i) + c;
                const int some = static_cast<int>(least(LANES, grad.channels(i) - c));
                Vec sum = on_top ? gather(at, 1, some) : Vec{};
                Vec piece{};
                for (int64_t p = 0; p < pixels; p++) piece += read<Vec>(line + p * TILE_ROWS);
                scatter(at, 1, sum + piece, some);
            }
    }

    void join(const Part &part) const {
        for (int64_t chunk = 1; chunk < chunks_; chunk++) {
            const Sums more = sums_of(chunk);
            for (int64_t o = part.output; o < part.outputs_end; o++) {
                const int64_t row = o * call_.inputs;
                for (int64_t i = part.input; i < part.inputs_end; i++) call_.weight[row + i] += more.weight[row + i];
                if (call_.bias && part.input == 0) call_.bias[o] += more.bias[o];
            }
        }
    }

    const wk_pointwise_grad &call_;
    const Pixels x_, grad_;
    const int64_t pixels_, weights_, tiles_, panels_;
    int64_t down_, across_, chunks_, threads_;  // parts of the weights, chunks of the pixels
    int32_t *done_ = nullptr;                   // for each part, the number of chunks that have been added up
    float *separate_ = nullptr;                 // the sums of all chunks but the first
    int out_of_memory_ = 0;
};

}  // namespace WK_NAMESPACE
}  // namespace wk
