"""Blocks of many kinds are recognized by their graphs, checked, measured, reported and fused."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, fx, nn
from torch.testing import assert_close

from tests.transforms.acceleration import replace_measurement, state_of
from tests.transforms.fusion import ByHand, Convolutional, InPlace, Normalized, calls_of, fused, fused_names, randomized
from widekernel import accelerate, fold, ops
from widekernel.ops.call_trace import FusedCall
from widekernel.ops.pointwise_reference import ReferenceBlock
from widekernel.transforms import to_torch
from widekernel.transforms.acceleration.fusion import FusedBlock, unfused
from widekernel.transforms.acceleration.fusion import fused as module_of_fused

pytestmark = pytest.mark.usefixtures("always_faster", "packs")
SHAPE = (2, 12, 6, 5)


def images(channels_last: bool = False) -> Tensor:
    x = torch.randn(SHAPE)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("make", "call"),
    [
        (ByHand, FusedCall(SHAPE, "gelu", norm=True, pair=True, residual=True)),
        (Convolutional, FusedCall(SHAPE, "gelu_tanh", norm=True, pair=True, residual=True)),
        (InPlace, FusedCall(SHAPE, "relu", norm=False, pair=True, residual=True)),
        (Normalized, FusedCall(SHAPE, "relu", norm=True, pair=False, residual=False)),
    ],
)
def test_blocks_by_hand(make: Callable[[], nn.Module], call: FusedCall, channels_last: bool) -> None:
    block, x = randomized(make()), images(channels_last)
    with torch.no_grad():
        want = block(x)
    before, keys = state_of(block), list(block.state_dict())
    result, report = fused(block, x)
    assert result is block
    assert isinstance(block, (FusedBlock, make))
    assert report[""].after == f"Fused{make.__name__}"
    assert state_of(block) == before
    assert list(block.state_dict()) == keys
    with torch.no_grad(), ops.trace() as traced:
        got = block(x)
    assert traced.fused == [call]
    assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert got.is_contiguous(memory_format=torch.channels_last) == want.is_contiguous(memory_format=torch.channels_last)
    assert block.reasons_against(x) != []  # gradients are on here
    with torch.no_grad():
        assert block.reasons_against(x) == []


@pytest.mark.parametrize(
    ("name", "per_block"),
    [
        ("convnext_atto", [1]),
        pytest.param("convnext_nano_ols", [1], marks=pytest.mark.slow),
        pytest.param("convnextv2_atto", [1], marks=pytest.mark.slow),
        ("slak_nano", [1]),
        ("replknet_nano", [2, 1]),
        pytest.param("shiftwise_nano", [1], marks=pytest.mark.slow),
        ("unireplknet_nano", [1]),
        pytest.param("roadmap_nano", [1], marks=pytest.mark.slow),
        ("vit_tiny_patch16_224", [2]),
    ],
)
def test_networks(name: str, per_block: list[int]) -> None:
    """`per_block`: native calls of each block in turn, with those of squeeze-excite within it."""
    options: dict[str, Any] = {"depth": 2, "img_size": 64} if name.startswith("vit") else {}
    if name.startswith("convnext"):
        options = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
    network, x = randomized(timm.create_model(name, **options)), torch.randn(1, 3, 64, 64)
    network = fold(network)
    with torch.no_grad():
        want = network(x)
    _, report = fused(network, x)
    blocks = [row for row in report.fused if row.name.rpartition(".")[0].endswith("blocks")]
    assert len(blocks) >= 2
    assert blocks == [row for row in report.blocks if row.name.rpartition(".")[0].endswith("blocks")]
    counts = [
        calls_of(network.get_submodule(row.name), torch.randn(1, *_input_of(network, row.name, x)))[1] for row in blocks
    ]
    assert counts == [per_block[i % len(per_block)] for i in range(len(blocks))]
    assert_close(network(x), want, rtol=1e-4, atol=1e-4 * want.abs().max().item())
    got, calls = calls_of(network, x)
    assert calls >= sum(counts)
    assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


def _input_of(network: nn.Module, name: str, x: Tensor) -> tuple[int, ...]:
    shapes: list[tuple[int, ...]] = []
    hook = network.get_submodule(name).register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape[1:])))
    with torch.no_grad():
        network(x)
    hook.remove()
    return shapes[0]


def test_a_second_call_changes_nothing() -> None:
    block, x = randomized(ByHand()), images()
    fused(block, x)
    kind = type(block)
    _, report = fused(block, x)
    assert type(block) is kind
    assert report[""].reason == "fused already"
    assert calls_of(block, x)[1] == 1


def test_to_torch_undoes_it() -> None:
    network, x = randomized(timm.create_model("slak_nano")), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        want = network(x)
    fused(network, x)
    assert calls_of(network, x)[1] > 0
    plain = to_torch(network)
    assert fused_names(plain) == []
    got, calls = calls_of(plain, x)
    assert calls == 0
    assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert fused_names(network)


def test_copies_that_are_not_fused() -> None:
    block, x = nn.Sequential(randomized(ByHand()), nn.ReLU()), images()
    assert unfused(block) is block
    fused(block, x)
    copied = unfused(block)
    assert fused_names(copied) == [] != fused_names(block)
    assert type(copied[0]) is ByHand and copied[0].scale is not block[0].scale
    assert calls_of(copied, x)[1] == 0
    assert_close(copied(x), block(x), rtol=0, atol=0)


def test_folding_a_fused_network() -> None:
    network, x = randomized(timm.create_model("slak_nano")), torch.randn(1, 3, 64, 64)
    fused(network, x)
    folded = fold(network)
    with torch.no_grad():
        want = to_torch(network)(x)
    got, calls = calls_of(folded, x)
    assert calls >= len(fused_names(folded)) > 0
    assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


def test_wrong_results_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(weights: Any, _: str) -> Callable[..., Tensor]:
        return ReferenceBlock(weights.first * 1.0001, *weights[1:])

    monkeypatch.setattr(module_of_fused, "pack", wrong)
    block, x = randomized(ByHand()), images()
    _, report = fused(block, x)
    assert fused_names(block) == []
    assert "differs by" in report[""].reason


def test_nothing_to_compare() -> None:
    block = randomized(ByHand())
    nn.init.zeros_(block.scale)
    _, report = fused(block, images())
    assert "zero for the example" in report[""].reason
    assert report["mlp"].is_swapped


def test_the_inner_block_is_fused_if_the_outer_one_is_not_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_measurement(monkeypatch, lambda after, _: not isinstance(after, ByHand))
    block = randomized(ByHand())
    _, report = fused(block, images())
    assert report[""].reason == "not faster"
    assert fused_names(block) == ["mlp"]
    assert report["mlp"].before.endswith("12 -> 36 -> gelu -> 12")


def test_blocks_that_are_not_fused() -> None:
    x = images()
    trained = randomized(ByHand()).train()
    assert "training mode" in fused(trained, x)[1][""].reason
    assert "float64" in fused(randomized(ByHand()).double(), x.double())[1][""].reason
    hooked = randomized(ByHand())
    hooked.mlp.fc1.register_forward_hook(lambda *_: None)
    assert "mlp.fc1 has a hook" in fused(hooked, x)[1][""].reason
    for block in (trained, hooked):
        assert fused_names(block) == []
    # Without an example, there is nothing to compare and to measure.
    _, report = accelerate(randomized(ByHand()))
    assert report.blocks == ()


def test_values_changed_in_place_that_others_use() -> None:
    class Shared(InPlace):
        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return super().forward(x) + self.second(y) + self.second(self.act(y))

    block = randomized(Shared())
    fused(block, images())
    assert fused_names(block) == []


def test_control_flow_on_values() -> None:
    class Choosing(ByHand):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else x

    _, report = fused(randomized(Choosing()), images())
    assert "cannot be traced" in report[""].reason
    assert report["mlp"].is_swapped


class Slotted(ByHand):
    __slots__ = ("more",)


class Lonely(ByHand):
    def __init_subclass__(cls) -> None:
        raise TypeError("no subclasses")


class Called(ByHand):
    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)


class Copied(ByHand):
    def __deepcopy__(self, memo: Any) -> ByHand:
        return self


class Named(ByHand):
    def reasons_against(self) -> str:
        return "mine"


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Slotted, "its own way of copying"),
        (Lonely, "no subclasses"),
        (Called, "its own way of being called|differs"),
        (Copied, "its own way of copying"),
        (Named, "name of one of fused blocks"),
    ],
)
def test_classes_that_are_left_alone(kind: type[ByHand], reason: str) -> None:
    block = randomized(kind()) if kind is not Copied else kind().eval()
    _, report = fused(block, images())
    assert re.search(reason, report[""].reason)
    assert type(block) is kind
    assert report["mlp"].is_swapped


@pytest.mark.parametrize("what", ["last", "count", "total", "log"])
def test_forwards_that_change_the_block(what: str) -> None:
    class Changing(ByHand):
        def __init__(self) -> None:
            super().__init__()
            self.count, self.log, self.last = 0, [], None
            self.register_buffer("total", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            if what == "last":
                self.last = x
            elif what == "count":
                self.count += 1
            elif what == "total":
                self.total = self.total + 1
            else:
                self.log.append(x)
            return super().forward(x)

    block = randomized(Changing())
    _, report = fused(block, images())
    assert f"the forward of the block changes {'_buffers' if what == 'total' else what}" in report[""].reason
    assert report["mlp"].is_swapped
    assert all(type(value) is not fx.Proxy for value in (block.last, block.count, block.total, *block.log))


def test_random_numbers_are_left_alone() -> None:
    block, x, before = randomized(ByHand()), images(), torch.get_rng_state()
    block.mlp.act = nn.RReLU(0.1, 0.3)
    block.mlp.act.training = True
    fused(block, x)
    assert torch.equal(torch.get_rng_state(), before)


def test_noise_is_noticed() -> None:
    class Noisy(ByHand):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.rand(1)

    _, report = fused(randomized(Noisy()), images())
    assert "differs" in report[""].reason


def test_failing_measurements_leave_layers_and_blocks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(before: nn.Module, after: nn.Module, x: Tensor, backward: bool) -> tuple[float, float]:
        if isinstance(after, FusedBlock):
            raise MemoryError
        return 2.0, 1.0

    monkeypatch.setattr(module_of_fused, "pack", lambda weights, _: ReferenceBlock(*weights))
    monkeypatch.setattr("widekernel.transforms.acceleration.timing.measure", measure)
    block = randomized(ByHand())
    classes = [type(module) for module in block.modules()]
    with pytest.raises(MemoryError):
        fused(block, images())
    assert [type(module) for module in block.modules()] == classes
