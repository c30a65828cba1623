"""Regions of a block's graph that one native call can compute.

    [norm] -> product -> [affine] -> [norm] -> [activation -> [pointwise layer -> [affine]]] -> [+ residual]

The product is a pointwise layer, or a convolution with a stride, which is a product over patches. Between the parts, there
may be permutations between (N, C, H, W) and (N, H, W, C), and modules that do nothing in evaluation. No value inside a
region is used outside it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from widekernel.layers.norms import is_foldable
from widekernel.ops.patch import Patch
from widekernel.ops.pointwise_reference import ACTIVATIONS
from widekernel.transforms.acceleration.fusion.graph import BlockGraph, is_pointwise, is_product, patch_of
from widekernel.transforms.acceleration.fusion.probing import (
    IDENTITY,
    TO_FIRST,
    TO_LAST,
    computed_by,
    is_layer_norm,
)

FIRST, LAST = 1, -1
"""The axis of the channels: 1 in (N, C, H, W), -1 in (N, H, W, C) and in rows."""
_PRODUCTS = (operator.mul, torch.mul, torch.multiply, operator.imul, "mul", "mul_", "multiply")
_SUMS = (operator.add, torch.add, operator.iadd, "add", "add_")
# Operators in `torch.ops` may do anything, such as communicate with other processes: they are not tried out.
_OPERATORS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)
_BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class Affine:
    """A factor or a summand per channel, or a batch norm, within a region.

    Attributes:
        kind: "norm", "factor" or "summand".
        value: the batch norm, a number, or the node of a constant.
        axis: axis of the channels where it acts.
    """

    kind: str
    value: Any
    axis: int


@dataclass
class Region:
    """A part of a block's graph that one native call can compute.

    Attributes:
        x: the node whose value goes in.
        x_axis: axis of the channels of that value.
        first: name of the first layer, pointwise or a convolution with a stride.
        dim_in: number of channels of its input.
        dim_out: number of channels of the result.
        nodes: the nodes of the region.
        patch: the patches of the first layer; None if it is pointwise.
        norm: name of the norm before the first layer; "" for none.
        affine: affine maps after the first layer, in order.
        after: name of the layer norm after these, which no second layer follows; "" for none.
        activation: a key of `ACTIVATIONS`.
        second: name of the second pointwise layer; "" for none.
        second_affine: affine maps after the second layer.
        product: the last node before the residual is added.
        product_axis: axis of the channels of its value.
        residual: the node that is added to it; None for none.
        last: the last node; its value comes out.
    """

    x: fx.Node
    x_axis: int
    first: str
    dim_in: int
    dim_out: int
    nodes: set[fx.Node]
    product: fx.Node
    product_axis: int
    last: fx.Node
    patch: Patch | None = None
    norm: str = ""
    affine: list[Affine] = field(default_factory=list)
    after: str = ""
    activation: str = "none"
    second: str = ""
    second_affine: list[Affine] = field(default_factory=list)
    residual: fx.Node | None = None

    def layers(self) -> tuple[str, ...]:
        """Return the names of the layers whose products it computes."""
        return (self.first, self.second) if self.second else (self.first,)

    def is_more_than_a_layer(self) -> bool:
        """Return whether it contains more than one pointwise layer alone."""
        more = self.patch, self.norm, self.affine, self.after, self.second, self.residual
        return any(part not in ("", [], None) for part in more) or self.activation != "none"


def find_regions(found: BlockGraph) -> list[Region]:
    """Find the regions of a block, from its first layer to its last; none if shared values are changed in place."""
    matcher = _Matcher(found)
    if any(matcher.changes_shared_value(node) for node in found.graph.nodes):
        return []
    regions: list[Region] = []
    for node in found.graph.nodes:
        module = found.module(node)
        if module is not None and is_product(module) and not any(node in region.nodes for region in regions):
            region = matcher.region(node)
            if region is not None and region.is_more_than_a_layer():
                regions.append(region)
    return regions


class _Matcher:
    def __init__(self, found: BlockGraph) -> None:
        self.found = found
        self._kinds: dict[fx.Node, str] = {}
        self._constants: set[fx.Node] = set()
        for node in found.graph.nodes:
            functions = node.op in ("call_function", "call_method") and bool(node.all_input_nodes)
            if node.op == "get_attr" or (functions and self._constants.issuperset(node.all_input_nodes)):
                self._constants.add(node)

    def region(self, start: fx.Node) -> Region | None:
        """Return the largest region whose first layer is called by `start`."""
        axis = self._layer_axis(start)
        x = _only_argument(start)
        if x is None:
            return None
        dim_out, dim_in = self._sizes(start)
        patch = patch_of(self.found.modules[str(start.target)])
        region = Region(x, axis, str(start.target), dim_in, dim_out, {start}, start, axis, start, patch)
        self._extend_backwards(region)
        self._extend_forwards(region)
        return region

    def _extend_backwards(self, region: Region) -> None:
        while len(region.x.users) == 1 and region.x.op != "placeholder":
            node, kind = region.x, self.kind(region.x)
            if kind == TO_LAST and region.x_axis == LAST:
                region.x_axis = FIRST
            elif kind == TO_FIRST and region.x_axis == FIRST:
                region.x_axis = LAST
            elif not region.norm and not _pads(region) and self._is_norm(node, region.dim_in, region.x_axis):
                region.norm = str(node.target)
            elif kind != IDENTITY:
                return
            region.nodes.add(node)
            region.x = node.all_input_nodes[0]

    def _extend_forwards(self, region: Region) -> None:
        while len(region.product.users) == 1:
            node = next(iter(region.product.users))
            if not self._absorb(region, node):
                self._add_residual(region, node)
                return
            region.nodes.add(node)
            region.product = region.last = node

    def _absorb(self, region: Region, node: fx.Node) -> bool:
        """Make the only user of the product part of it; return False if it cannot be."""
        kind, axis, module = self.kind(node), region.product_axis, self.found.module(node)
        if kind == IDENTITY:
            return True
        if (kind, axis) in ((TO_LAST, FIRST), (TO_FIRST, LAST)):
            region.product_axis = -axis
            return True
        is_layer = (
            module is not None and is_pointwise(module) and _only_argument(node) is region.product and not region.after
        )
        if is_layer and region.activation != "none" and not region.second and self._layer_axis(node) == axis:
            region.second, region.dim_out = str(node.target), self._sizes(node)[0]
            return True
        if kind in ACTIVATIONS and not region.second and region.activation == "none":
            region.activation = kind
            return True
        if region.activation == "none" and not region.after and self._is_layer_norm(node, region.dim_out, axis):
            region.after = str(node.target)
            return True
        affine = self._affine(node, region.product, axis)
        if affine is None or region.after or (region.activation != "none" and not region.second):
            return False
        (region.second_affine if region.second else region.affine).append(affine)
        return True

    def _add_residual(self, region: Region, node: fx.Node) -> None:
        pair = _two_arguments(node, _SUMS)
        if pair is None or region.product not in pair or pair[0] is pair[1]:
            return
        other = pair[1] if pair[0] is region.product else pair[0]
        # In place, a sum may only change the product.
        if isinstance(other, fx.Node) and other not in self._constants and not (is_in_place(node) and pair[0] is other):
            region.residual, region.last = other, node
            region.nodes.add(node)

    def kind(self, node: fx.Node) -> str:
        """Return what a node computes from its only input, as `computed_by` does; "" if that is unknown."""
        if node not in self._kinds:
            self._kinds[node] = self._computed(node)
        return self._kinds[node]

    def _computed(self, node: fx.Node) -> str:
        inputs, module = node.all_input_nodes, self.found.module(node)
        if len(inputs) != 1 or inputs[0] in self._constants:
            return ""
        function: Callable[..., Any]
        if node.op == "call_module":
            assert module is not None
            if module._parameters or module._buffers or module._modules:
                return ""
            function = module
        elif node.op == "call_function" and not isinstance(node.target, _OPERATORS):
            function = node.target  # type: ignore[assignment]
        elif node.op == "call_method":
            function = operator.methodcaller(str(node.target), *node.args[1:], **node.kwargs)
            return computed_by(function) if node.args[0] is inputs[0] else ""
        else:
            return ""

        def applied(x: Tensor) -> Any:
            args, kwargs = map_arg((node.args, node.kwargs), lambda _: x)
            return function(*args, **kwargs)

        return computed_by(applied)

    def changes_shared_value(self, node: fx.Node) -> bool:
        """Return whether a node changes a tensor in place that other nodes use, too."""
        module = self.found.module(node)
        if not is_in_place(node) and not (module is not None and getattr(module, "inplace", False)):
            return False
        value = node.args[0] if node.args else None
        return not isinstance(value, fx.Node) or len(value.users) > 1 or value.op in ("placeholder", "get_attr")

    def _affine(self, node: fx.Node, value: fx.Node, axis: int) -> Affine | None:
        module = self.found.module(node)
        if isinstance(module, _BATCH_NORMS) and axis == FIRST and is_foldable(module) and _only_argument(node) is value:
            return Affine("norm", module, axis)
        for kind, targets in (("factor", _PRODUCTS), ("summand", _SUMS)):
            pair = _two_arguments(node, targets)
            if pair is None or value not in pair or pair[0] is pair[1]:
                continue
            other = pair[1] if pair[0] is value else pair[0]
            if isinstance(other, (int, float)) or other in self._constants:
                return Affine(kind, other, axis)
        return None

    def _is_norm(self, node: fx.Node, channels: int, axis: int) -> bool:
        module = self.found.module(node)
        if module is None or _only_argument(node) is None:
            return False
        if isinstance(module, _BATCH_NORMS):
            return axis == FIRST and is_foldable(module)
        return self._is_layer_norm(node, channels, axis)

    def _is_layer_norm(self, node: fx.Node, channels: int, axis: int) -> bool:
        module = self.found.module(node)
        return module is not None and _only_argument(node) is not None and is_layer_norm(module, channels, axis)

    def _sizes(self, node: fx.Node) -> tuple[int, int]:
        """Return the numbers of output and input channels of the layer that a node calls."""
        weight: Any = self.found.modules[str(node.target)].weight
        return weight.shape[0], weight.shape[1]

    def _layer_axis(self, node: fx.Node) -> int:
        return LAST if isinstance(self.found.module(node), nn.Linear) else FIRST


def _pads(region: Region) -> bool:
    """Return whether there are zeros around the image, which the affine part of a norm before them would not reach."""
    return region.patch is not None and any(region.patch.padding)


def _only_argument(node: fx.Node) -> fx.Node | None:
    """Return the argument of a call with a single one; None if there are others."""
    if len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], fx.Node):
        return node.args[0]
    return None


def _two_arguments(node: fx.Node, targets: tuple[Any, ...]) -> tuple[Any, Any] | None:
    """Return the arguments of a call with two of them, if it calls one of `targets`."""
    if node.op in ("call_function", "call_method") and node.target in targets and len(node.args) == 2 and not node.kwargs:
        return node.args[0], node.args[1]
    return None


def is_in_place(node: fx.Node) -> bool:
    """Return whether a call of a function or method changes its first argument."""
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    if node.kwargs.get("inplace") or node.kwargs.get("out") is not None:
        return True
    methods = node.op != "call_module" and name.endswith("_") and not name.endswith("__")
    return methods or node.target in (operator.iadd, operator.imul, operator.isub, operator.itruediv, operator.setitem)
