// depthwise_sum: the forward pass and, with flipped kernels, the input gradient; also of several branches that share an input or
// an output, which is then packed or unpacked once; or of some channels, while the others are passed on.
#pragma once

#include "partial.hpp"
#include "phases.hpp"
#include "rolling.hpp"

#include <sched.h>

namespace wk {
namespace WK_NAMESPACE {

constexpr int64_t MOST_PASSES = WK_MOST_PASSES;

class Sum {
  public:
    explicit Sum(const wk_sum &call)
        : call_(call), blocks_(ceil_div(call.channels, LANES)), partial_(call), x_(partial_.image()) {
        int64_t taps = 0;
        for (int64_t i = 0; i < call.passes; i++) {
            steps_[i] = Step::of(call.pass[i]);
            any_hybrid_ |= steps_[i].hybrid, any_dilated_ |= steps_[i].dilated();
            above_ = most(above_, Step::above(call.pass[i])), below_ = most(below_, Step::below(call.pass[i]));
            margin_ = most(margin_, steps_[i].margin());
            taps += steps_[i].taps.area();
        }
        const bool adjoin = x_.channel == 1 && call.y.channel == 1, alone = call.inputs == 1 && call.outputs == 1;
        const int64_t numbers = int64_t{call.images} * call.channels * call.height * call.width;
        if (alone && call.passes == 1 && call.pass[0].method == WK_DIRECT && call.pass[0].dilation == 1) {
            const wk_pass &pass = call.pass[0];
            const bool pixels = x_.column == 1 && call.y.column == 1 && !(adjoin && call.channels > 1);
            const bool whole = adjoin && !pixels && call.dtype == WK_FLOAT32 && call.channels >= LANES;
            constexpr int64_t bytes = sizeof(float);
            const Distances apart = whole ? Distances{absolute(x_.column) * bytes, absolute(x_.row) * bytes} : Distances{};
            rolling_ = {{pass.rows, pass.columns}, {pass.row, pass.column}, {call.height, call.width}, pixels, apart};
            rolls_ = (adjoin || rolling_.pixels) && rolling_.pays(numbers);
        }
        if (rolls_) {
            steps_[0].turned = false, steps_[0].taps = rolling_.taps, steps_[0].anchor = rolling_.anchor;
            together_ = rolling_.together(blocks_, call.images, call.threads);
            groups_ = ceil_div(blocks_, together_);
            bands_ = bands_for(call.images * groups_, call.threads, call.height, 0, false);
            stream_ = call.dtype == WK_FLOAT32 && call.channels % LANES == 0 && is_aligned(call.y, rolling_.pixels) &&
                      (!rolling_.pixels || call.width % LANES == 0) && numbers >= STREAMED_NUMBERS;
            return;
        }
        in_place_ = adjoin && alone && call.dtype == WK_FLOAT32 && !any_hybrid_ && !any_dilated_ && !call.relu && taps <= FEW_TAPS;
        // Several images take twice the room in the cache, as transforms do.
        together_ = blocks_together(adjoin, any_hybrid_ || !alone, blocks_, call.images, call.threads);
        groups_ = ceil_div(blocks_, together_);
        spare_ = alone ? 1 : together_;
        bands_ = bands_for(call.images * groups_, call.threads, call.height, (together_ + spare_) * (call.width + 1 + 2 * margin_),
                           any_hybrid_);
        Extent outputs{ceil_div(call.height, bands_), call.width};
        Extent inputs{least(call.height, outputs.rows + above_ + below_), call.width};
        if (bands_ == 1) inputs = outputs;
        for (int64_t i = 0; i < call.passes; i++) {
            Step &s = steps_[i];
            if (!s.hybrid) continue;
            Extent out = s.seen(outputs), in = s.seen(inputs);
            s.tiling = best_tiling(out.columns, in.columns, s.taps.columns, s.anchor.columns, out.rows, s.taps.rows);
            room_ = most(room_, 2 * s.tiling.frequencies() * spectrum_lines(in.rows, s.anchor.rows) +
                                    folding_room(s.tiling.length, s.tiling.longest_reach()));
        }
        outputs_ = outputs, inputs_ = inputs;
    }

