// y = residual + second · act(first · norm(x · factors) + bias) + bias for every pixel, with weights packed in advance. The first
// product may be one over patches, and a norm may precede the activation if it is the only one.
#pragma once

#include "activation.hpp"
#include "patches.hpp"
#include "phases.hpp"
#include "pointwise_weights.hpp"
#include "stack.hpp"

namespace wk {
namespace WK_NAMESPACE {

// Activations of one task should leave half of a second-level cache of 1 MiB to the weights.
constexpr int64_t CACHED_FLOATS = int64_t{1} << 17;
// The most and fewest pixels of a task. With fewer, loading the weights would take longer than the products.
constexpr int64_t MOST_PIXELS = 112 / TILE_ROWS * TILE_ROWS, FEWEST_PIXELS = ceil_div(28, TILE_ROWS) * TILE_ROWS;
// Activations that threads share if there are few pixels.
constexpr int64_t MOST_SHARED_FLOATS = int64_t{1} << 23;
// Below this number of operations for each thread, waking it would take longer than its share.
constexpr int64_t WORTH_A_THREAD = 4000000;

// Fetches the panel that is needed next while tiles are multiplied with the present one, the same share with each tile. Otherwise
// the first tile would wait for the memory and the others leave it idle.
struct Fetcher {
    const float *next;
    int64_t each, share, tiles;

    Fetcher(const float *panel, int64_t depth, int64_t all_tiles)
        : next(panel), each(ceil_div(UNROLLED * PANEL, least(all_tiles, 8) * CACHE_LINE) * CACHE_LINE),
          share(depth / UNROLLED * each), tiles(ceil_div(UNROLLED * PANEL, each)) {}
    Fetch part(int64_t tile) const { return {next + share * tile, tile < tiles ? each : 0}; }
};

// `pixels` pixels in tiles, with `groups` vectors each.
inline Stack carve_stack(Carver &carver, int64_t pixels, int64_t groups) {
    return {carver.take<Vec>(pixels * groups), pixels, groups, TILE_ROWS};
}

// Activations of several pixels. The inputs are factors of a product, hidden units only if there is a second one, outputs are not.
// `unscaled` are hidden units in float32, from which factors with a scale are made once a chunk is complete.
struct Activations {
    Stack x, hidden, y, unscaled;

    Activations() = default;
    // For `units` hidden units at a time.
    Activations(Carver &carver, const wk_pointwise &packed, int64_t pixels, int64_t units) {
        x = carve_stack(carver, pixels, words_for(packed.inputs) + SCALE_VECTORS);
        hidden = carve_stack(carver, pixels, packed.outputs ? Weights(packed).unit_words(units) : vectors_for(units));
        y = carve_stack(carver, pixels, vectors_for(packed.outputs));
        unscaled = carve_stack(carver, pixels, SCALED && packed.outputs ? vectors_for(units) : 0);
    }

    static int64_t bytes(const wk_pointwise &packed, int64_t pixels, int64_t units) {
        Carver carver{nullptr};
        const Activations sizes(carver, packed, pixels, units);
        return carver.used;
    }
};

// Channels that have yet to be rounded to factors: of LANES inputs, and, without scales, of a panel of hidden units. Nothing for
// float32.
struct Unrounded {
    Vec *x = nullptr;
    Stack hidden{};

    Unrounded() = default;
    Unrounded(Carver &carver, const wk_pointwise &packed, int64_t pixels) {
        if constexpr (WORD > 1) {
            x = carver.take<Vec>(LANES * vectors_for(packed.inputs));
            hidden = carve_stack(carver, pixels, SCALED ? 0 : PANEL_VECTORS);
        }
    }

    static int64_t bytes(const wk_pointwise &packed, int64_t pixels) {
        Carver carver{nullptr};
        const Unrounded sizes(carver, packed, pixels);
        return carver.used;
    }
};

// How pixels are distributed. If there are enough, each task computes some of them from the first product to the last. Otherwise,
// all threads share the activations of all pixels: tasks pack tiles of pixels, compute hidden units, scale those of a tile if need
// be, and compute outputs, in this order. Both ways add in the same order, so the results do not depend on the number of threads.
struct Distribution {
    int32_t threads;
    bool shared;
    int64_t together;  // pixels whose activations exist at the same time

