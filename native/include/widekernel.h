// The C interface of the native CPU backend. Plain C types only: the library knows nothing of Python or PyTorch, so one build
// serves every version of both.
//
// All sizes are in elements. An image tensor is (image, channel, row, column) with any strides, as long as either the channels
// or the columns are contiguous in memory (stride 1).
#ifndef WIDEKERNEL_H
#define WIDEKERNEL_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Incremented whenever a structure or a function here changes its meaning.
#define WK_ABI 8
// Most passes and kernels of one call.
#define WK_MOST_PASSES 16
#define WK_MOST_RECTS 64

// The types of tensors, and, in int8, of factors of pointwise products only.
enum wk_dtype { WK_FLOAT32 = 0, WK_BFLOAT16 = 1, WK_FLOAT16 = 2, WK_INT8 = 3 };

// How one rectangle is computed.
enum wk_method {
    WK_DIRECT = 0,             // tap by tap; the error of an output depends only on the pixels under the kernel
    WK_HYBRID_ALONG_ROWS = 1,  // Fourier transform along the width, direct along the height
    WK_HYBRID_ALONG_COLUMNS = 2,  // Fourier transform along the height, direct along the width
};

// Activation of hidden units; GELU in the form of the error function and in that of the hyperbolic tangent.
enum wk_activation { WK_NO_ACTIVATION = 0, WK_RELU = 1, WK_GELU = 2, WK_GELU_TANH = 3 };

// Return values of functions: 0, or one of these. wk_error_text explains them.
enum wk_error { WK_OK = 0, WK_BAD_ARGUMENT = 1, WK_OUT_OF_MEMORY = 2, WK_UNAVAILABLE = 3 };

typedef struct {
    void *data;
    int64_t image, channel, row, column;  // strides
} wk_tensor;

// A kernel as executed: (row, column) is the tap that sits on the output pixel.
typedef struct {
    int32_t rows, columns, row, column;
    int32_t method;
    int32_t dilation;       // distance of neighboring taps, in pixels; above 1 only with WK_DIRECT
    int32_t input, output;  // of a sum: the image that the pass reads, and the one that it is added to
} wk_pass;

// A kernel of the caller, added into the pass with that index, with the anchors aligned. Taps outside the pass are left out.
typedef struct {
    const float *taps;  // (channels, rows, columns)
    int32_t rows, columns, row, column;
    int32_t dilation;  // a multiple of the pass's, which has zeros in between
    int32_t pass;
} wk_rect;

// Some channels of a larger image, in float32. Either channels are adjacent in x and y, or columns in both. Channel i of the sum is channel selected[i] of the image x, which
// has `inputs` channels; and channel i behind those of the sum in y is scale[i] · x[other[i]] + shift[i].
typedef struct {
    int32_t inputs, others;
    const int32_t *selected, *other;  // (channels of the sum), (others)
    const float *scale, *shift;       // (others) each
} wk_partial;

// One input and one output, or one of them and several of the other: then `xs` or `ys` has their addresses, and all have the
// strides of x or y. At least one pass leads from each input to each output.
typedef struct {
    int32_t dtype, threads;
    int32_t images, channels, height, width;
    wk_tensor x, y;
    int32_t inputs, outputs;
    const void *const *xs;
    void *const *ys;
    int32_t passes, rects;
    const wk_pass *pass;
    const wk_rect *rect;
    // y = relu(scale · sum + shift), (channels) each; either may be null, which means 1 and 0.
    const float *scale, *shift;
    int32_t relu;
    const wk_partial *partial;  // null if `x` and `y` have the channels of the sum; otherwise, there is one input and one output
} wk_sum;

typedef struct {
    int32_t dtype, threads;
    int32_t images, channels, height, width;
    wk_tensor x, grad;
    wk_pass pass;   // the gradient's extent; may be smaller than `rows` × `columns`, the taps outside are zero
    float *taps;    // (channels, rows, columns)
    int32_t rows, columns, row, column;
    int32_t dilation;  // a multiple of the pass's, whose taps in between are left out
} wk_weight_grad;

// A convolution as a product over patches: the pixels of `x` under a kernel are the inputs of one pixel of the result.
typedef struct {
    int32_t rows, columns;  // of the kernel
    int32_t row_stride, column_stride;
    int32_t top, left;  // rows and columns of zeros before the image; as many as are needed follow it
} wk_patch;

