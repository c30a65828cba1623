"""Replays: the native calls of one plan or several in turn, recorded once for each shape of their input."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from widekernel.layers import DepthwiseConv2d, FoldedLargeKernel, FoldedPartialChannels
from widekernel.ops import dispatch
from widekernel.ops.cpu.sequence import Sequence, UnrecordableError
from widekernel.ops.eager import TENSOR_TYPES, is_ordinary_call
from widekernel.ops.recording import recording
from widekernel.transforms.acceleration.fusion.guards import HOOKS

_MOST = 64
"""Number of shapes whose native calls are kept."""
_COMPUTING = (DepthwiseConv2d, FoldedLargeKernel, FoldedPartialChannels)


def is_replayable(layer: nn.Module) -> bool:
    """Return whether a layer computes nothing in Python that changes a value: it makes one native call, or none."""
    return type(layer) in (*_COMPUTING, nn.Identity)


def is_usual_call(x: Tensor) -> bool:
    """Return whether nothing but the states of modules and weights can prevent native calls on `x`.

    There are no gradients, autocast, global hooks, compilers, modes or profilers, and `x` is a plain float32 tensor in CPU
    memory.
    """
    return (
        not torch.is_grad_enabled()
        and type(x) in TENSOR_TYPES
        and x.dtype is torch.float32
        and x.is_cpu
        and x.layout is torch.strided
        and not x.is_neg()
        and not x._is_zerotensor()
        and is_ordinary_call()
        and not torch._C._is_any_autocast_enabled()
        and not torch_module._has_any_global_hook()
    )


class Replay:
    """Native calls that are made again as long as what they were recorded from is unchanged.

    Args:
        layers: the layers around the regions of the plans. Hooks on them are left to the guards of the plans.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self._layers = tuple(layer for layer in layers if type(layer) in _COMPUTING)
        self._seen: _Layers | None = None
        self._packed: tuple[Any, ...] = ()
        self._registry: Any = None
        self._sequences: dict[Hashable, Sequence | None] = {}

    def run(self, x: Tensor, packed: tuple[Any, ...], compute: Callable[[Tensor], Any]) -> Any:
        """Return `compute(x)`, by the native calls that it made for an input of this shape and these strides.

        Args:
            x: the input, of a usual call.
            packed: objects that stand for the present weights; other objects mean other weights.
            compute: computes the result with these weights.
        """
        if not self._is_current(packed):
            self._seen, self._packed, self._registry = _Layers(self._layers), packed, dispatch.registry
            self._sequences = {}
        sequences = self._sequences
        key = x.shape, x.stride(), torch.get_num_threads()
        sequence = sequences.get(key)
        if sequence is not None:
            return sequence(x)
        if key in sequences or x.numel() == 0:
            return compute(x)
        with recording() as recorded:
            y = compute(x)
        if len(sequences) >= _MOST:
            sequences.clear()
        try:
            sequences[key] = Sequence(recorded, x, y)
        except UnrecordableError:
            sequences[key] = None
        return y

    def _is_current(self, packed: tuple[Any, ...]) -> bool:
        same = self._seen is not None and self._registry is dispatch.registry and all(map(is_, packed, self._packed))
        return same and self._seen.are_unchanged()  # type: ignore[union-attr]


class _Layers:
    """The attributes and the tensors of layers at one time. Values in memory may change, because calls read them there."""

    def __init__(self, layers: tuple[nn.Module, ...]) -> None:
        self._parts = tuple(part for layer in layers for part in layer.modules())
        self._kinds = list(map(type, self._parts))
        self._held = [held for part in self._parts for held in (vars(part), part._parameters, part._buffers, part._modules)]
        # Guards see the hooks of layers, but not those of the layers inside.
        inside = [part for part in self._parts if type(part) in _COMPUTING and part not in layers]
        self._held += [vars(part)[key] for part in inside for key in HOOKS]
        self._lengths = list(map(len, self._held))
        self._values = tuple(chain.from_iterable(map(dict.values, self._held)))
        tensors = (held.values() for part in self._parts for held in (part._parameters, part._buffers))
        self._tensors = tuple(tensor for tensor in chain.from_iterable(tensors) if tensor is not None)
        self._places = self._present_places()

    def are_unchanged(self) -> bool:
        """Return whether every object is the same as before, and every tensor lies where it was."""
        return (
            list(map(len, self._held)) == self._lengths
            and all(map(is_, chain.from_iterable(map(dict.values, self._held)), self._values))
            and list(map(type, self._parts)) == self._kinds
            and self._present_places() == self._places
        )

    def _present_places(self) -> list[Any]:
        tensors = self._tensors
        return [
            *map(Tensor.data_ptr, tensors),
            *map(Tensor.stride, tensors),
            *map(Tensor.numel, tensors),
            *map(type, tensors),
        ]
