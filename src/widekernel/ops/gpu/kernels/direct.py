"""Small kernels by multiply-adds: memory-bound, for both layouts without conversion."""

import triton
import triton.language as tl


@triton.jit
def _finished(acc, scale, shift, c, in_channels, RELU: tl.constexpr):
    """Apply scale, shift and ReLU to (pixels, channels) or (planes, pixels); `c` holds the channels in a matching shape."""
    if scale is not None:
        acc *= tl.load(scale + c, mask=in_channels, other=0.0).to(tl.float32)
    if shift is not None:
        acc += tl.load(shift + c, mask=in_channels, other=0.0).to(tl.float32)
    if RELU:
        # Written so that NaN stays NaN.
        acc = tl.where(acc < 0.0, 0.0, acc)
    return acc


@triton.jit(do_not_specialize=["N", "C"])
def direct_sum_nchw(
    x, ws, y, scale, shift, x_planes, N, C, RECTS: tl.constexpr, H: tl.constexpr, W: tl.constexpr, RELU: tl.constexpr,
    BP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Compute y = relu(scale · Σ_r x * kernel_r + shift) for contiguous planes.

    Args:
        x: images; planes of H·W contiguous pixels.
        ws: kernels (C, KH, KW).
        y: (N, C, H, W).
        scale: (C,) or None.
        shift: (C,) or None.
        x_planes: number of planes from one image to the next.
        N: number of images.
        C: number of channels.
        RECTS: for each rectangle (KH, KW, ROW, COL, D): its size, the tap on the output pixel, and the dilation.
        H: number of rows.
        W: number of columns.
        RELU: whether negative numbers are set to zero.
        BP: planes per program.
        BM: pixels per program.
    """
    blocks: tl.constexpr = (H * W + BM - 1) // BM
    program = tl.program_id(0)
    plane = (program // blocks).to(tl.int64) * BP + tl.arange(0, BP)[:, None]
    pixel = program % blocks * BM + tl.arange(0, BM)[None, :]
    h = pixel // W
    w = pixel % W
    n = plane // C
    c = plane % C
    exists = n < N
    image = x + (n * x_planes + c) * (H * W) + pixel
    acc = tl.zeros((BP, BM), dtype=tl.float32)
    for i in tl.static_range(len(RECTS)):
        taps = ws[i] + c * (RECTS[i][0] * RECTS[i][1])
        for ky in tl.static_range(tl.constexpr(RECTS[i][0])):
            for kx in tl.static_range(tl.constexpr(RECTS[i][1])):
                row = h + (ky - RECTS[i][2]) * RECTS[i][4]
                column = w + (kx - RECTS[i][3]) * RECTS[i][4]
                seen = exists & (row >= 0) & (row < H) & (column >= 0) & (column < W)
                there = image + ((ky - RECTS[i][2]) * W + (kx - RECTS[i][3])) * RECTS[i][4]
                values = tl.load(there, mask=seen, other=0.0).to(tl.float32)
                tap = tl.load(taps + (ky * RECTS[i][1] + kx), mask=exists, other=0.0).to(tl.float32)
                acc += values * tap
    acc = _finished(acc, scale, shift, c, exists, RELU)
    tl.store(y + plane * (H * W) + pixel, acc.to(y.dtype.element_ty), mask=exists & (pixel < H * W))


@triton.jit(do_not_specialize=["N"])
def direct_sum_nhwc(
    x, ws, y, scale, shift, x_image, x_row, x_column, N, C, RECTS: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    RELU: tl.constexpr, RH: tl.constexpr, TW: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Compute y = relu(scale · Σ_r x * kernel_r + shift) of images with adjacent channels.

    Each value of x that a thread loads is used for all of the RH output rows that it affects.

    Args:
        x: images, channels contiguous.
        ws: kernels (KH, KW, C).
        y: (N, H, W, C).
        scale, shift: (C,) or None.
        x_image: stride of x between images.
        x_row: stride of x between rows.
        x_column: stride of x between columns.
        N: number of images.
        C: number of channels.
        RECTS: as in `direct_sum_nchw`.
        H, W: numbers of rows and columns.
        RELU: whether negative numbers are set to zero.
        RH: output rows per program.
        TW: output columns per program.
        BC: channels per program.
    """
    across: tl.constexpr = (W + TW - 1) // TW
    down: tl.constexpr = (H + RH - 1) // RH
    channel_blocks = tl.cdiv(C, BC)
    program = tl.program_id(0)
    c = program % channel_blocks * BC + tl.arange(0, BC)[None, :]
    tile = program // channel_blocks % (across * down)
    n = (program // channel_blocks // (across * down)).to(tl.int64)
    h0 = tile // across * RH
    j = tl.arange(0, TW)[:, None]
    w = tile % across * TW + j
    exists = c < C
    accs = (tl.zeros((TW, BC), dtype=tl.float32),) * RH
    for i in tl.static_range(len(RECTS)):
        # Column by column, so that only the taps of one column have to stay in registers.
        for kx in tl.static_range(tl.constexpr(RECTS[i][1])):
            column = w + (kx - RECTS[i][3]) * RECTS[i][4]
            # Counted from the first row that the block depends on. Rows in the gaps of all outputs are not compiled.
            for below in tl.static_range(tl.constexpr(RH + (RECTS[i][0] - 1) * RECTS[i][4])):
                if below % RECTS[i][4] < RH:
                    # The interpreter accepts no masks made from scalars alone.
                    row = h0 + (below - RECTS[i][2] * RECTS[i][4]) + 0 * j
                    seen = exists & (row >= 0) & (row < H) & (column >= 0) & (column < W)
                    there = x + n * x_image + row * x_row + column * x_column + c
                    values = tl.load(there, mask=seen, other=0.0).to(tl.float32)
                    for r in tl.static_range(RH):
                        # The kernel row; neither are rows outside the kernel or between its rows.
                        if below >= r and (below - r) % RECTS[i][4] == 0 and (below - r) // RECTS[i][4] < RECTS[i][0]:
                            place = ((below - r) // RECTS[i][4] * RECTS[i][1] + kx) * C + c
                            tap = tl.load(ws[i] + place, mask=exists, other=0.0).to(tl.float32)
                            accs = accs[:r] + (accs[r] + values * tap,) + accs[r + 1 :]
    for r in tl.static_range(RH):
        acc = _finished(accs[r], scale, shift, c, exists, RELU)
        place = ((n * H + h0 + r) * W + w) * C + c
        tl.store(y + place, acc.to(y.dtype.element_ty), mask=exists & (h0 + r + 0 * j < H) & (w < W))


@triton.jit(do_not_specialize=["N", "rows_each"])
def direct_weight_grad_nhwc(
    x, g, partial, x_image, x_row, x_column, g_image, g_row, g_column, N, C, rows_each, H: tl.constexpr, W: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, ROW: tl.constexpr, COL: tl.constexpr, D: tl.constexpr, TW: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """Store partial sums (splits, KH, KW, C) of images with adjacent channels.

    The grid is (channel blocks · KH, splits): a program computes one kernel row, and uses each value of g for KW taps.

    Args:
        x: images, channels contiguous.
        g: gradients of the output, channels contiguous.
        partial: float32.
        x_image: stride of x between images.
        x_row: stride of x between rows.
        x_column: stride of x between columns.
        g_image: stride of g between images.
        g_row: stride of g between rows.
        g_column: stride of g between columns.
        N: number of images.
        C: number of channels.
        rows_each: rows per split, counted over all images.
        H: number of rows.
        W: number of columns.
        KH: number of kernel rows.
        KW: number of kernel columns.
        ROW: kernel row on the output pixel.
        COL: kernel column on the output pixel.
        D: dilation.
        TW: columns at a time.
        BC: channels per program.
    """
    ky = tl.program_id(0) % KH
    c = tl.program_id(0) // KH * BC + tl.arange(0, BC)[None, :]
    split = tl.program_id(1)
    exists = c < C
    j = tl.arange(0, TW)[:, None]
    across: tl.constexpr = (W + TW - 1) // TW
    accs = (tl.zeros((TW, BC), dtype=tl.float32),) * KW
    for step in range(split * rows_each * across, tl.minimum((split + 1) * rows_each, N * H) * across):
        line = step // across
        h = line % H
        # Calls no method of the counter, because it is a Python integer in the interpreter.
        n = line // H + tl.zeros((1, 1), dtype=tl.int64)
        w = step % across * TW + j
        hi = h + ky * D - ROW * D + 0 * j  # the interpreter accepts no masks made from scalars alone
        here = exists & (w < W) & (hi >= 0) & (hi < H)
        grad = tl.load(g + n * g_image + h * g_row + w * g_column + c, mask=here, other=0.0).to(tl.float32)
        for kx in tl.static_range(KW):
            wi = w + (kx - COL) * D
            seen = here & (wi >= 0) & (wi < W)
            values = tl.load(x + n * x_image + hi * x_row + wi * x_column + c, mask=seen, other=0.0).to(tl.float32)
            accs = accs[:kx] + (accs[kx] + values * grad,) + accs[kx + 1 :]
    for kx in tl.static_range(KW):
        sums = tl.sum(accs[kx], 0, keep_dims=True)
        tl.store(partial + ((split.to(tl.int64) * KH + ky) * KW + kx) * C + c, sums, mask=exists)
