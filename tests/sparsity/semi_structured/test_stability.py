"""Effect of weight updates on a masked network."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from widekernel.errors import ArgumentError
from widekernel.sparsity import semi_structured as ss
from widekernel.sparsity.semi_structured.masks import choices_to_mask
from widekernel.sparsity.semi_structured.stability import spectral_norm


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 9, 8))


def updated(model: nn.Module, size: float) -> nn.Module:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * size)
    return other


def masks_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return ss.prepare(copy.deepcopy(model)).masks


def test_norms_are_those_of_the_masked_update() -> None:
    model = network()
    other, masks = updated(model, 0.01), masks_of(model)
    report = ss.stability_report(model, other, masks, torch.randn(4, 16, 5, 5))
    assert [layer.name for layer in report.layers] == ["0.weight", "4.weight"]
    for layer in report.layers:
        update = (other.get_parameter(layer.name) - model.get_parameter(layer.name)).detach().double().flatten(1)
        masked = update * masks[layer.name].flatten(1)
        assert layer.masked == pytest.approx(float(masked.norm()), rel=1e-6)
        assert layer.full == pytest.approx(float(update.norm()), rel=1e-6)
        assert layer.spectral == pytest.approx(float(torch.linalg.matrix_norm(masked, 2)), rel=1e-2)
        assert layer.spectral <= float(torch.linalg.matrix_norm(masked, 2)) * (1 + 1e-12)
        size = float((model.get_parameter(layer.name).detach() * masks[layer.name]).norm())
        assert layer.relative == pytest.approx(layer.masked / size, rel=1e-5)
    assert [layer.taps for layer in report.layers] == [9, 1]


def test_the_chain_of_bounds_holds() -> None:
    """||(M*D) x|| <= ||M*D||_2 ||x|| <= ||M*D||_F ||x|| <= ||D||_F ||x||, 300 random trials."""
    for trial in range(300):
        generator = torch.Generator().manual_seed(trial)
        rows, columns = 4 * (1 + trial % 4), 4 * (1 + trial % 6)
        weight, update, x = (
            torch.randn(shape, generator=generator, dtype=torch.float64)
            for shape in ((rows, columns), (rows, columns), (columns,))
        )
        masked = update * ss.magnitude_mask(weight)
        spectral = float(torch.linalg.matrix_norm(masked, 2))
        assert float((masked @ x).norm()) <= spectral * float(x.norm()) * (1 + 1e-12)
        assert spectral <= float(masked.norm()) * (1 + 1e-12) and masked.norm() <= update.norm()
        assert spectral_norm(masked, 300) == pytest.approx(spectral, rel=2e-2)


def test_masking_can_raise_the_spectral_norm() -> None:
    """||D||_2 is therefore not a bound: an orthogonal matrix (norm 1) has parts of larger norm."""
    largest = 0.0
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        orthogonal, _ = torch.linalg.qr(torch.randn(16, 16, generator=generator, dtype=torch.float64))
        choices = torch.randint(0, 6, (64,), generator=generator, dtype=torch.uint8)
        largest = max(largest, spectral_norm(orthogonal * choices_to_mask(choices, (16, 16)), 300))
    assert largest > 1.05


def test_agreement() -> None:
    model, inputs = network().train(), torch.randn(64, 16, 5, 5)
    masks, before = masks_of(model), copy.deepcopy(model.state_dict())
    same = ss.stability_report(model, model.state_dict(), masks, inputs)
    assert same.inputs == 64 and same.agreement_updated == 1 and same.flips == (0.0,) * 10
    assert 0 < same.agreement_dense < 1
    assert same.layers[0].masked == same.layers[0].spectral == same.layers[0].relative == 0
    small, large = (ss.stability_report(model, updated(model, size), masks, inputs) for size in (1e-3, 0.03))
    assert 1 >= small.agreement_updated > large.agreement_updated
    assert list(large.margins) == sorted(large.margins)
    assert large.agreement_updated == pytest.approx(1 - sum(flip * n for flip, n in zip(large.flips, sizes(64))) / 64)
    assert sum(large.flips[:5]) > sum(large.flips[5:]), "small margins flip first"
    assert model.training and all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def sizes(count: int) -> list[int]:
    return [len(part) for part in torch.arange(count).tensor_split(10)]


def test_batches_are_joined() -> None:
    model, inputs = network(), torch.randn(12, 16, 5, 5)
    other, masks = updated(model, 0.05), masks_of(model)
    whole, parts = (ss.stability_report(model, other, masks, given) for given in (inputs, inputs.split(5)))
    assert whole.layers == parts.layers and whole.agreement_updated == parts.agreement_updated
    assert whole.flips == parts.flips


def test_few_inputs_leave_tenths_empty() -> None:
    model = network()
    report = ss.stability_report(model, model, masks_of(model), torch.randn(3, 16, 5, 5))
    assert report.inputs == 3 and sum(math.isnan(flip) for flip in report.flips) == 7


def test_errors() -> None:
    model = network()
    masks, x = masks_of(model), torch.randn(1, 16, 5, 5)
    with pytest.raises(ArgumentError, match=r"the networks differ in 1\.bias"):
        ss.stability_report(model, {key: value for key, value in model.state_dict().items() if key != "1.bias"}, masks, x)
    with pytest.raises(ArgumentError, match=r"a mask for fc\.weight, but the network has no such weight"):
        ss.stability_report(model, model, {"fc.weight": masks["4.weight"]}, x)
    with pytest.raises(ArgumentError, match=r"the mask has shape \(8, 144\), the weight \(16, 16, 3, 3\) before"):
        ss.stability_report(model, model, {"0.weight": masks["4.weight"]}, x)
    with pytest.raises(ArgumentError, match="inputs hold no batch"):
        ss.stability_report(model, model, masks, [])
    assert spectral_norm(torch.zeros(4, 4)) == 0
