// depthwise_weight_grad: the output's gradient slides over the input, and the output is the kernel.
#pragma once

#include "engine.hpp"

namespace wk {
namespace WK_NAMESPACE {

// Number of pixels whose products are added up sequentially.
constexpr int64_t LONGEST_SUM = 4096;

class WeightGrad {
  public:
    explicit WeightGrad(const wk_weight_grad &call)
        : call_(call), blocks_(ceil_div(call.channels, LANES)), step_(Step::of(call.pass)) {
        above_ = Step::above(call.pass), below_ = Step::below(call.pass);
        // With enough blocks, there is one sum over all images; otherwise every chunk has its own sum.
        const bool adjoin = call.x.channel == 1 && call.grad.channel == 1;
        together_ = blocks_together(adjoin, true, blocks_, call.images, call.threads);
        groups_ = ceil_div(blocks_, together_);
        bands_ = bands_for(groups_ * call.images, call.threads, call.height, 2 * together_ * (call.width + 1 + 2 * step_.margin()),
                           step_.hybrid);
        if (!step_.hybrid) bands_ = least(call.height, most(bands_, ceil_div(int64_t{call.height} * call.width, LONGEST_SUM)));
        const int64_t items = call.images * bands_;
        chunks_ = call.threads > 1 && groups_ < 4 * call.threads ? least(items, ceil_div(4 * call.threads, groups_)) : 1;
        outputs_ = {ceil_div(call.height, bands_), call.width};
        inputs_ = bands_ == 1 ? outputs_ : Extent{least(call.height, outputs_.rows + above_ + below_), call.width};
        if (step_.hybrid) {
            Extent out = step_.seen(outputs_), in = step_.seen(inputs_);
            step_.tiling = best_tiling(out.columns, in.columns, step_.taps.columns, step_.anchor.columns, out.rows, step_.taps.rows);
            const int64_t frequencies = step_.tiling.frequencies();
            step_.packed_block = 2 * frequencies * step_.spectrum_column();
            room_ = frequencies * (2 * (in.rows | 1) + 3 * (out.rows | 1)) +
                    folding_room(step_.tiling.length, step_.tiling.longest_reach());
            room_ = most(room_, step_.taps.area() + folding_room(step_.tiling.length, step_.tiling.longest_reach()));
        } else {
            step_.packed_block = step_.taps.area();
            room_ = step_.taps.area();
        }
    }

    bool possible() const { return !step_.hybrid || step_.tiling.length <= LONGEST_TRANSFORM; }

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
        if (step_.hybrid) step_.tables = Tables::make(step_.tiling, true, tables_);
        for (int64_t group = 0; group < groups_; group++) done_[group] = 0;
        own_bytes_ = own_bytes();
        auto task = call_.dtype == WK_FLOAT32    ? &WeightGrad::start<Float32>
                    : call_.dtype == WK_BFLOAT16 ? &WeightGrad::start<BFloat16>
                                                 : &WeightGrad::start<Float16>;
        parallel(call_.threads, groups_ * chunks_, task, this);
        shared_memory.shrink();
        return __atomic_load_n(&out_of_memory_, __ATOMIC_RELAXED) ? WK_OUT_OF_MEMORY : WK_OK;
    }

  private:
    struct Own {
        Vec *x, *grad, *sums, *room;
    };

    Own carve_own(Carver &carver) {
        Own own;
        own.x = carver.take<Vec>(together_ * Padded(inputs_, step_.margin()).room());
        own.grad = carver.take<Vec>(together_ * outputs_.area());
        own.sums = carver.take<Vec>(chunks_ == 1 ? together_ * step_.packed_block : 0);
        own.room = carver.take<Vec>(most(room_, 1));
        return own;
    }

    void carve_shared(Carver &carver) {
        done_ = carver.take<int32_t>(groups_);
        tables_ = carver.take<float>(step_.hybrid ? Tables::room(step_.tiling) : 1);
        step_.packed = carver.take<Vec>(chunks_ == 1 ? 0 : blocks_ * chunks_ * step_.packed_block);
    }

    char *own_block() {
        char *block = own_memory.at_least(own_bytes_);
        if (!block) __atomic_store_n(&out_of_memory_, 1, __ATOMIC_RELAXED);
        return block;
    }

    template <class Type> static void start(void *self, int64_t task) {
        static_cast<WeightGrad *>(self)->compute<Type>(task);
    }

    int64_t first_item(int64_t chunk) const { return call_.images * bands_ * chunk / chunks_; }

    template <class Type> void compute(int64_t task) {
        Carver carver{own_block()};
        if (!carver.base) return;
        Own own = carve_own(carver);
        const int64_t group = task / chunks_, chunk = task % chunks_, end = first_item(chunk + 1);
        const int64_t first = group * together_, blocks = least(together_, blocks_ - first);
        Vec *sums[MOST_TOGETHER];
        for (int64_t b = 0; b < blocks; b++) {
            sums[b] = chunks_ == 1 ? own.sums + b * step_.packed_block : sums_of(first + b, chunk);
            clear(sums[b], step_.packed_block);
        }
        for (int64_t item = first_item(chunk); item < end; item++) add<Type>(own, sums, first, blocks, item);
        if (chunks_ == 1) {
            for (int64_t b = 0; b < blocks; b++) put(first + b, sums[b], own.room);
        } else if (__atomic_add_fetch(&done_[group], 1, __ATOMIC_ACQ_REL) == chunks_) {
            // The thread that finishes last adds up all sums, in the order of the chunks.
            for (int64_t b = 0; b < blocks; b++) join(first + b, own.room);
        }
    }

