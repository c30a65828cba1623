"""Hidden units: dead ones are removed from our blocks and from custom ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import widekernel
from tests.models.zoo import alive, assert_near, images
from tests.sparsity.nets import check_same_network
from widekernel.layers.hidden_units import Compactable, HiddenUnits
from widekernel.transforms.compaction import compact


@pytest.mark.parametrize("name", ["slak_nano", "replknet_nano", "convnext_isotropic_nano"])
def test_dead_hidden_units_are_removed(name: str) -> None:
    model = alive(name).double()
    pairs = [(m.fc1, m.fc2) for m in model.modules() if hasattr(m, "fc1") and hasattr(m, "fc2")]
    pairs += [(m.pw1.conv, m.pw2.conv) for m in model.modules() if hasattr(m, "preffn_bn")]
    with torch.no_grad():
        for first, second in pairs:
            first.weight[::3] = 0
            second.weight[:, 1::3] = 0
    small, x = compact(model), images().double()
    with torch.no_grad():
        assert_near(small(x), model(x), 1e-12)
    rows = [row for row in small.compaction if row.kind in ("Mlp", "FeedForwardBlock")]
    assert len(rows) == len(pairs) > 0
    for row, (first, _) in zip(rows, pairs):
        units = first.weight.shape[0]
        assert row.channels == units
        # RepLKNet folds a norm into the rows: the bias of a dead row is not zero, and its constant is moved.
        assert row.channels_kept == len(range(2, units, 3))
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in widekernel.fold(model).parameters())


def test_units_under_a_response_norm_stay() -> None:
    model = alive("shiftwise_nano").double()
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "fc1") and hasattr(module, "norm"):
                module.fc2.weight[:, ::2] = 0
    small, x = compact(model), images().double()
    with torch.no_grad():
        assert_near(small(x), model(x), 1e-12)
    assert not any(row.kind == "Mlp" for row in small.compaction)


def test_an_mlp_of_dead_units_only() -> None:
    model = alive("slak_nano").double()
    mlp = model.stages[0].blocks[0].mlp
    with torch.no_grad():
        mlp.fc2.weight.zero_()
    small, x = compact(model), images().double()
    assert small.stages[0].blocks[0].mlp.fc1.out_features == 1
    with torch.no_grad():
        assert_near(small(x), model(x), 1e-12)


class Expansion(nn.Module):
    """Custom block, which says where its hidden units are."""

    def __init__(self, mixed: bool = False) -> None:
        super().__init__()
        self.widen = nn.Sequential(nn.Linear(4, 10), nn.GELU())
        self.drop = nn.Dropout(0.1)
        self.mixed = mixed
        self.narrow = nn.Linear(10, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.widen(x))
        return x + self.narrow(y.softmax(-1) if self.mixed else y)

    def hidden_units(self) -> HiddenUnits | None:
        return None if self.mixed else HiddenUnits("widen.0", "widen.1", "narrow", others=("widen", "drop"))


@torch.no_grad()
def expansion(**kwargs: bool) -> nn.Sequential:
    """Return two blocks of ten units, of which the first three are constant and the fourth is not read."""
    model = nn.Sequential(*(Expansion(**kwargs) for _ in range(2))).double().eval()
    for block in model:
        block.widen[0].weight[:3] = 0
        block.narrow.weight[:, 3] = 0
    return model


def test_foreign_blocks_take_part() -> None:
    model, x = expansion(), torch.randn(5, 4, dtype=torch.float64)
    assert isinstance(model[0], Compactable)
    small = compact(model)
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x), rtol=1e-12, atol=1e-12)
    assert [(row.name, row.kind, row.channels, row.channels_kept) for row in small.compaction] == [
        ("0", "Expansion", 10, 6),
        ("1", "Expansion", 10, 6),
    ]
    for block, original in zip(small, model):
        assert (block.widen[0].out_features, block.narrow.in_features) == (6, 6)
        assert block.narrow.bias is not None  # the constants have moved there
        assert (original.widen[0].out_features, original.narrow.bias) == (10, None)


def test_a_hook_inside_a_foreign_block_keeps_its_units() -> None:
    model, x = expansion(), torch.randn(5, 4, dtype=torch.float64)
    model[0].drop.register_forward_hook(lambda *_: None)
    small = compact(model)
    assert (small[0].widen[0].out_features, small[1].widen[0].out_features) == (10, 6)
    assert "4 hidden units have zero weights but are kept: drop has a forward hook" in small.compaction.layers[0].reason
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x), rtol=1e-12, atol=1e-12)


def test_a_foreign_block_can_say_that_its_units_mix() -> None:
    model, x = expansion(mixed=True), torch.randn(5, 4, dtype=torch.float64)
    small = compact(model)
    check_same_network(small, model, x)
    assert not any(row.kind == "Expansion" for row in small.compaction)
