"""Parts of a block that could belong to two regions belong to one, and blocks that cannot be planned are left alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import timm
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.testing import assert_close

from tests.transforms.acceleration import kinds
from tests.transforms.fusion import ByHand, calls_of, fused, fused_names, randomized
from widekernel.transforms.acceleration.fusion import fused as module_of_fused
from widekernel.transforms.acceleration.fusion.fused import compared, planned
from widekernel.transforms.acceleration.fusion.graph import trace_block
from widekernel.transforms.acceleration.fusion.plan import NOTHING_TO_FUSE
from widekernel.transforms.acceleration.fusion.regions import find_regions

pytestmark = pytest.mark.usefixtures("always_faster", "packs")


class Doubling(nn.Module):
    """Twice the output of one layer, and another layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.second = nn.Linear(12, 8), nn.Dropout(), nn.Linear(8, 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.drop(self.first(x) * 2)).relu()


class Sum(nn.Module):
    """The sum of two branches."""

    def __init__(self, a: nn.Module, b: nn.Module) -> None:
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


def conv(dim_in: int, dim_out: int, kernel: int = 1, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(dim_in, dim_out, kernel, stride, kernel // 2, bias=False)


def projected() -> nn.Module:
    shortcut = nn.Sequential(conv(12, 16), nn.BatchNorm2d(16))
    return Sum(nn.Sequential(conv(12, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 16), nn.BatchNorm2d(16)), shortcut)


IMAGE, ROWS = (2, 12, 6, 5), (2, 5, 12)
# Each with the shape of the input and the number of native calls.
SHARED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "projected shortcut": (projected, IMAGE, 2),
    "two layers": (lambda: Sum(conv(12, 8), conv(12, 8)), IMAGE, 1),
    "norm between": (lambda: nn.Sequential(conv(12, 8), nn.BatchNorm2d(8), conv(8, 9)), IMAGE, 1),
    "norm after patches": (lambda: nn.Sequential(conv(12, 8, 2, 2), nn.BatchNorm2d(8), conv(8, 9)), IMAGE, 1),
    "stem": (
        lambda: nn.Sequential(conv(12, 8, 3, 2), nn.BatchNorm2d(8), conv(8, 9), nn.BatchNorm2d(9)),
        IMAGE,
        2,
    ),
    "layer norm between": (lambda: nn.Sequential(nn.Linear(12, 8), nn.LayerNorm(8), nn.Linear(8, 9)), ROWS, 1),
    "factor between": (Doubling, ROWS, 2),
}


@pytest.mark.parametrize("name", SHARED)
def test_parts_between_two_layers(name: str) -> None:
    make, shape, count = SHARED[name]
    block, x = randomized(make()), torch.randn(shape)
    with torch.no_grad():
        want = block(x)
    _, report = fused(block, x)
    assert report[""].is_swapped, report[""].reason
    got, calls = calls_of(block, x)
    assert calls >= count
    assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


@pytest.mark.parametrize(
    ("name", "part", "channels"),
    [("resnet50", "layer1.0", 64), ("levit_128s", "stem", 3), ("efficientformer_l1", "stages.0.blocks.0", 48)],
)
def test_published_blocks(name: str, part: str, channels: int) -> None:
    with torch.device("meta"):
        network = timm.create_model(name)
    block = network.get_submodule(part).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.1)
    block, x = randomized(block), torch.randn(1, channels, 16, 16)
    with torch.no_grad():
        want = block(x)
    _, report = fused(block, x)
    assert report.fused
    assert [row.reason for row in report.blocks if not row.is_swapped] == []
    got, calls = calls_of(block, x)
    assert calls > 0
    assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


def chain(draw: st.DrawFn) -> nn.Module:
    return nn.Sequential(*(draw(st.sampled_from(_PARTS))() for _ in range(draw(st.integers(1, 6)))))


_DIM = 4
_PARTS: list[Callable[[], nn.Module]] = [
    lambda: conv(_DIM, _DIM),
    lambda: conv(_DIM, _DIM),
    lambda: nn.BatchNorm2d(_DIM),
    nn.Dropout,
    nn.ReLU,
    nn.GELU,
    nn.Tanh,
]


@st.composite
def chains(draw: st.DrawFn) -> nn.Module:
    block = chain(draw)
    for _ in range(draw(st.integers(0, 2))):
        block = nn.Sequential(Sum(block, chain(draw)), chain(draw))
    return block


@settings(max_examples=40, deadline=None)
@given(chains(), st.integers(0, 2**32 - 1))
def test_no_node_belongs_to_two_regions(block: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    block = randomized(block)
    found = trace_block(block)
    nodes = [node for region in find_regions(found) for node in region.nodes]
    assert len(nodes) == len(set(nodes))
    plan, reason = planned(block)
    assert plan is not None or reason == NOTHING_TO_FUSE
    if plan is not None:
        deviation = compared(plan, block, torch.randn(2, _DIM, 3, 5))
        assert not deviation.reason or "zero" in deviation.reason


def test_errors_of_planning_leave_blocks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise KeyError("a part")

    original, x = randomized(ByHand()), torch.randn(IMAGE)
    with torch.no_grad():
        want = original(x)
    block = copy.deepcopy(original)
    fused(block, x)
    alone = copy.deepcopy(block)
    monkeypatch.setattr(module_of_fused, "Plan", fails)
    before = kinds(original)
    _, report = fused(original, x)
    assert report[""].reason == "it cannot be planned: KeyError: 'a part'"
    assert fused_names(original) == [] and len(kinds(original)) == len(before)
    got, calls = calls_of(alone, x)
    assert calls == 0
    assert_close(got, want)
    with torch.no_grad():
        assert alone.reasons_against(x) == ["it cannot be planned: KeyError: 'a part'"]


def test_blocks_that_need_the_whole_batch_are_left_alone() -> None:
    class Paired(ByHand):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).unflatten(0, (-1, 2)).flatten(0, 1)

    block, x = randomized(Paired()), torch.randn(IMAGE)
    _, report = fused(block, x)
    assert "it cannot be compared with its plan" in report[""].reason
    assert "" not in fused_names(block)
