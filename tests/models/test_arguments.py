"""Arguments of each family: defaults, effects, and refused values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

from tests.models.zoo import NANO, SMALL, create, images, on_meta
from widekernel.layers import LargeKernel, Rectangles, SharedStrips, ShiftTiles, ShuffledStrips, SplitStrips, TruncatedTiles

WITH_7X7_KERNELS = [name for name in timm.list_models("roadmap_*") if name[8:10].isdigit() and int(name[8:10]) >= 7]


def _shapes(model: nn.Module, pattern: str) -> list[tuple[int, ...]]:
    return [tuple(parameter.shape) for key, parameter in model.named_parameters() if pattern in key]


def _kernels(model: nn.Module, stage: int) -> list[tuple[int, ...]]:
    """Return the shapes of the branches of the first large kernel of a stage."""
    layer = next(module for module in model.stages[stage].modules() if isinstance(module, LargeKernel))
    return [tuple(rect.kernel.shape) for rect in layer.source.rects()]


# ---- RepLKNet


@pytest.mark.parametrize(
    ("name", "dims", "kernels", "small", "dw_ratio"),
    [
        ("replknet_31b", (128, 256, 512, 1024), (31, 29, 27, 13), 5, 1.0),
        ("replknet_31l", (192, 384, 768, 1536), (31, 29, 27, 13), 5, 1.0),
        ("replknet_xl", (256, 512, 1024, 2048), (27, 27, 27, 13), None, 1.5),
    ],
)
def test_replknet_defaults(name: str, dims: tuple[int, ...], kernels: tuple[int, ...], small: Any, dw_ratio: float) -> None:
    model = on_meta(name)
    for stage, (dim, size) in enumerate(zip(dims, kernels)):
        width = int(dim * dw_ratio)
        square = [(width, 1, small, small)] if small else []
        assert _kernels(model, stage) == [(width, 1, size, size), *square]
    assert [info["num_chs"] for info in model.feature_info] == list(dims)


def test_replknet_arguments() -> None:
    model = timm.create_model(
        "replknet_nano",
        kernel_sizes=[9, 7, 5, 5],
        small_kernel=3,
        depths=[1, 2, 1, 1],
        dims=[8, 12, 16, 24],
        dw_ratio=1.5,
        ffn_ratio=2.0,
        norm_intermediate_features=True,
    )
    assert [_kernels(model, i)[0] for i in range(4)] == [(12, 1, 9, 9), (18, 1, 7, 7), (24, 1, 5, 5), (36, 1, 5, 5)]
    assert _kernels(model, 0)[1] == (12, 1, 3, 3)
    assert [len(stage.blocks) for stage in model.stages] == [2, 4, 2, 2]
    assert model.stages[0].blocks[1].pw1.conv.weight.shape == (16, 8, 1, 1)
    assert [norm.num_features for norm in model.feature_norms] == [8, 12, 16, 24]


@pytest.mark.parametrize("none", [0, None])
def test_replknet_without_small_kernels(none: int | None) -> None:
    from widekernel.models.replknet import replknet_nano

    assert [len(_kernels(replknet_nano(small_kernel=none), i)) for i in range(4)] == [1, 1, 1, 1]


def test_feature_norms_act_where_maps_are_handed_out() -> None:
    model, x = create("replknet_nano_feature_norms").eval(), images()
    with torch.no_grad():
        logits, before = model(x), model.forward_intermediates(x, intermediates_only=True)
        model.feature_norms[0].bias.fill_(2.0)
        after = model.forward_intermediates(x, intermediates_only=True)
        assert torch.equal(model(x), logits)
    torch.testing.assert_close(after[0], before[0] + 2.0)
    assert all(torch.equal(a, b) for a, b in zip(after[1:], before[1:]))


# ---- SLaK


@pytest.mark.parametrize(
    ("size", "dims", "depths"),
    [
        ("tiny", (124, 249, 499, 998), (3, 3, 9, 3)),
        ("small", (124, 249, 499, 998), (3, 3, 27, 3)),
        ("base", (166, 332, 665, 1331), (3, 3, 27, 3)),
        ("large", (249, 499, 998, 1996), (3, 3, 27, 3)),
    ],
)
def test_slak_defaults(size: str, dims: tuple[int, ...], depths: tuple[int, ...]) -> None:
    model = on_meta(f"slak_{size}")
    for stage, (dim, big) in enumerate(zip(dims, (51, 49, 47, 13))):
        assert _kernels(model, stage) == [(dim, 1, big, 5), (dim, 1, 5, big), (dim, 1, 5, 5)]
        assert len(model.stages[stage].blocks) == depths[stage]
        assert len(model.stages[stage].blocks[0].mixer.norms) == 3


def test_slak_as_convnext() -> None:
    """The authors' "7 7 7 7 100" has one 7x7 kernel per block, with a batch norm."""
    from widekernel.models.slak import slak_tiny

    with torch.device("meta"):
        model = slak_tiny(kernel_sizes=(7, 7, 7, 7), small_kernel=None, decomposed=False, width_factor=1.0)
    assert sum(parameter.numel() for parameter in model.parameters()) == 28_595_752
    assert [_kernels(model, i) for i in range(4)] == [[(96 * 2**i, 1, 7, 7)] for i in range(4)]
    # timm drops arguments that are None, which makes no difference here.
    through_timm = on_meta("slak_tiny", kernel_sizes=(7, 7, 7, 7), small_kernel=None, decomposed=False, width_factor=1.0)
    assert _shapes(through_timm, "") == _shapes(model, "")