    Vec *sums_of(int64_t block, int64_t chunk) const { return step_.packed + (block * chunks_ + chunk) * step_.packed_block; }

    template <class Type> Block<Type> input(int64_t block, int64_t item) const {
        return block_of<Type>(call_.x, item / bands_, block * LANES, band_of(item).from, call_.channels);
    }
    template <class Type> Block<Type> gradient(int64_t block, int64_t item) const {
        return block_of<Type>(call_.grad, item / bands_, block * LANES, band_of(item).begin, call_.channels);
    }

    template <class Type>
    void add(const Own &own, Vec *const *sums, int64_t first, int64_t blocks, int64_t item) const {
        const Band band = band_of(item);
        const Padded padded(band.inputs, step_.margin());
        Plane x[MOST_TOGETHER], grad[MOST_TOGETHER];
        for (int64_t b = 0; b < blocks; b++) {
            x[b] = padded.plane(own.x + b * padded.room());
            // The window's taps are adjacent along the axis that it slides along.
            Vec *at = own.grad + b * band.outputs.area();
            grad[b] = step_.turned ? Plane{at, 1, band.outputs.rows} : Plane{at, call_.width, 1};
        }
        const int last = lanes_of(first + blocks - 1, call_.channels);
        pack_blocks<Type>(x, blocks, input<Type>(first, item), last, band.inputs);
        pack_blocks<Type>(grad, blocks, gradient<Type>(first, item), last, band.outputs);
        for (int64_t b = 0; b < blocks; b++) correlate(sums[b], x[b], grad[b], band, own.room);
    }

    void correlate(Vec *sums, Plane x, Plane grad, const Band &band, Vec *room) const {
        Extent anchor = step_.anchor;
        (step_.turned ? anchor.columns : anchor.rows) -= band.shift();
        const Extent window = step_.seen(band.outputs), inputs = step_.seen(band.inputs);
        if (step_.hybrid)
            hybrid_weight_grad({sums, step_.spectrum_column(), 2}, step_.taps.rows, step_.seen(grad), window, step_.seen(x),
                               inputs, anchor.rows, step_.turned ? band.shift() : 0, step_.tiling, step_.tables, room);
        else if (step_.dilated())
            step_.dilated_from(band.shift()).weight_grad(sums, grad.at, window, x, inputs);
        else
            add_direct(sums, step_.seen(x), inputs, grad.at, window, anchor, room);
    }

    // Adding numbers one by one to a growing sum loses precision; adding up the sums of short pieces keeps the error small.
    void add_direct(Vec *sums, const Field &x, Extent size, const Vec *grad, Extent window, Extent anchor, Vec *piece) const {
        Direct{Plane{piece, step_.taps.columns, 1}, step_.taps, x, size, grad, window, anchor, false, true, {}}.run();
        for (int64_t tap = 0; tap < step_.taps.area(); tap++) sums[tap] += piece[tap];
    }

    Band band_of(int64_t item) const { return Band::of(item % bands_, bands_, call_.height, call_.width, above_, below_); }

    // Add the sums of all chunks of a block, in their order, and write them.
    void join(int64_t block, Vec *room) const {
        Vec *sums = sums_of(block, 0);
        for (int64_t chunk = 1; chunk < chunks_; chunk++) {
            const Vec *more = sums_of(block, chunk);
            for (int64_t i = 0; i < step_.packed_block; i++) sums[i] += more[i];
        }
        put(block, sums, room);
    }

    void put(int64_t block, Vec *sums, Vec *room) const {
        Vec *kernel = sums;
        if (step_.hybrid) {
            kernel = room;
            synthesize<false>(step_.tables.output, {sums, step_.spectrum_column(), 2}, step_.taps.rows,
                              {kernel + step_.anchor.columns, step_.taps.columns, 1}, step_.anchor.columns,
                              step_.taps.columns - 1 - step_.anchor.columns, kernel + step_.taps.area());
        }
        const wk_pass &pass = call_.pass;
        const int64_t channel = block * LANES, area = int64_t{call_.rows} * call_.columns;
        const int count = lanes_of(block, call_.channels);
        // Where the first tap of the kernel lies in the pass, and the number of taps in it.
        const int64_t apart = call_.dilation / pass.dilation, down = pass.row % apart, right = pass.column % apart;
        const int64_t rows = ceil_div(pass.rows - down, apart), columns = ceil_div(pass.columns - right, apart);
        float *to = call_.taps + channel * area;
        if (call_.rows != rows || call_.columns != columns)
            for (int64_t i = 0; i < count * area; i++) to[i] = 0;
        to += (call_.row - pass.row / apart) * call_.columns + (call_.column - pass.column / apart);
        const Plane from = step_.seen(Plane{kernel, step_.taps.columns, 1}).from(down, right);
        unpack<Float32>(Block<Float32>{to, area, call_.columns, 1, count}, {from.at, from.row * apart, from.column * apart}, rows,
                        columns, [](Vec v) { return v; });
    }

    const wk_weight_grad &call_;
    const int64_t blocks_;
    Step step_;
    int64_t above_ = 0, below_ = 0, together_ = 1, groups_ = 1, bands_ = 1, chunks_ = 1, room_ = 0, own_bytes_ = 0;
    int out_of_memory_ = 0;
    Extent outputs_, inputs_;
    float *tables_ = nullptr;
    int32_t *done_ = nullptr;  // for each group, the number of chunks that have been added up
};

}  // namespace WK_NAMESPACE
}  // namespace wk