    bool possible() const {
        for (int64_t i = 0; i < call_.passes; i++)
            if (steps_[i].hybrid && steps_[i].tiling.length > LONGEST_TRANSFORM) return false;
        return true;
    }

    const char *form() const {
        if (rolls_) return rolling_.in_order ? "in order" : "rolling rows";
        return in_place_ && fills_vectors(0) ? "in place" : "packed";
    }

    int64_t own_bytes() {
        Carver carver{nullptr};
        carve_own(carver);
        return carver.used;
    }

    int64_t shared_bytes() {
        Carver carver{nullptr};
        carve_shared(carver);
        return carver.used;
    }

    int32_t run() {
        Carver carver{shared_memory.at_least(shared_bytes())};
        if (!carver.base) return WK_OUT_OF_MEMORY;
        carve_shared(carver);
        partial_.find_runs();
        x_ = partial_.image();
        for (int64_t i = 0; i < call_.passes; i++)
            if (steps_[i].hybrid)
                steps_[i].tables = Tables::make(steps_[i].tiling, false, tables_[i]);
        own_bytes_ = own_bytes();
        for (int64_t block = 0; block < blocks_; block++) ready_[block] = 0;
        auto task = call_.dtype == WK_FLOAT32    ? &Sum::start<Float32>
                    : call_.dtype == WK_BFLOAT16 ? &Sum::start<BFloat16>
                                                 : &Sum::start<Float16>;
        // Kernels are packed by the first tasks of the same parallel region: waking the threads twice would take too long.
        parallel(call_.threads, blocks_ + partial_.pieces() + call_.images * groups_ * bands_, task, this);
        shared_memory.shrink();
        return __atomic_load_n(&out_of_memory_, __ATOMIC_RELAXED) ? WK_OUT_OF_MEMORY : WK_OK;
    }

  private:
    struct Own {
        Vec *planes, *room;
    };
    struct Place {
        int64_t image, group, band;
    };

    Own carve_own(Carver &carver) {
        Own own;
        const bool packs = !in_place_ || call_.channels % LANES != 0;
        own.planes = carver.take<Vec>(rolls_  ? rolling_.buffered(together_, call_.channels) * rolling_.room()
                                      : packs ? (together_ + spare_) * Padded(inputs_, margin_).room()
                                              : 0);
        int64_t loose = 0;
        for (int64_t i = 0; i < call_.rects; i++) loose = most(loose, int64_t{call_.rect[i].rows} * call_.rect[i].columns);
        own.room = carver.take<Vec>(most(room_, kernel_room() + loose));
        return own;
    }

    void carve_shared(Carver &carver) {
        ready_ = carver.take<int32_t>(blocks_);
        partial_.carve(carver);
        for (int64_t i = 0; i < call_.passes; i++) {
            Step &s = steps_[i];
            s.packed_block = s.hybrid ? 3 * s.tiling.frequencies() * s.spectrum_column() : s.taps.area();
            s.packed = carver.take<Vec>(blocks_ * s.packed_block);
            tables_[i] = s.hybrid ? carver.take<float>(Tables::room(s.tiling)) : nullptr;
        }
    }

    // For assembling one block's kernel of a pass and transforming it.
    int64_t kernel_room() const {
        int64_t room = 0;
        for (int64_t i = 0; i < call_.passes; i++) {
            const Step &s = steps_[i];
            if (s.hybrid) room = most(room, s.taps.area() + folding_room(s.tiling.length, s.tiling.longest_reach()));
        }
        return room;
    }

    // Null if there is no memory; the failure is recorded.
    char *own_block() {
        char *block = own_memory.at_least(own_bytes_);
        if (!block) __atomic_store_n(&out_of_memory_, 1, __ATOMIC_RELAXED);
        return block;
    }