def test_slak_arguments() -> None:
    model = timm.create_model(
        "slak_nano", kernel_sizes=(13, 11, 9, 7), small_kernel=5, width_factor=1.3, depths=(2, 1, 1, 1), dims=(8, 12, 16, 24)
    )
    assert [info["num_chs"] for info in model.feature_info] == [10, 15, 20, 31]
    assert _kernels(model, 0) == [(10, 1, 13, 5), (10, 1, 5, 13), (10, 1, 5, 5)]
    assert len(model.stages[0].blocks) == 2


def test_slak_without_strips() -> None:
    assert _kernels(timm.create_model("slak_nano", decomposed=False), 0) == [(16, 1, 31, 31), (16, 1, 3, 3)]
    assert _kernels(timm.create_model("slak_nano", decomposed=False, small_kernel=0), 0) == [(16, 1, 31, 31)]


def test_slak_strips_of_equal_sides_have_no_square() -> None:
    model = timm.create_model("slak_nano", kernel_sizes=(9, 7, 5, 5), small_kernel=5)
    assert _kernels(model, 3) == [(128, 1, 5, 5), (128, 1, 5, 5)]
    assert len(model.stages[3].blocks[0].mixer.norms) == 2


@pytest.mark.parametrize("kind", ["slak", "slak_reg", "slak_pw", "slak_pww"])
def test_slak_without_batch_norm(kind: str) -> None:
    model = timm.create_model(f"{kind}_nano", bn=False)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in timm.create_model(f"{kind}_nano").modules())


@pytest.mark.parametrize(
    ("name", "strips"),
    [
        ("slak_tiny", Rectangles),
        ("slak_reg_tiny", SplitStrips),
        ("slak_pw_tiny", ShuffledStrips),
        ("slak_pww_tiny", SharedStrips),
        ("shiftwise_tiny", ShiftTiles),
        ("shiftwise_v1_tiny", ShiftTiles),
    ],
)
def test_strips_come_from_the_kernel_source_of_their_kind(name: str, strips: type) -> None:
    kinds = (Rectangles, SplitStrips, ShuffledStrips, SharedStrips, ShiftTiles)
    layers = [module for module in on_meta(name).modules() if isinstance(module, LargeKernel)]
    assert len(layers) in (18, 27)
    for layer in layers:
        assert next(type(module) for module in layer.source.modules() if isinstance(module, kinds)) is strips


@pytest.mark.parametrize(("padding", "truncated"), [("full", 0), ("k-1", 0), ("same", 5)])
def test_padding_of_shuffled_tiles(padding: str, truncated: int) -> None:
    model = timm.create_model("slak_pw_nano", padding=padding)
    assert sum(isinstance(module, TruncatedTiles) for module in model.modules()) == truncated


def test_full_padding_and_k_minus_1_are_the_same_function() -> None:
    x, outputs = images(), []
    for padding in ("full", "k-1", "same"):
        torch.manual_seed(0)
        with torch.no_grad():
            outputs.append(timm.create_model("slak_pw_nano", padding=padding, layer_scale=1.0).eval()(x))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2])


@pytest.mark.parametrize("branches", [1, 3])
def test_branches_of_shuffled_tiles(branches: int) -> None:
    model = timm.create_model("slak_pw_nano", branches=branches)
    table = model.stages[0].blocks[0].mixer.source.sources[0].tile_at
    assert table.shape == (2, branches, 16, 11)
    assert _shapes(model, "tiles") == _shapes(timm.create_model("slak_pw_nano"), "tiles")


# ---- Shift-wise