    static int64_t most_together(const Weights &weights) {
        const int64_t cached = CACHED_FLOATS / (weights.of.inputs + weights.units() + weights.of.outputs);
        return most(FEWEST_PIXELS, least(MOST_PIXELS, cached) / TILE_ROWS * TILE_ROWS);
    }
    // With as many pixels as this, no more are needed for each thread to have its own, or they take too much memory.
    static int64_t fewest_apart(const Weights &weights, int32_t threads) {
        const int64_t all = int64_t{weights.of.inputs} + weights.of.hidden + weights.of.outputs;
        return least(threads * FEWEST_PIXELS, most(1, MOST_SHARED_FLOATS / all));
    }

    Distribution(const Weights &weights, int64_t pixels, int32_t most_threads) {
        const double operations = 2.0 * static_cast<double>(pixels) * weights.of.hidden * (weights.of.inputs + weights.of.outputs);
        threads = static_cast<int32_t>(least(most_threads, 1 + static_cast<int64_t>(operations / WORTH_A_THREAD)));
        shared = threads > 1 && pixels < fewest_apart(weights, threads);
        together = pixels;
        if (shared) return;
        int64_t tasks = ceil_div(pixels, most_together(weights));
        if (threads > 1) {
            // At least two tasks for each thread, because threads differ in speed, and the same number. No more of them, because
            // each reads all weights.
            tasks = most(tasks, least(2 * threads, pixels / FEWEST_PIXELS));
            tasks = least(ceil_div(tasks, threads) * threads, pixels);
        }
        together = ceil_div(pixels, tasks);
    }
};

inline void pointwise_workspace(const wk_pointwise &packed, int32_t threads, int64_t &per_thread, int64_t &shared) {
    const Weights weights(packed);
    const int64_t together = Distribution::most_together(weights), apart = Distribution::fewest_apart(weights, threads);
    per_thread = Activations::bytes(packed, together, weights.units()) + Unrounded::bytes(packed, together);
    shared = packed.bytes;
    if (threads == 1) return;
    per_thread = most(per_thread, Unrounded::bytes(packed, apart));
    shared += Activations::bytes(packed, apart, packed.hidden);
}

inline Vec sum_of_squares(const Vec *at, int64_t count) {
    Vec even{}, odd{};
    for (int64_t i = 0; i + 1 < count; i += 2) even += at[i] * at[i], odd += at[i + 1] * at[i + 1];
    return count % 2 ? even + at[count - 1] * at[count - 1] + odd : even + odd;
}

// One call.
class Pointwise {
  public:
    Pointwise(const wk_pointwise &packed, const wk_pointwise_call &call)
        : packed_(packed), weights_(packed), patches_(packed, call), x_(call.x, call.images, call.height, call.width),
          y_(call.y, call.images, call.height, call.width), residual_(call.residual, call.images, call.height, call.width),
          factors_(call.factors), image_pixels_(int64_t{call.height} * call.width), pixels_(call.images * image_pixels_),
          plan_(weights_, pixels_, call.threads),
          own_bytes_(own_bytes(plan_.shared ? 0 : Activations::bytes(packed, plan_.together, weights_.units()), plan_.together)) {
        parts_ = least(weights_.chunks.size / PANEL, ceil_div(4 * plan_.threads, weights_.chunks.count()));
        endings_ = least(panels_for(packed.outputs), 2 * plan_.threads);  // few, because each reads all hidden units
    }

    int32_t run() {
        Phases<Pointwise> phases;
        if (plan_.shared) {
            Carver carver{shared_memory.at_least(Activations::bytes(packed_, pixels_, packed_.hidden))};
            if (!carver.base) return WK_OUT_OF_MEMORY;
            all_ = Activations(carver, packed_, pixels_, packed_.hidden);
            phases.add(all_.x.tiles(), &Pointwise::pack_tile);
            phases.add(weights_.chunks.count() * parts_, &Pointwise::compute_part);
            if (SCALED && packed_.outputs) phases.add(all_.hidden.tiles(), &Pointwise::scale_tile);
            if (packed_.normalize_after)
                phases.add(all_.hidden.tiles(), &Pointwise::normalize_tile);
            else
                phases.add(endings_, &Pointwise::compute_ending);
        } else {
            phases.add(ceil_div(pixels_, plan_.together), &Pointwise::compute);
        }
        phases.run(*this, plan_.threads);
        shared_memory.shrink();
        return outcome();
    }

  protected:
    int32_t outcome() const { return __atomic_load_n(&out_of_memory_, __ATOMIC_RELAXED) ? WK_OUT_OF_MEMORY : WK_OK; }

