"""Small depthwise convolutions are fused with the norm and the ReLU after them, and are a part of chains."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tests.transforms.fusion import fused, fused_names, randomized
from widekernel import accelerate, fold, ops
from widekernel.ops.call_trace import FusedCall
from widekernel.transforms.acceleration import timing
from widekernel.transforms.acceleration.fusion import FusedChain, packing
from widekernel.transforms.acceleration.timing import Timing

needs_library = pytest.mark.skipif(packing.missing() is not None, reason="the native library cannot run")


class Layer(nn.Module):
    """Depthwise convolution, batch norm and an activation."""

    def __init__(self, size: int = 3, stride: int = 1, act: nn.Module | None = None, **options: Any) -> None:
        super().__init__()
        settings: dict[str, Any] = {"padding": size // 2, "groups": 20, "bias": False} | options
        self.conv, self.bn = nn.Conv2d(20, 20, size, stride, **settings), nn.BatchNorm2d(20)
        self.act = act or nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))  # type: ignore[no-any-return]


def image(batch: int = 2, side: int = 9) -> Tensor:
    return torch.randn(batch, 20, side, side).contiguous(memory_format=torch.channels_last)


def calls_of(model: nn.Module, x: Tensor) -> tuple[Tensor, list[FusedCall]]:
    with torch.no_grad(), ops.trace() as traced:
        y = model(x)
    return y, traced.fused


def depthwise_call(x: Tensor, relu: bool = True) -> FusedCall:
    return FusedCall(tuple(x.shape), "relu" if relu else "none", False, False, False, depthwise=True)


@pytest.mark.usefixtures("always_faster", "packs")
@pytest.mark.parametrize("stride", [1, 2, (2, 1)])
@pytest.mark.parametrize("bias", [False, True])
def test_convolution_norm_and_relu_are_one_call(stride: int, bias: bool) -> None:
    model = randomized(nn.Sequential(Layer(stride=stride, bias=bias)))
    fused(model, image())
    for x in (image(), image(1, 12), image().contiguous()):
        y, calls = calls_of(model, x)
        with torch.no_grad():
            want = nn.Module.__call__(model[0], x)
        assert calls == [depthwise_call(x)]
        assert_close(y, want, rtol=1e-4, atol=1e-5)
        assert y.stride() == want.stride()


@pytest.mark.usefixtures("always_faster", "packs")
@pytest.mark.parametrize(
    "layer",
    [
        lambda: Layer(7),
        lambda: Layer(dilation=2),
        lambda: Layer(padding_mode="circular"),
        lambda: Layer(groups=10),
        lambda: nn.Sequential(nn.Conv2d(20, 20, 3, 2, 1, groups=20)),
    ],
)
def test_what_is_left_alone(layer: Callable[[], nn.Module]) -> None:
    model = randomized(nn.Sequential(layer()))
    fused(model, image())
    assert fused_names(model) == []


@pytest.mark.usefixtures("always_faster", "packs")
def test_another_activation_follows_the_call() -> None:
    model = randomized(nn.Sequential(Layer(5, 2, nn.SiLU())))
    fused(model, image())
    y, calls = calls_of(model, x := image())
    assert calls == [depthwise_call(x, relu=False)]
    assert_close(y, nn.Module.__call__(model[0], x), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("always_faster", "packs")
def test_changes_are_noticed() -> None:
    model: Any = randomized(nn.Sequential(Layer(stride=2)))
    fused(model, image())
    layer, x = model[0], image()
    with torch.no_grad():
        layer.conv.weight.mul_(2)
        layer.bn.bias.add_(1)
        got, calls = calls_of(model, x)
        assert calls == [depthwise_call(x)]
        assert_close(got, nn.Module.__call__(layer, x), rtol=1e-4, atol=1e-5)
        for key, value in (("stride", (1, 1)), ("padding", (0, 0)), ("dilation", (2, 2))):
            before = getattr(layer.conv, key)
            setattr(layer.conv, key, value)
            got, calls = calls_of(model, x)
            assert calls == []
            assert_close(got, layer.act(layer.bn(layer.conv(x))))
            setattr(layer.conv, key, before)
        assert calls_of(model, x)[1] == [depthwise_call(x)]


@needs_library
@pytest.mark.usefixtures("always_faster")
def test_stem_and_downsampling_of_replknet_are_chains(replayed: list[int]) -> None:
    model = fold(randomized(timm.create_model("replknet_nano"))).to(memory_format=torch.channels_last)
    x = torch.randn(1, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        want = model(x)
        _, report = accelerate(model, x)
        assert {"stem", *(f"stages.{i}.downsample" for i in (1, 2, 3))} <= set(report.chains)
        model(x)
        replayed.clear()
        assert_close(model(x), want, rtol=0, atol=1e-5 * want.abs().max().item())
    # Each of four stages has a chain of its blocks, too.
    assert sorted(replayed)[:3] == [2, 2, 2]
    assert replayed[0] == 4


@needs_library
def test_a_block_that_gains_nothing_alone_is_fused_to_complete_a_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    def compare(block: nn.Module, *_: Any) -> Timing:
        is_product = isinstance(block, Layer) and block.conv.groups == 1
        return Timing(1.0, slow if is_product else 0.5)

    def product() -> nn.Module:
        layer: Any = Layer()
        layer.conv = nn.Conv2d(20, 20, 1)
        return layer  # type: ignore[no-any-return]

    monkeypatch.setattr(timing, "compare_block", compare)
    parts = nn.Sequential(Layer(), product()), nn.AvgPool2d(2), nn.Sequential(product(), nn.SiLU())
    model = randomized(nn.Sequential(*parts))
    slow = 1.1
    with torch.no_grad():
        _, report = accelerate(copy.deepcopy(model), image())
    assert report.chains == ()
    slow = 1.05
    with torch.no_grad():
        _, report = accelerate(model, image())
        assert type(model[0]) is FusedChain
        assert report.chains == ("0",)
        assert {row.name: row.reason for row in report.fused} == {"0.0": "", "0.1": "a part of a chain"}
        in_nchw = image().contiguous()
        assert "x.contiguous(memory_format=torch.channels_last)" in model[0].reasons_against(in_nchw)[0]
        assert model[0].reasons_against(image()) == []
    # Alone it would gain nothing.
    assert {row.name: row.after for row in report.blocks}["2.0"] is None
    # A member that is planned again completes the chain again. The others are fused already and not timed.
    slow = 1.04
    changed: Any = model[0][1]
    changed.act = nn.GELU()
    with torch.no_grad():
        _, report = accelerate(model, image())
        assert {row.name: row.reason for row in report.blocks if row.name == "0.1"} == {"0.1": "a part of a chain"}
        assert report.chains == ("0",)
        assert model[0].reasons_against(image()) == []


@needs_library
def test_no_block_is_fused_for_a_chain_that_another_member_prevents(monkeypatch: pytest.MonkeyPatch) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Sequential(nn.Conv2d(20, 40, 1), nn.GELU(), nn.Conv2d(40, 20, 1))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.mlp(x)

    def compare(block: nn.Module, *_: Any) -> Timing:
        # The whole member gains nothing, so that what is within it is fused instead.
        return Timing(1.0, 0.5 if isinstance(block, nn.Sequential) else 1.02)

    monkeypatch.setattr(timing, "compare_block", compare)
    model = randomized(nn.Sequential(nn.Sequential(Layer(), Residual(), Layer())))
    with torch.no_grad():
        _, report = accelerate(model, image())
    assert report.chains == ()
    assert [row.name for row in report.fused] == ["0.1.mlp"]
