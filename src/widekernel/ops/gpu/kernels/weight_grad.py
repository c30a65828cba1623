"""Deterministic weight gradients: no atomics, a fixed split of the sum, float32 partial sums added in a fixed order.

For one channel and one kernel row, G = Xᵀ·dY over images and rows is a matrix (columns of x, columns of dY) computed on
tensor cores. Tap kx is the sum of its diagonal i - j = (kx - column)·dilation. So M is (KYB kernel rows, WI columns of x),
N is WO columns of dY, and K runs over all pairs of an image and an output row. The diagonals are gathered once, at the end.
"""

import triton
import triton.language as tl


@triton.jit
def _diagonals(acc, middle, D: tl.constexpr, KYB: tl.constexpr, KXB: tl.constexpr, WI: tl.constexpr, WO: tl.constexpr):
    """Sum, for each kernel row, over the pairs of columns of x and g that belong to tap kx: i - j = kx·D - middle."""
    q = tl.arange(0, KYB * KXB)
    source = tl.arange(0, WO)[None, :] + (q % KXB * D)[:, None] - middle
    there = (source >= 0) & (source < WI)
    sums = tl.gather(acc, (q // KXB * WI)[:, None] + tl.where(there, source, 0), 0)
    return tl.sum(tl.where(there, sums, 0.0), 1)


@triton.jit
def _image_and_row(pair, rows, WRAPS: tl.constexpr, LONG: tl.constexpr):
    """Divide pairs by the number of rows; if they span few images, do so by counting the ends of images."""
    if WRAPS == 0:
        n = pair // rows
    else:
        n = tl.zeros_like(pair)
        for i in tl.static_range(WRAPS):
            n += tl.where(pair >= (i + 1) * rows, 1, 0)
    row = pair - n * rows
    if LONG:
        n = n.to(tl.int64)
    return n, row


@triton.jit
def _first_plane(n, planes, c):
    """Return n · planes + c in 64 bits; in the interpreter, the counter n has no type to convert."""
    return n * (c.to(tl.int64) * 0 + planes) + c


@triton.jit
def _product(
    x, g, c, ky0, e, split, x_planes, g_planes, N, steps_each, H: tl.constexpr, W: tl.constexpr, ROW: tl.constexpr,
    D: tl.constexpr, KYB: tl.constexpr, WI: tl.constexpr, WO: tl.constexpr, OFFSET: tl.constexpr, BK: tl.constexpr,
    WRAPS: tl.constexpr, LONG: tl.constexpr, TURNED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Multiply columns of x, shifted by each kernel row, with columns of g, for one part of the sum: (KYB·WI, WO)."""
    column_blocks: tl.constexpr = (W + WO - 1) // WO
    m = tl.arange(0, KYB * WI)
    ky = ky0 + m // WI
    i = m % WI
    j = tl.arange(0, WO)
    k = tl.arange(0, BK)
    # Output rows for which some kernel row of the block lies on the image.
    first = tl.maximum(ROW * D - (ky0 + KYB - 1) * D, 0)
    rows = tl.maximum(tl.minimum(H + ROW * D - ky0 * D, H) - first, 0)
    pairs = N * rows
    # K is padded for every block of columns, so that blocks of K do not straddle them.
    steps = tl.cdiv(pairs, BK)
    row_stride: tl.constexpr = 1 if TURNED else W
    column_stride: tl.constexpr = H if TURNED else 1
    kind: tl.constexpr = tl.float32 if UPCAST else x.dtype.element_ty
    acc = tl.zeros((KYB * WI, WO), dtype=tl.float32)
    for step in range(split * steps_each, tl.minimum((split + 1) * steps_each, steps * column_blocks)):
        # Divisions by numbers that are unknown at compile time cost as much as loads.
        w0 = 0 if column_blocks == 1 else step // steps * WO
        pair = (step if column_blocks == 1 else step % steps) * BK
        here = pair + k < pairs
        # The image and row of the first pair are scalars; those of the other pairs are 32-bit offsets from them.
        n0 = pair // rows
        n, h = _image_and_row(pair % rows + k, rows, WRAPS, LONG)
        h += first
        hi = h[None, :] + ky[:, None] * D - ROW * D
        wi = w0 + OFFSET + e * WI + i
        seen = here[None, :] & (hi >= 0) & (hi < H) & ((wi >= 0) & (wi < W))[:, None]
        image = x + _first_plane(n0, x_planes, c) * (H * W)
        within = (ky * D - ROW * D) * row_stride + wi * column_stride
        pixels = (n * x_planes * (H * W) + h * row_stride)[None, :] + within[:, None]
        # Rows of x are used for several kernel rows, and are still in the L1 cache then.
        left = tl.load(image + pixels, mask=seen, other=0.0, cache_modifier=".ca")
        wo = w0 + j
        of = here[:, None] & (wo < W)[None, :]
        image = g + _first_plane(n0, g_planes, c) * (H * W)
        outputs = (n * g_planes * (H * W) + h * row_stride)[:, None] + (wo * column_stride)[None, :]
        right = tl.load(image + outputs, mask=of, other=0.0)
        acc = tl.dot(left.to(kind), right.to(kind), acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["N", "C", "x_planes", "g_planes", "steps_each"])
def toeplitz_weight_grad(
    x, g, partial, x_planes, g_planes, N, C, steps_each, H: tl.constexpr, W: tl.constexpr, KH: tl.constexpr,
    KW: tl.constexpr, ROW: tl.constexpr, COL: tl.constexpr, D: tl.constexpr, KYB: tl.constexpr, KXB: tl.constexpr,
    WI: tl.constexpr, WO: tl.constexpr, OFFSET: tl.constexpr, ACROSS: tl.constexpr, BK: tl.constexpr,
    WRAPS: tl.constexpr, LONG: tl.constexpr, TURNED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Store partial sums (splits·ACROSS, C, KH, KW) of the gradient of a kernel.

    w[c, ky, kx] = Σ g[n, c, h, w] · x[n, c, h + (ky - ROW)·D, w + (kx - COL)·D]

    The grid is (C · kernel row blocks, ACROSS, splits). Rows and columns are exchanged if TURNED.

    Args:
        x, g, partial: images, gradients of the output, both planes of H·W contiguous pixels; float32.
        x_planes, g_planes: number of planes from one image to the next.
        N, C, H, W, steps_each: numbers of images, channels, rows and columns; steps of BK per split.
        KH, KW, ROW, COL, D: size of the kernel, its tap on the output pixel, and the dilation.
        KYB, KXB: kernel rows per program, and a number of at least KW; both powers of two.
        WI, WO: columns of x and of g in a block.
        OFFSET, ACROSS: where the blocks of columns of x begin, relative to the first column of g, and their number.
        BK, WRAPS: pairs of an image and a row at a time, and how often they may reach the next image; 0 for any number.
        LONG: whether their distance in memory takes 64 bits.
        TURNED: whether the problem is transposed, as in `toeplitz.toeplitz_sum`.
        PRECISION: of float32 products.
        UPCAST: whether to multiply in float32; for the interpreter, whose bfloat16 products are wrong.
    """
    row_blocks: tl.constexpr = (KH + KYB - 1) // KYB
    c = tl.program_id(0) // row_blocks
    ky0 = tl.program_id(0) % row_blocks * KYB
    e = tl.program_id(1)
    split = tl.program_id(2)
    acc = _product(
        x, g, c, ky0, e, split, x_planes, g_planes, N, steps_each, H, W, ROW, D, KYB, WI, WO, OFFSET, BK, WRAPS, LONG,
        TURNED, PRECISION, UPCAST,
    )  # fmt: skip
    taps = _diagonals(acc, COL * D + OFFSET + e * WI, D, KYB, KXB, WI, WO)
    q = tl.arange(0, KYB * KXB)
    kyo = ky0 + q // KXB
    place = ((split * ACROSS + e).to(tl.int64) * C + c) * (KH * KW) + kyo * KW + q % KXB
    tl.store(partial + place, taps, mask=(kyo < KH) & (q % KXB < KW))
