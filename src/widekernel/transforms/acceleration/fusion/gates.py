"""Squeeze-excite in a block's graph."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from widekernel.ops.pointwise_reference import ACTIVATIONS
from widekernel.transforms.acceleration.fusion.graph import is_pointwise
from widekernel.transforms.acceleration.fusion.nodes import FIRST, PRODUCTS, Nodes, only_argument, two_arguments
from widekernel.transforms.acceleration.fusion.probing import IDENTITY, MEAN, SIGMOID


@dataclass(frozen=True)
class Gate:
    """Squeeze-excite: x · sigmoid(second · activation(first · mean(x))), where the mean is that over pixels.

    Attributes:
        first: name of the first pointwise layer.
        activation: a key of `ACTIVATIONS`.
        second: name of the second pointwise layer.
        nodes: the nodes between the value and its product with the factors, which is the last one.
    """

    first: str
    activation: str
    second: str
    nodes: tuple[fx.Node, ...]


def gate_ending_with(nodes: Nodes, product: fx.Node) -> Gate | None:
    """Return the squeeze-excite whose last step is `product`; None if it is anything else."""
    pair = two_arguments(product, PRODUCTS)
    for value, factors in (pair, pair[::-1]) if pair is not None else ():
        if not isinstance(value, fx.Node) or not isinstance(factors, fx.Node) or set(value.users) - {product} == set():
            continue
        gate = _gate_of(nodes, factors, value, product)
        if gate is not None:
            return gate
    return None


def _gate_of(nodes: Nodes, factors: fx.Node, value: fx.Node, product: fx.Node) -> Gate | None:
    """Return the squeeze-excite that computes `factors` from `value`, which nothing else uses."""
    # Backwards from the factors to the value.
    passed, layers, activation, has_sigmoid = [product], [], "none", False
    node = factors
    while node is not value:
        kind, module = nodes.kind(node), nodes.found.module(node)
        if len(node.users) != 1 or not node.all_input_nodes:
            return None
        passed.append(node)
        if module is not None and is_pointwise(module) and nodes.layer_axis(node) == FIRST and only_argument(node):
            layers.append(node)
        elif kind == SIGMOID and not layers and not has_sigmoid:
            has_sigmoid = True
        elif kind in ACTIVATIONS and len(layers) == 1 and activation == "none":
            activation = kind
        elif kind == MEAN and len(layers) == 2 and node.all_input_nodes[0] is value:
            pass
        elif kind != IDENTITY:
            return None
        node = node.all_input_nodes[0]
    whole = has_sigmoid and len(layers) == 2 and nodes.kind(passed[-1]) == MEAN and len(value.users) == 2
    if not whole or nodes.sizes(layers[0])[0] != nodes.sizes(layers[1])[1]:
        return None
    return Gate(str(layers[1].target), activation, str(layers[0].target), tuple(reversed(passed)))
