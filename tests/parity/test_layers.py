"""Single layers against the official ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.layers.helpers import tall_strip, wide_strip
from tests.parity.reference import assert_close, weights
from widekernel import ops
from widekernel.layers import LargeKernel, SharedStrips, ShiftTiles
from widekernel.layers.tile_tables import draw_tables
from widekernel.layers.tiles import cut_into_tiles, tile_convolution_padding

SPLITS = ["51x5", "5x51", "49x5", "5x49", "47x5", "5x47", "13x5", "5x13"]


@pytest.mark.parametrize("name", SPLITS)
def test_a_strip_cut_into_tiles(name: str, golden: Path) -> None:
    data = np.load(golden / "shiftwise_split.npz")
    case = next(c for c in json.loads((golden / "shiftwise_split.json").read_text())["cases"] if _name(c) == name)
    kh, kw = case["kernel"]
    tiles = cut_into_tiles(torch.from_numpy(data[f"w_{name}"]), 5)
    assert torch.equal(tiles, torch.from_numpy(data[f"split_{name}"]))
    assert tile_convolution_padding(max(kh, kw), 5) == max(case["conv_padding"])
    strip = (tall_strip if kh > kw else wide_strip)(tiles.view(4, -1, 5, 5), max(kh, kw))
    y = ops.depthwise_sum(torch.from_numpy(data[f"x_{name}"]), [strip.kernel], [strip.anchor])
    assert_close(y, data[f"y_{name}"])


def _name(case: dict[str, list[int]]) -> str:
    return "x".join(map(str, case["kernel"]))


@pytest.mark.parametrize("big", [51, 49, 45, 13])
def test_gated_strips(big: int, shared: Path, golden: Path) -> None:
    description = json.loads((golden / "pww_layer.json").read_text())
    case = next(c for c in description["cases"] if c["big"] == big)
    renamed = {"split_convs.weight": "source.tiles", "lora1.weight": "source.gates.0", "lora2.weight": "source.gates.1"}
    state = {
        renamed.get(key, key.replace("bn_lora1", "norms.0").replace("bn_lora2", "norms.1")): value
        for key, value in weights(shared, case["keys"], description["seed"]).items()
    }
    layer = LargeKernel(SharedStrips(case["channels"], big, case["small"]), [nn.BatchNorm2d(3) for _ in range(2)]).eval()
    layer.load_state_dict(state)
    data = np.load(golden / "pww_layer.npz")
    x = torch.from_numpy(data[f"x_{big}_5"])
    with torch.no_grad():
        assert_close(layer(x), data[f"y_{big}_5"])
        assert_close(layer.folded()(x), data[f"y_{big}_5"])


@pytest.mark.parametrize("name", ["13_3_c4_g2", "51_3_c3_g4", "13_5_c2_g3"])
def test_shift_and_add(name: str, golden: Path) -> None:
    """The official operator on feature maps equals our strip of moved tiles: outputs and input gradient.

    Its input z has one map per tile, on an image that is N - 1 pixels larger. A tile with a single tap makes such maps from
    an image, so each map is passed as a channel of its own through a kernel with one tap at the place of the tile.
    """
    cases = json.loads((golden / "shift_add_op.json").read_text())["cases"]
    case = next(c for c in cases if c["name"] == name)
    data = np.load(golden / "shift_add_op.npz")
    z = torch.from_numpy(data[f"{name}.x"]).requires_grad_()
    big, small, channels, groups = case["big"], case["small"], case["c_out"], case["n_rep"]
    count, size = case["n_split"], (case["hout"], case["wout"])
    tile_at, centre = _tables(data, name, big, small, channels, groups)
    outputs = [
        _moved(z, tile_at[0], big, small, size, 3),
        _moved(z, tile_at[1], big, small, size, 2),
        _picked(z, centre, count, small, size),
    ]
    for ours, which in zip(outputs, ("h", "v", "i")):
        assert_close(ours, data[f"{name}.y_{which}"])
    gout = torch.from_numpy(data[f"{name}.gout"])
    torch.autograd.backward(outputs, list(gout.chunk(3)))
    assert z.grad is not None
    assert_close(z.grad, data[f"{name}.gin"])


def _tables(data, name: str, big: int, small: int, channels: int, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Convert the official displacements of each map to the tile in each slot."""
    shifts = torch.from_numpy(data[f"{name}.pad_hv"].astype(np.int64))
    slots = (big // 2 - (small - 1) - shifts) // small
    count = shifts.shape[0] // channels
    slots = slots.view(channels, count, 2, groups).permute(2, 3, 0, 1)
    centre = torch.from_numpy(data[f"{name}.idx_identit"].astype(np.int64)) - torch.arange(channels)[:, None] * count
    return slots.argsort(-1), centre.T


def _moved(z: torch.Tensor, table: torch.Tensor, big: int, small: int, size: tuple[int, int], axis: int) -> torch.Tensor:
    channels, count = table.shape[1:]
    maps = z.view(z.shape[0], channels, count, *z.shape[2:])
    summed = []
    for group in table:
        index = group.view(1, channels, count, 1, 1).expand_as(maps)
        moved = maps.gather(2, index)
        shape = (1, count * small) if axis == 3 else (count * small, 1)
        single = torch.zeros(channels, 1, *shape, dtype=z.dtype)
        # One map per slot: each is convolved with a kernel of one tap, at the slot's first column.
        for slot in range(count):
            tap = single.clone()
            tap[:, :, 0 if axis == 3 else slot * small, slot * small if axis == 3 else 0] = 1
            summed.append(_read(moved[:, :, slot], tap, big, small, size, axis))
    return torch.stack(summed).sum(0)


def _read(plane: torch.Tensor, tap: torch.Tensor, big: int, small: int, size: tuple[int, int], axis: int) -> torch.Tensor:
    """Apply a one-tap kernel anchored at K // 2; the plane's pixel (0, 0) is the image's (1 - N, 1 - N)."""
    margin = big + 2 * small
    plane = torch.nn.functional.pad(plane, (margin,) * 4)
    y = ops.depthwise_sum(plane, [tap], [(0, big // 2) if axis == 3 else (big // 2, 0)])
    along, across = margin + small - 1, margin + small - 1 - small // 2
    row, column = (across, along) if axis == 3 else (along, across)
    return y[:, :, row : row + size[0], column : column + size[1]]


def _picked(z: torch.Tensor, centre: torch.Tensor, count: int, small: int, size: tuple[int, int]) -> torch.Tensor:
    channels = centre.shape[1]
    maps = z.view(z.shape[0], channels, count, *z.shape[2:])
    start = small - 1 - small // 2
    total = sum(maps[:, torch.arange(channels), group] for group in centre)
    return total[:, :, start : start + size[0], start : start + size[1]]


@pytest.mark.parametrize("name", ["13_3_c4_g2", pytest.param("51_3_c3_g4", marks=pytest.mark.slow), "13_5_c2_g3"])
def test_shift_tiles_equal_the_official_composition(name: str, golden: Path) -> None:
    """`ShiftTiles` equals tile convolutions, then the official displacements, then the sum."""
    cases = json.loads((golden / "shift_add_op.json").read_text())["cases"]
    case = next(c for c in cases if c["name"] == name)
    data = np.load(golden / "shift_add_op.npz")
    big, small, channels, groups = case["big"], case["small"], case["c_out"], case["n_rep"]
    size = (case["hout"], case["wout"])
    source = ShiftTiles(channels, big, small, paths=2, groups=groups).double()
    tile_at, centre = _tables(data, name, big, small, channels, groups)
    source.tile_at.copy_(tile_at)
    source.centre.copy_(centre)
    x = torch.randn(2, channels, *size, dtype=torch.float64)
    z = sum(torch.nn.functional.conv2d(x, w, padding=small - 1, groups=channels) for w in source.tiles)
    expected = [
        _moved(z, tile_at[0], big, small, size, 3),
        _moved(z, tile_at[1], big, small, size, 2),
        _picked(z, centre, case["n_split"], small, size),
    ]
    for ours, theirs in zip(source.responses(x), expected):
        assert (ours - theirs).abs().max() <= 1e-12 * theirs.abs().max()


@pytest.mark.parametrize("name", ["shiftwise_v1_mini", "shiftwise_v2_mini", "shiftwise_v2_tiny"])
def test_tables_are_the_official_ones(name: str, golden: Path) -> None:
    """The private generator draws the official tables, without which official checkpoints are meaningless.

    The official tables hold the displacement of every tile, ours the tile in every slot.
    """
    data = np.load(golden / f"{name}_tables.npz")
    for stage in range(4):
        offsets = torch.from_numpy(data[f"stage{stage}.offsets"])
        centre = torch.from_numpy(data[f"stage{stage}.idx_identit"].astype(np.int64))
        channels, groups, count = *centre.shape, len(offsets)
        tile_at, ours = draw_tables(channels, count, groups)
        displacement = offsets[tile_at.long().argsort(-1)]
        expected = torch.from_numpy(data[f"stage{stage}.pad_hv"].astype(np.int64)).view(channels, count, 2, groups)
        assert torch.equal(displacement, expected.permute(2, 3, 0, 1))
        assert torch.equal(ours.long(), (centre - torch.arange(channels)[:, None] * count).T)