    // The working memory of a task: its activations, and those of `pixels` pixels that have yet to be rounded. Never 0.
    int64_t own_bytes(int64_t activations, int64_t pixels) const {
        return most(ALIGNMENT, activations + Unrounded::bytes(packed_, pixels));
    }

    // The working memory of a task; null if there is none. Then the task does nothing, because others wait for its end.
    char *own_block() {
        char *block = own_memory.at_least(own_bytes_);
        if (!block) __atomic_store_n(&out_of_memory_, 1, __ATOMIC_RELAXED);
        return block;
    }

    // Some pixels, from the first product to the last.
    void compute(int64_t task) {
        Carver carver{own_block()};
        if (!carver.base) return;
        const int64_t first = task * plan_.together, pixels = least(plan_.together, pixels_ - first);
        const Activations own(carver, packed_, pixels, weights_.units());
        const Unrounded unrounded(carver, packed_, pixels);
        pack(first, own.x, unrounded);
        for (int64_t chunk = 0; chunk < weights_.chunks.count(); chunk++) {
            const int64_t units = weights_.chunks.in(chunk);
            const int64_t group = packed_.normalize_after ? hidden_group(chunk) : 0;
            const float *next = packed_.outputs ? weights_.second(chunk, 0) : next_chunk(chunk);
            hidden_units(own.x, chunk, 0, panels_for(units), scales_units() ? own.unscaled : own.hidden, group, unrounded, next);
            if (scales_units()) scale_units(own.unscaled, 0, chunk, own.hidden, 0);
            if (packed_.outputs)
                add_outputs(own.hidden, 0, chunk, 0, panels_for(packed_.outputs), own.y);
            else if (!packed_.normalize_after)
                unpack_pixels(own.hidden, 0, vectors_for(units), target(weights_.chunks.begin(chunk), units), first, nullptr);
        }
        if (packed_.normalize_after) end_with_norm(own.hidden, first);
        if (packed_.outputs) unpack_pixels(own.y, 0, own.y.groups, target(0, packed_.outputs), first, second_bias());
    }

    // Of all pixels, those of a tile.
    void pack_tile(int64_t task) {
        Carver carver{own_block()};
        if (!carver.base) return;
        pack(all_.x.begin(task), all_.x.only(task), Unrounded(carver, packed_, pixels_));
    }

    // A part of a chunk of hidden units, for all pixels.
    void compute_part(int64_t task) {
        Carver carver{own_block()};
        if (!carver.base) return;
        const auto [chunk, begin, end] = part_of_units(task);
        const int64_t group = scales_units() ? first_vector(chunk) : hidden_group(chunk);
        const Stack &units = scales_units() ? all_.unscaled : all_.hidden;
        hidden_units(all_.x, chunk, begin, end, units, group, Unrounded(carver, packed_, pixels_), after_part(task));
        if (!packed_.outputs && !packed_.normalize_after)
            unpack_pixels(all_.hidden, group + begin * PANEL_VECTORS, least(group + end * PANEL_VECTORS, all_.hidden.groups),
                          target(0, packed_.hidden), 0, nullptr);
    }

    // Panels [begin, end) of a chunk.
    struct Part {
        int64_t chunk, begin, end;
    };
    Part part_of_units(int64_t task) const {
        const int64_t chunk = task / parts_, part = task % parts_, panels = panels_for(weights_.chunks.in(chunk));
        return {chunk, panels * part / parts_, panels * (part + 1) / parts_};
    }

    // The weights that a thread probably needs after a part of the hidden units, because threads take turns.
    const float *after_part(int64_t task) const {
        const int64_t tasks = weights_.chunks.count() * parts_, next = task + plan_.threads;
        if (next < tasks) {
            const Part part = part_of_units(next);
            return weights_.first(part.chunk, 0, part.begin);
        }
        if (!packed_.outputs) return weights_.first(0, 0, 0);
        return weights_.second(0, panels_for(packed_.outputs) * least(next - tasks, endings_ - 1) / endings_);
    }

    // Some of the outputs, for all pixels.
    void compute_ending(int64_t task) {
        const int64_t panels = panels_for(packed_.outputs), begin = panels * task / endings_, end = panels * (task + 1) / endings_;
        for (int64_t chunk = 0; chunk < weights_.chunks.count(); chunk++)
            add_outputs(all_.hidden, hidden_group(chunk), chunk, begin, end, all_.y);
        unpack_pixels(all_.y, begin * PANEL_VECTORS, least(end * PANEL_VECTORS, all_.y.groups), target(0, packed_.outputs), 0,
                      second_bias());
    }

