"""Channel permutation: a better order is found, and the outputs of the network stay the same."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

import widekernel  # noqa: F401
from widekernel.errors import ShapeError
from widekernel.sparsity import semi_structured as ss
from widekernel.sparsity.semi_structured.channel_permutation import Permuted, permute_channels
from widekernel.sparsity.semi_structured.permutation_search import kept_magnitude, search_permutation

PERMUTED = ss.SemiStructuredConfig("permuted", permutation_rounds=30, permutation_escapes=2)


def randomized(model: nn.Module) -> nn.Module:
    """Make all entries of norms and biases different, so that a wrong order shows."""
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if value.dim() == 1 and value.is_floating_point():
                value.copy_(torch.rand_like(value) + 0.5 if "var" in name else torch.randn_like(value) * 0.3 + 0.5)
            elif name.endswith("gamma"):
                value.fill_(0.5)
    return model.eval()


def check_equal(model: nn.Module, x: Tensor, layers: list[str]) -> dict[str, Permuted]:
    """Permute and compare outputs in both precisions."""
    single, double = copy.deepcopy(model), copy.deepcopy(model).double()
    with torch.no_grad():
        before, before_double = single(x), double(x.double())
        results = permute_channels(single, layers, PERMUTED)
        permute_channels(double, layers, PERMUTED)
        scale, scale_double = before.abs().max(), before_double.abs().max()
        assert float((single(x) - before).abs().max() / scale) <= 1e-5
        assert float((double(x.double()) - before_double).abs().max() / scale_double) <= 1e-12
    done = [name for name, result in results.items() if not result.reason]
    for name in done:
        assert results[name].kept_after > results[name].kept_before
        assert not torch.equal(single.get_submodule(name).weight, model.get_submodule(name).weight)
    return results


def test_search_reaches_the_reference_figure() -> None:
    """For a Gaussian 64 x 64 matrix, the reference is .7410 -> .7623 (unstructured: .7945)."""
    generator = torch.Generator().manual_seed(0)
    gains, kept = [], []
    for seed in range(3):
        matrix = torch.randn(64, 64, generator=generator)
        order = search_permutation(matrix, 400, seed=seed)
        assert torch.equal(order.sort().values, torch.arange(64))
        assert torch.equal(order, search_permutation(matrix, 400, seed=seed)), "deterministic"
        kept.append(kept_magnitude(matrix[:, order]))
        gains.append(kept[-1] - kept_magnitude(matrix))
    assert min(kept) > 0.7623 and min(gains) > 0.02
    assert sum(kept) / 3 < 0.7945


def test_search_finds_a_hidden_order() -> None:
    """Half of the columns are large, but sorted by size: a perfect order loses almost nothing."""
    matrix = torch.rand(16, 32) * torch.cat([torch.full((16,), 100.0), torch.full((16,), 1.0)])
    assert kept_magnitude(matrix) < 0.9
    assert kept_magnitude(matrix[:, search_permutation(matrix)]) > 0.98


def test_search_never_keeps_less() -> None:
    for columns in (4, 8, 12, 20):
        matrix = torch.randn(3, columns)
        assert kept_magnitude(matrix[:, search_permutation(matrix, 5, 1)]) >= kept_magnitude(matrix)
    assert torch.equal(search_permutation(torch.randn(8, 16), 0), torch.arange(16)), "no budget, no change"
    assert torch.equal(search_permutation(torch.zeros(8, 16)), torch.arange(16))
    with pytest.raises(ShapeError, match="C a multiple of 4"):
        search_permutation(torch.randn(4, 6))


def test_large_matrices_are_judged_by_all_rows() -> None:
    matrix = torch.randn(3000, 32)
    order = search_permutation(matrix, 50)
    assert kept_magnitude(matrix[:, order]) > kept_magnitude(matrix)


@pytest.mark.parametrize(
    "between",
    [
        lambda: [nn.GELU()],
        lambda: [nn.BatchNorm2d(32), nn.ReLU(), nn.Dropout(0.1)],
        lambda: [nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.BatchNorm2d(32), nn.SiLU()],
        lambda: [nn.MaxPool2d(2), nn.Identity()],
        lambda: [timm.layers.LayerNorm2d(32), nn.ReLU()],
        lambda: [timm.layers.BatchNormAct2d(32)],
        lambda: [nn.GELU(), timm.layers.grn.GlobalResponseNorm(32, channels_last=False)],
    ],
)
def test_modules_allowed_between_convolutions(between: object) -> None:
    model = nn.Sequential(nn.Conv2d(8, 32, 3), *between(), nn.Conv2d(32, 16, 3))  # type: ignore[operator]
    last = str(len(model) - 1)
    assert check_equal(randomized(model), torch.randn(2, 8, 12, 12), [last])[last].producer == "0"


@pytest.mark.parametrize(
    "between",
    [
        lambda: [nn.GELU(), nn.LayerNorm(32)],
        lambda: [timm.layers.LayerNorm(32), nn.Tanh()],
        lambda: [nn.GELU(), timm.layers.grn.GlobalResponseNorm(32)],
    ],
)
def test_modules_allowed_between_linear_layers(between: object) -> None:
    model = nn.Sequential(nn.Linear(8, 32), *between(), nn.Linear(32, 16))  # type: ignore[operator]
    last = str(len(model) - 1)
    assert check_equal(randomized(model), torch.randn(2, 5, 5, 8), [last])[last].producer == "0"


class Residual(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.weight = nn.Parameter(torch.rand(16))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if self.kind == "read twice":
            return y + self.second(y)
        if self.kind == "sum":
            return self.second(x + y)
        if self.kind == "scale":
            return self.second(y * self.weight)
        if self.kind == "roll":
            return self.second(y.roll(1, -1))
        if self.kind == "called twice":
            return self.second(self.second(y))
        if self.kind == "producer twice":
            return self.second(self.first(y))
        if self.kind == "data":
            return self.second(y) if float(x.sum()) > 0 else y
        if self.kind == "weight":
            return self.second(y) + self.first.weight.sum(1)
        if self.kind == "training":
            return self.second(y) + (y if self.training else 0)
        return self.second(y)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("read twice", "its input is read elsewhere too"),
        ("sum", "its input is a sum"),
        ("scale", "its input comes from mul"),
        ("roll", "its input comes from roll"),
        ("called twice", "it is called 2 times"),
        ("producer twice", "first, which comes before it, is used several times"),
        ("data", "cannot be traced"),
        ("weight", "first: its parameters are read directly"),
        ("training", "it is used differently in training"),
    ],
)
def test_chains_that_cannot_be_proved_are_left_alone(kind: str, reason: str) -> None:
    model = Residual(kind).train()
    before = copy.deepcopy(model.state_dict())
    result = permute_channels(model, ["second"], PERMUTED)["second"]
    assert reason in result.reason
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training and all(module.training for module in model.modules()), "tracing restores the modes"


def test_the_plain_chain_is_permuted() -> None:
    assert not permute_channels(Residual("plain"), ["second"], PERMUTED)["second"].reason


@pytest.mark.parametrize(
    "between", [nn.GroupNorm(4, 32), nn.PReLU(32), nn.Softmax(1), nn.Conv2d(32, 32, 1, groups=2), nn.InstanceNorm2d(32)]
)
def test_layers_that_treat_channels_differently(between: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(8, 32, 3), between, nn.Conv2d(32, 16, 3))
    assert "treats channels differently" in permute_channels(model, ["2"], PERMUTED)["2"].reason


class Grouping(nn.Linear):
    """Scales its weight in groups of neighboring columns, as quantized layers do."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.unflatten(1, (-1, 8))
        return nn.functional.linear(x, (weight / weight.abs().amax(2, keepdim=True)).flatten(1), self.bias)


