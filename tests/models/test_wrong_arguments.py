"""Arguments and images that a network cannot take are refused with a message that says why."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

from tests.models.zoo import NANO, create, images
from widekernel.errors import ArgumentError, ShapeError
from widekernel.layers import LargeKernel

TYPOS = [
    ("replknet_nano", "kernel_size", "kernel_sizes"),
    ("replknet_nano", "large_kernel_sizes", "kernel_sizes"),
    ("slak_nano", "width_facto", "width_factor"),
    ("slak_reg_nano", "Decomposed", "decomposed"),
    ("shiftwise_nano", "ghost_ration", "ghost_ratio"),
    ("shiftwise_v1_nano", "path", "paths"),
    ("unireplknet_nano", "kernel_size", "kernel_sizes"),
    ("convnext_isotropic_nano", "patchsize", "patch_size"),
    ("roadmap_07_kernel7", "kernel_sizes", "kernel_size"),
    ("slak_nano", "drop_path", "drop_path_rate"),
    ("slak_nano", "out_indice", "out_indices"),
]


@pytest.mark.parametrize(("name", "typo", "meant"), TYPOS)
@pytest.mark.parametrize("features_only", [False, True], ids=["network", "features_only"])
def test_unknown_argument(name: str, typo: str, meant: str, features_only: bool) -> None:
    with pytest.raises(TypeError, match=rf"{name} got an unknown argument '{typo}'\. Did you mean '{meant}'\?"):
        timm.create_model(name, features_only=features_only, **{typo: 3})


@pytest.mark.parametrize("name", NANO)
def test_unknown_argument_without_a_similar_one(name: str) -> None:
    with pytest.raises(TypeError, match=rf"{name} got an unknown argument 'zzzz'\. It takes .*num_classes"):
        timm.create_model(name, zzzz=1)


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("replknet_nano", {"kernel_sizes": (30, 15, 7, 5)}, "kernel size 30 is not a positive odd number.*use 31"),
    ("replknet_nano", {"small_kernel": 4}, "kernel size 4 is not a positive odd number"),
    ("replknet_nano", {"small_kernel": 7}, "small_kernel 7 is larger than the kernel size 5"),
    ("replknet_nano", {"depths": (1, 1, 1)}, "one entry per stage.*'depths': 3"),
    ("replknet_nano", {"dims": (8, 8, 8, 8, 8)}, "one entry per stage.*'dims': 5"),
    ("replknet_nano", {"kernel_sizes": 31}, "kernel_sizes must be a sequence with one entry per stage, not 31"),
    ("replknet_nano", {"dw_ratio": 0.0}, "depthwise_widths are .*at least one channel"),
    ("replknet_nano", {"ffn_ratio": 0.01}, "hidden_widths are .*at least one channel"),
    ("slak_nano", {"kernel_sizes": (31, 16, 7, 5)}, "kernel size 16 is not a positive odd number"),
    ("slak_nano", {"kernel_sizes": (31, -3, 7, 5)}, "kernel size -3 is not a positive odd number"),
    ("slak_nano", {"kernel_sizes": (31, 15, 7)}, "one entry per stage.*'kernel_sizes': 3"),
    ("slak_nano", {"small_kernel": 4}, "small_kernel 4 is not a positive odd number"),
    ("slak_nano", {"small_kernel": 7}, r"small_kernel 7 is larger than a kernel size of \(31, 15, 7, 5\)"),
    ("slak_nano", {"small_kernel": 4, "decomposed": False}, "small_kernel 4 is not a positive odd number"),
    ("slak_nano", {"small_kernel": 0}, "small_kernel=0 leaves the strips without a short side"),
    ("slak_nano", {"width_factor": 0.01}, "widths are .*at least one channel"),
    ("slak_nano", {"padding": "same"}, r"options of the slak_pw_\* networks only"),
    ("slak_nano", {"branches": 2}, r"options of the slak_pw_\* networks only"),
    ("slak_reg_nano", {"decomposed": False}, "decomposed=False leaves no strips"),
    ("slak_reg_nano", {"small_kernel": 5}, "tile size 5 is not smaller than the kernel size 5"),
    ("slak_pw_nano", {"padding": "valid"}, "padding 'valid' is unknown: it must be one of 'full', 'k-1', 'same'"),
    ("slak_pw_nano", {"padding": "sane"}, r"padding 'sane' is unknown: .*Did you mean 'same'\?"),
    ("slak_nano", {"strips": "shufled"}, r"strips 'shufled' is unknown: .*Did you mean 'shuffled'\?"),
    ("slak_nano", {"strips": "Split"}, r"strips 'Split' is unknown: .*Did you mean 'split'\?"),
    ("roadmap_08_gelu", {"act": "swish"}, "act 'swish' is unknown: it must be one of 'relu', 'gelu'"),
    ("roadmap_08_gelu", {"act": "glu"}, r"act 'glu' is unknown: .*Did you mean 'gelu'\?"),
    ("roadmap_nano", {"norm": "gn"}, r"norm 'gn' is unknown: it must be one of 'bn', 'ln'\. Did you mean '[bl]n'\?"),
    ("roadmap_nano", {"block": "basic"}, "block 'basic' is unknown: it must be one of 'bottleneck', 'inverted'"),
    ("roadmap_nano", {"block": "inverter"}, r"block 'inverter' is unknown: .*Did you mean 'inverted'\?"),
    ("roadmap_nano", {"stem": "patchfy"}, r"stem 'patchfy' is unknown: .*Did you mean 'patchify'\?"),
    ("roadmap_12_final_norm", {"layer_scale": 1e-6}, "layer_scale needs separate_downsample=True"),
    ("slak_pw_nano", {"branches": 0}, "branches=0 must be at least 1"),
    ("shiftwise_nano", {"ghost_ratio": -0.1}, r"ghost_ratio -0.1 must lie in \[0, 1\)"),
    ("shiftwise_nano", {"ghost_ratio": 1.0}, r"ghost_ratio 1.0 must lie in \[0, 1\)"),
    ("shiftwise_v1_nano", {"ghost_ratio": float("nan")}, r"ghost_ratio nan must lie in \[0, 1\)"),
    ("shiftwise_nano", {"ghost_ratio": 0.99}, "ghost_ratio 0.99 leaves none of 16 channels"),
    ("shiftwise_nano", {"paths": 0}, "paths=0 and groups=4 must both be at least 1"),
    ("shiftwise_nano", {"groups": 0}, "paths=2 and groups=0 must both be at least 1"),
    ("shiftwise_nano", {"small_kernel": 2}, "tile size 2 is not a positive odd number"),
    ("shiftwise_nano", {"kernel_sizes": (31, 15, 7, 3)}, "tile size 3 is not smaller than the kernel size 3"),
    ("shiftwise_nano", {"depths": (1, 1)}, "one entry per stage.*'depths': 2"),
    ("unireplknet_nano", {"kernel_sizes": (3, 13, (13, 6), 7)}, "kernel size 6 is unknown: it must be one of 0, 3, 5, 7, 9"),
    ("unireplknet_nano", {"kernel_sizes": (3, 13, (), 7)}, r"give every stage a size, or a tuple of sizes for its blocks"),
    ("unireplknet_nano", {"kernel_sizes": (3, 13, 7)}, "one entry per stage.*'kernel_sizes': 3"),
    ("unireplknet_nano", {"dims": (2, 8, 8, 8)}, "every stage needs at least 4 channels"),
    ("convnext_isotropic_nano", {"kernel_size": 8}, "kernel size 8 is not a positive odd number"),
    ("roadmap_07_kernel7", {"kernel_size": 6}, "kernel size 6 is not a positive odd number.*use 7"),
    ("roadmap_07_kernel7", {"kernel_size": 7.0}, "kernel size 7.0 is not a positive odd number"),
    *(
        (name, {"depths": (1, -1, 1, 1)}, r"depths are \(1, -1, 1, 1\): every stage needs a whole number of blocks")
        for name in NANO
        if name != "convnext_isotropic_nano"
    ),
    *(
        ("convnext_isotropic_nano", {"depth": depth}, f"depth is {depth}, but must be a whole number, at least 1")
        for depth in (-1, 0)
    ),
    ("replknet_nano", {"depths": 3}, "depths must be a sequence with one entry per stage, not 3"),
    ("roadmap_00_resnet50", {"depths": (3, 4, 6)}, "one entry per stage.*'depths': 3"),
    ("roadmap_00_resnet50", {"dw_first": True}, "dw_first=True needs block='inverted'"),
    ("roadmap_02_patchify", {"block": "inverted"}, "block='inverted' needs depthwise=True"),
    ("roadmap_05_inverted", {"fewer_norms": True}, "fewer_norms=True needs dw_first=True"),
    ("roadmap_08_gelu", {"separate_downsample": True}, "separate_downsample=True needs"),
]


@pytest.mark.parametrize(
    ("name", "arguments", "message"), WRONG, ids=[f"{n}-{'-'.join(f'{k}={v}' for k, v in a.items())}" for n, a, _ in WRONG]
)
def test_wrong_argument(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        timm.create_model(name, **arguments)


@pytest.mark.parametrize("name", NANO)
class TestWrongImages:
    def test_too_small(self, name: str) -> None:
        model = create(name)
        stride = model.feature_info[-1]["reduction"]
        side = stride - 1
        with pytest.raises(ShapeError, match=rf"image is {side}x64 but the network's stride is {stride}.*enlarge"):
            model(torch.randn(1, 3, side, 64))
        assert model.eval()(images(stride)).shape == (2, 1000)

    def test_other_channels(self, name: str) -> None:
        with pytest.raises(ShapeError, match=r"input has 4 channels but the network takes 3: create it with in_chans=4"):
            create(name)(images(channels=4))
        with pytest.raises(ShapeError, match=r"input has 3 channels but the network takes 1"):
            create(name, in_chans=1)(images())

    def test_one_image_without_a_batch(self, name: str) -> None:
        with pytest.raises(ShapeError, match=r"shape \(3, 64, 64\): the network takes \(N, 3, H, W\)"):
            create(name)(images()[0])

    def test_features_only(self, name: str) -> None:
        model = create(name, features_only=True)
        for wrong in (images(channels=4), images()[0], images(4)):
            with pytest.raises(ShapeError):
                model(wrong)


def test_small_kernel_that_is_not_smaller_is_left_out() -> None:
    """The authors write "7 7 7 7 100" for a network without small kernels."""
    model = timm.create_model("slak_nano", kernel_sizes=(7, 7, 7, 7), small_kernel=100, decomposed=False)
    layers = [module for module in model.modules() if isinstance(module, LargeKernel)]
    assert [[tuple(kernel.shape[2:]) for kernel in layer.source.kernels] for layer in layers] == [[(7, 7)]] * 5
    assert model.eval()(images()).shape == (2, 1000)
    some = timm.create_model("slak_nano", small_kernel=7, decomposed=False)
    assert [some.stages[i].blocks[0].mixer.source.num_branches for i in range(4)] == [2, 2, 1, 1]


def test_networks_with_three_stages() -> None:
    arguments = {"kernel_sizes": (9, 7, 5), "depths": (1, 1, 1), "dims": (8, 12, 16)}
    for name in ("slak_nano", "replknet_nano", "shiftwise_nano"):
        maps = timm.create_model(name, features_only=True, **arguments)(images())
        assert [tuple(feature.shape[1:]) for feature in maps] == [(8, 16, 16), (12, 8, 8), (16, 4, 4)]


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_shallow_isotropic_networks_return_each_map_once(depth: int) -> None:
    model = timm.create_model("convnext_isotropic_nano", depth=depth, features_only=True)
    maps = model(images())
    assert len(maps) == len(model.feature_info.channels()) == min(depth, 4)
