"""Stems and downsampling layers: convolutions with a stride are fused with the norms and activations around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import timm
import torch
from hypothesis import given, settings
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.testing import assert_close

from tests.transforms.fusion import calls_of, fused, fused_names, randomized
from widekernel import fold, ops
from widekernel.ops.call_trace import FusedCall
from widekernel.transforms import to_torch
from widekernel.transforms.acceleration.fusion import fuse
from widekernel.transforms.acceleration.fusion.fused import checked_plan

pytestmark = pytest.mark.usefixtures("always_faster", "packs")


def stem() -> nn.Module:
    return nn.Sequential(nn.Conv2d(12, 8, 4, 4), LayerNorm2d(8))


def downsampling() -> nn.Module:
    return nn.Sequential(LayerNorm2d(12), nn.Conv2d(12, 8, 2, 2))


def padded() -> nn.Module:
    return nn.Sequential(nn.Conv2d(12, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())


def rectangular() -> nn.Module:
    return nn.Sequential(nn.Conv2d(12, 8, (1, 3), (1, 2), "valid"), nn.GELU(), nn.Conv2d(8, 5, 1))


def twice() -> nn.Module:
    convolutions = nn.Conv2d(12, 8, 3, 2, 1), nn.Conv2d(8, 9, 3, 2, 1)
    return nn.Sequential(convolutions[0], LayerNorm2d(8), nn.GELU(), convolutions[1], LayerNorm2d(9))


def image(channels_last: bool = False) -> Tensor:
    x = torch.randn(2, 12, 9, 8)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def patches(shape: tuple[int, ...], activation: str = "none", **parts: bool) -> FusedCall:
    return FusedCall(shape, activation, **{"norm": False, "pair": False, "residual": False, "patches": True, **parts})


EXPECTED: dict[Callable[[], nn.Module], tuple[list[FusedCall], str]] = {
    stem: ([patches((2, 12, 9, 8), norm_after=True)], "4x4 patches of 12 -> 8 -> norm"),
    downsampling: ([patches((2, 12, 9, 8), norm=True)], "norm, 2x2 patches of 12 -> 8"),
    padded: ([patches((2, 12, 9, 8), "relu")], "3x3 patches of 12 -> 8 -> relu"),
    rectangular: ([patches((2, 12, 9, 8), "gelu", pair=True)], "1x3 patches of 12 -> 8 -> gelu -> 5"),
    twice: (
        [patches((2, 12, 9, 8), "gelu", norm_after=True), patches((2, 8, 5, 4), norm_after=True)],
        "3x3 patches of 12 -> 8 -> norm -> gelu; 3x3 patches of 8 -> 9 -> norm",
    ),
}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("make", EXPECTED)
def test_layers_by_hand(make: Callable[[], nn.Module], channels_last: bool) -> None:
    block, x = randomized(make()), image(channels_last)
    with torch.no_grad():
        want = block(x)
    _, report = fused(block, x)
    calls, text = EXPECTED[make]
    assert report[""].before == f"Sequential: {text}"
    with torch.no_grad(), ops.trace() as traced:
        got = block(x)
    assert traced.fused == calls
    assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert got.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert type(to_torch(block)) is nn.Sequential


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.BatchNorm2d(12), nn.Conv2d(12, 8, 3, 2, 1)),
        lambda: nn.Sequential(LayerNorm2d(12), nn.Conv2d(12, 8, 3, 2, 1)),
    ],
)
def test_a_norm_before_zeros_is_not_folded(make: Callable[[], nn.Module]) -> None:
    """Its summands do not reach the border."""
    block, x = randomized(make()), image()
    want = block(x)
    fused(block, x)
    with torch.no_grad(), ops.trace() as traced:
        got = block(x)
    assert traced.fused == [patches((2, 12, 9, 8))]
    assert_close(got, want)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(12, 8, 3, 1, 1),
        nn.Conv2d(12, 8, 3, 2, 1, groups=4),
        nn.Conv2d(12, 8, 3, 2, 2, dilation=2),
        nn.Conv2d(12, 8, 3, 2, 1, padding_mode="reflect"),
        nn.Conv1d(12, 8, 2, 2),
    ],
    ids=str,
)
def test_convolutions_that_are_no_products_over_patches(conv: nn.Module) -> None:
    block, x = nn.Sequential(conv, nn.ReLU()).eval(), image() if isinstance(conv, nn.Conv2d) else torch.randn(2, 12, 9)
    _, report = fused(block, x)
    assert report.blocks == ()


def change_stride(conv: Any) -> None:
    conv.stride = (1, 1)


def change_padding(conv: Any) -> None:
    conv.padding = (1, 1)


def change_dilation(conv: Any) -> None:
    conv.dilation = (2, 2)


def change_padding_mode(conv: Any) -> None:
    conv.padding_mode = "circular"
    conv.padding = (1, 1)


def change_kernel(conv: Any) -> None:
    conv.weight = nn.Parameter(torch.randn(8, 12, 3, 2))
    conv.kernel_size = (3, 2)


def change_weight_alone(conv: Any) -> None:
    conv.weight = nn.Parameter(torch.randn(8, 12, 3, 2))


CHANGES = [change_stride, change_padding, change_dilation, change_padding_mode, change_kernel, change_weight_alone]


@pytest.mark.parametrize("change", CHANGES)
def test_another_geometry_runs_the_code_of_the_block(change: Callable[[Any], None]) -> None:
    block, x = randomized(downsampling()), image()
    fused(block, x)
    assert calls_of(block, x)[1] == 1
    change(block[1])
    got, calls = calls_of(block, x)
    assert calls == 0
    with torch.no_grad():
        assert block.reasons_against(x)
        assert_close(got, nn.Module.__call__(block, x))


@pytest.mark.parametrize("make", [stem, downsampling, twice])
def test_writes_to_weights_are_noticed(make: Callable[[], nn.Module]) -> None:
    block, x = randomized(make()), image()
    fused(block, x)
    last, number = calls_of(block, x)
    for name, tensor in block.named_parameters():
        with torch.no_grad():
            tensor.mul_(1.5).add_(0.1)
        got, calls = calls_of(block, x)
        assert calls == number
        assert not torch.equal(got, last), name
        with torch.no_grad():
            assert_close(got, nn.Module.__call__(block, x), rtol=1e-4, atol=1e-4)
        last = got


def test_images_smaller_than_a_patch() -> None:
    block = randomized(downsampling())
    fused(block, image())
    small = torch.randn(1, 12, 1, 5)
    with torch.no_grad():
        assert block.reasons_against(small) == ["an image of (1, 5) pixels is smaller than a patch"]
        with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
            block(small)
        assert block.reasons_against(image()) == []


@settings(max_examples=25, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    sides=st.tuples(st.integers(4, 11), st.integers(4, 11)),
    norms=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 2**32 - 1),
)
def test_layers_at_random(
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    sides: tuple[int, int],
    norms: tuple[bool, bool],
    seed: int,
) -> None:
    torch.manual_seed(seed)
    conv = nn.Conv2d(5, 7, kernel, stride, padding)
    before, after = (LayerNorm2d(width) if flag else nn.Identity() for width, flag in zip((5, 7), norms))
    block, x = randomized(nn.Sequential(before, conv, after, nn.GELU())), torch.randn(2, 5, *sides)
    plan, reason = checked_plan(block, x)
    if max(stride) == 1 and (max(kernel) > 1 or max(padding) > 0):
        assert plan is None
        return
    assert plan is not None, reason
    with torch.no_grad():
        want = block(x)
    fuse(block, plan)
    with torch.no_grad(), ops.trace() as traced:
        got = block(x)
    (call,) = traced.fused
    norm = norms[0] and (padding == (0, 0))
    assert call == FusedCall((2, 5, *sides), "gelu", norm, False, False, max(stride) > 1, norms[1])
    assert_close(got, want, rtol=1e-4, atol=1e-5 * max(1.0, want.abs().max().item()))


@pytest.mark.parametrize(
    ("name", "stem", "downsample"),
    [
        ("convnext_atto", patches((1, 3, 64, 64), norm_after=True), patches((1, 8, 16, 16), norm=True)),
        ("slak_nano", patches((1, 3, 64, 64), norm_after=True), patches((1, 16, 16, 16), norm=True)),
        ("unireplknet_nano", patches((1, 3, 64, 64), "gelu", norm_after=True), None),
        ("replknet_nano", patches((1, 3, 64, 64), "relu"), None),
    ],
)
def test_networks(name: str, stem: FusedCall, downsample: FusedCall | None) -> None:
    options: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)} if name.startswith("convnext") else {}
    network, x = fold(randomized(timm.create_model(name, **options))), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        want = network(x)
    fused(network, x)
    with torch.no_grad(), ops.trace() as traced:
        got = network(x)
    assert stem in traced.fused
    assert downsample is None or downsample in traced.fused
    assert sum(call.patches for call in traced.fused) >= 1 + 3 * (downsample is not None)
    assert any(part.startswith("stem") for part in fused_names(network))
    assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())
