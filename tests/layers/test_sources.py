"""Kernel sources, compared with tile maps that are shifted and added as in the papers, and their state dicts."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.layers.helpers import assert_close, image, tall_strip, wide_strip
from widekernel import ops
from widekernel.layers import (
    KernelSource,
    LargeKernel,
    Rectangles,
    RectSource,
    SharedStrips,
    ShiftTiles,
    ShuffledStrips,
    SourceGroup,
    SplitStrips,
    TruncatedTiles,
    tile_tables,
)
from widekernel.layers.sources import dilate, rects_of
from widekernel.layers.tile_tables import draw_tables
from widekernel.layers.tiles import cut_into_tiles, num_tiles

C = 3
# K divisible by N, and with one and two columns too many; the last is wider than the image.
GEOMETRIES = [(9, 3), (7, 3), (11, 3), (13, 5), (15, 5), (3, 1), (31, 5)]
GEOMETRY = pytest.mark.parametrize(("kernel_size", "tile_size"), GEOMETRIES, ids=lambda size: str(size))


def shift_add(x: Tensor, tiles: Tensor, kernel_size: int, wide: bool) -> Tensor:
    """Add up the map of every tile, moved to the tile's slot; `tiles` is (C, slots, N, N), pixels outside are zero."""
    tile_size, (height, width) = tiles.shape[-1], x.shape[-2:]
    margin = kernel_size + tile_size
    canvas = F.pad(x, (margin,) * 4)
    total = torch.zeros_like(x)
    for slot in range(tiles.shape[1]):
        map_of_tile = F.conv2d(canvas, tiles[:, slot].unsqueeze(1), groups=x.shape[1])
        along, across = margin + slot * tile_size - kernel_size // 2, margin - tile_size // 2
        top, left = (across, along) if wide else (along, across)
        total = total + map_of_tile[..., top : top + height, left : left + width]
    return total


def by_slot(flat: Tensor, slots: Tensor) -> Tensor:
    """Put tile slots[c][s] of channel c into slot s, by plain loops."""
    count = slots.shape[1]
    return torch.stack([torch.stack([flat[c * count + int(slots[c, s])] for s in range(count)]) for c in range(len(slots))])


def check(source: KernelSource, want: list[Tensor], x: Tensor) -> None:
    responses = source.responses(x)
    assert len(responses) == len(want) == source.num_branches
    for mine, truth in zip(responses, want):
        assert_close(mine, truth)


@GEOMETRY
def test_split_strips(kernel_size: int, tile_size: int) -> None:
    source, x = SplitStrips(C, kernel_size, tile_size).double(), image(C)
    tall, wide = (tiles.detach().view(C, -1, tile_size, tile_size) for tiles in (source.tall, source.wide))
    check(source, [shift_add(x, tall, kernel_size, wide=False), shift_add(x, wide, kernel_size, wide=True)], x)


@GEOMETRY
def test_shared_strips(kernel_size: int, tile_size: int) -> None:
    source, x = SharedStrips(C, kernel_size, tile_size).double(), image(C)
    tiles = source.tiles.detach().view(C, -1, tile_size, tile_size)
    gates = [1 / (1 + torch.exp(-gate.detach())).view(C, -1, 1, 1) for gate in source.gates]
    assert not torch.equal(*gates)
    wide, tall = (shift_add(x, tiles * gate, kernel_size, wide=d == 0) for d, gate in enumerate(gates))
    check(source, [wide, tall], x)


