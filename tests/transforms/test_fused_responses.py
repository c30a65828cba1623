"""Response norms and squeeze-excite in fused blocks: what is recognized, what is not, and what happens when it changes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from timm.layers import SqueezeExcite
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn
from torch.testing import assert_close

from tests.transforms.fusion import calls_of, fused, randomized
from widekernel import ops
from widekernel.models.blocks import UnbiasedResponseNorm
from widekernel.ops.call_trace import FusedCall
from widekernel.transforms.acceleration.fusion.probing import is_response_norm

pytestmark = pytest.mark.usefixtures("always_faster", "packs")
SHAPE = (2, 8, 6, 5)


class Responding(nn.Module):
    """A block with squeeze-excite, a response norm and a residual, like those of Shift-wise networks."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.se = SqueezeExcite(dim, rd_channels=3)
        self.fc1, self.act, self.fc2 = nn.Linear(dim, 20), nn.GELU(), nn.Linear(20, dim)
        self.grn = GlobalResponseNorm(20)

    def forward(self, x: Tensor) -> Tensor:
        y = self.se(x.flip(-1))
        return x + self.after(self.fc2(self.between(self.act(self.fc1(y.permute(0, 2, 3, 1)))))).permute(0, 3, 1, 2)

    def between(self, hidden: Tensor) -> Tensor:
        return self.grn(hidden)

    def after(self, y: Tensor) -> Tensor:
        return y


class Maps(nn.Module):
    """The same norm over maps, without a residual; the response is not the last step before the second layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Conv2d(8, 12, 1), nn.ReLU(), nn.Conv2d(12, 5, 1)
        self.grn, self.drop = GlobalResponseNorm(12, channels_last=False), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.drop(self.grn(self.act(self.first(x)))))


class Rows(nn.Module):
    """A block whose images have their channels last everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc1, self.act, self.fc2 = nn.LayerNorm(5), nn.Linear(5, 12), nn.GELU(), nn.Linear(12, 5)
        self.grn = GlobalResponseNorm(12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.grn(self.act(self.fc1(self.norm(x)))))


def visible(block: nn.Module) -> nn.Module:
    """Give response norms weights, which are zero at first."""
    with torch.no_grad():
        for module in block.modules():
            if isinstance(module, GlobalResponseNorm):
                for parameter in module.parameters():
                    parameter.uniform_(0.5, 1.5)
    return randomized(block)


def run(block: nn.Module, x: Tensor) -> tuple[Tensor, list[FusedCall]]:
    with torch.no_grad(), ops.trace() as traced:
        return block(x), traced.fused


GELU = FusedCall(SHAPE, "gelu", norm=False, pair=True, residual=True, gate=True, response=True)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("make", "call"),
    [
        (Responding, GELU),
        (Maps, FusedCall(SHAPE, "relu", norm=False, pair=True, residual=False, response=True)),
        (Rows, FusedCall(SHAPE, "gelu", norm=True, pair=True, residual=True, response=True)),
    ],
)
def test_one_call(make: Callable[[], nn.Module], call: FusedCall, channels_last: bool) -> None:
    block, x = visible(make()), torch.randn(SHAPE)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    with torch.no_grad():
        want = block(x)
    _, report = fused(block, x)
    got, calls = run(block, x)
    assert calls == [call]
    assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert ("gate, " in report[""].before) == call.gate
    assert "response norm -> " in report[""].before
    # Every image has a response of its own.
    assert_close(run(block, x[1:])[0], got[1:], rtol=1e-5, atol=1e-5)


def test_a_copy_computes_the_same() -> None:
    block, x = visible(Responding()), torch.randn(SHAPE)
    fused(block, x)
    copied = copy.deepcopy(block)
    run(copied, x)  # compares itself with its code
    got, calls = run(copied, x)
    assert calls == [GELU]
    assert_close(got, run(block, x)[0])


@pytest.mark.parametrize("what", ["grn.weight", "grn.bias", "se.fc1.weight", "se.fc2.bias", "fc2.weight"])
def test_changed_weights_are_packed_again(what: str) -> None:
    block, x = visible(Responding()), torch.randn(SHAPE)
    fused(block, x)
    before, _ = run(block, x)
    with torch.no_grad():
        block.get_parameter(what).add_(0.5)
        want = Responding.forward(block, x)  # type: ignore[arg-type]
    got, calls = run(block, x)
    assert calls == [GELU]
    assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert (got - before).abs().max() > 1e-3


def test_changes_that_the_native_call_does_not_cover() -> None:
    block, x = visible(Responding()), torch.randn(SHAPE)
    fused(block, x)
    eps, block.grn.eps = block.grn.eps, 0.5  # type: ignore[union-attr, assignment]
    with torch.no_grad():
        assert any("eps of grn has changed" in reason for reason in block.reasons_against(x))
        assert_close(block(x), Responding.forward(block, x))  # type: ignore[arg-type]
    block.grn.eps = eps  # type: ignore[union-attr, assignment]
    assert run(block, x)[1] == [GELU]
    for name in ("grn", "se.fc1", "se"):
        seen: list[str] = []
        handle = block.get_submodule(name).register_forward_hook(lambda *_, seen=seen, name=name: seen.append(name))
        assert run(block, x)[1] == []
        assert seen == [name]
        handle.remove()


