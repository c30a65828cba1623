// Kernels that are applied to some channels of an image only: these are copied side by side, and the others go to the result.
#pragma once

#include "engine.hpp"

namespace wk {
namespace WK_NAMESPACE {

// One call. All pixels are cut into pieces, which are independent of each other.
class Partial {
  public:
    explicit Partial(const wk_sum &call)
        : call_(call), pixels_(int64_t{call.height} * call.width), pitch_(ceil_div(call.channels, LANES) * LANES) {
        if (!call.partial) return;
        const int64_t all = call.images * pixels_;
        pieces_ = most(1, least(all, all * call.partial->inputs / PIECE_NUMBERS));
    }

    int64_t pieces() const { return pieces_; }

    void carve(Carver &carver) {
        if (!pieces_) return;
        runs_ = carver.take<Run>(call_.channels);
        gathered_ = carver.take<float>(call_.images * pixels_ * pitch_);
    }

    // Neighboring channels that stay neighbors are copied together.
    void find_runs() {
        if (!pieces_) return;
        const int32_t *selected = call_.partial->selected;
        count_ = 0;
        for (int32_t i = 0; i < call_.channels; i++) {
            const bool continues = count_ > 0 && runs_[count_ - 1].length < LANES && selected[i] == selected[i - 1] + 1;
            if (continues)
                runs_[count_ - 1].length++;
            else
                runs_[count_++] = {selected[i], i, 1};
        }
    }

    // The image that the kernels are applied to.
    wk_tensor image() const {
        if (!pieces_) return call_.x;
        return {gathered_, pixels_ * pitch_, 1, call_.width * pitch_, pitch_};
    }

    void copy(int64_t piece) const {
        const int64_t all = call_.images * pixels_, end = all * (piece + 1) / pieces_;
        for (int64_t i = all * piece / pieces_; i < end; i++) {
            const int64_t image = i / pixels_, row = i % pixels_ / call_.width, column = i % call_.width;
            gather(at(call_.x, image, row, column), gathered_ + i * pitch_);
            pass(at(call_.x, image, row, column), at(call_.y, image, row, column) + call_.channels);
        }
    }

  private:
    // Channels `from`, ... of x become channels `to`, ... of the image.
    struct Run {
        int32_t from, to, length;
    };
    static constexpr int64_t PIECE_NUMBERS = 1 << 14;

    static float *at(const wk_tensor &t, int64_t image, int64_t row, int64_t column) {
        return static_cast<float *>(t.data) + image * t.image + row * t.row + column * t.column;
    }

    // Whole vectors, as far as they lie within a pixel. The numbers behind a run are replaced by those of the next one.
    void gather(const float *x, float *y) const {
        for (int64_t r = 0; r < count_; r++) {
            const Run &run = runs_[r];
            if (run.from + LANES <= call_.partial->inputs && run.to + LANES <= pitch_)
                Float32::store(y + run.to, Float32::load(x + run.from));
            else
                for (int32_t i = 0; i < run.length; i++) y[run.to + i] = x[run.from + i];
        }
    }

    void pass(const float *x, float *y) const {
        const wk_partial &p = *call_.partial;
        for (int32_t i = 0; i < p.others; i++) y[i] = x[p.other[i]] * p.scale[i] + p.shift[i];
    }

    const wk_sum &call_;
    const int64_t pixels_, pitch_;
    int64_t pieces_ = 0, count_ = 0;
    Run *runs_ = nullptr;
    float *gathered_ = nullptr;
};

}  // namespace WK_NAMESPACE
}  // namespace wk
