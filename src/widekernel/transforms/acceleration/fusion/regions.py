"""Regions of a block's graph that one native call can compute.

    [squeeze-excite] -> [norm] -> product -> [affine] -> [norm]
        -> [activation -> [[response norm] -> layer -> [affine]]] -> [+ residual]

The product is a pointwise layer, or a convolution with a stride, which is a product over patches; the second layer is
pointwise. Or

    small depthwise convolution -> [affine] -> [ReLU]

Between the parts, there may be permutations between (N, C, H, W) and (N, H, W, C), and modules that do nothing
in evaluation. No value inside a region is used outside it, and no node belongs to two regions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from widekernel.layers.norms import is_foldable
from widekernel.ops.patch import Patch
from widekernel.ops.pointwise_reference import ACTIVATIONS
from widekernel.transforms.acceleration.fusion.gates import Gate, gate_ending_with
from widekernel.transforms.acceleration.fusion.graph import (
    BlockGraph,
    is_pointwise,
    is_small_depthwise,
    patch_of,
    starts_region,
)
from widekernel.transforms.acceleration.fusion.nodes import (
    FIRST,
    LAST,
    PRODUCTS,
    SUMS,
    Nodes,
    is_in_place,
    only_argument,
    two_arguments,
)
from widekernel.transforms.acceleration.fusion.probing import (
    IDENTITY,
    TO_FIRST,
    TO_LAST,
    is_layer_norm,
    is_response_norm,
)

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
        first: name of the first layer, pointwise, a convolution with a stride, or a depthwise one.
        dim_in: number of channels of its input.
        dim_out: number of channels of the result.
        nodes: the nodes of the region.
        patch: the patches of the first layer; None if it is pointwise.
        gate: squeeze-excite before the norm; None for none.
        norm: name of the norm before the first layer; "" for none.
        affine: affine maps after the first layer, in order.
        after: name of the layer norm after these, which no second layer follows; "" for none.
        activation: a key of `ACTIVATIONS`.
        response: name of the response norm before the second layer; "" for none.
        second: name of the second pointwise layer; "" for none.
        second_affine: affine maps after the second layer.
        product: the last node before the residual is added.
        product_axis: axis of the channels of its value.
        residual: the node that is added to it; None for none.
        depthwise: whether the first layer is a depthwise convolution, which is then the only one.
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
    gate: Gate | None = None
    norm: str = ""
    affine: list[Affine] = field(default_factory=list)
    after: str = ""
    activation: str = "none"
    response: str = ""
    second: str = ""
    second_affine: list[Affine] = field(default_factory=list)
    residual: fx.Node | None = None
    depthwise: bool = False

    def layers(self) -> tuple[str, ...]:
        """Return the names of the layers whose products it computes for pixels."""
        return (self.first, self.second) if self.second else (self.first,)

    def all_layers(self) -> tuple[str, ...]:
        """Return the names of all its layers, those of its gate first."""
        return (self.gate.first, self.gate.second, *self.layers()) if self.gate else self.layers()

    def needs_images(self) -> bool:
        """Return whether its result for a pixel depends on which others belong to the image."""
        return any(part not in ("", None) for part in (self.patch, self.gate, self.response))

    def is_more_than_a_layer(self) -> bool:
        """Return whether it contains more than one pointwise or depthwise layer alone."""
        patch = None if self.depthwise else self.patch
        more = patch, self.gate, self.norm, self.affine, self.after, self.second, self.residual
        return any(part not in ("", [], None) for part in more) or self.activation != "none"


def find_regions(found: BlockGraph) -> list[Region]:
    """Find the regions of a block, from its first layer to its last; none if shared values are changed in place.

    What could belong to two regions belongs to the one whose first layer comes first.
    """
    matcher = _Matcher(found)
    if any(matcher.changes_shared_value(node) for node in found.graph.nodes):
        return []
    regions: list[Region] = []
    for node in found.graph.nodes:
        module = found.module(node)
        if module is not None and starts_region(module) and not any(node in region.nodes for region in regions):
            region = matcher.region(node, regions)
            if region is not None and region.is_more_than_a_layer():
                # The layers of its gate may have been a region of their own.
                regions = [other for other in regions if not other.nodes <= region.nodes] + [region]
    assert sum(len(region.nodes) for region in regions) == len({node for region in regions for node in region.nodes})
    return regions


class _Matcher(Nodes):
    """Finds regions."""

    def __init__(self, found: BlockGraph) -> None:
        super().__init__(found)
        self._regions: Sequence[Region] = ()
        self._taken: set[fx.Node] = set()

    def region(self, start: fx.Node, regions: Sequence[Region]) -> Region | None:
        """Return the largest region whose first layer is called by `start`, without the nodes of `regions`."""
        self._regions, self._taken = regions, {node for region in regions for node in region.nodes}
        axis = self.layer_axis(start)
        x = only_argument(start)
        if x is None:
            return None
        module = self.found.modules[str(start.target)]
        dim_out, dim_in = self.sizes(start)
        region = Region(x, axis, str(start.target), dim_in, dim_out, {start}, start, axis, start, patch_of(module))
        if is_small_depthwise(module):
            region.dim_in, region.depthwise = dim_out, True
            self._extend_depthwise(region)
            return region
        self._extend_backwards(region)
        self._extend_forwards(region)
        return region

    def _extend_backwards(self, region: Region) -> None:
        while len(region.x.users) == 1 and region.x.op != "placeholder" and region.x not in self._taken:
            node, kind = region.x, self.kind(region.x)
            gate = gate_ending_with(self, node) if region.x_axis == FIRST else None
            if gate is not None and self._is_free(gate):
                value = next(input for input in gate.nodes[0].all_input_nodes)
                region.gate, region.x = gate, value
                region.nodes.update(gate.nodes)
                return
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

    def _extend_depthwise(self, region: Region) -> None:
        while len(region.product.users) == 1 and region.activation == "none":
            node = next(iter(region.product.users))
            kind, affine = self.kind(node), self._affine(node, region.product, FIRST)
            if node in self._taken or (kind not in (IDENTITY, "relu") and affine is None):
                return
            if kind == "relu":
                region.activation = kind
            elif affine is not None:
                region.affine.append(affine)
            region.nodes.add(node)
            region.product = region.last = node

    def _is_free(self, gate: Gate) -> bool:
        """Return whether no region extends beyond the gate that contains some of it."""
        nodes = set(gate.nodes)
        return all(region.nodes <= nodes or region.nodes.isdisjoint(nodes) for region in self._regions)

    def _extend_forwards(self, region: Region) -> None:
        complete: tuple[fx.Node, int, set[fx.Node]] | None = None
        while len(region.product.users) == 1:
            node = next(iter(region.product.users))
            before = region.product, region.product_axis, set(region.nodes)
            if not self._absorb(region, node):
                if not region.response or region.second:
                    self._add_residual(region, node)
                break
            complete = before if region.response == str(node.target) and not region.second else complete
            region.nodes.add(node)
            region.product = region.last = node
        if complete is not None and not region.second:
            # Without a second layer, the region ends before the response norm.
            region.response = ""
            region.product, region.product_axis, region.nodes = complete
            region.last = region.product

    def _absorb(self, region: Region, node: fx.Node) -> bool:
        """Make the only user of the product part of it; return False if it cannot be."""
        kind, axis, module = self.kind(node), region.product_axis, self.found.module(node)
        if kind == IDENTITY:
            return True
        if (kind, axis) in ((TO_LAST, FIRST), (TO_FIRST, LAST)):
            region.product_axis = -axis
            return True
        is_layer = module is not None and is_pointwise(module) and only_argument(node) is region.product and not region.after
        if is_layer and region.activation != "none" and not region.second and self.layer_axis(node) == axis:
            region.second, region.dim_out = str(node.target), self.sizes(node)[0]
            return True
        if region.response and not region.second:
            return False
        # Before a second layer, the outputs are the hidden units.
        follows = region.activation != "none" and not region.second and only_argument(node) is region.product
        if follows and module is not None and is_response_norm(module, region.dim_out, axis):
            region.response = str(node.target)
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
        pair = two_arguments(node, SUMS)
        if node in self._taken or pair is None or region.product not in pair or pair[0] is pair[1]:
            return
        other = pair[1] if pair[0] is region.product else pair[0]
        # In place, a sum may only change the product.
        if isinstance(other, fx.Node) and other not in self.constants and not (is_in_place(node) and pair[0] is other):
            region.residual, region.last = other, node
            region.nodes.add(node)

    def _affine(self, node: fx.Node, value: fx.Node, axis: int) -> Affine | None:
        module = self.found.module(node)
        if isinstance(module, _BATCH_NORMS) and axis == FIRST and is_foldable(module) and only_argument(node) is value:
            return Affine("norm", module, axis)
        for kind, targets in (("factor", PRODUCTS), ("summand", SUMS)):
            pair = two_arguments(node, targets)
            if pair is None or value not in pair or pair[0] is pair[1]:
                continue
            other = pair[1] if pair[0] is value else pair[0]
            if isinstance(other, (int, float)) or other in self.constants:
                return Affine(kind, other, axis)
        return None

    def _is_norm(self, node: fx.Node, channels: int, axis: int) -> bool:
        module = self.found.module(node)
        if module is None or only_argument(node) is None:
            return False
        if isinstance(module, _BATCH_NORMS):
            return axis == FIRST and is_foldable(module)
        return self._is_layer_norm(node, channels, axis)

    def _is_layer_norm(self, node: fx.Node, channels: int, axis: int) -> bool:
        module = self.found.module(node)
        return module is not None and only_argument(node) is not None and is_layer_norm(module, channels, axis)


def _pads(region: Region) -> bool:
    """Return whether there are zeros around the image, which the affine part of a norm before them would not reach."""
    return region.patch is not None and any(region.patch.padding)