// A matrix product over channels, an activation, and perhaps a second product, for every pixel:
// y = residual + second · activation(first · norm(x) + first_bias) + second_bias, and without a second product
// y = residual + activation(first · norm(x) + first_bias). All tensors are float32.
//
// `type` is that of the factors of both products, WK_FLOAT32, WK_BFLOAT16 or WK_INT8. All else is float32: tensors, norms, activation,
// biases, residual, and the sums of products. In bfloat16, weights, norm(x) and hidden units are rounded to the nearest bfloat16,
// ties to even; subnormal ones count as zero. Their products are exact.
//
// In int8, weights become whole numbers from -127 to 127, times the largest absolute value of their output divided by 127. The channels
// of a pixel, or all numbers of its patch, become scale · (n - zero) with a whole n from 0 to 255, scale = (high - low) / 255 and
// zero = -low / scale, rounded, where [low, high] is the range of these channels and 0. So do hidden units, by chunks, the smallest
// number of equal ones of up to 512 units that are multiples of 64. Rounding is to the nearest number, ties to even. Within a chunk,
// sums of products are exact; chunks are added in float32. Scales below 1e-30 count as zero. If a number is not finite, all results
// that depend on its scale are NaN.
//
// With patches, `first` is (hidden, inputs, rows, columns). Pixels are normalized before zeros are put around the image. With
// `normalize_after`, a layer norm over the hidden units, and then the factors and summands, come before the activation.
//
// If `response` is given, hidden units go through a response norm before the second product:
// hidden · (1 + response · size / (mean + response_eps)), where `size` is the Euclidean norm of a unit over the pixels of its
// image, and `mean` that of the sizes of all units of the image.
typedef struct {
    int32_t type;
    int32_t inputs, hidden, outputs;  // channels; `outputs` is 0 without a second product
    int32_t activation;
    int32_t normalize;  // whether the norm is a layer norm over the channels of a pixel, without factors; otherwise it is x
    float eps;          // added to the variance
    const float *first, *first_bias, *second, *second_bias;  // (hidden, inputs), (hidden), (outputs, hidden), (outputs)
    wk_patch patch;           // all zero for none: each pixel is its own input
    int32_t normalize_after;  // only without a second product
    float after_eps;
    const float *after_scale, *after_shift;  // (hidden) each; may be null, which means 1 and 0
    const float *response;                   // (hidden); only with a second product
    float response_eps;
} wk_pointwise_weights;

// Weights in the order in which they are used, for the instruction set that was in use when they were packed.
typedef struct wk_pointwise wk_pointwise;

// The channels of `x` are the inputs; those of `residual` and `y` are the outputs, or the hidden units without a second product.
// `residual.data` may be null. Here, any strides are valid, but those described above are fast. `y` must not overlap the others.
typedef struct {
    int32_t threads;
    int32_t images, height, width;  // of the result
    wk_tensor x, residual, y;
    int32_t x_height, x_width;  // with patches; otherwise, `x` has the size of the result
    const float *factors;       // (images, inputs); `x` is multiplied by them before anything else; may be null
} wk_pointwise_call;

// Squeeze-excite: y = sigmoid(second · activation(first · mean(x) + first_bias) + second_bias), where the mean is that over the
// pixels of an image. Everything is float32. Biases may be null. As in `wk_pointwise_call`, any strides are valid.
typedef struct {
    int32_t threads;
    int32_t images, channels, height, width;
    wk_tensor x;
    int32_t hidden, activation;
    const float *first, *first_bias, *second, *second_bias;  // (hidden, channels), (hidden), (channels, hidden), (channels)
    float *y;                                                // (images, channels)
} wk_gate;

// A depthwise convolution, y = Σ taps · x + shift, or the ReLU of it, where the patch is the kernel with its strides. Everything is
// float32. Channels are adjacent in x and y. `y` must not overlap `x`.
typedef struct {
    int32_t threads;
    int32_t images, channels, height, width;  // of the result
    int32_t x_height, x_width;
    int32_t relu;
    wk_tensor x, y;
    wk_patch patch;
    const float *taps, *shift;  // (rows, columns, channels), (channels); `shift` may be null
} wk_depthwise_conv;

// The gradients of the weights and the bias of a pointwise layer: weight[o][i] = Σ grad[o] · x[i] and bias[o] = Σ grad[o] over all
// pixels. Any strides are valid, but contiguous channels or columns are fast.
typedef struct {
    int32_t threads;
    int32_t images, height, width, inputs, outputs;
    wk_tensor x, grad;
    float *weight;  // (outputs, inputs)
    float *bias;    // (outputs), or null
} wk_pointwise_grad;

// Batch norm in training over all images and pixels: y = (x - mean) · factor · weight + bias with factor = 1 / sqrt(variance + eps),
// and mean and (biased) variance of every channel, which are stored. With `backward`, mean and factor are given, and y is the gradient
// of x, from `grad`, that of the forward pass's result. All images have the same layout, dense, with either channels or columns adjacent.
typedef struct {
    int32_t threads;
    int32_t images, channels, height, width;
    int32_t backward;
    wk_tensor x, grad, y;
    const float *weight, *bias;  // (channels), or null, which means 1 and 0
    float eps;
    float *mean, *variance, *factor;
    float *weight_grad, *bias_grad;  // (channels), or null
} wk_batch_norm;

int32_t wk_abi(void);
// The instruction set in use: "avx512", "avx2", "neon" or "portable".
const char *wk_isa(void);
// Use the instruction set `name` from now on, for tests and comparisons; WK_BAD_ARGUMENT if this build or processor lacks it.
int32_t wk_use_isa(const char *name);
// As far as choices depend on the processor: "zen4" (AMD's), "amd" (others of AMD's) or "other".
const char *wk_processor(void);
// Number of channels computed together: the width of a vector.
int32_t wk_lanes(void);
// Use the OpenMP runtime that was loaded from the file `path`. Returns 1 if it provides threads, else 0.
int32_t wk_bind_openmp(const char *path);

