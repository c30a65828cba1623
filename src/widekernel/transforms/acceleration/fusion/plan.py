"""The plan of a fused block: native calls for its regions, and all other steps of its graph in their order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from widekernel.ops import call_trace, recording
from widekernel.ops.call_trace import FusedCall
from widekernel.transforms.acceleration.fusion.calls import is_usual_call
from widekernel.transforms.acceleration.fusion.deviation import TOLERANCES, Deviation, deviation
from widekernel.transforms.acceleration.fusion.graph import BlockGraph, trace_block
from widekernel.transforms.acceleration.fusion.guards import Guards
from widekernel.transforms.acceleration.fusion.nodes import FIRST, is_in_place
from widekernel.transforms.acceleration.fusion.regions import Region, find_regions
from widekernel.transforms.acceleration.fusion.replay import Replay, is_replayable
from widekernel.transforms.acceleration.fusion.weights import (
    BlockWeights,
    DepthwiseWeights,
    Fingerprint,
    UnsuitableWeightsError,
    block_weights,
    evaluated,
    sources,
)

NOTHING_TO_FUSE = "nothing in it can be fused"
Pack = Callable[[BlockWeights | DepthwiseWeights, str], Callable[..., Tensor]]


class UnsuitableInputError(Exception):
    """A native call does not cover a value that has come up in the block; the message says why."""


@dataclass(frozen=True)
class _Step:
    """One step of the graph: a call, or a region.

    Attributes:
        node: the node whose value it computes.
        call: the region, the module or the function; for a constant, a function without arguments.
        done: nodes whose values are not needed afterwards.
        inputs: the arguments, if all of them are nodes; None otherwise.
    """

    node: fx.Node
    call: Any
    done: tuple[fx.Node, ...] = ()
    inputs: tuple[fx.Node, ...] | None = None


class Plan:
    """How a block with one input is computed with its regions fused.

    Args:
        block: the block in evaluation mode.
        pack: packs the weights of a region in a precision, and returns the function that computes it.
        precision: type of the factors of products; a key of `TOLERANCES`.

    Attributes:
        layers_between: the modules that are called as they are.
        is_replayable: whether it consists of native calls only, so that these can be recorded.

    Raises:
        NotTraceableError: if the forward of the block cannot be traced.
        UnsuitableWeightsError: if weights cannot be packed.
    """

    def __init__(self, block: nn.Module, pack: Pack, precision: str = "float32") -> None:
        self._pack, self.precision = pack, precision
        self._found, self.regions = _own_regions(block)
        inside = {str(node.target) for region in self.regions for node in region.nodes if node.op == "call_module"}
        self.layers = tuple(self._found.modules[name] for region in self.regions for name in region.all_layers())
        self.guards = Guards(self._found, inside)
        self._sources = [source for region in self.regions for source in sources(self._found, region)]
        self._holders, self._keys = [held for held, _ in self._sources], [key for _, key in self._sources]
        self._x = next(node for node in self._found.graph.nodes if node.op == "placeholder")
        self._steps = self._fused_steps()
        self._output = next(iter(reversed(self._found.graph.nodes))).args[0]
        self._packed: tuple[Fingerprint, dict[int, Callable[..., Tensor]]] | None = None
        # A region is one native call (with a gate, two), if it takes its input as it is. Functions and constants are none.
        others = [step for step in self._steps if not isinstance(step.call, Region)]
        self.layers_between = tuple(step.call for step in others if step.node.op == "call_module")
        only_layers = len(self.layers_between) == len(others) and all(map(is_replayable, self.layers_between))
        self.is_replayable = only_layers and isinstance(self._output, fx.Node)
        self._replay = Replay(self.layers_between)

    def why_not(self) -> Iterator[str]:
        """Yield what prevents the plan from being used in its present state."""
        yield from self.guards.violations()
        try:
            self.current()
        except UnsuitableWeightsError as error:
            yield str(error)

    def run(self, x: Tensor) -> Any:
        """Compute the block. The guards must hold.

        Raises:
            UnsuitableInputError: if a native call does not cover a value that has come up.
            UnsuitableWeightsError: if the weights have become such that they cannot be packed.
        """
        packed = self.current()
        if self.is_replayable and is_usual_call(x):
            return self._replay.run(x, (packed,), lambda value: self.step_by_step(value, packed))
        return self.step_by_step(x, packed)

    def step_by_step(self, x: Tensor, packed: dict[int, Callable[..., Tensor]]) -> Any:
        """Compute the block with the packed regions that `current` has returned.

        Raises:
            UnsuitableInputError: if a native call does not cover a value that has come up.
        """
        values: dict[fx.Node, Any] = {self._x: x}
        for step in self._steps:
            if isinstance(step.call, Region):
                values[step.node] = self._run_region(step.call, packed[id(step.call)], values)
            else:
                values[step.node] = _run_node(step, values)
            for node in step.done:
                del values[node]
        output = self._output
        return values[output] if isinstance(output, fx.Node) else map_arg(output, values.__getitem__)

    def check(self, x: Tensor) -> Deviation:
        """Compare every region with the original steps on an input; return the largest deviation, or the first wrong one."""
        packed, values = self.current(), self._all_values(x)
        largest = Deviation()
        for region in self.regions:
            got = self._run_region(region, packed[id(region)], values, add_residual=False)
            found = deviation(got, values[region.product], TOLERANCES[self.precision])
            if found.reason:
                return Deviation(found.size, f"{' and '.join(region.layers())}: {found.reason}")
            largest = max(largest, found)
        return largest

    def describe(self) -> str:
        """Return what the regions compute, in words."""
        return "; ".join(_described(self._found, region) for region in self.regions)

    def current(self) -> dict[int, Callable[..., Tensor]]:
        """Return the packed regions; they are packed again if any of their weights has changed, which makes another object.

        Raises:
            UnsuitableWeightsError: if the weights have become such that they cannot be packed.
        """
        tensors = list(map(dict.get, self._holders, self._keys))
        packed = self._packed
        if packed is None or not packed[0].matches(tensors):
            # First the fingerprint: a write while the weights are packed leads to packing them again.
            fingerprint = Fingerprint(tensors)
            calls = {id(region): self._pack(block_weights(self._found, region), self.precision) for region in self.regions}
            packed = self._packed = (fingerprint, calls)
            # In a chain, the replay of this plan alone may not run again and would keep the former weights.
            self.forget_recorded()
        return packed[1]

    def forget_recorded(self) -> None:
        """Release the native calls that `run` has recorded."""
        self._replay.forget()

    def _fused_steps(self) -> list[_Step]:
        """List the steps in order; a region takes the place of its last node."""
        last = {region.last: region for region in self.regions}
        covered = {node for region in self.regions for node in region.nodes}
        needed: set[fx.Node] = set()
        backwards: list[_Step] = []
        for node in reversed(self._found.graph.nodes):
            region = last.get(node)
            if node.op == "output":
                needed.update(node.all_input_nodes)
            if node.op in ("output", "placeholder") or (node in covered and region is None):
                continue
            # Unused values count only if computing them has an effect.
            if not (node in needed or region or node.op == "call_module" or is_in_place(node)):
                continue
            if region is not None:
                inputs = [region.x, *([] if region.residual is None else [region.residual])]
            else:
                inputs = node.all_input_nodes
            done = [other for other in dict.fromkeys(inputs) if other not in needed]
            done += [] if node in needed else [node]
            needed.update(inputs)
            plain = not node.kwargs and list(node.args) == node.all_input_nodes
            call = self._call(node) if region is None else region
            backwards.append(_Step(node, call, tuple(done), tuple(node.all_input_nodes) if plain else None))
        return backwards[::-1]

    def _call(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return lambda: evaluated(self._found, node)
        return self._found.module(node) if node.op == "call_module" else node.target

    def _run_region(
        self, region: Region, packed: Callable[..., Tensor], values: dict[fx.Node, Any], add_residual: bool = True
    ) -> Tensor:
        """Compute a region from the values of its inputs; images are handed over as (N, C, H, W), anything else as rows."""
        x = values[region.x]
        residual = values[region.residual] if add_residual and region.residual is not None else None
        _require_plain(x, residual)
        if FIRST not in (region.x_axis, region.product_axis) and not region.needs_images():
            y = _on_rows(region, packed, x, residual)
        else:
            y = _on_images(region, packed, x, residual)
        if call_trace.OPEN_TRACES or recording.OPEN:
            call = FusedCall(
                tuple(x.shape),
                region.activation,
                norm=bool(region.norm),
                pair=bool(region.second),
                residual=residual is not None,
                patches=region.patch is not None and not region.depthwise,
                norm_after=bool(region.after),
                gate=region.gate is not None,
                response=bool(region.response),
                precision="float32" if region.depthwise else self.precision,
                depthwise=region.depthwise,
            )
            call_trace.record_fused(call)
            recording.note_event(partial(call_trace.record_fused, call))
        return y

    def _all_values(self, x: Tensor) -> dict[fx.Node, Any]:
        """Compute the values of all nodes with the original steps."""
        values: dict[fx.Node, Any] = {self._x: x}
        products = {region.product for region in self.regions}
        for node in self._found.graph.nodes:
            if node.op not in ("placeholder", "output"):
                # A residual may be added in place.
                copies = {other: values[other].clone() for other in products.intersection(node.all_input_nodes)}
                values[node] = _run_node(_Step(node, self._call(node)), values | copies)
        return values


def _own_regions(block: nn.Module) -> tuple[BlockGraph, list[Region]]:
    """Trace a block, and find the regions that are not within one of its submodules, which then could be fused itself."""
    found = trace_block(block)
    regions = [region for region in find_regions(found) if _is_own(found, region)]
    used = {found.scopes[node] for region in regions for node in region.nodes}
    kept = {name for name in found.through if any(scope == name or scope.startswith(f"{name}.") for scope in used)}
    if kept | {""} == found.through:
        return found, regions
    found = trace_block(block, frozenset(found.through - kept - {""}))
    return found, [region for region in find_regions(found) if _is_own(found, region)]


def _is_own(found: BlockGraph, region: Region) -> bool:
    """Return whether the nodes of a region have no scope in common except that of the block."""
    scopes = [found.scopes[node] for node in region.nodes]
    first = scopes[0].split(".")[0]
    return not first or any(scope.split(".")[0] != first for scope in scopes)


def _run_node(step: _Step, values: dict[fx.Node, Any]) -> Any:
    node = step.node
    if node.op == "get_attr":
        return step.call()
    if step.inputs is not None and node.op != "call_method":
        return step.call(*[values[argument] for argument in step.inputs])
    args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
    if node.op == "call_method":
        return getattr(args[0], step.call)(*args[1:], **kwargs)
    return step.call(*args, **kwargs)


def _on_rows(region: Region, packed: Callable[..., Tensor], x: Tensor, residual: Tensor | None) -> Tensor:
    shape = (*x.shape[:-1], region.dim_out)
    _require_shapes(x.shape[-1] if x.dim() else 0, region.dim_in, residual, shape)
    rows = None if residual is None else residual.reshape(-1, region.dim_out)
    return packed(x.reshape(-1, region.dim_in), rows).view(shape)


def _on_images(region: Region, packed: Callable[..., Tensor], x: Tensor, residual: Tensor | None) -> Tensor:
    if x.dim() != 4:
        raise UnsuitableInputError(f"a value of shape {tuple(x.shape)} is not a batch of images")
    if region.x_axis != FIRST:
        x = x.permute(0, 3, 1, 2)
    if residual is not None and residual.dim() == 4 and region.product_axis != FIRST:
        residual = residual.permute(0, 3, 1, 2)
    sides = tuple(x.shape[2:]) if region.patch is None else region.patch.size(*x.shape[2:])
    if min(sides) < 1:
        raise UnsuitableInputError(f"an image of {tuple(x.shape[2:])} pixels is smaller than a patch")
    _require_shapes(x.shape[1], region.dim_in, residual, (x.shape[0], region.dim_out, *sides))
    y = packed(x, residual)
    return y if region.product_axis == FIRST else y.permute(0, 2, 3, 1)


def _require_shapes(channels: int, wanted: int, residual: Tensor | None, shape: tuple[int, ...]) -> None:
    if channels != wanted:
        raise UnsuitableInputError(f"a value has {channels} channels where {wanted} are needed")
    if residual is not None and residual.shape != shape:
        raise UnsuitableInputError(f"a residual of shape {tuple(residual.shape)} is added to {shape}")


def _require_plain(*tensors: Tensor | None) -> None:
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            raise UnsuitableInputError(f"a value is not a plain float32 tensor on the CPU but {type(tensor).__name__}")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise UnsuitableInputError("a value requires gradients")


def _described(found: BlockGraph, region: Region) -> str:
    layers: list[Any] = [found.modules[name] for name in region.layers()]
    widths = [layers[0].weight.shape[1], *(layer.weight.shape[0] for layer in layers)]
    parts = [str(widths[0]), str(widths[1])]
    if region.depthwise:
        assert region.patch is not None
        size, stride = ("x".join(map(str, pair)) for pair in (region.patch.kernel, region.patch.stride))
        parts = [f"{size} depthwise with stride {stride}, {region.dim_in} channels"]
    elif region.patch is not None:
        rows, columns = region.patch.kernel
        parts[0] = f"{rows}x{columns} patches of {parts[0]}"
    if region.after:
        parts.append("norm")
    if region.activation != "none":
        parts.append(region.activation)
    if region.response:
        parts.append("response norm")
    parts += [str(width) for width in widths[2:]]
    text = f"{'gate, ' if region.gate else ''}{'norm, ' if region.norm else ''}{' -> '.join(parts)}"
    return f"{text} + residual" if region.residual is not None else text
