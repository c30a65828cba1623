"""Banded Toeplitz products on tensor cores: sums of rectangles of any size, with several inputs or outputs in one launch.

One row of a convolution is a product with a banded Toeplitz matrix. For a channel, a block of output pixels (RH rows by TW
columns, the M of a matrix product) is the sum over input rows of `T · X`. X holds columns of that row (K) of many images and
row blocks (N). T[(r, j), i] = kernel[δ - r + row, i - j + column]. Padding rows are never visited. Columns
outside the band are visited only where blocks of BK extend beyond it.

The matrices T are not stored. `expand` stores every kernel row S times between zeros, each time shifted right by one. Then
every row of every T starts at a multiple of 16 bytes, and a block of T is one load without a gather.

With a dilation, input rows in the gaps of all outputs of a block are not visited either. The gaps within a kernel row are
zeros of T: they widen the band, but images are still read in contiguous rows.
"""

import triton
import triton.language as tl


@triton.jit
def expand(w, e, KH: tl.constexpr, KW: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr, L: tl.constexpr, S: tl.constexpr,
           BL: tl.constexpr):  # fmt: skip
    """Store e[c, ky, s, PAD + s + kx·D] = w[c, ky, kx], zero elsewhere; one program per kernel row of a channel."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BL)
    for s in tl.static_range(S):
        for start in tl.static_range(0, L, BL):
            i = start + at
            right = i - s - PAD
            kx = right // D
            held = (right >= 0) & (kx < KW)
            if D > 1:
                held = held & (right % D == 0)
            taps = tl.load(w + row * KW + kx, mask=held, other=0.0)
            tl.store(e + (row * S + s) * L + i, taps.to(e.dtype.element_ty), mask=i < L)


@triton.jit
def _rows_above(row, D: tl.constexpr, NEAR: tl.constexpr):
    """Count the rows above `row` if only the first NEAR of every D count."""
    return row // D * NEAR + tl.minimum(row % D, NEAR)


@triton.jit
def _accumulate(
    acc, x, e, c, planes, in_batch, h0, hb, w0, H: tl.constexpr, W: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    ROW: tl.constexpr, COL: tl.constexpr, PAD: tl.constexpr, L: tl.constexpr, LEAD: tl.constexpr, D: tl.constexpr,
    S: tl.constexpr, TURNED: tl.constexpr, RH: tl.constexpr, TW: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add one rectangle to `acc` (RH·TW, images·BH)."""
    m = tl.arange(0, RH * TW)
    r = m // TW
    j = m % TW
    k = tl.arange(0, BK)
    # The rows that the block of outputs depends on and that lie inside the image.
    if D == 1:
        first = tl.maximum(-ROW, -h0 - (BH - 1) * RH)
        last = tl.minimum(RH + KH - 1 - ROW, H - h0)
    else:
        # Counted without those in the gaps of all outputs: NEAR rows of every D remain.
        NEAR: tl.constexpr = RH if RH < D else D
        first = _rows_above(tl.maximum(ROW * D - h0 - (BH - 1) * RH, 0), D, NEAR)
        last = tl.minimum(RH + (KH - 1) * NEAR, _rows_above(ROW * D + H - h0, D, NEAR))
    # Blocks begin LEAD columns before the outputs; those in the padding on the left are skipped.
    first_block = tl.maximum(LEAD - w0, 0) // BK
    right = tl.minimum(w0 + TW + (KW - 1 - COL) * D, W)
    blocks = tl.maximum(tl.cdiv(right - (w0 - LEAD), BK) - first_block, 0)
    # Copy of the kernel row and offset in it: together a multiple of S, as is the offset of the first block, for every j.
    t = e + c.to(tl.int64) * (KH * S * L) + (PAD + COL * D - LEAD) + ((j % S) * L - j // S * S)[:, None]
    row_stride: tl.constexpr = 1 if TURNED else W
    column_stride: tl.constexpr = H if TURNED else 1
    xs = x + planes * (H * W)
    kind: tl.constexpr = tl.float32 if UPCAST else x.dtype.element_ty
    # A single loop over rows and blocks of columns, because only the innermost loop is pipelined.
    at = first
    block = first_block
    for _ in range(tl.maximum(last - first, 0) * blocks):
        column = w0 - LEAD + block * BK
        if D == 1:
            ky = at - r + ROW
            row = h0 + hb * RH + at
            inside = (ky >= 0) & (ky < KH)
        else:
            ky = at // NEAR - r // D
            row = h0 + hb * RH + (at // NEAR - ROW) * D + at % NEAR
            inside = (ky >= 0) & (ky < KH) & (r % D == at % NEAR)
        toeplitz = tl.load(
            t + ((ky * (S * L))[:, None] + (block * BK + k)[None, :]),
            mask=inside[:, None],
            other=0.0,
            cache_modifier=".ca",
        )
        seen = (in_batch & (row >= 0) & (row < H))[None, :] & ((column + k >= 0) & (column + k < W))[:, None]
        # 32-bit arithmetic until they become addresses.
        pixels = xs[None, :] + ((row * row_stride)[None, :] + ((column + k) * column_stride)[:, None])
        image = tl.load(pixels, mask=seen, other=0.0)
        acc = tl.dot(toeplitz.to(kind), image.to(kind), acc, input_precision=PRECISION)
        block += 1
        is_last = block == first_block + blocks
        block = tl.where(is_last, first_block, block)
        at += tl.where(is_last, 1, 0)
    return acc


@triton.jit
def _finish(acc, y, scale, shift, c, planes, in_batch, h0, hb, w0, RELU: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
            TURNED: tl.constexpr, RH: tl.constexpr, TW: tl.constexpr):  # fmt: skip
    """Apply scale, shift and ReLU, and store a block of outputs."""
    if scale is not None:
        acc *= tl.load(scale + c).to(tl.float32)
    if shift is not None:
        acc += tl.load(shift + c).to(tl.float32)
    if RELU:
        # Written so that NaN stays NaN.
        acc = tl.where(acc < 0.0, 0.0, acc)
    m = tl.arange(0, RH * TW)
    h = h0 + (m // TW)[:, None] + (hb * RH)[None, :]
    w = w0 + m % TW
    mask = (h < H) & (w < W)[:, None] & in_batch[None, :]
    row_stride: tl.constexpr = 1 if TURNED else W
    column_stride: tl.constexpr = H if TURNED else 1
    pixels = y + planes[None, :] * (H * W) + h * row_stride + (w * column_stride)[:, None]
    tl.store(pixels, acc.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N", "C"])
def toeplitz_sum(
    xs, es, ys, scale, shift, x_planes, N, C, RECTS: tl.constexpr, H: tl.constexpr, W: tl.constexpr, S: tl.constexpr,
    TURNED: tl.constexpr, RELU: tl.constexpr, RH: tl.constexpr, TW: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute y = relu(scale · Σ_r x_r * kernel_r + shift), or one y for each rectangle, without the sum.

    Rows and columns are exchanged if TURNED.

    Args:
        xs: images, one for each rectangle or one for all; planes of H·W contiguous pixels.
        es: the output of `expand` for each kernel.
        ys: outputs (N, C, H, W), one for each rectangle or one for their sum.
        scale, shift: (C,) or None.
        x_planes: for each of `xs`, the number of planes from one image to the next.
        N, C: numbers of images and channels.
        RECTS: for each rectangle (KH, KW, ROW, COL, PAD, L, LEAD, D): its size, the tap on the output pixel, the arguments
            of `expand`, how many columns before the outputs the blocks of input columns begin, and the dilation.
        H, W: numbers of rows and columns.
        S: copies of each kernel row.
        TURNED: whether the problem is transposed: H counts the columns of the images and W their rows, and so on. Bands then
            run along the columns, which suits tall kernels, at the cost of unaligned loads.
        RELU: whether negative numbers are set to zero.
        RH, TW: output rows and columns in M.
        BH, BN: row blocks and images in N.
        BK: input columns in K.
        PRECISION: of float32 products.
        UPCAST: whether to multiply in float32; for the interpreter, whose bfloat16 products are wrong.
    """
    across: tl.constexpr = (W + TW - 1) // TW
    down: tl.constexpr = (H + RH * BH - 1) // (RH * BH)
    program = tl.program_id(0)
    tile = program % (across * down)
    c = program // (across * down) % C
    n0 = program // (across * down) // C * BN
    h0 = tile // across * (RH * BH)
    w0 = tile % across * TW
    column = tl.arange(0, BN * BH)
    hb = column % BH
    n = n0 + column // BH
    in_batch = n < N
    y_planes = n.to(tl.int64) * C + c
    acc = tl.zeros((RH * TW, BN * BH), dtype=tl.float32)
    for i in tl.static_range(len(RECTS)):
        x = xs[i % len(xs)]
        planes = n.to(tl.int64) * x_planes[i % len(xs)] + c
        acc = _accumulate(
            acc, x, es[i], c, planes, in_batch, h0, hb, w0, H, W, RECTS[i][0], RECTS[i][1], RECTS[i][2], RECTS[i][3],
            RECTS[i][4], RECTS[i][5], RECTS[i][6], RECTS[i][7], S, TURNED, RH, TW, BH, BK, PRECISION, UPCAST,
        )  # fmt: skip
        if len(ys) > 1:
            _finish(acc, ys[i], scale, shift, c, y_planes, in_batch, h0, hb, w0, RELU, H, W, TURNED, RH, TW)
            acc = tl.zeros((RH * TW, BN * BH), dtype=tl.float32)
    if len(ys) == 1:
        _finish(acc, ys[0], scale, shift, c, y_planes, in_batch, h0, hb, w0, RELU, H, W, TURNED, RH, TW)
