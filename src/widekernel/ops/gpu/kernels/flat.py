"""Small images on tensor cores: all pixels of a plane at once, because every output depends on nearly every input.

For each channel, the convolution is one product with a matrix of (H·W)² numbers, which is gathered from the kernel once and
used for many images. A sum of rectangles is formed in that matrix, so that any number of them costs one product. The weight
gradient is also one product, of the pixels of x with those of dY, where K runs over the images; the terms of each tap are
gathered at the end.
"""

import triton
import triton.language as tl


@triton.jit
def _matrix(w, c, KH: tl.constexpr, KW: tl.constexpr, ROW: tl.constexpr, COL: tl.constexpr, D: tl.constexpr,
            H: tl.constexpr, W: tl.constexpr, P: tl.constexpr):  # fmt: skip
    """Gather the matrix (P outputs, P inputs) of one rectangle, in float32."""
    out = tl.arange(0, P)[:, None]
    seen = tl.arange(0, P)[None, :]
    # Distances from the first tap, in pixels; with gaps, not all of them are those of a tap.
    down = seen // W - out // W + ROW * D
    right = seen % W - out % W + COL * D
    ky = down // D
    kx = right // D
    mask = (down >= 0) & (ky < KH) & (right >= 0) & (kx < KW) & (seen < H * W) & (out < H * W)
    if D > 1:
        mask = mask & (down % D == 0) & (right % D == 0)
    return tl.load(w + c.to(tl.int64) * (KH * KW) + ky * KW + kx, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _images(x, planes, in_batch, PIXELS: tl.constexpr, P: tl.constexpr):
    """Load (P pixels, images)."""
    k = tl.arange(0, P)[:, None]
    return tl.load(x + planes[None, :] * PIXELS + k, mask=(k < PIXELS) & in_batch[None, :], other=0.0)


@triton.jit
def _store(acc, y, scale, shift, c, planes, in_batch, RELU: tl.constexpr, PIXELS: tl.constexpr, P: tl.constexpr):
    if scale is not None:
        acc *= tl.load(scale + c).to(tl.float32)
    if shift is not None:
        acc += tl.load(shift + c).to(tl.float32)
    if RELU:
        # Written so that NaN stays NaN.
        acc = tl.where(acc < 0.0, 0.0, acc)
    m = tl.arange(0, P)[:, None]
    tl.store(y + planes[None, :] * PIXELS + m, acc.to(y.dtype.element_ty), mask=(m < PIXELS) & in_batch[None, :])


@triton.jit(do_not_specialize=["N", "C", "per_program"])
def flat_sum(
    xs, ws, ys, scale, shift, x_planes, N, C, per_program, RECTS: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    RELU: tl.constexpr, P: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute the same as `toeplitz.toeplitz_sum`, for images of at most P pixels.

    Args:
        xs: images, one for each rectangle or one for all; planes of H·W contiguous pixels.
        ws: kernels (C, KH, KW).
        ys: outputs (N, C, H, W), one for each rectangle or one for their sum.
        scale: (C,) or None.
        shift: (C,) or None.
        x_planes: for each of `xs`, the number of planes from one image to the next.
        N: number of images.
        C: number of channels.
        per_program: images per program, a multiple of BN.
        RECTS: for each rectangle (KH, KW, ROW, COL, D): its size, the tap on the output pixel, and the dilation.
        H: number of rows.
        W: number of columns.
        RELU: whether negative numbers are set to zero.
        P: power of two, at least H·W.
        BN: images in one product.
        PRECISION: of float32 products.
        UPCAST: whether to multiply in float32; for the interpreter, whose bfloat16 products are wrong.
    """
    program = tl.program_id(0)
    c = program % C
    first = program // C * per_program
    dtype: tl.constexpr = tl.float32 if UPCAST else xs[0].dtype.element_ty
    if len(ys) == 1 and len(xs) == 1:
        whole = tl.zeros((P, P), dtype=tl.float32)
        for i in tl.static_range(len(RECTS)):
            whole += _matrix(ws[i], c, RECTS[i][0], RECTS[i][1], RECTS[i][2], RECTS[i][3], RECTS[i][4], H, W, P)
        matrix = whole.to(dtype)
        for n0 in range(first, tl.minimum(first + per_program, N), BN):
            n = n0 + tl.arange(0, BN)
            in_batch = n < N
            x = _images(xs[0], n.to(tl.int64) * x_planes[0] + c, in_batch, H * W, P).to(dtype)
            acc = tl.dot(matrix, x, input_precision=PRECISION)
            _store(acc, ys[0], scale, shift, c, n.to(tl.int64) * C + c, in_batch, RELU, H * W, P)
    else:
        for n0 in range(first, tl.minimum(first + per_program, N), BN):
            n = n0 + tl.arange(0, BN)
            in_batch = n < N
            y_planes = n.to(tl.int64) * C + c
            acc = tl.zeros((P, BN), dtype=tl.float32)
            for i in tl.static_range(len(RECTS)):
                matrix = _matrix(
                    ws[i], c, RECTS[i][0], RECTS[i][1], RECTS[i][2], RECTS[i][3], RECTS[i][4], H, W, P
                ).to(dtype)  # fmt: skip
                planes = n.to(tl.int64) * x_planes[i % len(xs)] + c
                x = _images(xs[i % len(xs)], planes, in_batch, H * W, P).to(dtype)
                acc = tl.dot(matrix, x, acc, input_precision=PRECISION)
                if len(ys) > 1:
                    _store(acc, ys[i], scale, shift, c, y_planes, in_batch, RELU, H * W, P)
                    acc = tl.zeros((P, BN), dtype=tl.float32)
            if len(ys) == 1:
                _store(acc, ys[0], scale, shift, c, y_planes, in_batch, RELU, H * W, P)


@triton.jit(do_not_specialize=["N", "C", "x_planes", "g_planes", "per_program"])
def flat_weight_grad(
    x, g, partial, x_planes, g_planes, N, C, per_program, H: tl.constexpr, W: tl.constexpr, KH: tl.constexpr,
    KW: tl.constexpr, ROW: tl.constexpr, COL: tl.constexpr, D: tl.constexpr, P: tl.constexpr, TAPS: tl.constexpr,
    BN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Store partial sums (splits, C, KH, KW) of the gradient of a kernel.

    w[c, ky, kx] = Σ g[n, c, h, w] · x[n, c, h + (ky - ROW)·D, w + (kx - COL)·D]

    Args:
        x, g, partial: images, gradients of the output, both planes of H·W contiguous pixels; float32.
        x_planes, g_planes: number of planes from one image to the next.
        N, C: numbers of images and channels.
        per_program: images per program, a multiple of BN.
        H, W: numbers of rows and columns.
        KH, KW, ROW, COL, D: size of the kernel, its tap on the output pixel, and the dilation.
        P, TAPS: powers of two, at least H·W and KH·KW.
        BN: images in one product.
        PRECISION: of float32 products.
        UPCAST: whether to multiply in float32; for the interpreter, whose bfloat16 products are wrong.
    """
    c = tl.program_id(0) % C
    split = tl.program_id(0) // C
    dtype: tl.constexpr = tl.float32 if UPCAST else x.dtype.element_ty
    acc = tl.zeros((P, P), dtype=tl.float32)
    for n0 in range(split * per_program, tl.minimum((split + 1) * per_program, N), BN):
        n = n0 + tl.arange(0, BN)
        in_batch = n < N
        seen = _images(x, n.to(tl.int64) * x_planes + c, in_batch, H * W, P)
        out = _images(g, n.to(tl.int64) * g_planes + c, in_batch, H * W, P)
        acc = tl.dot(seen.to(dtype), tl.trans(out.to(dtype)), acc, input_precision=PRECISION)
    tap = tl.arange(0, TAPS)[:, None]
    pixel = tl.arange(0, P)[None, :]
    row = pixel // W + tap // KW * D - ROW * D
    column = pixel % W + tap % KW * D - COL * D
    there = (row >= 0) & (row < H) & (column >= 0) & (column < W) & (pixel < H * W) & (tap < KH * KW)
    sums = tl.gather(acc, tl.where(there, row * W + column, 0), 0)
    place = partial + (split.to(tl.int64) * C + c) * (KH * KW) + tl.arange(0, TAPS)
    tl.store(place, tl.sum(tl.where(there, sums, 0.0), 1), mask=tl.arange(0, TAPS) < KH * KW)
