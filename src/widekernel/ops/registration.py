"""Shared parts of the operators: the `torch.library` they are registered in, autocast, derivatives, and batching."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._decomp import register_decomposition

from widekernel.ops.problem import Algorithm, Anchor, Dilations, only_dilated

# `torch.library.custom_op` adds checks to every call that take as long as a small convolution.
LIBRARY = torch.library.Library("widekernel", "FRAGMENT")


class CallOptions(NamedTuple):
    """The last arguments of every operator: what a call requests, and the gaps between taps.

    Attributes:
        backend: name of the backend; None for the best one.
        algorithm: the algorithm; None for the fastest one.
        dilations: distance between neighboring taps of each rectangle; empty if all are 1.
    """

    backend: str | None
    algorithm: Algorithm | None
    dilations: Dilations = ()

    def of(self, rects: Sequence[int]) -> CallOptions:
        """Return the options of a call with only the rectangles of these indices."""
        if not self.dilations:
            return self
        return self._replace(dilations=only_dilated([self.dilations[rect] for rect in rects]))


def define_operator(name: str, arguments: str, result: str = "Tensor") -> None:
    """Add an operator to the library; the fields of `CallOptions` follow its arguments.

    Programs exported by 0.4.0 pass "" instead of None. Programs exported before kernels had dilations do not pass them.
    """
    options = "str? backend, str? algorithm, SymInt[] dilations=[]"
    LIBRARY.define(f"{name}({arguments}, {options}) -> {result}", tags=torch.Tag.pt2_compliant_tag)


def register_implementation(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Register the decorated function as the implementation of the operator `name`, and return the operator."""

    def register(function: Callable[..., Any]) -> Any:
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        return getattr(torch.ops.widekernel, name).default

    return register


def register_fake(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Register the decorated function as the fake implementation of the operator `name`: shapes and layouts only."""

    def register(function: Callable[..., Any]) -> Any:
        torch.library.register_fake(f"widekernel::{name}", function, lib=LIBRARY)
        # With symbolic sizes, PyTorch would otherwise prefer the entry in `decompositions`.
        return register_decomposition(getattr(torch.ops.widekernel, name).default, type="meta")(function)

    return register


def on_gpu_of(x: Tensor) -> AbstractContextManager:
    """Make the GPU of `x` the current one; backends look at it when they decide how to compute a problem."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" and torch.cuda.is_available() else nullcontext()


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the type to which autocast converts a call with input `x`; None if it changes nothing."""
    device = x.device.type
    # The query raises for the meta device, which does not support autocast.
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    if x.dtype == torch.float64 or not x.dtype.is_floating_point:
        return None
    return torch.get_autocast_dtype(device)


def autocast(x: Tensor, kernels: Sequence[Tensor], *others: Tensor | None) -> tuple[Any, ...]:
    """Convert the arguments of a call as autocast converts those of a convolution."""
    dtype = autocast_dtype(x)
    if dtype is None or isinstance(kernels, Tensor):  # `check_sum` rejects a bare tensor
        return x, kernels, *others
    return x.to(dtype), [kernel.to(dtype) for kernel in kernels], *[t if t is None else t.to(dtype) for t in others]


def needs_derivatives(*tensors: Tensor | None) -> bool:
    """Return whether a derivative of the call may be requested: backward, or forward mode (which then raises)."""
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return True
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def has_batched_gradients(*tensors: Tensor) -> bool:
    """Return whether a tensor holds batched gradients, as in `torch.autograd.grad(is_grads_batched=True)`."""
    if torch.compiler.is_compiling():
        return False
    return any(torch._C._functorch.is_legacy_batchedtensor(tensor) for tensor in tensors)


def operator_options(options: CallOptions) -> tuple[Any, ...]:
    """Return the last arguments of an operator: without dilations those of earlier versions, which can then read a graph."""
    return (*options[:2], list(options.dilations)) if options.dilations else options[:2]


def given_options(backend: str | None, algorithm: Any, dilations: Sequence[int]) -> CallOptions:
    """Restore the options from the last arguments of an operator."""
    return CallOptions(backend, algorithm, only_dilated(dilations))


def flatten_anchors(anchors: Sequence[Sequence[int]]) -> list[int]:
    """Flatten anchors into the list of numbers that an operator takes."""
    return [number for anchor in anchors for number in anchor]


def unflatten_anchors(numbers: Sequence[int]) -> tuple[Anchor, ...]:
    """Restore the anchors from the list of numbers that an operator takes."""
    return tuple(zip(numbers[::2], numbers[1::2]))


def batch_dim_first(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """Move the dimension that `vmap` maps over to the front; repeat a tensor that has none."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def merge_into_batch(x: Tensor, dim: int | None, size: int) -> Tensor:
    """Merge the dimension that `vmap` maps over into the first one: (B·N, C, H, W) for images."""
    return batch_dim_first(x, dim, size).flatten(0, 1)


def merge_into_channels(x: Tensor, dim: int | None, size: int) -> Tensor:
    """Merge the dimension that `vmap` maps over into the channels of images: (N, B·C, H, W)."""
    return batch_dim_first(x, dim, size).transpose(0, 1).flatten(1, 2)
