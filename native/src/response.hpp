// A response norm between the activation and the second product:
//
//     hidden · (1 + weight · size / (mean of all sizes + eps)),
//
// where the size of a channel is its Euclidean norm over the pixels of an image. Hidden units of whole images exist at the same
// time, in float32 whatever the factors of products are. They lie in the order of products, so that a copy, times their factors,
// is the input of the second product.
#pragma once

#include "phases.hpp"
#include "pointwise.hpp"

namespace wk {
namespace WK_NAMESPACE {

// Pixels of a part of an image, over which squares are summed, if there are several parts. Parts do not depend on the number of
// threads, so the results do not either.
constexpr int64_t PART_PIXELS = 56;
// Images are computed together until they have so many pixels: fewer read the weights too often, more fill the cache.
constexpr int64_t PIXELS_TOGETHER = 896;

// The images that are computed together, and how they are cut into parts.
struct Parting {
    int64_t pixels, parts, images;  // pixels of an image, its parts, and images together

    Parting(const wk_pointwise &packed, int64_t pixels_each, int64_t all_images) : pixels(pixels_each), parts(1) {
        if (pixels > PART_PIXELS) parts = ceil_div(ceil_div(pixels, PART_PIXELS), 4) * 4;
        const int64_t cached = MOST_SHARED_FLOATS / (pixels * (int64_t{packed.inputs} + packed.hidden + packed.outputs));
        images = most(1, least(all_images, least(cached, PIXELS_TOGETHER / pixels)));
    }
    int64_t all() const { return images * parts; }
    int64_t begin(int64_t part) const { return pixels * part / parts; }
    int64_t largest() const { return ceil_div(pixels, parts); }
};

// As `pointwise_workspace`, without what grows with the images if there is a response norm.
inline void products_workspace(const wk_pointwise &packed, int32_t threads, int64_t &per_thread, int64_t &shared) {
    pointwise_workspace(packed, threads, per_thread, shared);
    if (!packed.response) return;
    per_thread = Activations::bytes(packed, PART_PIXELS, Weights(packed).chunks.size) + Unrounded::bytes(packed, PART_PIXELS);
    shared = packed.bytes;
}

// What all threads share: the hidden units of some images, the sums of their squares by part, and the factors by image. If parts
// are fewer than threads, also all other activations.
struct Responses {
    Vec *hidden, *squares, *factors, *x, *scaled, *y;

    Responses() = default;
    Responses(Carver &carver, const wk_pointwise &packed, const Parting &parting, bool shared) {
        const int64_t pixels = parting.images * parting.pixels, groups = vectors_for(packed.hidden);
        hidden = carver.take<Vec>(pixels * groups);
        squares = carver.take<Vec>(parting.all() * groups);
        factors = carver.take<Vec>(parting.images * groups);
        x = carver.take<Vec>(shared ? pixels * (words_for(packed.inputs) + SCALE_VECTORS) : 0);
        scaled = carver.take<Vec>(shared ? pixels * Weights(packed).unit_words(packed.hidden) : 0);
        y = carver.take<Vec>(shared ? pixels * vectors_for(packed.outputs) : 0);
    }

    static int64_t bytes(const wk_pointwise &packed, const Parting &parting, bool shared) {
        Carver carver{nullptr};
        const Responses sizes(carver, packed, parting, shared);
        return carver.used;
    }
};

// One call.
class RespondingPointwise : protected Pointwise {
  public:
    RespondingPointwise(const wk_pointwise &packed, const wk_pointwise_call &call)
        : Pointwise(packed, call), parting_(packed, int64_t{call.height} * call.width, call.images), images_(call.images) {
        const int64_t parts = parting_.all(), threads = plan_.threads;
        shared_ = parts < threads || (parts < 4 * threads && parts % threads);
        own_bytes_ = own_bytes(shared_ ? 0 : Activations::bytes(packed, parting_.largest(), weights_.chunks.size), parting_.largest());
    }

    int32_t run() {
        char *block = shared_memory.at_least(Responses::bytes(packed_, parting_, shared_));
        if (!block) return WK_OUT_OF_MEMORY;
        for (first_ = 0; first_ < images_ && outcome() == WK_OK; first_ += parting_.images) {
            parting_.images = least(parting_.images, images_ - first_);
            Carver carver{block};
            memory_ = Responses(carver, packed_, parting_, shared_);
            run_phases();
        }
        shared_memory.shrink();
        return outcome();
    }

  private:
    void run_phases() {
        typedef RespondingPointwise Self;
        const int64_t parts = parting_.all();
        Phases<Self> phases;
        if (shared_) {
            phases.add(parts, &Self::pack_part);
            phases.add(weights_.chunks.count() * parts_, &Self::compute_units);
            phases.add(parting_.images, &Self::respond);
            phases.add(parts, &Self::scale_part);
            phases.add(endings_, &Self::compute_outputs);
        } else {
            phases.add(parts, &Self::first_half);
            phases.add(parting_.images, &Self::respond);
            phases.add(parts, &Self::second_half);
        }
        phases.run(*this, plan_.threads);
    }

    // The pixels of a part within memory for those of all images.
    Stack part_of(Vec *all, int64_t part, int64_t groups) const {
        const int64_t begin = parting_.begin(part % parting_.parts), count = parting_.begin(part % parting_.parts + 1) - begin;
        const int64_t pixel = part / parting_.parts * parting_.pixels + begin;
        return {all + pixel * groups, count, groups, TILE_ROWS};
    }
    Stack hidden_of(int64_t part) const { return part_of(memory_.hidden, part, vectors_for(packed_.hidden)); }
    // Number of a part's first pixel among those of all images of the call.
    int64_t first_pixel(int64_t part) const {
        return (first_ + part / parting_.parts) * parting_.pixels + parting_.begin(part % parting_.parts);
    }
    Vec *squares_of(int64_t part) const { return memory_.squares + part * vectors_for(packed_.hidden); }