@pytest.mark.parametrize(
    ("name", "dims", "tile"),
    [
        ("shiftwise_tiny", (80, 160, 320, 640), 3),
        ("shiftwise_small", (96, 192, 384, 768), 3),
        ("shiftwise_base", (128, 256, 512, 1024), 3),
        ("shiftwise_v1_tiny", (96, 192, 384, 768), 5),
        ("shiftwise_v1_small", (96, 192, 384, 768), 5),
        ("shiftwise_v1_base", (128, 256, 512, 1024), 5),
    ],
)
def test_shiftwise_defaults(name: str, dims: tuple[int, ...], tile: int) -> None:
    model = on_meta(name)
    for stage, (dim, big) in enumerate(zip(dims, (51, 49, 47, 13))):
        worked = dim - int(dim * 0.23) if "v1" in name else int(dim * 0.77) // 2 * 2
        source = model.stages[stage].blocks[0].mixer.layer.source
        count = -(-big // tile)
        assert [tuple(p.shape) for p in source.parameters()] == [(worked * count, 1, tile, tile)] * 2
        assert source.tile_at.shape == (2, 4, worked, count)


@pytest.mark.parametrize("name", ["shiftwise_nano", "shiftwise_v1_nano"])
def test_shiftwise_arguments(name: str) -> None:
    model = timm.create_model(name, ghost_ratio=0.5, paths=3, groups=2, width_factor=1.5)
    mixer = model.stages[0].blocks[0].mixer
    assert mixer.selected.numel() == mixer.ghosts.numel() == 12
    assert sorted([*mixer.selected.tolist(), *mixer.ghosts.tolist()]) == list(range(24))
    assert len(mixer.layer.source.tiles) == 3
    assert mixer.layer.source.tile_at.shape == (2, 2, 12, 11)
    assert timm.create_model(name, ghost_ratio=0.0).stages[0].blocks[0].mixer.ghosts.numel() == 0


# ---- The roadmap


@pytest.mark.parametrize("name", WITH_7X7_KERNELS)
@pytest.mark.parametrize("size", [1, 5, 31])
def test_roadmap_with_other_kernel_sizes(name: str, size: int) -> None:
    model = timm.create_model(name, kernel_size=size, depths=(1, 1, 1, 1), width=8, num_classes=2)
    depthwise = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert len(depthwise) == 4
    assert {m.kernel_size for m in depthwise} == {(size, size)}
    with torch.no_grad():
        assert model.eval()(images(32)).shape == (2, 2)


def test_seven_roadmap_steps_have_7x7_kernels() -> None:
    assert len(WITH_7X7_KERNELS) == 7
    assert all(on_meta(name).cfg.kernel_size == 7 for name in WITH_7X7_KERNELS)


# ---- Randomness


@pytest.mark.parametrize("name", NANO)
def test_construction_does_not_reseed(name: str) -> None:
    np.random.seed(7)
    before = np.random.get_state()
    torch.manual_seed(1)
    first, after_first = create(name), torch.get_rng_state()
    second = create(name)
    torch.manual_seed(1)
    again, after_again = create(name), torch.get_rng_state()
    state = np.random.get_state()
    assert state[0] == before[0]
    assert np.array_equal(state[1], before[1])
    assert state[2:] == before[2:]
    assert torch.equal(after_first, after_again)
    assert torch.equal(first.head.fc.weight, again.head.fc.weight)
    # Two in a row differ, and another seed leaves another state: nothing was seeded in between.
    assert not torch.equal(first.head.fc.weight, second.head.fc.weight)
    torch.manual_seed(2)
    create(name)
    assert not torch.equal(torch.get_rng_state(), after_first)


@pytest.mark.parametrize("name", [name for name in SMALL if name.startswith(("shiftwise", "slak_pw_"))])
def test_tables_are_the_same_in_every_construction(name: str) -> None:
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append({key: value for key, value in create(name).state_dict().items() if not value.is_floating_point()})
    tables = [key for key in states[0] if key.endswith(("tile_at", "centre", "selected", "ghosts"))]
    assert tables
    assert all(torch.equal(states[0][key], states[1][key]) for key in tables)


@pytest.mark.parametrize("name", [name for name in NANO if name.startswith(("shiftwise", "slak_pw_"))])
def test_tables_of_two_networks_are_equal_but_not_shared(name: str) -> None:
    first, second = (dict(create(name).named_buffers()) for _ in range(2))
    tables = [key for key in first if key.endswith(("tile_at", "centre", "selected", "ghosts"))]
    assert tables
    for key in tables:
        assert torch.equal(first[key], second[key])
        assert first[key].data_ptr() != second[key].data_ptr()
    assert len({table[key].data_ptr() for table in (first, second) for key in tables}) == 2 * len(tables)