class NoSecond(Maps):
    """Nothing follows the response norm, so the part before it is computed alone."""

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.grn(self.act(self.first(x)))).flip(-1)


class UsedTwice(Maps):
    def forward(self, x: Tensor) -> Tensor:
        y = self.grn(self.act(self.first(x)))
        return self.second(y) * y.mean()


class Summed(Responding):
    """The hidden units are not the only input of the second layer."""

    def between(self, hidden: Tensor) -> Tensor:
        return self.grn(hidden) + 0.5


@pytest.mark.parametrize("make", [NoSecond, UsedTwice])
def test_without_a_second_layer_the_region_ends_before_the_response_norm(make: Callable[[], nn.Module]) -> None:
    block, x = visible(make()), torch.randn(SHAPE)
    with torch.no_grad():
        want = block(x)
    fused(block, x)
    got, calls = run(block, x)
    assert calls == [FusedCall(SHAPE, "relu", norm=False, pair=False, residual=False)]
    assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_summand_after_the_response_norm() -> None:
    block, x = visible(Summed()), torch.randn(SHAPE)
    with torch.no_grad():
        want = block(x)
    fused(block, x)
    got, calls = run(block, x)
    assert [(call.gate, call.response, call.pair) for call in calls] == [(True, False, False), (False, False, False)]
    assert_close(got, want, rtol=1e-5, atol=1e-5)


class Gated(nn.Module):
    """Squeeze-excite in many forms before one layer."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.down, self.up, self.last = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), nn.Conv2d(8, 3, 1)
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        x = x.flip(-1)
        mean = x.amax((2, 3), keepdim=True) if self.form == "largest" else x.mean((2, 3), keepdim=True)
        if self.form == "rows":
            mean = x.mean((3,), keepdim=True)
        hidden = self.down(mean)
        hidden = hidden.relu() if self.form != "silu" else nn.functional.silu(hidden)
        gate = self.up(hidden)
        gate = gate.sigmoid() if self.form != "hard" else nn.functional.hardsigmoid(gate)
        if self.form == "shared":
            return self.last(x * gate) + gate.mean()
        if self.form == "other":
            return self.last(x.flip(-2) * gate)
        return self.last(gate * x).relu() if self.form == "swapped" else self.last(x * gate).relu()


@pytest.mark.parametrize(
    ("form", "recognized"),
    [("plain", True), ("swapped", True)]
    + [(form, False) for form in ("largest", "rows", "silu", "hard", "shared", "other")],
)
def test_forms_of_squeeze_excite(form: str, recognized: bool) -> None:
    block, x = randomized(Gated(form)), torch.randn(SHAPE)
    with torch.no_grad():
        want = block(x)
    fused(block, x)
    got, calls = run(block, x)
    assert [call.gate for call in calls if call.gate] == [True] * recognized
    assert_close(got, want, rtol=1e-5, atol=1e-5)


class Clamped(GlobalResponseNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(max=3.0)


class Largest(GlobalResponseNorm):
    def forward(self, x: Tensor) -> Tensor:
        sizes = x.norm(p=float("inf"), dim=self.spatial_dim, keepdim=True)
        return x + self.bias + self.weight * x * sizes / (sizes.mean(self.channel_dim, keepdim=True) + self.eps)


class Epsilon(GlobalResponseNorm):
    """Another place of epsilon."""

    def forward(self, x: Tensor) -> Tensor:
        sizes = (x.square().sum(self.spatial_dim, keepdim=True) + self.eps).sqrt()
        return x + self.bias + self.weight * x * sizes / sizes.mean(self.channel_dim, keepdim=True)


def test_what_counts_as_a_response_norm() -> None:
    norm = GlobalResponseNorm(9)
    weights = [parameter.clone() for parameter in norm.parameters()]
    assert is_response_norm(norm, 9, -1)
    assert not is_response_norm(norm, 9, 1)
    assert is_response_norm(GlobalResponseNorm(9, channels_last=False), 9, 1)
    assert is_response_norm(UnbiasedResponseNorm(norm), 9, -1)
    assert not is_response_norm(norm, 8, -1)
    for other in (Clamped(9), Largest(9), Epsilon(9), nn.LayerNorm(9), nn.Identity(), nn.GroupNorm(3, 9)):
        assert not is_response_norm(other, 9, -1)
    # The norm itself is neither called nor changed.
    assert all(torch.equal(a, b) for a, b in zip(weights, norm.parameters()))


def test_gradients_run_the_code() -> None:
    block, x = visible(Responding()), torch.randn(SHAPE, requires_grad=True)
    fused(block, x.detach())
    with ops.trace() as traced:
        block(x).sum().backward()
    assert traced.fused == []
    assert x.grad is not None
    assert calls_of(block, x.detach())[1] == 1
