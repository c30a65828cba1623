"""What the operators share: the library they are registered in, autocast, what a choice depends on, and batching."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._decomp import register_decomposition

from widekernel.ops.problem import Anchor, allows_tf32, memory_format

# Registered in the form that costs least a call: the checks of `torch.library.custom_op` take as long as a convolution may.
LIBRARY = torch.library.Library("widekernel", "FRAGMENT")


class How(NamedTuple):
    """The backend asked for, and the algorithm; "" for the best of each."""

    backend: str
    algorithm: str


def define(name: str, arguments: str, result: str = "Tensor") -> None:
    """Add an operator to the library; the fields of `How` follow its arguments."""
    LIBRARY.define(f"{name}({arguments}, str backend, str algorithm) -> {result}", tags=torch.Tag.pt2_compliant_tag)


def implements(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Make the decorated function compute the operator `name`, and give the operator."""

    def register(function: Callable[..., Any]) -> Any:
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        return getattr(torch.ops.widekernel, name).default

    return register


def promises(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Make the decorated function say the shape and the layout of what the operator `name` returns."""

    def register(function: Callable[..., Any]) -> Any:
        torch.library.register_fake(f"widekernel::{name}", function, lib=LIBRARY)
        # Where sizes are symbols, PyTorch would otherwise rather ask what the operator is made of; see `decomposing`.
        return register_decomposition(getattr(torch.ops.widekernel, name).default, type="meta")(function)

    return register


def facts(x: Tensor) -> tuple[Any, ...]:
    """Give what the choice for a call depends on besides kernels and anchors: a part of its key."""
    if x.device.type != "cuda":
        return x.shape, x.dtype, x.device.type, memory_format(x), False
    # A machine may have different GPUs.
    return x.shape, x.dtype, x.device, memory_format(x), allows_tf32(x)


def chosen_for(x: Tensor) -> AbstractContextManager:
    """Make the GPU of `x` the current one, which is what backends ask when they decide how to compute a problem."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" and torch.cuda.is_available() else nullcontext()


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Give the type that a call with input `x` is computed in because of autocast, None if autocast changes nothing."""
    device = x.device.type
    # Asking about the meta device, which knows no autocast, is an error.
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    if x.dtype == torch.float64 or not x.dtype.is_floating_point:
        return None
    return torch.get_autocast_dtype(device)


def autocast(x: Tensor, kernels: Sequence[Tensor], *others: Tensor | None) -> tuple[Any, ...]:
    """Convert the arguments of a call as autocast converts those of a convolution."""
    dtype = autocast_dtype(x)
    if dtype is None or isinstance(kernels, Tensor):  # a bare tensor is for `check_sum` to refuse
        return x, kernels, *others
    return x.to(dtype), [kernel.to(dtype) for kernel in kernels], *[t if t is None else t.to(dtype) for t in others]


def differentiated(*tensors: Tensor | None) -> bool:
    """Whether a derivative of the call may be asked for, backward or (which is then refused) forward."""
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return True
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def has_batched_gradients(*tensors: Tensor) -> bool:
    """Whether a tensor stands for many, as in `torch.autograd.grad(is_grads_batched=True)` and vectorised Jacobians."""
    if torch.compiler.is_compiling():
        return False
    return any(torch._C._functorch.is_legacy_batchedtensor(tensor) for tensor in tensors)


def flattened(anchors: Sequence[Sequence[int]]) -> list[int]:
    """Turn anchors into the list of numbers that an operator takes."""
    return [number for anchor in anchors for number in anchor]


def pairs(flat: Sequence[int]) -> list[Anchor]:
    """Turn the numbers that an operator takes back into anchors."""
    return list(zip(flat[::2], flat[1::2]))


def mapped(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """Give `tensor` with the dimension that is mapped over in front; one that has none is repeated."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def into_batch(x: Tensor, dim: int | None, size: int) -> Tensor:
    """Turn images mapped over into a larger batch, (B·N, C, H, W)."""
    return mapped(x, dim, size).flatten(0, 1)


def into_channels(x: Tensor, dim: int | None, size: int) -> Tensor:
    """Turn images mapped over into channels of their own, (N, B·C, H, W)."""
    return mapped(x, dim, size).transpose(0, 1).flatten(1, 2)
