// The C interface: checks its arguments and passes them on to the kernels for this processor.
#include "kernels.hpp"
#include "processor.hpp"
#include "validity.hpp"

#include <cstdlib>
#include <cstring>

#define WK_EXPORT extern "C" __attribute__((visibility("default")))

namespace wk {

extern const Kernels kernels_portable;
#if defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx512;
#ifdef WIDEKERNEL_AVX512_BF16
extern const Products products_avx512_bf16;
#endif
#ifdef WIDEKERNEL_AVX512_VNNI
extern const Products products_avx512_vnni;
#endif
#elif defined(__aarch64__)
extern const Kernels kernels_neon;
#endif

namespace {

// The kernels named `name`, or the best ones for an empty name; null if this build or processor lacks them.
const Kernels *find(const char *name) {
    const bool best = !*name;
#if defined(__x86_64__)
    const Processor processor = Processor::present();
    if (processor.avx512() && (best || !std::strcmp(name, "avx512"))) return &kernels_avx512;
    if (processor.avx2() && (best || !std::strcmp(name, "avx2"))) return &kernels_avx2;
#elif defined(__aarch64__)
    if (best || !std::strcmp(name, "neon")) return &kernels_neon;
#endif
    return best || !std::strcmp(name, "portable") ? &kernels_portable : nullptr;
}

const Kernels *chosen = nullptr;

const Kernels &kernels() {
    const Kernels *found = __atomic_load_n(&chosen, __ATOMIC_ACQUIRE);
    if (!found) {
        found = find("");
        __atomic_store_n(&chosen, found, __ATOMIC_RELEASE);
    }
    return *found;
}

// The products of a type in the instruction set in use; null, with the reason, if there are none.
const Products *products(int32_t type, const char *&reason) {
    reason = nullptr;
    if (type == WK_FLOAT32) return &kernels().products;
    if (type == WK_BFLOAT16) {
#ifdef WIDEKERNEL_AVX512_BF16
        if (!Processor::present().avx512_bf16())
            reason = "this processor has no bfloat16 products (AVX512_BF16: AMD Zen 4, Intel Sapphire Rapids, and later)";
        else if (&kernels() != &kernels_avx512)
            reason = "the instruction set in use has no bfloat16 products; only avx512 has them";
        else
            return &products_avx512_bf16;
#else
        reason = "this build of the native library has no bfloat16 products, which its compiler or processor family lacks";
#endif
    } else if (type == WK_INT8) {
#ifdef WIDEKERNEL_AVX512_VNNI
        if (!Processor::present().avx512_vnni())
            reason = "this processor has no int8 products (AVX512_VNNI: Intel Cascade Lake, AMD Zen 4, and later)";
        else if (&kernels() != &kernels_avx512)
            reason = "the instruction set in use has no int8 products; only avx512 has them";
        else
            return &products_avx512_vnni;
#else
        reason = "this build of the native library has no int8 products, which its compiler or processor family lacks";
#endif
    } else {
        reason = "products are computed in float32, bfloat16 or int8";
    }
    return nullptr;
}

}  // namespace
}  // namespace wk

WK_EXPORT int32_t wk_abi(void) { return WK_ABI; }
WK_EXPORT const char *wk_isa(void) { return wk::kernels().isa; }
WK_EXPORT int32_t wk_lanes(void) { return wk::kernels().lanes; }

WK_EXPORT const char *wk_processor(void) {
#if defined(__x86_64__)
    const wk::Processor processor = wk::Processor::present();
    if (processor.is_amd()) return processor.is_zen4() ? "zen4" : "amd";
#endif
    return "other";
}

WK_EXPORT int32_t wk_use_isa(const char *name) {
    const wk::Kernels *found = wk::find(name);
    if (!found) return WK_BAD_ARGUMENT;
    __atomic_store_n(&wk::chosen, found, __ATOMIC_RELEASE);
    return WK_OK;
}

WK_EXPORT int32_t wk_depthwise_sum(const wk_sum *call) {
    return wk::is_valid(*call) ? wk::kernels().depthwise_sum(*call) : WK_BAD_ARGUMENT;
}

WK_EXPORT int32_t wk_depthwise_weight_grad(const wk_weight_grad *call) {
    return wk::is_valid(*call) ? wk::kernels().depthwise_weight_grad(*call) : WK_BAD_ARGUMENT;
}