@GEOMETRY
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize(("paths", "groups"), [(1, 1), (2, 1), (1, 3), (2, 4)], ids=str)
def test_shift_tiles(kernel_size: int, tile_size: int, paths: int, groups: int, gated: bool) -> None:
    source, x = ShiftTiles(C, kernel_size, tile_size, paths, groups, gated).double(), image(C)
    flat = sum(path.detach() for path in source.tiles).squeeze(1)
    want = []
    for d in range(2):
        weighted = flat * torch.sigmoid(source.gates[d].detach()).view(-1, 1, 1) if gated else flat
        strips = [shift_add(x, by_slot(weighted, source.tile_at[d, g]), kernel_size, wide=d == 0) for g in range(groups)]
        want.append(sum(strips))
    count = num_tiles(kernel_size, tile_size)
    middle = [torch.stack([flat[c * count + int(source.centre[g, c])] for c in range(C)]) for g in range(groups)]
    want.append(F.conv2d(x, sum(middle).unsqueeze(1), padding=tile_size // 2, groups=C))
    check(source, want, x)


@GEOMETRY
@pytest.mark.parametrize("branches", [1, 3])
def test_shuffled_strips(kernel_size: int, tile_size: int, branches: int) -> None:
    source, x = ShuffledStrips(C, kernel_size, tile_size, branches).double(), image(C)
    flat = source.tiles.detach().squeeze(1)
    want = [
        sum(shift_add(x, by_slot(flat, source.tile_at[d, b]), kernel_size, wide=d == 0) for b in range(branches))
        for d in range(2)
    ]
    check(source, want, x)
    in_order = torch.arange(num_tiles(kernel_size, tile_size), dtype=torch.int32)
    assert torch.equal(source.tile_at[0, 0], in_order.expand(C, -1))


def truncated(x: Tensor, tiles: Tensor, kernel_size: int, wide: bool) -> Tensor:
    """Add at every pixel the tiles whose middle lies in the image, pixel by pixel along the strip."""
    if not wide:
        return truncated(x.transpose(2, 3), tiles.transpose(2, 3), kernel_size, wide=True).transpose(2, 3)
    tile_size = tiles.shape[-1]
    half = tile_size // 2
    padded, (height, width) = F.pad(x, (half,) * 4), x.shape[-2:]
    y = torch.zeros_like(x)
    for column in range(width):
        for slot in range(tiles.shape[1]):
            middle = column + slot * tile_size + half - kernel_size // 2
            if 0 <= middle < width:
                for row in range(height):
                    patch = padded[..., row : row + tile_size, middle : middle + tile_size]
                    y[..., row, column] += (patch * tiles[:, slot]).sum((2, 3))
    return y


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize(("kernel_size", "tile_size"), [(9, 3), (7, 3), (13, 5), (31, 5)])
def test_truncated_tiles(kernel_size: int, tile_size: int, branches: int) -> None:
    strips = ShuffledStrips(C, kernel_size, tile_size, branches).double()
    source, x = TruncatedTiles(strips).double(), image(C, 7, 8, 1)
    arranged = [tiles.detach() for tiles in strips.arranged()]
    check(source, [truncated(x, tiles, kernel_size, wide=d == 0) for d, tiles in enumerate(arranged)], x)


def test_truncated_tiles_differ_from_the_strips_only_where_a_tile_is_cut() -> None:
    """At each end, one tile that reaches into the image is dropped: tiles are 3 wide, with 3 pixels beside their middle."""
    strips = ShuffledStrips(C, 9, 3).double()
    x = image(C, 25, 26)
    for d, (part, whole) in enumerate(zip(TruncatedTiles(strips).responses(x), strips.responses(x))):
        along = 3 - d
        largest = (part - whole).detach().abs().transpose(along, -1).amax((0, 1, 2))
        differs = largest > 1e-3
        assert (largest[~differs] < 1e-14).all()
        assert differs.nonzero().flatten().tolist() == [2, x.shape[along] - 3]


def test_truncated_tiles_give_gradients() -> None:
    source = TruncatedTiles(ShuffledStrips(2, 7, 3)).double()
    x = image(2, 5, 6, 1).requires_grad_()
    tiles = source.source.tiles
    assert torch.autograd.gradcheck(lambda x, _: tuple(source.responses(x)), (x, tiles), fast_mode=True)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_truncated_tiles_have_gradients_on_an_image_that_few_of_them_reach(size: int) -> None:
    """Several processes cannot reduce a gradient that does not exist."""
    strips = ShuffledStrips(2, 13, 5).double()
    source, x = TruncatedTiles(strips).double(), image(2, size, size, 1)
    arranged = [tiles.detach() for tiles in strips.arranged()]
    check(source, [truncated(x, tiles, 13, wide=d == 0) for d, tiles in enumerate(arranged)], x)
    sum(y.sum() for y in source.responses(x)).backward()
    assert strips.tiles.grad is not None


@pytest.mark.parametrize("sizes", [[(3, 3)], [(5, 1), (1, 5)], [(31, 31), (5, 5)], [(13, 3), (3, 13), (3, 3)]], ids=str)
def test_rectangles(sizes: list[tuple[int, int]]) -> None:
    source, x = Rectangles(C, sizes).double(), image(C)
    want = [F.conv2d(x, k.detach(), padding=(k.shape[2] // 2, k.shape[3] // 2), groups=C) for k in source.kernels]
    check(source, want, x)


@pytest.mark.parametrize("whole", [1, 2], ids=["source", "dilated-source"])
def test_rectangles_with_dilations(whole: int) -> None:
    """Every branch is PyTorch's dilated convolution; the parameters have no gaps."""
    sizes, dilations = [(7, 7), (3, 3), (3, 1), (1, 1)], [1, 3, 2, 4]
    source, x = dilate(Rectangles(C, sizes, dilations).double(), whole), image(C)
    steps = [step * whole for step in dilations]
    want = [
        F.conv2d(x, k.detach(), padding=(k.shape[2] // 2 * step, k.shape[3] // 2 * step), dilation=step, groups=C)
        for k, step in zip(source.kernels, steps)
    ]
    check(source, want, x)
    rects = rects_of(source) or []
    assert [(rect.size, rect.dilation) for rect in rects] == list(zip(sizes, steps))
    assert source.extents() == [(7, 7), (7, 7), (5, 1), (1, 1)]
    assert source.published_macs(4, 5) == 20 * C * (49 + 9 + 3 + 1)
    with ops.trace() as calls:
        source.responses(x)
    ran = [rect for _, problem in calls.calls for rect in zip(problem.kernels, problem.dilations)]
    assert ran == list(zip(sizes, steps))
    assert "dilations=[1, 3, 2, 4]" in repr(source) and "dilations" not in repr(Rectangles(C, sizes))
    gradients = torch.autograd.grad(
        sum((i + 1) * y.square().sum() for i, y in enumerate(source.responses(x))), source.kernels
    )
    plain = [kernel.detach().clone().requires_grad_() for kernel in source.kernels]
    theirs = [
        F.conv2d(x, k, padding=(k.shape[2] // 2 * step, k.shape[3] // 2 * step), dilation=step, groups=C)
        for k, step in zip(plain, steps)
    ]
    expected = torch.autograd.grad(sum((i + 1) * y.square().sum() for i, y in enumerate(theirs)), plain)
    for ours, other in zip(gradients, expected):
        torch.testing.assert_close(ours, other, rtol=1e-10, atol=1e-10)


def test_a_group_lines_up_the_branches_of_its_sources() -> None:
    parts = [SharedStrips(C, 7, 3).double(), Rectangles(C, [(3, 3), (1, 1)]).double(), Rectangles(C, [])]
    group, x = SourceGroup(parts), image(C)
    assert group.num_branches == 4
    assert all(map(torch.equal, group.responses(x), [r for part in parts for r in part.responses(x)]))
    assert [rect.size for rect in rects_of(group)] == [(3, 9), (9, 3), (3, 3), (1, 1)]
    assert group.published_macs(8, 9) == sum(part.published_macs(8, 9) for part in parts)


def test_a_group_with_truncated_tiles_is_not_a_sum_of_rectangles() -> None:
    assert rects_of(SourceGroup([TruncatedTiles(ShuffledStrips(C, 7, 3)), Rectangles(C, [(3, 3)])])) is None


@GEOMETRY
@pytest.mark.parametrize("along", ["tall", "wide"])
def test_cutting_a_strip_and_joining_it_again(kernel_size: int, tile_size: int, along: str) -> None:
    shape = (C, 1, kernel_size, tile_size) if along == "tall" else (C, 1, tile_size, kernel_size)
    kernel = torch.randn(shape, dtype=torch.float64)
    tiles = cut_into_tiles(kernel, tile_size).view(C, -1, tile_size, tile_size)
    strip = (tall_strip if along == "tall" else wide_strip)(tiles, kernel_size)
    assert torch.equal(strip.kernel[..., : shape[2], : shape[3]], kernel)
    assert strip.kernel.count_nonzero() == kernel.count_nonzero()
    assert strip.anchor == (shape[2] // 2, shape[3] // 2)


def test_only_strips_can_be_cut() -> None:
    with pytest.raises(ValueError, match="a 7x5 kernel is not a strip of 3x3 tiles: one side must be 3"):
        cut_into_tiles(torch.zeros(2, 1, 7, 5), 3)


SOURCES = {
    "rectangles": lambda: Rectangles(C, [(9, 3), (3, 9)]),
    "split": lambda: SplitStrips(C, 9, 3),
    "shared": lambda: SharedStrips(C, 9, 3),
    "shift": lambda: ShiftTiles(C, 9, 3, 2, 2, gated=True),
    "shuffled": lambda: ShuffledStrips(C, 9, 3, 2),
    "truncated": lambda: TruncatedTiles(ShuffledStrips(C, 9, 3, 2)),
}
STATES = {
    "rectangles": {"kernels.0": (3, 1, 9, 3), "kernels.1": (3, 1, 3, 9)},
    "split": {"tall": (9, 1, 3, 3), "wide": (9, 1, 3, 3)},
    "shared": {"tiles": (9, 1, 3, 3), "gates.0": (1, 9, 1, 1), "gates.1": (1, 9, 1, 1)},
    "shift": {
        "tiles.0": (9, 1, 3, 3),
        "tiles.1": (9, 1, 3, 3),
        "gates.0": (9,),
        "gates.1": (9,),
        "tile_at": (2, 2, 3, 3),
        "centre": (2, 3),
    },
    "shuffled": {"tiles": (9, 1, 3, 3), "tile_at": (2, 2, 3, 3)},
    "truncated": {"source.tiles": (9, 1, 3, 3), "source.tile_at": (2, 2, 3, 3)},
}
EACH = pytest.mark.parametrize("name", SOURCES)
WITH_TABLES = pytest.mark.parametrize("name", ["shift", "shuffled", "truncated"])


def tables_of(source: nn.Module) -> dict[str, Tensor]:
    return {key: value for key, value in source.state_dict().items() if not value.is_floating_point()}


@EACH
def test_contents_of_the_state(name: str) -> None:
    assert {key: tuple(value.shape) for key, value in SOURCES[name]().state_dict().items()} == STATES[name]


@EACH
def test_the_state_restores_the_source(name: str) -> None:
    source, other, x = SOURCES[name](), SOURCES[name](), image(C).float()
    for table in tables_of(other).values():  # as another version of PyTorch might draw them
        table.copy_(table.flip(-1))
    assert not torch.equal(other.responses(x)[0], source.responses(x)[0])
    other.load_state_dict(copy.deepcopy(source.state_dict()))
    assert all(map(torch.equal, other.responses(x), source.responses(x)))
    assert all(torch.equal(table, tables_of(other)[key]) for key, table in tables_of(source).items())


@WITH_TABLES
def test_tables_survive_a_change_of_type_and_reinitialization(name: str) -> None:
    source, fresh = SOURCES[name](), SOURCES[name]()
    assert {table.dtype for table in tables_of(source.bfloat16()).values()} == {torch.int32}
    (source.source if name == "truncated" else source).reset_parameters()
    assert all(torch.equal(table, tables_of(fresh)[key]) for key, table in tables_of(source).items())


@WITH_TABLES
def test_tables_do_not_depend_on_the_seed_but_weights_do(name: str) -> None:
    torch.manual_seed(1)
    first = SOURCES[name]().state_dict()
    torch.manual_seed(2)
    second = SOURCES[name]().state_dict()
    same = {key for key in first if torch.equal(first[key], second[key])}
    assert same == {key for key in first if not first[key].is_floating_point()}


def test_cached_tables_are_copied_for_every_network() -> None:
    """Drawing is slow, so it is done once; changing the drawn tables must not change later ones."""
    first, second = draw_tables(8, 7, 3), draw_tables(8, 7, 3)
    for one, other in zip(first, second):
        assert torch.equal(one, other)
        assert one.data_ptr() != other.data_ptr()
        one.zero_()
    assert all(map(torch.equal, draw_tables(8, 7, 3), second))
    assert tile_tables._drawn_tables.cache_info().hits >= 2


@pytest.mark.parametrize("name", [name for name in SOURCES if "tile_at" in SOURCES[name]().state_dict()])
def test_tables_of_equal_layers_do_not_share_memory(name: str) -> None:
    first, second = SOURCES[name](), SOURCES[name]()
    want = {key: buffer.clone() for key, buffer in second.named_buffers()}
    assert want
    for key, buffer in first.named_buffers():
        assert torch.equal(buffer, want[key])
        buffer.zero_()
    assert all(
        torch.equal(buffer, want[key]) for model in (second, SOURCES[name]()) for key, buffer in model.named_buffers()
    )


def test_drawing_tables_leaves_the_global_random_numbers_alone() -> None:
    torch.manual_seed(5)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    draw_tables(8, 7, 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)


@EACH
def test_constructing_draws_weights_and_nothing_else(name: str) -> None:
    """The next random number is the one that follows after drawing the weights alone, so nothing was reseeded."""
    numpy_before = np.random.get_state()[1].copy()
    torch.manual_seed(5)
    source = SOURCES[name]()
    after = torch.rand(1)
    torch.manual_seed(5)
    (source.source if name == "truncated" else source).reset_parameters()
    assert torch.equal(torch.rand(1), after)
    assert np.array_equal(np.random.get_state()[1], numpy_before)


@pytest.mark.parametrize("groups", [1, 4])
def test_every_group_is_a_permutation_of_its_own(groups: int) -> None:
    tile_at, centre = draw_tables(16, 17, groups)
    assert tile_at.shape == (2, groups, 16, 17)
    assert torch.equal(tile_at.sort(-1).values, torch.arange(17, dtype=torch.int32).expand_as(tile_at))
    assert len({tuple(row.tolist()) for row in tile_at.flatten(0, 2)}) == 2 * groups * 16
    assert centre.shape == (groups, 16)
    assert centre.min() >= 0 and centre.max() < 17


@WITH_TABLES
def test_tables_on_another_default_device(name: str) -> None:
    """A network may be built on a device where a CPU generator cannot draw; the tables are those of the CPU."""
    with torch.device("meta"):
        built, tables = SOURCES[name](), draw_tables(C, 3, 2)
    assert {value.device.type for value in built.state_dict().values()} == {"meta"}
    assert all(map(torch.equal, tables, draw_tables(C, 3, 2)))


@EACH
def test_gradients_reach_every_parameter(name: str) -> None:
    source = SOURCES[name]()
    sum(response.square().sum() for response in source.responses(image(C).float())).backward()
    for parameter in source.parameters():
        assert parameter.grad.count_nonzero() > 0.9 * parameter.numel()


@EACH
def test_sources_describe_themselves(name: str) -> None:
    source = SOURCES[name]()
    assert isinstance(source, RectSource) == (name != "truncated")
    assert source.published_macs(4, 4) > 0
    assert str(C) in repr(source)


TILED = [SplitStrips, SharedStrips, ShiftTiles, ShuffledStrips]


@pytest.mark.parametrize("kind", TILED, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    ("kernel_size", "tile_size", "message"),
    [
        (8, 3, "kernel size 8 is not a positive odd number: .*use 9"),
        (9, 2, "tile size 2 is not a positive odd number: .*use 3"),
        (9, 0, "tile size 0 is not a positive odd number"),
        (9, 9, "tile size 9 is not smaller than the kernel size 9"),
        (9, 11, "tile size 11 is not smaller"),
        (9.0, 3, "kernel size 9.0 is not a positive odd number"),
    ],
)
def test_wrong_tiles(kind: type, kernel_size: int, tile_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(C, kernel_size, tile_size)


@pytest.mark.parametrize("kind", TILED, ids=lambda kind: kind.__name__)
def test_old_names_of_the_sizes_work_and_warn(kind: type) -> None:
    with pytest.warns(FutureWarning, match="'big' is now called 'kernel_size'"):
        source = kind(C, big=9, small=3)
    assert (source.kernel_size, source.tile_size) == (9, 3)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Rectangles(C, [(4, 3)]), "kernel size 4 is not a positive odd number: .*use 5"),
        (lambda: Rectangles(C, [(3, -1)]), "kernel size -1 is not a positive odd number"),
        (lambda: Rectangles(C, [(3, True)]), "kernel size True is not"),
        (lambda: Rectangles(C, [(3, 3)], [1, 2]), "2 dilations for 1 branches: give one for each"),
        (lambda: Rectangles(C, [(3, 3)], [0]), "dilation 0 is not a positive whole number"),
        (lambda: ShiftTiles(C, 9, 3, paths=0), "paths=0 and groups=1 must both be at least 1"),
        (lambda: ShiftTiles(C, 9, 3, groups=0), "paths=1 and groups=0"),
        (lambda: ShuffledStrips(C, 9, 3, branches=0), "branches=0 must be at least 1"),
        (lambda: SourceGroup([Rectangles(2, [(3, 3)]), Rectangles(3, [(3, 3)])]), r"have \[2, 3\] channels"),
        (lambda: LargeKernel(SplitStrips(C, 9, 3), [nn.BatchNorm2d(C)]), "1 norms for 2 branches"),
    ],
    ids=["even", "negative", "bool", "dilations", "no-dilation", "paths", "groups", "branches", "group-channels", "norms"],
)
def test_wrong_sources(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("name", [name for name in SOURCES if name != "truncated"])
def test_an_image_of_other_channels(name: str) -> None:
    with pytest.raises(ValueError, match="an input with 4 channels"):
        SOURCES[name]().responses(torch.zeros(1, 4, 8, 8))
