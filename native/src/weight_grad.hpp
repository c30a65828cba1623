// depthwise_weight_grad: the output's gradient slides over the input, and the output is the kernel.
#pragma once

#include "engine.hpp"

namespace wk {
namespace WK_NAMESPACE {

// Number of pixels whose products are added up sequentially.
constexpr int64_t LONGEST_SUM = 4096;

// Kernels of one call share the packed input.
class WeightGrad {
  public:
    explicit WeightGrad(const wk_weight_grad &call) : call_(call), blocks_(ceil_div(call.channels, LANES)) {
        bool any_hybrid = false, any_direct = false;
        for (int64_t k = 0; k < call.kernels; k++) {
            const wk_pass &pass = call.kernel[k].pass;
            steps_[k] = Step::of(pass);
            (steps_[k].hybrid ? any_hybrid : any_direct) = true;
            above_ = most(above_, Step::above(pass)), below_ = most(below_, Step::below(pass));
            margin_ = most(margin_, steps_[k].margin());
        }
        // With enough blocks, there is one sum over all images; otherwise every chunk has its own sum.
        const bool adjoin = call.x.channel == 1 && call.grad.channel == 1;
        together_ = blocks_together(adjoin, true, blocks_, call.images, call.threads);
        groups_ = ceil_div(blocks_, together_);
        bands_ = bands_for(groups_ * call.images, call.threads, call.height, 2 * together_ * (call.width + 1 + 2 * margin_),
                           any_hybrid);
        if (any_direct) bands_ = least(call.height, most(bands_, ceil_div(int64_t{call.height} * call.width, LONGEST_SUM)));
        const int64_t items = call.images * bands_;
        chunks_ = call.threads > 1 && groups_ < 4 * call.threads ? least(items, ceil_div(4 * call.threads, groups_)) : 1;
        outputs_ = {ceil_div(call.height, bands_), call.width};
        inputs_ = bands_ == 1 ? outputs_ : Extent{least(call.height, outputs_.rows + above_ + below_), call.width};
        for (int64_t k = 0; k < call.kernels; k++) room_ = most(room_, prepare(steps_[k]));
    }