static int32_t run_with_taps(wk_sum &call, const float *const *taps) {
    if (call.rects < 1 || call.rects > WK_MOST_RECTS) return WK_BAD_ARGUMENT;
    wk_rect rects[WK_MOST_RECTS];
    for (int32_t i = 0; i < call.rects; i++) {
        rects[i] = call.rect[i];
        rects[i].taps = taps[i];
    }
    call.rect = rects;
    return wk_depthwise_sum(&call);
}

WK_EXPORT int32_t wk_depthwise_sum_at(const wk_sum *call, const void *x, void *y, const float *const *taps, const float *scale,
                                      const float *shift, int32_t relu, const wk_partial *partial) {
    wk_sum here = *call;
    here.x.data = const_cast<void *>(x), here.y.data = y;
    here.scale = scale, here.shift = shift, here.relu = relu, here.partial = partial;
    return run_with_taps(here, taps);
}

WK_EXPORT int32_t wk_depthwise_branches_at(const wk_sum *call, const void *const *xs, void *const *ys, const float *const *taps) {
    wk_sum here = *call;
    here.x.data = const_cast<void *>(xs[0]), here.y.data = ys[0], here.xs = xs, here.ys = ys;
    return run_with_taps(here, taps);
}

WK_EXPORT int32_t wk_depthwise_weight_grad_at(const wk_weight_grad *call, const void *x, const void *grad, float *taps) {
    wk_weight_grad here = *call;
    here.x.data = const_cast<void *>(x), here.grad.data = const_cast<void *>(grad), here.taps = taps;
    return wk_depthwise_weight_grad(&here);
}

WK_EXPORT void wk_sum_workspace(const wk_sum *call, int64_t *per_thread, int64_t *shared) {
    wk::kernels().sum_workspace(*call, *per_thread, *shared);
}

WK_EXPORT const char *wk_sum_form(const wk_sum *call) { return wk::kernels().sum_form(*call); }

WK_EXPORT void wk_weight_grad_workspace(const wk_weight_grad *call, int64_t *per_thread, int64_t *shared) {
    wk::kernels().weight_grad_workspace(*call, *per_thread, *shared);
}

WK_EXPORT int32_t wk_pointwise_pack(const wk_pointwise_weights *weights, wk_pointwise **packed) {
    *packed = nullptr;
    if (!wk::is_valid(*weights)) return WK_BAD_ARGUMENT;
    const char *reason;
    const wk::Products *products = wk::products(weights->type, reason);
    if (!products) return WK_UNAVAILABLE;
    auto *made = static_cast<wk_pointwise *>(std::calloc(1, sizeof(wk_pointwise)));
    if (!made) return WK_OUT_OF_MEMORY;
    made->products = products;
    made->channels = weights->inputs, made->hidden = weights->hidden, made->outputs = weights->outputs;
    made->activation = weights->activation, made->normalize = weights->normalize, made->eps = weights->eps;
    made->patch = weights->patch, made->normalize_after = weights->normalize_after, made->after_eps = weights->after_eps;
    made->response_eps = weights->response_eps;
    const int32_t error = products->pack(*weights, *made);
    if (error)
        wk_pointwise_free(made);
    else
        *packed = made;
    return error;
}

WK_EXPORT void wk_pointwise_free(wk_pointwise *packed) {
    if (packed) std::free(packed->memory);
    std::free(packed);
}

WK_EXPORT int32_t wk_pointwise_run(const wk_pointwise *packed, const wk_pointwise_call *call) {
    if (!packed || !wk::is_valid(*call)) return WK_BAD_ARGUMENT;
    if (wk::has_patches(packed->patch) && (call->x_height <= 0 || call->x_width <= 0)) return WK_BAD_ARGUMENT;
    return packed->products->run(*packed, *call);
}

WK_EXPORT int32_t wk_pointwise_run_at(const wk_pointwise *packed, const wk_pointwise_call *call, const void *x,
                                      const float *factors, const void *residual, void *y) {
    wk_pointwise_call here = *call;
    here.x.data = const_cast<void *>(x), here.residual.data = const_cast<void *>(residual), here.y.data = y;
    here.factors = factors;
    return wk_pointwise_run(packed, &here);
}

WK_EXPORT void wk_pointwise_workspace(const wk_pointwise *packed, int32_t threads, int64_t *per_thread, int64_t *shared) {
    packed->products->workspace(*packed, threads, *per_thread, *shared);
}