int32_t wk_depthwise_sum(const wk_sum *call);
int32_t wk_depthwise_weight_grad(const wk_weight_grad *call);
// The same with other addresses instead of those in `call`. `call` does not change, so its sizes and strides are filled in once,
// and several threads may use it at the same time. `taps` has one address for each rect.
int32_t wk_depthwise_sum_at(const wk_sum *call, const void *x, void *y, const float *const *taps, const float *scale,
                            const float *shift, int32_t relu, const wk_partial *partial);
int32_t wk_depthwise_branches_at(const wk_sum *call, const void *const *xs, void *const *ys, const float *const *taps);
int32_t wk_depthwise_weight_grad_at(const wk_weight_grad *call, const void *x, const void *grad, float *taps);
// Bytes of working memory of a call: for each thread, and shared by all threads (the packed kernels).
void wk_sum_workspace(const wk_sum *call, int64_t *per_thread, int64_t *shared);
// How the image of a call passes through memory: "packed" if it is copied as a whole, "rolling rows" if it is copied row by row into a
// small buffer; "in place", or "in order" of memory by kernels of few rows, if it is not copied, except for the last group of channels
// if these do not fill whole vectors.
const char *wk_sum_form(const wk_sum *call);
void wk_weight_grad_workspace(const wk_weight_grad *call, int64_t *per_thread, int64_t *shared);

// Copies and packs the weights; a bias may be null. The result is valid until `wk_pointwise_free`, which accepts null.
int32_t wk_pointwise_pack(const wk_pointwise_weights *weights, wk_pointwise **packed);
void wk_pointwise_free(wk_pointwise *packed);
// Several threads may use the same weights at the same time.
int32_t wk_pointwise_run(const wk_pointwise *packed, const wk_pointwise_call *call);
// The same with other addresses, like `wk_depthwise_sum_at`.
int32_t wk_pointwise_run_at(const wk_pointwise *packed, const wk_pointwise_call *call, const void *x, const float *factors,
                            const void *residual, void *y);
// The most bytes of working memory that any call with up to `threads` threads needs: for each thread, and shared by all threads,
// including the packed weights. With a response norm, the hidden units of whole images are shared as well, and not counted here.
void wk_pointwise_workspace(const wk_pointwise *packed, int32_t threads, int64_t *per_thread, int64_t *shared);

int32_t wk_gate_run(const wk_gate *call);
int32_t wk_gate_run_at(const wk_gate *call, const void *x, float *y);

int32_t wk_depthwise_conv_run(const wk_depthwise_conv *call);
int32_t wk_depthwise_conv_run_at(const wk_depthwise_conv *call, const void *x, void *y);

// What a step of `wk_run_steps` computes.
enum wk_step_kind { WK_PRODUCTS_STEP = 0, WK_DEPTHWISE_STEP = 1, WK_GATE_STEP = 2, WK_CONV_STEP = 3 };

// An address: `offset` bytes from one of the bases of `wk_run_steps`; null if `base` is negative.
typedef struct {
    int64_t base, offset;
} wk_place;

// One of several calls that are made in turn. `call` is a `wk_pointwise_call`, `wk_sum`, `wk_gate` or `wk_depthwise_conv`.
// `packed`, `factors` and `residual` belong to products; `taps`, `scale`, `shift`, `relu` and `partial` to depthwise sums.
typedef struct {
    int32_t kind, relu;
    const void *call;
    const wk_pointwise *packed;
    wk_place x, factors, residual, y;
    const float *const *taps;
    const float *scale, *shift;
    const wk_partial *partial;
} wk_step;

// Makes all calls, or those up to the first that returns an error, which is returned. The steps do not change, so several threads
// may use them at the same time, with other bases.
int32_t wk_run_steps(const wk_step *steps, int32_t count, void *const *bases);

// `count` floats in memory, at distance `step`.
typedef struct {
    const float *at;
    int64_t count, step;
} wk_samples;

// Whether all of them have the bits of `expected`, in which one set of samples follows another.
int32_t wk_samples_equal(const wk_samples *samples, int32_t sets, const float *expected);

int32_t wk_pointwise_weight_grad(const wk_pointwise_grad *call);

int32_t wk_batch_norm_run(const wk_batch_norm *call);

const char *wk_error_text(int32_t error);

// Why there are no pointwise products of a type in the instruction set in use; null if there are.
const char *wk_why_no_products(int32_t type);
// Measured peak of fused multiply-adds, in floating-point operations per second.
double wk_fma_peak(int32_t threads, double seconds);
// The same for products of a type; 0 if there are none.
double wk_product_peak(int32_t type, int32_t threads, double seconds);

#ifdef __cplusplus
}
#endif

#endif
