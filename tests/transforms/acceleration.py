"""Helpers of the tests of `accelerate`: networks, replaced measurements, and snapshots of what must not change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from widekernel.layers import DepthwiseConv2d, PointwiseConv2d, PointwiseLinear
from widekernel.transforms.acceleration import timing

OURS = (DepthwiseConv2d, PointwiseConv2d, PointwiseLinear)
NETWORKS = {
    "convnext_atto": 64,
    "mobilenetv3_small_050": 64,
    "efficientnet_b0": 64,
    "resnet18": 64,
    "vit_tiny_patch16_224": 224,
    "slak_nano": 64,
    "replknet_nano": 64,
    "roadmap_nano": 64,
    "shiftwise_nano": 64,
    "unireplknet_nano": 64,
}
EACH = pytest.mark.parametrize("name", NETWORKS)
SOME = ("slak_nano", "resnet18")


def each_with(option: str) -> pytest.MarkDecorator:
    """Run a test on every network, with the option off and on; off is slow for most networks, and so is the largest."""
    cases = [
        pytest.param(name, value, marks=[] if (value and name != "efficientnet_b0") or name in SOME else [pytest.mark.slow])
        for name in NETWORKS
        for value in (False, True)
    ]
    return pytest.mark.parametrize(("name", option), cases)


Measure = Callable[[nn.Module, nn.Module, Tensor, bool], tuple[float, float]]


def replace_measurement(
    monkeypatch: pytest.MonkeyPatch, faster: bool | Callable[[nn.Module, Tensor], bool] = True
) -> list[Any]:
    """Fake measurements: ours is twice as fast where `faster` says so, else half as fast. Return their list."""
    asked: list[Any] = []

    def measure(before: nn.Module, after: nn.Module, x: Tensor, backward: bool) -> tuple[float, float]:
        asked.append((type(before), type(after), tuple(x.shape), backward))
        good = faster if isinstance(faster, bool) else faster(after, x)
        return (2.0, 1.0) if good else (1.0, 2.0)

    monkeypatch.setattr(timing, "measure", measure)
    return asked


def network(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    kwargs = {"num_classes": 10} | ({"depth": 2} if name.startswith("vit") else {})
    return timm.create_model(name, **kwargs).to(dtype)


def pictures(name: str, dtype: torch.dtype = torch.float64, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, NETWORKS[name], NETWORKS[name]).to(dtype)


def small() -> nn.Sequential:
    """Make a network with every kind of layer, of 8 channels."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Conv2d(8, 8, 5, padding=2, groups=8),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 1),
        nn.Conv2d(8, 16, 3, padding=1, groups=8),
        nn.Conv2d(16, 16, 3, padding=1, stride=2, groups=16),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )


def image(channels: int = 3, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, 12, 10)


def candidates_of(model: nn.Module) -> set[str]:
    """Return the names of the layers that a report must contain, by independent rules."""
    names = set()
    for name, module in model.named_modules():
        wanted = isinstance(module, nn.Linear)
        if isinstance(module, nn.Conv2d):
            depthwise = 1 < module.groups == module.in_channels
            wanted = depthwise or (module.groups == 1 and module.kernel_size == (1, 1))
        if wanted:
            names.add(name)
    return names


def state_of(model: nn.Module) -> tuple[Any, ...]:
    """Return what must not change: objects, values, flags and hooks."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return (
        [(key, id(tensor), hash(tensor.detach().numpy().tobytes())) for key, tensor in tensors],
        [(key, id(module), module.training) for key, module in model.named_modules(remove_duplicate=False)],
        [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
        [None if parameter.grad is None else parameter.grad.tolist() for parameter in model.parameters()],
    )


def kinds(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def outputs_and_gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    return [y, *torch.autograd.grad(y.square().sum(), [leaf, *model.parameters()], materialize_grads=True)]