    // The hidden units of a tile, chunk by chunk.
    void scale_tile(int64_t task) {
        for (int64_t chunk = 0; chunk < weights_.chunks.count(); chunk++)
            scale_units(all_.unscaled.only(task), first_vector(chunk), chunk, all_.hidden.only(task), hidden_group(chunk));
    }

    void normalize_tile(int64_t task) { end_with_norm(all_.hidden.only(task), all_.hidden.begin(task)); }

    // Among the hidden units of all chunks, the group with which a chunk begins; and among vectors of units in float32.
    int64_t hidden_group(int64_t chunk) const {
        return packed_.outputs ? weights_.unit_words(weights_.chunks.begin(chunk)) : first_vector(chunk);
    }
    int64_t first_vector(int64_t chunk) const { return weights_.chunks.begin(chunk) / LANES; }
    // Whether hidden units become factors once those of a chunk are complete.
    bool scales_units() const { return SCALED && packed_.outputs; }

    // Makes factors of a chunk of hidden units. It begins with a vector of `from` and a group of `to`.
    void scale_units(const Stack &from, int64_t vector, int64_t chunk, const Stack &to, int64_t group) const {
        for (int64_t t = 0; t < from.tiles(); t++) {
            const int64_t rows = from.rows(t);
            for (int64_t row = 0; row < rows; row++)
                convert(Slot(from.tile(t) + vector * rows + row, rows), vectors_for(weights_.chunks.in(chunk)),
                        Slot(to.tile(t) + group * rows + row, rows));
        }
    }

    void pack(int64_t first, const Stack &to, const Unrounded &unrounded) const {
        const int64_t channels = packed_.channels, vectors = vectors_for(packed_.inputs);
        auto place = [&](int64_t pixel, int j) { return WORD > 1 ? Slot(unrounded.x + j, LANES) : Slot(to, pixel); };
        auto prepare = [&](const Slot &slot, int64_t image) {
            if (factors_) multiply(slot, factors_ + image * channels, channels);
            if (packed_.normalize) normalize(slot, channels, packed_.eps);
        };
        auto finish = [&](const Slot &slot, int64_t pixel) {
            if (WORD > 1) convert(slot, vectors, Slot(to, pixel));
        };
        if (packed_.patch.rows)
            patches_.pack(first, to.count, place, prepare, finish);
        else
            pack_pixels(x_, first, to.count, channels, place, [&](const Slot &slot, int64_t pixel) {
                prepare(slot, (first + pixel) / image_pixels_);
                finish(slot, pixel);
            });
    }

    // Normalizes the hidden units of the pixels from `first` on, applies the activation, and writes them.
    void end_with_norm(const Stack &hidden, int64_t first) const {
        for (int64_t i = 0; i < hidden.count; i++) normalize(Slot(hidden, i), packed_.hidden, packed_.after_eps);
        const Vec *scale = reinterpret_cast<const Vec *>(packed_.after_scale), *shift = reinterpret_cast<const Vec *>(packed_.after_shift);
        for (int64_t t = 0; t < hidden.tiles(); t++) {
            const int64_t rows = hidden.rows(t);
            Vec *units = hidden.tile(t);
            for (int64_t g = 0; g < hidden.groups; g++, units += rows) {
                for (int64_t i = 0; i < rows; i++) units[i] *= scale[g];
                activate(packed_.activation, shift[g], units, rows);
            }
        }
        unpack_pixels(hidden, 0, hidden.groups, target(0, packed_.hidden), first, nullptr);
    }

