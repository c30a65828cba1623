// The inputs of products over patches: pixels under a kernel, zeros outside the image.
#pragma once

#include "pointwise_weights.hpp"
#include "stack.hpp"

namespace wk {
namespace WK_NAMESPACE {

// `N` numbers at constant distance.
template <int N> WK_INLINE void copy_row(const float *from, int64_t column, float *to) {
    unroll<N>([&](auto i) { to[i] = from[i * column]; });
}

class Patches {
  public:
    Patches(const wk_pointwise &packed, const wk_pointwise_call &call)
        : of_(packed), patch_(packed.patch), x_(call.x), at_(static_cast<const float *>(call.x.data)), x_height_(call.x_height),
          x_width_(call.x_width), height_(call.height), width_(call.width), factors_(call.factors) {}

    // Packs the patches of `pixels` pixels of the result from `first` on, with slots and `finish` as in `pack_pixels`. `prepare` is
    // called for each pixel of an image with a slot of its own and the number of the image, unless patches are dense.
    template <class Place, class Prepare, class Finish>
    void pack(int64_t first, int64_t pixels, Place &&place, Prepare &&prepare, Finish &&finish) const {
        for (int64_t i = 0; i < pixels;) {
            const int64_t pixel = first + i, column = pixel % width_;
            const int count = static_cast<int>(least(least(LANES, pixels - i), width_ - column));
            const int64_t top = pixel / width_ % height_ * patch_.row_stride - patch_.top;
            const int64_t left = column * patch_.column_stride - patch_.left;
            const int64_t image = pixel / width_ / height_;
            Slot slots[LANES];
            for (int j = 0; j < count; j++) slots[j] = place(i + j, j);
            if (of_.dense)
                for (int j = 0; j < count; j++) pack_numbers(image, top, left + j * patch_.column_stride, slots[j]);
            else
                pack_taps(image, top, left, count, slots, prepare);
            for (int j = 0; j < count; j++) finish(slots[j], i + j);
            i += count;
        }
    }

  private:
    // The taps one after another, each with its channels in whole vectors. The patches begin at distances of one stride.
    template <class Prepare>
    void pack_taps(int64_t image, int64_t top, int64_t left, int count, const Slot *slots, Prepare &&prepare) const {
        const int64_t groups = vectors_for(of_.channels), stride = patch_.column_stride;
        for (int64_t tap = 0; tap < int64_t{patch_.rows} * patch_.columns; tap++) {
            const int64_t row = top + tap / patch_.columns, column = left + tap % patch_.columns;
            // Patches [begin, end) have this tap inside the image.
            int64_t begin = column < 0 ? least(count, ceil_div(-column, stride)) : 0;
            int64_t end = column < x_width_ ? least(count, ceil_div(x_width_ - column, stride)) : 0;
            if (row < 0 || row >= x_height_ || end <= begin) begin = end = 0;
            Slot parts[LANES];
            for (int j = 0; j < count; j++) {
                parts[j].at = slots[j].at + tap * groups * slots[j].step, parts[j].step = slots[j].step;
                if (j >= begin && j < end) continue;
                for (int64_t g = 0; g < groups; g++) parts[j].at[g * parts[j].step] = Vec{};
            }
            if (begin == end) continue;
            const int64_t from = column + begin * stride;
            pack_run(at_ + image * x_.image + row * x_.row + from * x_.column, x_.channel, stride * x_.column,
                     static_cast<int>(end - begin), x_.column == 1 ? x_width_ - from : 1, of_.channels, parts + begin);
            for (int64_t j = begin; j < end; j++) prepare(parts[j], image);
        }
    }

    // Channel by channel, row by row, as in the weights.
    void pack_numbers(int64_t image, int64_t top, int64_t left, const Slot &slot) const {
        alignas(ALIGNMENT) float numbers[MOST_DENSE + LANES];
        const int64_t rows = patch_.rows, columns = patch_.columns;
        const bool inside = top >= 0 && left >= 0 && top + rows <= x_height_ && left + columns <= x_width_;
        float *to = numbers;
        for (int64_t c = 0; c < of_.channels; c++) {
            for (int64_t r = 0; r < rows; r++, to += columns) {
                const float *from = at_ + image * x_.image + c * x_.channel + (top + r) * x_.row + left * x_.column;
                if (!inside)
                    copy_inside(from, top + r, left, to);
                else if (columns == 4)
                    copy_row<4>(from, x_.column, to);
                else if (columns == 3)
                    copy_row<3>(from, x_.column, to);
                else if (columns == 2)
                    copy_row<2>(from, x_.column, to);
                else
                    for (int64_t i = 0; i < columns; i++) to[i] = from[i * x_.column];
            }
            for (int64_t i = 1; factors_ && i <= rows * columns; i++) to[-i] *= factors_[image * of_.channels + c];
        }
        for (int i = 0; i < LANES; i++) to[i] = 0;
        for (int64_t g = 0; g < vectors_for(of_.inputs); g++) slot.at[g * slot.step] = Float32::load(numbers + g * LANES);
    }

    void copy_inside(const float *from, int64_t row, int64_t left, float *to) const {
        for (int64_t i = 0; i < patch_.columns; i++) {
            const bool inside = row >= 0 && row < x_height_ && left + i >= 0 && left + i < x_width_;
            to[i] = inside ? from[i * x_.column] : 0.0f;
        }
    }

    const wk_pointwise &of_;
    const wk_patch patch_;
    const wk_tensor x_;
    const float *at_;
    const int64_t x_height_, x_width_, height_, width_;
    const float *const factors_;  // (images, channels), or null
};

}  // namespace WK_NAMESPACE
}  // namespace wk