    void pack_kernels(int64_t block) {
        Carver carver{own_block()};
        if (!carver.base) return;
        Vec *room = carve_own(carver).room, *loose = room + kernel_room();
        const int64_t channel = block * LANES;
        for (int64_t i = 0; i < call_.passes; i++) {
            const Step &s = steps_[i];
            Vec *packed = s.packed + block * s.packed_block, *kernel = s.hybrid ? room : packed;
            int64_t members = 0;
            for (int64_t r = 0; r < call_.rects; r++)
                if (call_.rect[r].pass == i) add_kernel(s, call_.pass[i], call_.rect[r], channel, kernel, loose, members++ == 0);
            if (members == 0) clear(kernel, s.taps.area());
            if (call_.scale) {
                const Vec scale = load_some<Float32>(call_.scale + channel, lanes_of(block, call_.channels));
                for (int64_t tap = 0; tap < s.taps.area(); tap++) kernel[tap] *= scale;
            }
            if (s.hybrid)
                analyze<3>(s.tables.window, {kernel + s.anchor.columns, s.taps.columns, 1}, s.taps.rows, s.anchor.columns,
                           s.taps.columns - 1 - s.anchor.columns, {packed, s.spectrum_column(), 3}, 0, room + s.taps.area());
        }
    }

    // Add a kernel to that of its pass, with the anchors aligned, transposed like the pass; the first one replaces the old values.
    void add_kernel(const Step &s, const wk_pass &pass, const wk_rect &rect, int64_t channel, Vec *kernel, Vec *loose,
                    bool first) {
        const int64_t area = int64_t{rect.rows} * rect.columns;
        Block<Float32> taps{const_cast<float *>(rect.taps) + channel * area, area, rect.columns, 1,
                            lanes_of(channel / LANES, call_.channels)};
        const Plane placed = s.seen(Plane{kernel, s.taps.columns, 1});
        if (first && rect.rows == pass.rows && rect.columns == pass.columns && rect.row == pass.row && rect.column == pass.column &&
            rect.dilation == pass.dilation) {
            pack<Float32>(placed, taps, rect.rows, rect.columns);
            return;
        }
        if (first) clear(kernel, s.taps.area());
        pack<Float32>({loose, rect.columns, 1}, taps, rect.rows, rect.columns);
        const int64_t apart = rect.dilation / pass.dilation;
        const int64_t down = pass.row - rect.row * apart, right = pass.column - rect.column * apart;
        for (int64_t u = 0, i = down; u < rect.rows; u++, i += apart)
            for (int64_t v = 0, j = right; v < rect.columns; v++, j += apart)
                if (0 <= i && i < pass.rows && 0 <= j && j < pass.columns) *placed.from(i, j).at += loose[u * rect.columns + v];
    }

    // Bands of one image share rows, and neighboring images share the kernels.
    Place place(int64_t task) const { return {task / bands_ % call_.images, task / bands_ / call_.images, task % bands_}; }

    template <class Type> static void start(void *self, int64_t task) {
        Sum &sum = *static_cast<Sum *>(self);
        if (task >= sum.blocks_ + sum.partial_.pieces()) {
            sum.compute<Type>(task - sum.blocks_ - sum.partial_.pieces());
            return;
        }
        if (task >= sum.blocks_) {
            sum.partial_.copy(task - sum.blocks_);
            __atomic_fetch_add(&sum.copied_, 1, __ATOMIC_RELEASE);
            return;
        }
        sum.pack_kernels(task);
        __atomic_store_n(&sum.ready_[task], 1, __ATOMIC_RELEASE);
    }

    // Whether no block of the group has fewer channels than a vector; only the last group may.
    bool fills_vectors(int64_t group) const { return group < groups_ - 1 || call_.channels % LANES == 0; }

    // With kernels of few rows, bands are whole tiles, except for the last one: the last tile of a band overlaps the one before.
    Band band_at(int64_t index) const {
        return Band::of(index, bands_, call_.height, call_.width, above_, below_, rolls_ ? FEW_HIGH : 1);
    }

