"""Replays: the native calls of one plan or several in turn, recorded once for each shape of their input."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from itertools import chain
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from widekernel.layers import DepthwiseConv2d, FoldedLargeKernel, FoldedPartialChannels
from widekernel.ops import dispatch
from widekernel.ops.cpu import library
from widekernel.ops.cpu.sequence import Sequence, UnrecordableError
from widekernel.ops.recording import recording
from widekernel.transforms.acceleration.fusion.guards import HOOKS

_MOST = 64
"""Number of shapes whose native calls are kept."""
_FORWARDS = {kind: kind.forward for kind in (DepthwiseConv2d, FoldedLargeKernel, FoldedPartialChannels, nn.Identity)}
"""The classes of layers that can be replayed, with what they compute unless somebody replaces it."""
_dtype_of = attrgetter("dtype")


def is_replayable(layer: nn.Module) -> bool:
    """Return whether a layer computes nothing in Python that changes a value: it makes one native call, or none.

    Two classes hand their input to `ops.depthwise_sum`, which may make a native call, and `nn.Identity` returns it. If they
    compute something else after all, such as with another backend, a value comes up that no native call has written, and the
    calls are not recorded. An operation in place on such a value would not be noticed, so all other classes are excluded.
    """
    return type(layer) in _FORWARDS


class Replay:
    """Native calls that are made again as long as what they were recorded from is unchanged.

    Args:
        layers: the layers around the regions of the plans. Hooks on them are left to the guards of the plans.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self._layers = tuple(layer for layer in layers if type(layer) is not nn.Identity)
        # Replaced as a whole, so that threads which run while something changes see what belongs together.
        self._recorded: _Recorded | None = None

    def run(self, x: Tensor, packed: tuple[Any, ...], compute: Callable[[Tensor], Any]) -> Any:
        """Return `compute(x)`, by the native calls that it made for an input of this shape and these strides.

        Args:
            x: the input, of a usual call.
            packed: objects that stand for the present weights; other objects mean other weights.
            compute: computes the result with these weights.
        """
        if x.numel() == 0 or any(kind.forward is not forward for kind, forward in _FORWARDS.items()):
            return compute(x)
        recorded = self._recorded
        if recorded is None or not recorded.is_current(packed):
            recorded = self._recorded = _Recorded(_Layers(self._layers), packed, dispatch.registry, {})
        key, sequences = _key(x), recorded.sequences
        sequence = sequences.get(key)
        if isinstance(sequence, Sequence):
            return sequence(x)
        if sequence is not None:
            return compute(x)
        with recording() as made:
            y = compute(x)
        if len(sequences) >= _MOST:
            sequences.clear()
        try:
            sequences[key] = Sequence(made, x, y, recorded.layers.addresses)
        except UnrecordableError as error:
            sequences[key] = str(error)
        return y

    def reason_against(self, x: Tensor) -> str:
        """Return why the native calls for `x`, with which `run` has been called, cannot be made again; "" if they can."""
        if any(kind.forward is not forward for kind, forward in _FORWARDS.items()):
            return "the forward of a class of layers has been replaced"
        found = None if self._recorded is None else self._recorded.sequences.get(_key(x))
        if not isinstance(found, str):
            return ""
        if x.dim() == 4 and not x.is_contiguous(memory_format=torch.channels_last):
            # Some layers leave images in another layout to PyTorch.
            found += "; images in channels_last may avoid it: x.contiguous(memory_format=torch.channels_last)"
        return found

    def forget(self) -> None:
        """Release all recorded calls, with the packed weights that they use."""
        self._recorded = None


class _Recorded(NamedTuple):
    """Recorded calls, and what they depend on.

    Attributes:
        layers: the state of the layers before the first of these calls.
        packed: the objects that stand for the weights of the regions.
        registry: the backends.
        sequences: the calls, or why they cannot be made again, for each shape.
    """

    layers: _Layers
    packed: tuple[Any, ...]
    registry: Any
    sequences: dict[Hashable, Sequence | str]

    def is_current(self, packed: tuple[Any, ...]) -> bool:
        """Return whether nothing has changed on which the calls depend."""
        return (
            self.registry is dispatch.registry
            and len(packed) == len(self.packed)
            and all(map(is_, packed, self.packed))
            and self.layers.are_unchanged()
        )


class _Layers:
    """The attributes and the tensors of layers at one time. Values in memory may change, because calls read them there.

    Attributes:
        addresses: where the parameters and buffers lie.
    """

    def __init__(self, layers: tuple[nn.Module, ...]) -> None:
        self._parts = tuple(part for layer in layers for part in layer.modules())
        self._kinds = list(map(type, self._parts))
        self._held = [held for part in self._parts for held in (vars(part), part._parameters, part._buffers, part._modules)]
        # Guards see the hooks of layers, but not those of the layers inside.
        inside = [part for part in self._parts if type(part) in _FORWARDS and part not in layers]
        self._held += [vars(part)[key] for part in inside for key in HOOKS]
        self._lengths = list(map(len, self._held))
        self._values = tuple(chain.from_iterable(map(dict.values, self._held)))
        tensors = (held.values() for part in self._parts for held in (part._parameters, part._buffers))
        self._tensors = tuple(tensor for tensor in chain.from_iterable(tensors) if tensor is not None)
        self._forms = self._present_forms()
        self.addresses = frozenset(self._forms[: len(self._tensors)])

    def are_unchanged(self) -> bool:
        """Return whether every object is the same as before, and every tensor has its place and form."""
        return (
            list(map(len, self._held)) == self._lengths
            and all(map(is_, chain.from_iterable(map(dict.values, self._held)), self._values))
            and list(map(type, self._parts)) == self._kinds
            and self._present_forms() == self._forms
        )

    def _present_forms(self) -> list[Any]:
        """List the addresses of the tensors first, and then all that a call depends on besides the numbers there."""
        tensors = self._tensors
        return [
            *map(Tensor.data_ptr, tensors),
            *map(Tensor.size, tensors),
            *map(Tensor.stride, tensors),
            *map(_dtype_of, tensors),
            *map(Tensor.is_neg, tensors),
            *map(type, tensors),
        ]


def _key(x: Tensor) -> tuple[Hashable, ...]:
    return x.shape, x.stride(), torch.get_num_threads(), library.load().isa
