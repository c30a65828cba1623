// Kernels that are applied to some channels of an image only: these are copied side by side, and the others go to the result.
#pragma once

#include "engine.hpp"

namespace wk {
namespace WK_NAMESPACE {

// One call. Where channels are adjacent, pieces consist of pixels; otherwise, of planes. They are independent of each other.
class Partial {
  public:
    explicit Partial(const wk_sum &call)
        : call_(call), pixels_(int64_t{call.height} * call.width), planes_(call.x.channel != 1),
          pitch_(planes_ ? call.channels : ceil_div(call.channels, LANES) * LANES) {
        if (!call.partial) return;
        const int64_t results = call.channels + call.partial->others;
        parts_ = call.images * (planes_ ? results : pixels_);
        pieces_ = most(1, least(parts_, call.images * pixels_ * results / PIECE_NUMBERS));
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
        if (planes_) return {gathered_, pixels_ * pitch_, pixels_, call_.width, 1};
        return {gathered_, pixels_ * pitch_, 1, call_.width * pitch_, pitch_};
    }

    void copy(int64_t piece) const {
        for (int64_t i = parts_ * piece / pieces_; i < parts_ * (piece + 1) / pieces_; i++) planes_ ? copy_plane(i) : copy_pixel(i);
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

    void copy_pixel(int64_t index) const {
        const int64_t image = index / pixels_, row = index % pixels_ / call_.width, column = index % call_.width;
        const float *x = at(call_.x, image, row, column);
        gather(x, gathered_ + index * pitch_);
        pass(x, at(call_.y, image, row, column) + call_.channels);
    }

    void copy_plane(int64_t index) const {
        const wk_partial &p = *call_.partial;
        const int64_t count = call_.channels + p.others, image = index / count, channel = index % count, other = channel - call_.channels;
        const float *x = at(call_.x, image, 0, 0) + (other < 0 ? p.selected[channel] : p.other[other]) * call_.x.channel;
        if (other < 0) {
            float *to = gathered_ + (image * pitch_ + channel) * pixels_;
            for (int64_t i = 0; i < call_.height; i++, x += call_.x.row, to += call_.width)
                for (int64_t j = 0; j < call_.width; j++) to[j] = x[j];
            return;
        }
        float *to = at(call_.y, image, 0, 0) + channel * call_.y.channel;
        for (int64_t i = 0; i < call_.height; i++, x += call_.x.row, to += call_.y.row)
            for (int64_t j = 0; j < call_.width; j++) to[j] = x[j] * p.scale[other] + p.shift[other];
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
    const int64_t pixels_;
    const bool planes_;
    const int64_t pitch_;  // of pixels in the image that the kernels are applied to, or the number of its planes
    int64_t parts_ = 0, pieces_ = 0, count_ = 0;
    Run *runs_ = nullptr;
    float *gathered_ = nullptr;
};

}  // namespace WK_NAMESPACE
}  // namespace wk
