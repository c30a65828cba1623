"""Every registered network in a small form: the nano networks, and the roadmap steps with fewer blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import pytest
import timm
import torch
from torch import nn

import widekernel  # noqa: F401
from widekernel.layers import tile_tables
from widekernel.models import list_models

NANO = list_models("*nano")
FULL_SIZE = [name for name in list_models() if name not in NANO]
# Compiling takes seconds: variants that differ only in their kernel sources are slow tests.
ALIKE = ("shiftwise_v1_nano", "slak_pww_nano", "slak_reg_nano")
every_family_once = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in ALIKE else []) for name in NANO]
)
_TINY_ROADMAP = {"depths": (1, 1, 2, 1), "width": 16}

# Networks that are cheap to run: id -> (registered name, arguments).
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in NANO},
    **{f"{name}_small": (name, _TINY_ROADMAP) for name in FULL_SIZE if name.startswith("roadmap_")},
    "replknet_nano_feature_norms": ("replknet_nano", {"norm_intermediate_features": True}),
    "slak_nano_square": ("slak_nano", {"decomposed": False}),
    "slak_nano_without_bn": ("slak_nano", {"bn": False}),
    "slak_pw_nano_two_branches": ("slak_pw_nano", {"branches": 2}),
    "slak_pw_nano_truncated": ("slak_pw_nano", {"padding": "same"}),
    "shiftwise_nano_without_ghosts": ("shiftwise_nano", {"ghost_ratio": 0.0, "paths": 1, "groups": 1}),
    "unireplknet_nano_every_kernel": (
        "unireplknet_nano",
        {"kernel_sizes": (3, (17, 5, 0), (15, 11), (9, 7, 13)), "depths": (1, 3, 2, 3), "dims": (8, 8, 12, 16)},
    ),
    "unireplknet_nano_without_large_kernels": ("unireplknet_nano", {"kernel_sizes": (0, 3, 5, 0), "layer_scale": 0}),
}


def create(identity: str, **kwargs: Any) -> nn.Module:
    """Create a small network by its id in `SMALL`."""
    name, arguments = SMALL[identity]
    return timm.create_model(name, **{**arguments, **kwargs})


def alive(identity: str, **kwargs: Any) -> nn.Module:
    """Create a small network in which every part has an effect: no initial zeros, batch norms with statistics."""
    model = create(identity, **kwargs)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() == 1:
                near = 0.0 if key.endswith("bias") else 1.0
                parameter.copy_(near + 0.2 * torch.randn(parameter.shape))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.copy_(0.1 * torch.randn(module.num_features))
                module.running_var.copy_(0.5 + torch.rand(module.num_features))
    return model.eval()


def images(size: int = 64, batch: int = 2, channels: int = 3) -> torch.Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same_state(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    """Assert that two state dicts are equal bit by bit, NaN included."""
    assert list(ours) == list(theirs)
    different = [key for key in ours if not _same_bits(ours[key], theirs[key])]
    assert not different


def assert_near(ours: torch.Tensor, theirs: torch.Tensor, relative: float = 1e-5) -> None:
    """Assert |a - b| <= relative * max|b|, a bound for rounding in sums of many terms."""
    assert ours.shape == theirs.shape
    error, bound = (ours - theirs).abs().max().item(), relative * theirs.abs().max().item()
    assert error <= bound, f"largest difference {error:.3g}, allowed {bound:.3g}"


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b) or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


@contextmanager
def tables_drawn_once() -> Iterator[None]:
    """Draw each table once instead of once per block, which takes most of the time in a big Shift-wise network."""
    with mock.patch.object(tile_tables, "draw_tables", cache(tile_tables.draw_tables)):
        yield


def on_meta(name: str, **kwargs: Any) -> nn.Module:
    """Create a network of any size without memory for its weights."""
    with torch.device("meta"), tables_drawn_once():
        return timm.create_model(name, **kwargs)
