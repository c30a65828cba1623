"""What the nodes of a block's graph compute, as far as regions need to know."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from widekernel.transforms.acceleration.fusion.graph import BlockGraph
from widekernel.transforms.acceleration.fusion.probing import computed_by

FIRST, LAST = 1, -1
"""The axis of the channels: 1 in (N, C, H, W), -1 in (N, H, W, C) and in rows."""
PRODUCTS = (operator.mul, torch.mul, torch.multiply, operator.imul, "mul", "mul_", "multiply")
SUMS = (operator.add, torch.add, operator.iadd, "add", "add_")
# Operators in `torch.ops` may do anything, such as communicate with other processes: they are not tried out.
_OPERATORS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)


class Nodes:
    """The nodes of a graph.

    Args:
        found: the graph.

    Attributes:
        constants: nodes whose values depend on parameters and buffers only.
    """

    def __init__(self, found: BlockGraph) -> None:
        self.found = found
        self._kinds: dict[fx.Node, str] = {}
        self.constants: set[fx.Node] = set()
        for node in found.graph.nodes:
            functions = node.op in ("call_function", "call_method") and bool(node.all_input_nodes)
            if node.op == "get_attr" or (functions and self.constants.issuperset(node.all_input_nodes)):
                self.constants.add(node)

    def kind(self, node: fx.Node) -> str:
        """Return what a node computes from its only input, as `computed_by` does; "" if that is unknown."""
        if node not in self._kinds:
            self._kinds[node] = self._computed(node)
        return self._kinds[node]

    def _computed(self, node: fx.Node) -> str:
        inputs, module = node.all_input_nodes, self.found.module(node)
        if len(inputs) != 1 or inputs[0] in self.constants:
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

    def sizes(self, node: fx.Node) -> tuple[int, int]:
        """Return the numbers of output and input channels of the layer that a node calls."""
        weight: Any = self.found.modules[str(node.target)].weight
        return weight.shape[0], weight.shape[1]

    def layer_axis(self, node: fx.Node) -> int:
        """Return the axis of the channels of the values that a layer takes and returns."""
        return LAST if isinstance(self.found.module(node), nn.Linear) else FIRST


def only_argument(node: fx.Node) -> fx.Node | None:
    """Return the argument of a call with a single one; None if there are others."""
    if len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], fx.Node):
        return node.args[0]
    return None


def two_arguments(node: fx.Node, targets: tuple[Any, ...]) -> tuple[Any, Any] | None:
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