    // Panels [begin, end) of a chunk; the chunk's first group is `group` of `to`. The sums of the squares of its units over all
    // pixels go to `squares`, if given, which has one vector for each group of `to`; then the units are not rounded. The panel at
    // `after` is fetched at the end.
    void hidden_units(const Stack &x, int64_t chunk, int64_t begin, int64_t end, const Stack &to, int64_t group,
                      const Unrounded &unrounded, const float *after, Vec *squares = nullptr) const {
        const int64_t units = weights_.chunks.in(chunk), blocks = weights_.blocks.count(), steps = blocks * (end - begin);
        const Vec *bias = reinterpret_cast<const Vec *>(packed_.first_bias) + weights_.chunks.begin(chunk) / LANES;
        const int32_t activation = packed_.normalize_after ? int32_t{WK_NO_ACTIVATION} : packed_.activation;
        const bool rounds = WORD > 1 && !SCALED && packed_.outputs && !squares;
        // Sums that are to be rounded have room for one panel only, which all blocks complete before the next panel.
        auto panel_at = [&](int64_t step) { return begin + (rounds ? step / blocks : step % (end - begin)); };
        auto block_at = [&](int64_t step) { return rounds ? step % blocks : step / (end - begin); };
        for (int64_t step = 0; step < steps; step++) {
            const int64_t panel = panel_at(step), block = block_at(step);
            const int64_t vectors = weights_.vectors(panel, units), depth = lines_for(weights_.blocks.in(block));
            const float *next = step + 1 < steps ? weights_.first(chunk, block_at(step + 1), panel_at(step + 1)) : after;
            const Fetcher later(next, depth, x.tiles());
            for (int64_t t = 0; t < x.tiles(); t++) {
                const int64_t rows = x.rows(t);
                Vec *sums = rounds ? unrounded.hidden.tile(t) : to.tile(t) + (group + panel * PANEL_VECTORS) * rows;
                const Vec *a = x.tile(t) + weights_.blocks.begin(block) / GROUP * rows;
                const Vec *scales = x.tile(t) + words_for(packed_.inputs) * rows;
                tile_products(vectors)[rows - 1](reinterpret_cast<const float *>(a), weights_.first(chunk, block, panel), depth,
                                                 scales, sums, block > 0, later.part(t));
                if (block < blocks - 1) continue;
                for (int64_t v = 0; v < vectors; v++) {
                    activate(activation, bias[panel * PANEL_VECTORS + v], sums + v * rows, rows);
                    if (!squares) continue;
                    Vec &square = squares[group + panel * PANEL_VECTORS + v];
                    square = sum_of_squares(sums + v * rows, rows) + (t > 0 ? square : Vec{});
                }
                if (!rounds) continue;
                for (int64_t row = 0; row < rows; row++)
                    convert(Slot(sums + row, rows), vectors, Slot(to.tile(t) + (group + panel) * rows + row, rows));
            }
        }
    }

    // Adds what a chunk, whose first group is `group` of `hidden`, contributes to panels [begin, end) of the outputs.
    void add_outputs(const Stack &hidden, int64_t group, int64_t chunk, int64_t begin, int64_t end, const Stack &y) const {
        const int64_t depth = lines_for(weights_.chunks.in(chunk));
        const int64_t following = (chunk + 1) % weights_.chunks.count();
        const float *next = plan_.shared || packed_.response ? weights_.second(following, begin) : next_chunk(chunk);
        for (int64_t panel = begin; panel < end; panel++) {
            const int64_t vectors = weights_.vectors(panel, packed_.outputs);
            const float *b = weights_.second(chunk, panel);
            const Fetcher later(panel + 1 < end ? b + vectors * LANES * (depth + SCALE_LINES) : next, depth, y.tiles());
            for (int64_t t = 0; t < y.tiles(); t++) {
                const int64_t rows = y.rows(t);
                const Vec *a = hidden.tile(t) + group * rows, *scales = a + words_for(weights_.chunks.in(chunk)) * rows;
                tile_products(vectors)[rows - 1](reinterpret_cast<const float *>(a), b, depth, scales,
                                                 y.tile(t) + panel * PANEL_VECTORS * rows, chunk > 0, later.part(t));
            }
        }
    }

    // Where the next chunk begins; after the last one, a task begins with the first one again.
    const float *next_chunk(int64_t chunk) const { return weights_.first((chunk + 1) % weights_.chunks.count(), 0, 0); }

    const Vec *second_bias() const { return reinterpret_cast<const Vec *>(packed_.second_bias); }
    Target target(int64_t channel, int64_t channels) const { return {y_, residual_, channel, channels}; }

    const wk_pointwise &packed_;
    const Weights weights_;
    const Patches patches_;
    const Pixels x_, y_, residual_;
    const float *const factors_;  // (images, channels), or null
    const int64_t image_pixels_, pixels_;
    const Distribution plan_;
    int64_t own_bytes_;
    int64_t parts_, endings_;  // of a chunk of hidden units, and of the outputs
    Activations all_{};
    int out_of_memory_ = 0;
};

}  // namespace WK_NAMESPACE
}  // namespace wk