@pytest.mark.parametrize(("first", "second"), [(nn.Linear, Grouping), (Grouping, nn.Linear)])
def test_layers_with_their_own_forward(first: type[nn.Linear], second: type[nn.Linear]) -> None:
    model = nn.Sequential(first(16, 16), nn.ReLU(), second(16, 16))
    reason = permute_channels(model, ["2"], PERMUTED)["2"].reason
    assert "Grouping" in reason


def test_hooks_and_shared_parts_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    model[1].register_forward_hook(lambda *_: None)
    assert "cannot be traced" in permute_channels(model, ["2"], PERMUTED)["2"].reason
    shared = nn.Linear(16, 16)
    model = nn.ModuleDict({"block": nn.Sequential(shared, nn.ReLU(), nn.Linear(16, 16)), "other": shared})
    assert "is used in several places" in permute_channels(model, ["block.2"], PERMUTED)["block.2"].reason


def test_channels_that_are_not_a_multiple_of_four() -> None:
    model = nn.Sequential(nn.Linear(16, 18), nn.Linear(18, 16))
    assert permute_channels(model, ["1"], PERMUTED)["1"].reason == "18 input channels are not a multiple of 4"


def small(name: str) -> tuple[nn.Module, int]:
    arguments = {
        "convnext_atto": {"depths": (1, 1, 1, 1)},
        "convnextv2_atto": {"depths": (1, 1, 1, 1)},
        "slak_tiny": {"depths": (1, 1, 1, 1), "dims": (16, 16, 32, 32)},
        "replknet_31b": {"depths": (1, 1, 1, 1), "dims": (16, 16, 32, 32)},
        "shiftwise_tiny": {"depths": (1, 1, 1, 1), "dims": (16, 16, 32, 32)},
    }
    return randomized(timm.create_model(name, num_classes=16, **arguments.get(name, {}))), 64


@pytest.mark.parametrize(
    ("name", "at_least"),
    [
        ("resnet18", 4),
        pytest.param("resnet34", 16, marks=pytest.mark.slow),
        pytest.param("resnet26d", 16, marks=pytest.mark.slow),
        ("convnext_atto", 4),
        pytest.param("convnextv2_atto", 4, marks=pytest.mark.slow),
        pytest.param("slak_tiny", 4, marks=pytest.mark.slow),
        ("replknet_31b", 4),
        ("shiftwise_tiny", 4),
        ("mobilenetv2_050", 16),
    ],
)
def test_networks(name: str, at_least: int) -> None:
    model, size = small(name)
    rows = [row for row in ss.prepare(copy.deepcopy(model)).report if row.masked]
    layers = [row.name for row in rows if name != "resnet18" or row.shape[0] <= 128]  # the wide ones take seconds
    results = check_equal(model, torch.randn(1, 3, size, size), layers)
    assert sum(not result.reason for result in results.values()) >= at_least


def test_prepared_networks_report_both_shares() -> None:
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64), nn.Flatten(), nn.Linear(64, 16))
    magnitude = {row.name: row for row in ss.prepare(copy.deepcopy(model)).report}
    report = {row.name: row for row in ss.prepare(model, ss.SemiStructuredConfig("permuted")).report}
    assert report["2"].kept_before == pytest.approx(magnitude["2"].kept) and report["2"].kept > magnitude["2"].kept + 0.01
    assert report["0"].reason.startswith("not permuted: ") and report["0"].kept == magnitude["0"].kept
    assert report["4"].reason.startswith("not permuted: ") and report["4"].kept_before is None
    ss.validate(model)