    template <class Type> void compute(int64_t task) {
        Carver carver{own_block()};
        if (!carver.base) return;
        Own own = carve_own(carver);
        const Place at = place(task);
        const Band band = band_at(at.band);
        const int64_t first = at.group * together_, blocks = least(together_, blocks_ - first);
        // Tasks start in order, so another thread is already packing these kernels.
        for (int64_t b = 0; b < blocks; b++)
            while (!__atomic_load_n(&ready_[first + b], __ATOMIC_ACQUIRE)) sched_yield();
        wait_for(&copied_, partial_.pieces());
        if (rolls_) {
            roll<Type>(at, band, first, blocks, own.planes);
            return;
        }
        if (in_place_ && fills_vectors(at.group)) {
            compute_in_place(at.image, first, blocks, band);
            return;
        }
        const int64_t room = Padded(inputs_, margin_).room();
        const int last = lanes_of(first + blocks - 1, call_.channels);
        // The inputs lie `spare_` planes behind the outputs: one plane if each output may replace the previous block's input.
        Vec *outputs[MOST_TOGETHER];
        Plane inputs[MOST_TOGETHER];
        for (int64_t b = 0; b < blocks; b++) outputs[b] = own.planes + b * room;
        for (int32_t in = 0; in < call_.inputs; in++) {
            for (int64_t b = 0; b < blocks; b++) inputs[b] = Padded(band.inputs, margin_).plane(own.planes + (b + spare_) * room);
            pack_blocks<Type>(inputs, blocks, input<Type>(at, in), last, band.inputs);
            for (int32_t out = 0; out < call_.outputs; out++) {
                for (int64_t b = 0; b < blocks; b++) {
                    const Plane y{outputs[b], call_.width | 1, 1};
                    bool add = in > 0;
                    for (int64_t i = 0; i < call_.passes; i++) {
                        if (call_.pass[i].input != in || call_.pass[i].output != out) continue;
                        apply(steps_[i], first + b, band, y, inputs[b], add, own.room);
                        add = true;
                    }
                }
                if (in == call_.inputs - 1) put<Type>(output<Type>(at, out), outputs, band.outputs, first, blocks);
            }
        }
    }

    template <class Type> void roll(const Place &at, const Band &band, int64_t first, int64_t blocks, Vec *room) const {
        const Step &s = steps_[0];
        const Block<Type> x = block_of<Type>(x_, at.image, first * LANES, 0, call_.channels);
        const Block<Type> y = block_of<Type>(call_.y, at.image, first * LANES, 0, call_.channels);
        const float *shift = call_.shift ? call_.shift + first * LANES : nullptr;
        RollingTask<Type>{rolling_,
                          x,
                          y,
                          band.begin,
                          band.end,
                          blocks,
                          lanes_of(first + blocks - 1, call_.channels),
                          s.packed + first * s.packed_block,
                          s.packed_block,
                          shift,
                          call_.relu != 0,
                          stream_,
                          room}
            .run();
    }

    // Without packing: the image is read, and the result written, in place.
    void compute_in_place(int64_t image, int64_t first, int64_t blocks, const Band &band) const {
        for (int64_t i = 0; i < call_.passes; i++) {
            const Step &s = steps_[i];
            Direct task[MOST_TOGETHER];
            for (int64_t b = 0; b < blocks; b++) {
                const Block<Float32> from = block_of<Float32>(x_, image, (first + b) * LANES, band.from, call_.channels);
                const Block<Float32> to = block_of<Float32>(call_.y, image, (first + b) * LANES, band.begin, call_.channels);
                const Field x(from.at, from.row, from.column), y(to.at, to.row, to.column);
                const Vec start = call_.shift ? load_some<Float32>(call_.shift + (first + b) * LANES, LANES) : Vec{};
                task[b] = {s.seen(y), s.seen(band.outputs), s.seen(x), s.seen(band.inputs),
                           s.packed + (first + b) * s.packed_block, s.taps, anchor_in(s, band), i > 0, false, start};
            }
            if (call_.width > NARROW_MAP) {
                for (int64_t b = 0; b < blocks; b++) task[b].run();
                continue;
            }
            // Rows over all blocks, as in memory. The rows of a wide map under a kernel would not stay in the cache.
            for (int64_t a = 0; a < task[0].outputs.rows; a += MOST_ROWS)
                for (int64_t b = 0; b < blocks; b++) task[b].rows(a);
        }
    }