    void first_half(int64_t part) {
        Carver carver{own_block()};
        if (!carver.base) return;
        const Stack hidden = hidden_of(part);
        const Activations own(carver, packed_, hidden.count, weights_.chunks.size);
        const Unrounded unrounded(carver, packed_, hidden.count);
        pack(first_pixel(part), own.x, unrounded);
        for (int64_t chunk = 0; chunk < weights_.chunks.count(); chunk++)
            hidden_units(own.x, chunk, 0, panels_for(weights_.chunks.in(chunk)), hidden, first_vector(chunk), unrounded,
                         next_chunk(chunk), squares_of(part));
    }

    // The factors of an image's hidden units, from the sums of their squares.
    void respond(int64_t image) {
        const int64_t groups = vectors_for(packed_.hidden);
        Vec *factors = memory_.factors + image * groups;
        const Vec *weight = reinterpret_cast<const Vec *>(packed_.response);
        Vec total{};
        for (int64_t g = 0; g < groups; g++) {
            Vec sum{};
            for (int64_t part = image * parting_.parts; part < (image + 1) * parting_.parts; part++) sum += squares_of(part)[g];
            for (int i = 0; i < LANES; i++) sum[i] = __builtin_sqrtf(sum[i]);
            factors[g] = sum, total += sum;
        }
        const float mean = sum_of_lanes(total) / static_cast<float>(packed_.hidden);
        const Vec inverse = all(1.0f / (mean + packed_.response_eps));
        for (int64_t g = 0; g < groups; g++) factors[g] = weight[g] * (factors[g] * inverse) + 1.0f;
    }

    // Makes factors of products of a chunk of hidden units, times their factors, in `to`, where they begin with `group`.
    void scale(int64_t part, int64_t chunk, const Stack &to, int64_t group) const {
        const Stack from = hidden_of(part);
        const int64_t begin = first_vector(chunk), count = vectors_for(weights_.chunks.in(chunk));
        const Vec *factors = memory_.factors + part / parting_.parts * from.groups + begin;
        for (int64_t t = 0; t < from.tiles(); t++) {
            const int64_t rows = from.rows(t);
            const Vec *source = from.tile(t) + begin * rows;
            Vec *target = to.tile(t) + group * rows;
            for (int64_t v = 0; SCALED && v < count; v++)
                for (int64_t row = 0; row < rows; row++) from.tile(t)[(begin + v) * rows + row] *= factors[v];
            if (SCALED) continue;
            for (int64_t v = 0; v < count; v += WORD)
                for (int64_t row = 0; row < rows; row++) {
                    Vec scaled[WORD];
                    for (int64_t i = 0; i < WORD; i++)
                        scaled[i] = v + i < count ? source[(v + i) * rows + row] * factors[v + i] : Vec{};
                    target[v / WORD * rows + row] = Rounding().words_of(scaled);
                }
        }
        if (SCALED) scale_units(from, begin, chunk, to, group);
    }

    void second_half(int64_t part) {
        Carver carver{own_block()};
        if (!carver.base) return;
        const Activations own(carver, packed_, hidden_of(part).count, weights_.chunks.size);
        for (int64_t chunk = 0; chunk < weights_.chunks.count(); chunk++) {
            scale(part, chunk, own.hidden, 0);
            add_outputs(own.hidden, 0, chunk, 0, panels_for(packed_.outputs), own.y);
        }
        unpack_pixels(own.y, 0, own.y.groups, target(0, packed_.outputs), first_pixel(part), second_bias());
    }

    Stack shared_x(int64_t part) const { return part_of(memory_.x, part, words_for(packed_.inputs) + SCALE_VECTORS); }
    Stack shared_scaled(int64_t part) const { return part_of(memory_.scaled, part, weights_.unit_words(packed_.hidden)); }

    void pack_part(int64_t part) {
        Carver carver{own_block()};
        if (carver.base) pack(first_pixel(part), shared_x(part), Unrounded(carver, packed_, parting_.largest()));
    }

    void compute_units(int64_t task) {
        const auto [chunk, begin, end] = part_of_units(task);
        for (int64_t p = 0; p < parting_.all(); p++)
            hidden_units(shared_x(p), chunk, begin, end, hidden_of(p), first_vector(chunk), {}, after_part(task), squares_of(p));
    }

    void scale_part(int64_t part) {
        for (int64_t chunk = 0; chunk < weights_.chunks.count(); chunk++) scale(part, chunk, shared_scaled(part), hidden_group(chunk));
    }

    void compute_outputs(int64_t task) {
        const int64_t panels = panels_for(packed_.outputs), begin = panels * task / endings_, end = panels * (task + 1) / endings_;
        for (int64_t part = 0; part < parting_.all(); part++) {
            const Stack y = part_of(memory_.y, part, vectors_for(packed_.outputs));
            for (int64_t chunk = 0; chunk < weights_.chunks.count(); chunk++)
                add_outputs(shared_scaled(part), hidden_group(chunk), chunk, begin, end, y);
            unpack_pixels(y, begin * PANEL_VECTORS, least(end * PANEL_VECTORS, y.groups), target(0, packed_.outputs),
                          first_pixel(part), second_bias());
        }
    }

    Parting parting_;
    const int64_t images_;
    bool shared_;
    int64_t first_ = 0;  // of the images that are computed together
    Responses memory_{};
};

}  // namespace WK_NAMESPACE
}  // namespace wk
