"""Finding out what a module or a function without parameters computes: it is applied to numbers and compared.

Networks bring their own classes for activations, norms and dropout. What they compute says more than their names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from widekernel.ops.pointwise_reference import ACTIVATIONS

IDENTITY = "identity"
TO_LAST = "channels last"
"""(N, C, H, W) -> (N, H, W, C)."""
TO_FIRST = "channels first"
"""(N, H, W, C) -> (N, C, H, W)."""
_KNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    IDENTITY: lambda x: x,
    TO_LAST: lambda x: x.permute(0, 2, 3, 1),
    TO_FIRST: lambda x: x.permute(0, 3, 1, 2),
    **{name: act for name, act in ACTIVATIONS.items() if name != "none"},
}
# Functions that limit large numbers, or treat tiny ones differently, must not pass for others.
_EXTREMES = (0.0, 1e-30, -1e-30, 6.5, -6.5, 30.0, -30.0, 1e4, -1e4, 1e30, -1e30)
_RELATIVE, _ABSOLUTE = 1e-5, 1e-6


def computed_by(function: Callable[[Tensor], Any]) -> str:
    """Return what `function` computes: a permutation of the axes, or an activation by its name; "" if it is unknown."""
    x = _numbers(2, 3, 5, 7)
    y = _applied(function, x)
    if y is None:
        return ""
    return next((name for name, known in _KNOWN.items() if _equal(y, known(x))), "")


def is_layer_norm(module: nn.Module, channels: int, axis: int) -> bool:
    """Return whether `module` is a layer norm over one axis of images, with its `weight`, `bias` and epsilon.

    Args:
        module: any module.
        channels: size of the axis.
        axis: 1 for maps (N, C, H, W), -1 for maps (N, H, W, C).
    """
    parameters, eps = module._parameters, epsilon_of(module)
    if module._modules or module._buffers or eps is None or not set(parameters) <= {"weight", "bias"}:
        return False
    if any(value is not None and value.shape != (channels,) for value in parameters.values()):
        return False
    # Some rows are so small that epsilon matters.
    x = _numbers(2, channels, 3, 5) * torch.tensor([1.0, 1e-3, 1e-2, 1.0, 0.1])
    like = next((value for value in parameters.values() if value is not None), x)
    x = x.clamp(-9, 9).to(like)
    x = x if axis == 1 else x.permute(0, 2, 3, 1).contiguous()
    y = _applied(module, x)
    rows = x.movedim(1, -1) if axis == 1 else x
    want = F.layer_norm(rows, (channels,), parameters.get("weight"), parameters.get("bias"), eps).detach()
    return y is not None and _equal(y, want.movedim(-1, 1) if axis == 1 else want)


def epsilon_of(norm: nn.Module) -> float | None:
    """Return the epsilon of a norm, which some libraries call `variance_epsilon`; None if it has none."""
    eps = getattr(norm, "eps", getattr(norm, "variance_epsilon", None))
    return eps if isinstance(eps, float) else None


def _applied(function: Callable[[Tensor], Any], x: Tensor) -> Tensor | None:
    try:
        with torch.no_grad():
            # A copy, because the function may work in place.
            y = function(x.clone())
    except Exception:  # whatever it is, it does not act on images of any number of channels
        return None
    return y if type(y) is Tensor else None


def _equal(y: Tensor, want: Tensor) -> bool:
    same = y.shape == want.shape and y.dtype == want.dtype and y.device == want.device
    return same and torch.allclose(y, want, _RELATIVE, _ABSOLUTE)


def _numbers(*shape: int) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3
    x.view(-1)[: len(_EXTREMES)] = torch.tensor(_EXTREMES)[: x.numel()]
    return x