    // Where the anchor lies in the rows of a band.
    static Extent anchor_in(const Step &s, const Band &band) {
        Extent anchor = s.anchor;
        (s.turned ? anchor.columns : anchor.rows) -= band.shift();
        return anchor;
    }

    template <class Type> Block<Type> input(const Place &at, int32_t index) const {
        wk_tensor x = x_;
        if (call_.inputs > 1) x.data = const_cast<void *>(call_.xs[index]);
        return block_of<Type>(x, at.image, at.group * together_ * LANES, band_at(at.band).from, call_.channels);
    }
    template <class Type> Block<Type> output(const Place &at, int32_t index) const {
        wk_tensor y = call_.y;
        if (call_.outputs > 1) y.data = call_.ys[index];
        return block_of<Type>(y, at.image, at.group * together_ * LANES, band_at(at.band).begin, call_.channels);
    }
    void apply(const Step &s, int64_t block, const Band &band, Plane y, Plane x, bool add, Vec *room) {
        const Extent anchor = anchor_in(s, band);
        const Vec *packed = s.packed + block * s.packed_block;
        const Extent outputs = s.seen(band.outputs), inputs = s.seen(band.inputs);
        if (s.dilated()) {
            s.dilated_from(band.shift()).sum(y, outputs, x, inputs, packed, add);
            return;
        }
        if (!s.hybrid) {
            Direct{s.seen(y), outputs, s.seen(x), inputs, packed, s.taps, anchor, add, true, {}, WK_REGISTERS >= 32}.run();
            return;
        }
        const Spectrum window{const_cast<Vec *>(packed), s.spectrum_column(), 3};
        auto run = add ? hybrid_sum<true> : hybrid_sum<false>;
        // Rows that only other passes need, which look further up.
        const int64_t unseen = most(0, -anchor.rows);
        run(s.seen(y), outputs, s.seen(x).from(unseen, 0), {inputs.rows - unseen, inputs.columns}, window, s.taps.rows,
            anchor.rows + unseen, s.turned ? band.shift() : 0, s.tiling, s.tables, room);
    }

    template <class Type>
    void put(const Block<Type> &to, Vec *const *planes, const Extent &extent, int64_t first, int64_t blocks) const {
        Vec shift[MOST_TOGETHER];
        for (int64_t b = 0; b < blocks; b++) {
            const int count = lanes_of(first + b, call_.channels);
            shift[b] = call_.shift ? load_some<Float32>(call_.shift + (first + b) * LANES, count) : Vec{};
        }
        auto write = [&](auto &&finish) {
            const int64_t row = call_.width | 1;
            if (blocks == 1)
                unpack<Type>(to, {planes[0], row, 1}, extent.rows, extent.columns, [&](Vec v) { return finish(v, 0); });
            else
                unpack_together<Type>(to, blocks, lanes_of(first + blocks - 1, call_.channels), planes, row, extent.rows,
                                      extent.columns, finish);
        };
        if (call_.relu)
            // Written so that NaN stays NaN.
            write([&](Vec v, int64_t b) {
                v += shift[b];
                return v < Vec{} ? Vec{} : v;
            });
        else if (call_.shift)
            write([&](Vec v, int64_t b) { return v + shift[b]; });
        else
            write([](Vec v, int64_t) { return v; });
    }

    const wk_sum &call_;
    const int64_t blocks_;
    Partial partial_;
    wk_tensor x_;  // the image that the kernels are applied to
    int64_t above_ = 0, below_ = 0, margin_ = MARGIN, together_ = 1, groups_ = 1, spare_ = 1, bands_ = 1;
    int64_t room_ = 0, own_bytes_ = 0;
    bool any_hybrid_ = false, any_dilated_ = false, in_place_ = false, rolls_ = false, stream_ = false;
    Rolling rolling_;
    int out_of_memory_ = 0;
    Extent outputs_, inputs_;
    Step steps_[MOST_PASSES];
    float *tables_[MOST_PASSES];
    int32_t *ready_ = nullptr;  // for each block, whether its kernels are packed
    int64_t copied_ = 0;        // pieces of the image
};

}  // namespace WK_NAMESPACE
}  // namespace wk
