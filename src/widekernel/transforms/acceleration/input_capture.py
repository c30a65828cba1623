"""Capturing the inputs of layers while a network runs on an example, without changing the network."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from widekernel.errors import ArgumentError
from widekernel.layers.training_modes import training_modes_restored


@dataclass(frozen=True)
class InputSpec:
    """Shape, strides, dtype and device of a layer's input."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, x: Tensor) -> InputSpec:
        """Describe a tensor."""
        return cls(tuple(x.shape), x.stride(), x.dtype, x.device)

    @property
    def layout(self) -> str:
        """Memory format of the input: contiguous, channels_last or neither."""
        x = torch.empty_strided(self.shape, self.stride, device="meta")
        if x.is_contiguous():
            return "contiguous"
        return "channels_last" if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) else "neither"


SEVERAL = "it has several arguments"
"""What is noted for a block that is called with more than one argument."""
Seen = dict[nn.Module, Counter[InputSpec | str]]


def capture_inputs(
    model: nn.Module, example_input: Any, layers: Iterable[nn.Module], blocks: Iterable[nn.Module] = ()
) -> tuple[Seen, dict[nn.Module, Tensor]]:
    """Run `model` once and count, for each of `layers` and `blocks`, the inputs with which it is called.

    The network runs in evaluation mode and without gradients, on a copy of the example, which it may change. Training
    flags, buffers and random number generators are restored afterwards.

    Args:
        model: the network.
        example_input: a tensor, a tuple of arguments or a dict of keyword arguments.
        layers: the layers to watch.
        blocks: the blocks to watch.

    Returns:
        for each layer and block, the descriptions of its inputs; for inputs that are not plain tensors, the name of their
        type. And for each block with plain inputs the first element of the first one, along its first axis.

    Raises:
        ArgumentError: if the network cannot run on the example.
    """
    args, kwargs = _arguments(example_input)
    seen: Seen = {layer: Counter() for layer in layers}
    of_blocks: Seen = {block: Counter() for block in blocks}
    samples: dict[nn.Module, Tensor] = {}
    hooks = [layer.register_forward_pre_hook(_noting(notes), with_kwargs=True) for layer, notes in seen.items()]
    hooks += [
        block.register_forward_pre_hook(_sampling(notes, samples), with_kwargs=True) for block, notes in of_blocks.items()
    ]
    try:
        # Not inference mode: tensors that a network caches (such as position tables) could not be used in training later.
        with _unchanged(model), torch.no_grad():
            args, kwargs = _copied((args, kwargs), {})
            model(*args, **kwargs)
    except Exception as error:
        raise ArgumentError(
            f"the network cannot run on example_input ({_described(example_input)}): {error}\nGive the network's input: "
            "a tensor, a tuple of arguments or a dict of keyword arguments. The network is unchanged."
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return {**seen, **of_blocks}, samples


def outputs_of(model: nn.Module, example_input: Any) -> Any:
    """Run `model` once like `capture_inputs`, and return its outputs."""
    args, kwargs = _arguments(example_input)
    with _unchanged(model), torch.no_grad():
        args, kwargs = _copied((args, kwargs), {})
        return model(*args, **kwargs)


def unmeasurable(seen: Counter[InputSpec | str]) -> str:
    """Return why a layer or block cannot be measured; "" if it can."""
    if not seen:
        return "the example does not call it"
    for spec in seen:
        if isinstance(spec, str):
            return spec if spec == SEVERAL else f"its input is not a plain tensor but {spec}"
        if spec.device.type == "meta":
            return "on the meta device there is nothing to measure"
        if 0 in spec.shape:
            return f"its input {spec.shape} is empty"
    return ""


def _arguments(example_input: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_input, Tensor):
        return (example_input,), {}
    if isinstance(example_input, tuple):
        return example_input, {}
    if isinstance(example_input, Mapping) and all(isinstance(key, str) for key in example_input):
        return (), dict(example_input)
    raise ArgumentError(
        f"example_input is a {type(example_input).__name__}: it must be a tensor, a tuple of arguments or a dict of keyword "
        "arguments of the network"
    )


def _copied(value: Any, copies: dict[int, Tensor]) -> Any:
    """Copy the tensors in nested tuples, lists and dicts; one that occurs twice is copied once, into `copies`, by `id`."""
    if isinstance(value, Tensor):
        if id(value) not in copies:
            copies[id(value)] = _copy_of(value)
        return copies[id(value)]
    if type(value) is dict:
        return {key: _copied(part, copies) for key, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_copied(part, copies) for part in value))
    if type(value) in (tuple, list):
        return type(value)(_copied(part, copies) for part in value)
    return value


def _copy_of(x: Tensor) -> Tensor:
    """Copy a tensor with its strides, which `clone` alone does not keep if there are gaps or overlaps."""
    copy = x.clone()
    if not _is_plain(x) or copy.stride() == x.stride():
        return copy
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
    return x.as_strided((span,), (1,)).clone().as_strided(x.shape, x.stride())


def _described(example: Any) -> str:
    if isinstance(example, Tensor):
        return f"{tuple(example.shape)} {str(example.dtype).removeprefix('torch.')}"
    if isinstance(example, Mapping):
        return ", ".join(f"{key}={_described(value)}" for key, value in example.items())
    if isinstance(example, tuple):
        return ", ".join(_described(value) for value in example)
    return type(example).__name__


def _noting(notes: Counter[InputSpec | str]) -> Callable[..., None]:
    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Any = args[0] if args else kwargs.get("input")
        notes[InputSpec.of(x) if _is_plain(x) else type(x).__name__] += 1

    return note


def _sampling(notes: Counter[InputSpec | str], samples: dict[nn.Module, Tensor]) -> Callable[..., None]:
    def note(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(args) != 1 or kwargs:
            notes[SEVERAL] += 1
            return
        x = args[0]
        notes[InputSpec.of(x) if _is_plain(x) else type(x).__name__] += 1
        if block not in samples and _is_plain(x) and x.dim() > 0:
            # A copy, because the network may change it later, and only one element, because a network has many blocks.
            samples[block] = x[:1].clone()

    return note


def _is_plain(x: Any) -> bool:
    return type(x) in (Tensor, nn.Parameter) and x.layout == torch.strided


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode inside the block; restore training flags, buffers and random number generators afterwards."""
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    values = {id(buffer): (buffer, buffer.detach().clone(), buffer._version) for buffer in model.buffers()}
    tensors = [*model.parameters(), *model.buffers()]
    devices = sorted({tensor.device.index for tensor in tensors if tensor.device.type == "cuda"})
    ours, theirs = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices), training_modes_restored(model):
            # Not `model.eval()`: a network's `eval` may do more than set the flags.
            for module in model.modules():
                module.training = False
            yield
    finally:
        random.setstate(ours)
        np.random.set_state(theirs)
        for module, kept in buffers:
            module._buffers.clear()
            module._buffers.update(kept)
        with torch.no_grad():
            for buffer, value, version in values.values():
                if buffer._version != version:
                    buffer.copy_(value)
