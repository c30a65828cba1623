"""Shortcuts for ordinary calls: no dispatcher where nothing needs it, and no checks for arguments that have passed them.

`torch.library` operators are called through PyTorch's dispatcher so that compilers, modes, transforms and profilers see
them. That takes longer than the computation of a small problem. An *ordinary* call is one that nothing of the kind sees.
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
from widekernel.ops.problem import DEPTHWISE_SUM, Anchor

_key_set = torch._C._dispatch_tls_local_include_set
_function_modes = torch._C._len_torch_function_stack
_is_profiling = torch._C._autograd._profiler_enabled
_tracing_state = torch._C._get_tracing_state
# Subclasses may intercept operators.
_TENSOR_TYPES = frozenset({Tensor, Parameter})


def _key_sets_of_ordinary_calls() -> frozenset[int]:
    """Return the dispatch keys that a thread adds to those of tensors: without modes and transforms, or in inference mode.

    Dispatch modes (`FlopCounterMode`, `FakeTensorMode`, what `make_fx` records), functorch transforms, functionalization and
    batched gradients all add a key of theirs.
    """
    inference = torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect)
    return frozenset({inference.raw_repr(), inference.add(torch._C.DispatchKey.ADInplaceOrView).raw_repr()})


_ORDINARY_KEY_SETS = _key_sets_of_ordinary_calls()


def is_ordinary_call() -> bool:
    """Return whether nothing compiles, records, transforms or counts the operators that this thread calls now."""
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
    """Return whether the tensors are no subclasses and hold numbers in memory.

    The dispatcher fills in the zeros of tensors that have no memory, which PyTorch's own derivatives use here and there.
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
) -> tuple[Any, ...]:
    """Return the key of a call of `depthwise_sum`, which holds every shape that is checked.

    Args:
        x: (N, C, H, W).
        sizes: the shapes of the kernels.
        anchors: of the kernels.
        bias: (C,) or None.
        scale: (C,) or None.
        backend: that the call asks for.
        algorithm: that the call asks for.
    """
    shapes = None if bias is None else bias.shape, None if scale is None else scale.shape
    return dispatch_key(DEPTHWISE_SUM, x, sizes, anchors, *shapes, backend, algorithm)


def find_sum(
    x: Tensor,
    kernels: Sequence[Tensor],
    anchors: Sequence[Anchor] | None,
    bias: Tensor | None,
    scale: Tensor | None,
    backend: str | None,
    algorithm: str | None,
) -> dispatch.BackendChoice | None:
    """Return what was chosen for an earlier call of `depthwise_sum` with arguments like these, None if there was none.

    The arguments of the earlier call passed all checks. What the checks look at is compared here: shapes by the key, the
    rest one by one. Calls that look unusual in any way are not found, and are checked again.
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
                # Floating-point numbers equal integers and have the same hash, but are no anchors.
                if type(row) is not int or type(column) is not int:
                    return None
        return dispatch.registry.choices.get(sum_key(x, tuple(sizes), tuple(anchors), bias, scale, backend, algorithm))
    except (TypeError, ValueError, IndexError):  # unhashable, or no pairs, or no four dimensions
        return None