    bool possible() const {
        for (int64_t k = 0; k < call_.kernels; k++)
            if (steps_[k].hybrid && steps_[k].tiling.length > LONGEST_TRANSFORM) return false;
        return true;
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
        for (int64_t k = 0; k < call_.kernels; k++)
            if (steps_[k].hybrid) steps_[k].tables = Tables::make(steps_[k].tiling, true, tables_[k]);
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

    // Fill in what depends on the bands, and return the working memory that the step needs.
    int64_t prepare(Step &step) {
        int64_t room = step.taps.area();
        step.packed_block = step.taps.area();
        if (step.hybrid) {
            const Extent out = step.seen(outputs_), in = step.seen(inputs_);
            step.tiling = best_tiling(out.columns, in.columns, step.taps.columns, step.anchor.columns, out.rows, step.taps.rows);
            const int64_t frequencies = step.tiling.frequencies();
            step.packed_block = 2 * frequencies * step.spectrum_column();
            room = most(room, frequencies * (2 * (in.rows | 1) + 3 * (out.rows | 1))) +
                   folding_room(step.tiling.length, step.tiling.longest_reach());
        }
        sums_before_[&step - steps_] = sums_room_;
        sums_room_ += step.packed_block;
        return room;
    }

    Own carve_own(Carver &carver) {
        Own own;
        own.x = carver.take<Vec>(together_ * Padded(inputs_, margin_).room());
        own.grad = carver.take<Vec>(together_ * outputs_.area());
        own.sums = carver.take<Vec>(chunks_ == 1 ? together_ * sums_room_ : 0);
        own.room = carver.take<Vec>(most(room_, 1));
        return own;
    }

    void carve_shared(Carver &carver) {
        done_ = carver.take<int32_t>(groups_);
        for (int64_t k = 0; k < call_.kernels; k++)
            tables_[k] = steps_[k].hybrid ? carver.take<float>(Tables::room(steps_[k].tiling)) : nullptr;
        shared_sums_ = carver.take<Vec>(chunks_ == 1 ? 0 : blocks_ * chunks_ * sums_room_);
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
        // The sums of all kernels of a block lie one after another.
        Vec *sums[MOST_TOGETHER];
        for (int64_t b = 0; b < blocks; b++) {
            sums[b] = chunks_ == 1 ? own.sums + b * sums_room_ : sums_of(first + b, chunk);
            clear(sums[b], sums_room_);
        }
        for (int64_t item = first_item(chunk); item < end; item++) add<Type>(own, sums, first, blocks, item);
        if (chunks_ == 1) {
            for (int64_t b = 0; b < blocks; b++) put(first + b, sums[b], own.room);
        } else if (__atomic_add_fetch(&done_[group], 1, __ATOMIC_ACQ_REL) == chunks_) {
            // The thread that finishes last adds up all sums, in the order of the chunks.
            for (int64_t b = 0; b < blocks; b++) join(first + b, own.room);
        }
    }

    Vec *sums_of(int64_t block, int64_t chunk) const { return shared_sums_ + (block * chunks_ + chunk) * sums_room_; }

    template <class Type> Block<Type> input(int64_t block, int64_t item) const {
        return block_of<Type>(call_.x, item / bands_, block * LANES, band_of(item).from, call_.channels);
    }
    template <class Type> Block<Type> gradient(int64_t kernel, int64_t block, int64_t item) const {
        wk_tensor grad = call_.grad;
        grad.data = const_cast<void *>(call_.kernel[kernel].grad);
        return block_of<Type>(grad, item / bands_, block * LANES, band_of(item).begin, call_.channels);
    }

    template <class Type>
    void add(const Own &own, Vec *const *sums, int64_t first, int64_t blocks, int64_t item) const {
        const Band band = band_of(item);
        const Padded padded(band.inputs, margin_);
        const int last = lanes_of(first + blocks - 1, call_.channels);
        Plane x[MOST_TOGETHER], grad[MOST_TOGETHER];
        for (int64_t b = 0; b < blocks; b++) x[b] = padded.plane(own.x + b * padded.room());
        pack_blocks<Type>(x, blocks, input<Type>(first, item), last, band.inputs);
        for (int64_t k = 0; k < call_.kernels; k++) {
            const Step &step = steps_[k];
            for (int64_t b = 0; b < blocks; b++) {
                // The window's taps are adjacent along the axis that it slides along.
                Vec *at = own.grad + b * band.outputs.area();
                grad[b] = step.turned ? Plane{at, 1, band.outputs.rows} : Plane{at, call_.width, 1};
            }
            pack_blocks<Type>(grad, blocks, gradient<Type>(k, first, item), last, band.outputs);
            for (int64_t b = 0; b < blocks; b++) correlate(step, sums[b] + sums_before_[k], x[b], grad[b], band, own.room);
        }
    }

    void correlate(const Step &step, Vec *sums, Plane x, Plane grad, const Band &band, Vec *room) const {
        Extent anchor = step.anchor;
        (step.turned ? anchor.columns : anchor.rows) -= band.shift();
        const Extent window = step.seen(band.outputs), inputs = step.seen(band.inputs);
        if (step.hybrid)
            hybrid_weight_grad({sums, step.spectrum_column(), 2}, step.taps.rows, step.seen(grad), window, step.seen(x), inputs,
                               anchor.rows, step.turned ? band.shift() : 0, step.tiling, step.tables, room);
        else if (step.dilated())
            step.dilated_from(band.shift()).weight_grad(sums, grad.at, window, x, inputs);
        else
            add_direct(step, sums, step.seen(x), inputs, grad.at, window, anchor, room);
    }

    // Adding numbers one by one to a growing sum loses precision; adding up the sums of short pieces keeps the error small.
    void add_direct(const Step &step, Vec *sums, const Field &x, Extent size, const Vec *grad, Extent window, Extent anchor,
                    Vec *piece) const {
        Direct{Plane{piece, step.taps.columns, 1}, step.taps, x, size, grad, window, anchor, false, true, {}}.run();
        for (int64_t tap = 0; tap < step.taps.area(); tap++) sums[tap] += piece[tap];
    }

    Band band_of(int64_t item) const { return Band::of(item % bands_, bands_, call_.height, call_.width, above_, below_); }

    // Add the sums of all chunks of a block, in their order, and write them.
    void join(int64_t block, Vec *room) const {
        Vec *sums = sums_of(block, 0);
        for (int64_t chunk = 1; chunk < chunks_; chunk++) {
            const Vec *more = sums_of(block, chunk);
            for (int64_t i = 0; i < sums_room_; i++) sums[i] += more[i];
        }
        put(block, sums, room);
    }

    void put(int64_t block, Vec *sums, Vec *room) const {
        for (int64_t k = 0; k < call_.kernels; k++) put(steps_[k], call_.kernel[k], block, sums + sums_before_[k], room);
    }

    void put(const Step &step, const wk_tap_grad &whole, int64_t block, Vec *sums, Vec *room) const {
        Vec *kernel = sums;
        if (step.hybrid) {
            kernel = room;
            synthesize<false>(step.tables.output, {sums, step.spectrum_column(), 2}, step.taps.rows,
                              {kernel + step.anchor.columns, step.taps.columns, 1}, step.anchor.columns,
                              step.taps.columns - 1 - step.anchor.columns, kernel + step.taps.area());
        }
        const wk_pass &pass = whole.pass;
        const int64_t channel = block * LANES, area = int64_t{whole.rows} * whole.columns, apart = whole.dilation / pass.dilation;
        const int count = lanes_of(block, call_.channels);
        // The first tap of the kernel in the pass, its place there, and the number of taps.
        const int64_t row = whole.row - pass.row / apart, column = whole.column - pass.column / apart;
        const int64_t down = pass.row % apart, right = pass.column % apart;
        const int64_t rows = ceil_div(pass.rows - down, apart), columns = ceil_div(pass.columns - right, apart);
        float *to = whole.taps + channel * area;
        if (rows != whole.rows || columns != whole.columns)
            for (int64_t i = 0; i < count * area; i++) to[i] = 0;
        const Plane from = step.seen(Plane{kernel, step.taps.columns, 1}).from(down, right);
        unpack<Float32>(Block<Float32>{to + row * whole.columns + column, area, whole.columns, 1, count},
                        {from.at, from.row * apart, from.column * apart}, rows, columns, [](Vec v) { return v; });
    }

    const wk_weight_grad &call_;
    const int64_t blocks_;
    Step steps_[WK_MOST_PASSES];
    int64_t sums_before_[WK_MOST_PASSES], sums_room_ = 0;  // where the sums of a kernel lie in those of a block
    int64_t above_ = 0, below_ = 0, margin_ = MARGIN, together_ = 1, groups_ = 1, bands_ = 1, chunks_ = 1;
    int64_t room_ = 0, own_bytes_ = 0;
    int out_of_memory_ = 0;
    Extent outputs_, inputs_;
    float *tables_[WK_MOST_PASSES];
    Vec *shared_sums_ = nullptr;
    int32_t *done_ = nullptr;  // for each group, the number of chunks that have been added up
};

}  // namespace WK_NAMESPACE
}  // namespace wk
