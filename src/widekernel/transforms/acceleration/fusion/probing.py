"""Finding out what a module or a function computes: it is applied to numbers and compared.

Networks bring their own classes for activations, norms and dropout. What they compute says more than their names.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from widekernel.ops.pointwise_reference import ACTIVATIONS, response_norm

IDENTITY = "identity"
TO_LAST = "channels last"
"""(N, C, H, W) -> (N, H, W, C)."""
TO_FIRST = "channels first"
"""(N, H, W, C) -> (N, C, H, W)."""
MEAN = "mean over pixels"
"""(N, C, H, W) -> (N, C, 1, 1)."""
SIGMOID = "sigmoid"
_KNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    IDENTITY: lambda x: x,
    TO_LAST: lambda x: x.permute(0, 2, 3, 1),
    TO_FIRST: lambda x: x.permute(0, 3, 1, 2),
    MEAN: lambda x: x.mean((2, 3), keepdim=True),
    SIGMOID: torch.sigmoid,
    **{name: act for name, act in ACTIVATIONS.items() if name != "none"},
}
# Functions that limit large numbers, or treat tiny ones differently, must not pass for others.
_EXTREMES = (0.0, 1e-30, -1e-30, 6.5, -6.5, 30.0, -30.0, 1e4, -1e4, 1e30, -1e30)
_RELATIVE, _ABSOLUTE = 1e-5, 1e-6


def computed_by(function: Callable[[Tensor], Any]) -> str:
    """Return what `function` computes: an activation by its name, a permutation of the axes or a mean; "" if unknown."""
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


def is_response_norm(module: nn.Module, channels: int, axis: int) -> bool:
    """Return whether `module` is a response norm over images, with its `weight`, perhaps a `bias`, and epsilon.

    A new norm has zeros as weights, which hide what it computes. So a shallow copy with other weights is applied.

    Args:
        module: any module.
        channels: number of channels.
        axis: their axis, 1 or -1, as in `is_layer_norm`.
    """
    eps, values = epsilon_of(module), {key: value for key, value in module._parameters.items() if value is not None}
    plain = (
        not module._modules and not module._buffers and eps is not None and {"weight"} <= set(values) <= {"weight", "bias"}
    )
    if not plain or any(value.numel() != channels or value.shape[-1] != channels for value in values.values()):
        return False
    numbers = 0.5 + 0.1 * _numbers(channels).clamp(-9, 9)
    # With and without a bias; in the second case, numbers are so small that epsilon matters, and the results are enlarged.
    for bias, size in ((numbers, 1.0), (0 * numbers, 1e-7)):
        new = {key: (bias if key == "bias" else numbers).view(value.shape).to(value) for key, value in values.items()}
        probe = copy.copy(module)
        vars(probe)["_parameters"] = {key: new.get(key) for key in module._parameters}
        x = (_numbers(2, 3, 5, channels).clamp(-9, 9) * size).to(new["weight"])
        y = _applied(probe, x if axis == -1 else x.movedim(-1, 1).contiguous())
        want = response_norm(x, new["weight"].flatten(), eps)  # type: ignore[arg-type]
        want = want + new["bias"].flatten() if "bias" in new else want
        if y is None or not _equal(y / size, (want if axis == -1 else want.movedim(-1, 1)) / size):
            return False
    return True


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
