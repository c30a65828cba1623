"""Shortcuts for ordinary calls: they bypass the dispatcher, and skip checks that equivalent arguments have passed before.

`torch.library` operators are called through PyTorch's dispatcher so that compilers, modes, transforms and profilers see
them. This takes longer than computing a small problem. A call is *ordinary* if none of these are active.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.nn import Parameter

from widekernel.ops import dispatch
from widekernel.ops.dispatch import dispatch_key
from widekernel.ops.problem import DEPTHWISE_SUM, Anchor, Dilations, only_dilated

_key_set = torch._C._dispatch_tls_local_include_set
_function_modes = torch._C._len_torch_function_stack
_is_profiling = torch._C._autograd._profiler_enabled
_tracing_state = torch._C._get_tracing_state
# Subclasses may intercept operators.
_TENSOR_TYPES = frozenset({Tensor, Parameter})


def _key_sets_of_ordinary_calls() -> frozenset[int]:
    """Return the sets of thread-local dispatch keys of an ordinary call: one outside and one inside inference mode.

    Dispatch modes (`FlopCounterMode`, `FakeTensorMode`, the tracing mode of `make_fx`), functorch transforms,
    functionalization and batched gradients each add a key of their own.
    """
    inference = torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect)
    return frozenset({inference.raw_repr(), inference.add(torch._C.DispatchKey.ADInplaceOrView).raw_repr()})


_ORDINARY_KEY_SETS = _key_sets_of_ordinary_calls()


def is_ordinary_call() -> bool:
    """Return whether nothing compiles, records, transforms or counts the operators that this thread is calling."""
    if torch.compiler.is_compiling():
        return False
    return (
        _key_set().raw_repr() in _ORDINARY_KEY_SETS
        and not _function_modes()
        and not _is_profiling()
        and _tracing_state() is None
        and forward_ad._current_level < 0
    )


def are_ordinary(*tensors: Tensor | None) -> bool:
    """Return whether the tensors hold data in memory and none is an instance of a subclass.

    PyTorch's own derivatives sometimes use zero tensors without memory, which only the dispatcher materializes.
    """
    return all(t is None or (type(t) in _TENSOR_TYPES and not t.is_meta and not t._is_zerotensor()) for t in tensors)


def sum_key(
    x: Tensor,
    sizes: tuple[Any, ...],
    anchors: tuple[Anchor, ...],
    bias: Tensor | None,
    scale: Tensor | None,
    backend: str | None,
    algorithm: str | None,
    dilations: Dilations,
) -> tuple[Any, ...]:
    """Return the dispatch key of a `depthwise_sum` call; it contains every shape that is checked.

    Args:
        x: (N, C, H, W).
        sizes: the shapes of the kernels.
        anchors: the anchors of the kernels.
        bias: (C,) or None.
        scale: (C,) or None.
        backend: the requested backend, or None.
        algorithm: the requested algorithm, or None.
        dilations: the dilations of the kernels; empty if all are 1.
    """
    shapes = None if bias is None else bias.shape, None if scale is None else scale.shape
    return dispatch_key(DEPTHWISE_SUM, x, sizes, anchors, *shapes, backend, algorithm, dilations)


def find_sum(
    x: Tensor,
    kernels: Sequence[Tensor],
    anchors: Sequence[Anchor] | None,
    bias: Tensor | None,
    scale: Tensor | None,
    backend: str | None,
    algorithm: str | None,
    dilations: Sequence[int] | None = None,
) -> dispatch.BackendChoice | None:
    """Return the choice made for an earlier `depthwise_sum` call with equivalent arguments, or None if there was none.

    The arguments of the earlier call passed all checks. Every property that the checks examine is compared here: shapes by
    the key, the rest one by one. A call that is unusual in any way is not found, and is checked again.
    """
    if type(x) not in _TENSOR_TYPES or type(kernels) not in (list, tuple) or torch._C._is_any_autocast_enabled():
        return None
    if x._is_zerotensor():
        return None
    dtype, device = x.dtype, x.device
    sizes = []
    for kernel in kernels:
        if type(kernel) not in _TENSOR_TYPES or kernel.dtype is not dtype or kernel.device != device:
            return None
        if kernel._is_zerotensor():
            return None
        sizes.append(kernel.shape)
    for values in (bias, scale):
        if values is not None and (
            type(values) not in _TENSOR_TYPES
            or values.dtype is not dtype
            or values.device != device
            or values._is_zerotensor()
        ):
            return None
    try:
        if anchors is None:
            anchors = [(size[2] // 2, size[3] // 2) for size in sizes]
        else:
            for row, column in anchors:
                # 1.0 equals 1 and has the same hash, but is not a valid anchor.
                if type(row) is not int or type(column) is not int:
                    return None
        gaps: Dilations = ()
        if dilations is not None:
            # True equals 1 as well.
            if len(dilations) != len(sizes) or any(type(dilation) is not int for dilation in dilations):
                return None
            gaps = only_dilated(dilations)
        key = sum_key(x, tuple(sizes), tuple(anchors), bias, scale, backend, algorithm, gaps)
        return dispatch.registry.choices.get(key)
    except (TypeError, ValueError, IndexError):  # unhashable, not pairs, or not four dimensions
        return None