WK_EXPORT int32_t wk_gate_run(const wk_gate *call) {
    return wk::is_valid(*call) ? wk::kernels().gate(*call) : WK_BAD_ARGUMENT;
}

WK_EXPORT int32_t wk_gate_run_at(const wk_gate *call, const void *x, float *y) {
    wk_gate here = *call;
    here.x.data = const_cast<void *>(x), here.y = y;
    return wk_gate_run(&here);
}

WK_EXPORT int32_t wk_depthwise_conv_run(const wk_depthwise_conv *call) {
    return wk::is_valid(*call) ? wk::kernels().depthwise_conv(*call) : WK_BAD_ARGUMENT;
}

WK_EXPORT int32_t wk_depthwise_conv_run_at(const wk_depthwise_conv *call, const void *x, void *y) {
    wk_depthwise_conv here = *call;
    here.x.data = const_cast<void *>(x), here.y.data = y;
    return wk_depthwise_conv_run(&here);
}

WK_EXPORT int32_t wk_run_steps(const wk_step *steps, int32_t count, void *const *bases) {
    const auto at = [bases](const wk_place &place) {
        return place.base < 0 ? nullptr : static_cast<char *>(bases[place.base]) + place.offset;
    };
    const auto floats = [at](const wk_place &place) { return reinterpret_cast<float *>(at(place)); };
    const auto run = [&](const wk_step &s) {
        switch (s.kind) {
        case WK_PRODUCTS_STEP:
            return wk_pointwise_run_at(s.packed, static_cast<const wk_pointwise_call *>(s.call), at(s.x), floats(s.factors),
                                       at(s.residual), at(s.y));
        case WK_DEPTHWISE_STEP:
            return wk_depthwise_sum_at(static_cast<const wk_sum *>(s.call), at(s.x), at(s.y), s.taps, s.scale, s.shift, s.relu,
                                       s.partial);
        case WK_GATE_STEP: return wk_gate_run_at(static_cast<const wk_gate *>(s.call), at(s.x), floats(s.y));
        case WK_CONV_STEP: return wk_depthwise_conv_run_at(static_cast<const wk_depthwise_conv *>(s.call), at(s.x), at(s.y));
        }
        return static_cast<int32_t>(WK_BAD_ARGUMENT);
    };
    int32_t error = WK_OK;
    for (int32_t i = 0; i < count && error == WK_OK; i++) error = run(steps[i]);
    return error;
}

WK_EXPORT int32_t wk_samples_equal(const wk_samples *samples, int32_t sets, const float *expected) {
    // Without branches inside, so that the processor waits for many addresses at the same time.
    uint32_t differences = 0;
    for (int32_t s = 0; s < sets; s++)
        for (int64_t i = 0; i < samples[s].count; i++) {
            uint32_t now, before;
            std::memcpy(&now, samples[s].at + i * samples[s].step, sizeof now);
            std::memcpy(&before, expected++, sizeof before);
            differences |= now ^ before;
        }
    return differences == 0;
}

WK_EXPORT int32_t wk_pointwise_weight_grad(const wk_pointwise_grad *call) {
    return wk::is_valid(*call) ? wk::kernels().pointwise_weight_grad(*call) : WK_BAD_ARGUMENT;
}

WK_EXPORT int32_t wk_batch_norm_run(const wk_batch_norm *call) {
    return wk::is_valid(*call) ? wk::kernels().batch_norm(*call) : WK_BAD_ARGUMENT;
}

WK_EXPORT const char *wk_error_text(int32_t error) {
    switch (error) {
    case WK_OK: return "no error";
    case WK_BAD_ARGUMENT: return "the sizes, strides or methods of the call do not fit together";
    case WK_OUT_OF_MEMORY: return "there is no memory left for the working space";
    case WK_UNAVAILABLE: return "this build, processor or instruction set lacks products of that type";
    default: return "unknown error";
    }
}

WK_EXPORT const char *wk_why_no_products(int32_t type) {
    const char *reason;
    wk::products(type, reason);
    return reason;
}

WK_EXPORT double wk_product_peak(int32_t type, int32_t threads, double seconds) {
    const char *reason;
    const wk::Products *products = wk::products(type, reason);
    return products && threads > 0 && seconds > 0 ? products->peak(threads, seconds) : 0;
}

WK_EXPORT double wk_fma_peak(int32_t threads, double seconds) { return wk_product_peak(WK_FLOAT32, threads, seconds); }
