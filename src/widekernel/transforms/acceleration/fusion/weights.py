"""The weights of a region: affine maps folded into its pointwise layers, and how to notice that any of them has changed."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from widekernel.layers.norms import affine_of
from widekernel.ops.patch import NormAfter, Patch
from widekernel.transforms.acceleration.fusion.graph import BlockGraph
from widekernel.transforms.acceleration.fusion.nodes import FIRST
from widekernel.transforms.acceleration.fusion.probing import epsilon_of
from widekernel.transforms.acceleration.fusion.regions import Affine, Region
from widekernel.transforms.acceleration.fusion.samples import Samples

Source = tuple[dict[str, Any], str]
"""The dict that holds a parameter or buffer, and its key."""
_version_of = attrgetter("_version")


class UnsuitableWeightsError(Exception):
    """The weights of a region cannot be packed; the message says why."""


class GateWeights(NamedTuple):
    """The arguments of `ops.cpu.gate.Gate`, in float32."""

    first: Tensor
    first_bias: Tensor | None
    activation: str
    second: Tensor
    second_bias: Tensor | None


class BlockWeights(NamedTuple):
    """The arguments of `PackedBlock`: weights in float32, with affine maps folded in; and those of its gate.

    Attributes:
        gate: weights of the gate that comes first; None for none.
    """

    first: Tensor
    first_bias: Tensor | None
    activation: str
    second: Tensor | None
    second_bias: Tensor | None
    norm_eps: float | None
    patch: Patch | None = None
    after: NormAfter | None = None
    response: Tensor | None = None
    response_eps: float = 1e-6
    gate: GateWeights | None = None


class DepthwiseWeights(NamedTuple):
    """The arguments of `ops.cpu.depthwise_conv.PackedDepthwiseConv`: weights in float32, with affine maps folded in."""

    weight: Tensor
    bias: Tensor | None
    patch: Patch
    relu: bool


@torch.no_grad()
def block_weights(found: BlockGraph, region: Region) -> BlockWeights | DepthwiseWeights:
    """Compute the weights of a region from the current parameters and buffers, in float64, and round them to float32.

    Raises:
        UnsuitableWeightsError: if an affine map is not one value per channel, or weights have other shapes than before.
    """
    if region.depthwise:
        return _depthwise_weights(found, region)
    first, bias = _matrix(found.modules[region.first])
    last = first if not region.second else _matrix(found.modules[region.second])[0]
    gate = _gate_weights(found, region)
    gated = gate is None or gate.first.shape[1] == gate.second.shape[0] == region.dim_in
    kernel = region.patch.kernel if region.patch else ()
    shape: Any = found.modules[region.first].weight.shape
    unchanged = shape[1] == region.dim_in and last.shape[0] == region.dim_out and gated
    if not unchanged or (region.patch is not None and tuple(shape[2:]) != kernel):
        raise UnsuitableWeightsError("the shape of a weight has changed since the block was fused")
    eps = None
    if region.norm:
        norm = found.modules[region.norm]
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            scale, shift = affine_of(norm, region.dim_in)
        else:
            eps = epsilon_of(norm)
            scale, shift = _affine_part(norm, region.dim_in)
        # The weights of all taps of a channel are side by side.
        scale, shift = (part.repeat_interleave(first.shape[1] // region.dim_in) for part in (scale, shift))
        first, bias = first * scale, bias + first @ shift
    first, bias = _mapped(found, region.affine, first, bias)
    matrix = _float(first).view(-1, region.dim_in, *kernel)
    after = _norm_after(found.modules[region.after]) if region.after else None
    if not region.second:
        return BlockWeights(
            matrix, _bias(bias), region.activation, None, None, eps, patch=region.patch, after=after, gate=gate
        )
    second, second_bias = _matrix(found.modules[region.second])
    response, response_eps = None, 1e-6
    if region.response:
        norm = found.modules[region.response]
        weight, shift = (part.flatten() for part in _affine_part(norm, second.shape[1]))
        response, response_eps = weight.float(), epsilon_of(norm) or 0.0
        second_bias = second_bias + second @ shift
    second, second_bias = _mapped(found, region.second_affine, second, second_bias)
    firsts, seconds = (matrix, _bias(bias)), (_float(second), _bias(second_bias))
    return BlockWeights(*firsts, region.activation, *seconds, eps, region.patch, None, response, response_eps, gate)


def _depthwise_weights(found: BlockGraph, region: Region) -> DepthwiseWeights:
    layer: Any = found.modules[region.first]
    assert region.patch is not None
    shape = (region.dim_in, 1, *region.patch.kernel)
    if tuple(layer.weight.shape) != shape:
        raise UnsuitableWeightsError("the shape of a weight has changed since the block was fused")
    weight, bias = _mapped(found, region.affine, *_matrix(layer))
    return DepthwiseWeights(_float(weight).view(shape), _bias(bias), region.patch, region.activation == "relu")


def _gate_weights(found: BlockGraph, region: Region) -> GateWeights | None:
    if region.gate is None:
        return None
    first, first_bias = _matrix(found.modules[region.gate.first])
    second, second_bias = _matrix(found.modules[region.gate.second])
    return GateWeights(_float(first), _bias(first_bias), region.gate.activation, _float(second), _bias(second_bias))


def sources(found: BlockGraph, region: Region) -> list[Source]:
    """List everything that the weights of a region are computed from."""
    norms = [affine.value for affine in (*region.affine, *region.second_affine) if affine.kind == "norm"]
    names = [name for name in (region.norm, region.after, region.response, *region.all_layers()) if name]
    listed = []
    for module in (*(found.modules[name] for name in names), *norms):
        listed += [(module._parameters, key) for key in module._parameters]
        listed += [(module._buffers, key) for key in module._buffers if key != "num_batches_tracked"]
    for affine in (*region.affine, *region.second_affine):
        if isinstance(affine.value, fx.Node):
            listed += [found.attributes[str(node.target)] for node in _leaves(affine.value)]
    return listed


class Fingerprint:
    """The state of parameters and buffers at one time.

    PyTorch counts the writes to a tensor, but neither those through `.data` nor those of NumPy. So a few values of every
    tensor, which are spread over it, are compared as well.

    Args:
        tensors: the parameters and buffers; None for those that do not exist.

    Raises:
        UnsuitableWeightsError: if one is not a plain float32 tensor in CPU memory whose writes are counted.
    """

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        self._tensors = tuple(tensors)
        self._present = tuple(tensor for tensor in tensors if tensor is not None)
        for tensor in self._present:
            _check(tensor)
        self._kinds = list(map(type, self._present))
        self._addresses, self._versions = self._states()
        self._samples = Samples(self._present)

    def matches(self, tensors: Sequence[Tensor | None]) -> bool:
        """Return whether these are the same tensors, unchanged.

        Raises:
            UnsuitableWeightsError: if there are tensors where there were none, or none where there were some.
        """
        if not all(map(is_, tensors, self._tensors)):
            if [tensor is None for tensor in tensors] != [tensor is None for tensor in self._tensors]:
                raise UnsuitableWeightsError("a weight has appeared or disappeared since the block was fused")
            return False
        # In this order: the samples lie at the addresses.
        same = all(map(is_, map(type, self._present), self._kinds)) and self._states() == (self._addresses, self._versions)
        return same and self._samples.unchanged()

    def _states(self) -> tuple[list[int], list[int]]:
        """Return the address and the number of writes of every tensor."""
        return list(map(Tensor.data_ptr, self._present)), list(map(_version_of, self._present))


def _check(tensor: Tensor) -> None:
    if type(tensor) not in (nn.Parameter, Tensor) or tensor.layout != torch.strided:
        raise UnsuitableWeightsError(f"a weight is not a plain tensor but {type(tensor).__name__}")
    if tensor.device.type != "cpu" or tensor.dtype != torch.float32:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise UnsuitableWeightsError(f"a weight is {kind} on {tensor.device}: blocks are fused in float32 on the CPU")
    if tensor.is_inference():
        raise UnsuitableWeightsError(
            "a weight is an inference tensor, whose changes are not counted: create the network outside inference mode"
        )
    if not torch.ops.aten.is_non_overlapping_and_dense(tensor):
        raise UnsuitableWeightsError(f"a weight of shape {tuple(tensor.shape)} has gaps in memory: call contiguous() on it")


def _affine_part(norm: nn.Module, channels: int) -> tuple[Tensor, Tensor]:
    """Return the weight and the bias of a layer norm or response norm, with C values each."""
    weight, bias = norm._parameters.get("weight"), norm._parameters.get("bias")
    ones = torch.ones(channels, dtype=torch.float64)
    return ones if weight is None else weight.double(), 0 * ones if bias is None else bias.double()


def _norm_after(norm: nn.Module) -> NormAfter:
    eps = epsilon_of(norm)
    assert eps is not None
    return NormAfter(eps, norm._parameters.get("weight"), norm._parameters.get("bias"))


def _matrix(layer: nn.Module) -> tuple[Tensor, Tensor]:
    weight: Tensor = layer._parameters["weight"].double().flatten(1)  # type: ignore[union-attr]
    bias = layer._parameters.get("bias")
    return weight, weight.new_zeros(weight.shape[0]) if bias is None else bias.double()


def _mapped(found: BlockGraph, affine: list[Affine], weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    for step in affine:
        scale, shift = _scale_and_shift(found, step, bias)
        weight, bias = weight * scale[:, None], bias * scale + shift
    return weight, bias


def _scale_and_shift(found: BlockGraph, affine: Affine, like: Tensor) -> tuple[Tensor, Tensor]:
    ones, zeros = torch.ones_like(like), torch.zeros_like(like)
    if affine.kind == "norm":
        return affine_of(affine.value, like.numel())
    value = evaluated(found, affine.value) if isinstance(affine.value, fx.Node) else affine.value
    if isinstance(value, Tensor):
        value = _per_channel(value, affine.axis, like.numel())
    return (ones * value, zeros) if affine.kind == "factor" else (ones, zeros + value)


def _per_channel(value: Tensor, axis: int, channels: int) -> Tensor:
    """Return the values (C,) of a constant that is broadcast over images; a single value counts as well."""
    dim = 3 if axis == FIRST else 1
    fits = value.dim() >= dim and value.shape[-dim] == channels == value.numel()
    if not fits and value.numel() != 1:
        raise UnsuitableWeightsError(
            f"a factor of shape {tuple(value.shape)} is not one value for each of {channels} channels"
        )
    return value.reshape(-1).double()


def evaluated(found: BlockGraph, node: fx.Node) -> Any:
    """Compute the current value of a constant of the graph, such as a reshaped parameter."""
    if node.op == "get_attr":
        held, key = found.attributes[str(node.target)]
        return held[key]
    args, kwargs = map_arg((node.args, node.kwargs), lambda argument: evaluated(found, argument))
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _leaves(node: fx.Node) -> list[fx.Node]:
    if node.op == "get_attr":
        return [node]
    return [leaf for argument in node.all_input_nodes for leaf in _leaves(argument)]


def _float(weight: Tensor) -> Tensor:
    return weight.float().contiguous()


def _bias(bias: Tensor) -> Tensor | None:
    return bias.float() if bias.any() else None
