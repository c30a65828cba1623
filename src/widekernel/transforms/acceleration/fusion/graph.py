"""The graph of a block: which modules and functions it calls, in which order.

The block itself is not called, and nothing of it is replaced while other threads may use it. Its `forward` runs on a shadow:
shallow copies of the modules it is traced through, stubs of those that count as one operation, and `torch.fx` proxies for
tensors. Attributes that `forward` sets are set on the shadow.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, fx, nn

from widekernel.layers.pointwise import reasons_against_pointwise
from widekernel.layers.rebuilding import is_plain
from widekernel.layers.sides import sides
from widekernel.ops.patch import Patch
from widekernel.transforms.acceleration.fusion.probing import epsilon_of

_CONTAINERS = (list, dict, set)
# A block is traced through modules whose layers are at most so many levels below them.
_LEVELS = 2
# Most taps of a small depthwise convolution.
_TAPS, _TAPS_WITH_STRIDE = 9, 25


class NotTraceableError(Exception):
    """The forward of a block cannot be traced; the message says why."""


@dataclass
class BlockGraph:
    """The graph of a block with one tensor as input.

    Attributes:
        graph: calls of modules (by their names in the block), functions and methods.
        modules: the modules by name, those traced through and those called; "" is the block.
        through: names of the modules that are traced through.
        scopes: for each node, the name of the module whose forward created it.
        attributes: for each name of a parameter or buffer in the graph, the dict that holds it, and its key.
    """

    graph: fx.Graph
    modules: dict[str, nn.Module] = field(default_factory=dict)
    through: set[str] = field(default_factory=set)
    scopes: dict[fx.Node, str] = field(default_factory=dict)
    attributes: dict[str, tuple[dict[str, Any], str]] = field(default_factory=dict)

    def module(self, node: fx.Node) -> nn.Module | None:
        """Return the module that a node calls; None if it calls something else."""
        return self.modules[str(node.target)] if node.op == "call_module" else None


def is_pointwise(module: nn.Module) -> bool:
    """Return whether `module` is a linear layer or a 1x1 convolution and nothing else."""
    if not is_plain(module) or "weight" not in module._parameters:
        return False
    if isinstance(module, nn.Linear):
        return True
    return not reasons_against_pointwise(cast(nn.Conv2d, module))


def patch_of(module: nn.Module) -> Patch | None:
    """Return the patches of a convolution with a stride, such as a stem, or of a depthwise one; None for anything else."""
    if not is_plain(module) or isinstance(module, nn.Linear) or "weight" not in module._parameters:
        return None
    conv: Any = module
    plain = conv.padding_mode == "zeros" and sides(conv.dilation) == (1, 1) and conv.padding != "same"
    depthwise = 1 < conv.groups == conv.in_channels == conv.out_channels
    stride = sides(conv.stride)
    if not plain or not (depthwise or (conv.groups == 1 and max(stride) > 1)):
        return None
    padding = (0, 0) if conv.padding == "valid" else sides(conv.padding)
    return Patch(tuple(conv.kernel_size), stride, padding)


def is_product(module: nn.Module) -> bool:
    """Return whether `module` is a matrix product over the channels of pixels or of patches."""
    layer: Any = module
    return is_pointwise(module) or (patch_of(module) is not None and layer.groups == 1)


def is_small_depthwise(module: nn.Module) -> bool:
    """Return whether `module` is a depthwise convolution of few taps; for more taps, other kernels are faster."""
    patch, layer = patch_of(module), cast(Any, module)
    if patch is None or layer.groups == 1:
        return False
    return math.prod(patch.kernel) <= (_TAPS if max(patch.stride) == 1 else _TAPS_WITH_STRIDE)


def starts_region(module: nn.Module) -> bool:
    """Return whether `module` may be the first layer of what one native call computes."""
    return is_product(module) or is_small_depthwise(module)


def has_layers(module: nn.Module, levels: int = _LEVELS) -> bool:
    """Return whether a first layer is among the descendants of `module`, at most `levels` below it, and none deeper.

    Depthwise convolutions do not count if there are products.
    """
    parts = [(name.count(".") + 1, part) for name, part in module.named_modules() if name]
    depths = [depth for depth, part in parts if is_product(part)]
    depths = depths or [depth for depth, part in parts if is_small_depthwise(part)]
    return bool(depths) and max(depths) <= levels


def may_own(module: nn.Module) -> bool:
    """Return whether `module` could be a block whose parts are fused: a product or a small depthwise convolution is near."""
    return any(starts_region(child) or has_layers(child) for child in module.children())


def trace_block(block: nn.Module, opaque: frozenset[str] = frozenset()) -> BlockGraph:
    """Trace the forward of a block with one argument; the other arguments have their default values.

    Modules that cannot be traced through count as one operation.

    Args:
        block: the block, in evaluation mode.
        opaque: names of further modules that count as one operation.

    Raises:
        NotTraceableError: if the forward of the block itself cannot be traced.
    """
    hidden = set(opaque)
    while True:
        tracer = _Tracer(block, hidden)
        try:
            return tracer.traced()
        except Exception as error:
            if not tracer.failed:
                raise NotTraceableError(f"its forward cannot be traced: {str(error).splitlines()[0]}") from error
            hidden.add(tracer.failed)


class _Tracer(fx.Tracer):
    """Records the graph of one block."""

    def __init__(self, block: nn.Module, opaque: set[str]) -> None:
        super().__init__()
        self.block, self.opaque = block, opaque
        self.failed = ""
        self.graph = fx.Graph(tracer_cls=fx.Tracer)
        self.root, self.tensor_attrs = nn.Module(), {}  # where `fx` puts tensors that are not parameters or buffers
        self.result = BlockGraph(self.graph)
        self._scope = [""]
        self._shadows: dict[nn.Module, nn.Module] = {}
        # For each module that is traced through: its name, its attributes, and what they consist of.
        self._states: list[tuple[str, dict[str, Any], dict[str, list[Any]]]] = []

    def traced(self) -> BlockGraph:
        x = self.create_proxy("placeholder", "x", (), {})
        output = self._shadow(self.block, "").forward(x)  # type: ignore[operator]
        self._check_unchanged()
        self.create_node("output", "output", (self.create_arg(output),), {})
        self._note_constants()
        return self.result

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        self.result.scopes[node] = self._scope[-1]
        return node

    def _check_unchanged(self) -> None:
        """Raise if a forward has set an attribute or changed a list, as it would do again at each call."""
        for name, held, before in self._states:
            for key, value in held.items():
                same = key in before and len(before[key]) == len(_parts(value))
                if not same or any(now is not then for now, then in zip(_parts(value), before[key])):
                    self.failed = self.failed or name
                    raise NotTraceableError(f"the forward of {name or 'the block'} changes {key}")

    def _note_constants(self) -> None:
        for node in self.graph.nodes:
            if node.op == "get_attr" and node.target not in self.result.attributes:
                self.result.attributes[node.target] = vars(self.root), node.target

    def _shadow(self, module: nn.Module, name: str) -> nn.Module:
        """Return the shadow of `module`, which calls proxies; the shadow of a module used twice is one, too."""
        if module in self._shadows:
            return self._shadows[module]
        shadow = type(module).__new__(type(module))
        self._shadows[module] = shadow
        # Lists are copied, because a forward may append to them.
        own = {key: copy.copy(value) if type(value) in _CONTAINERS else value for key, value in vars(module).items()}
        vars(shadow).update(own)
        self.result.modules[name] = module
        goes_through = not name or (name not in self.opaque and self._is_transparent(module))
        if goes_through:
            self.result.through.add(name)
            prefix = f"{name}." if name else ""
            parts = {key: child and self._shadow(child, prefix + key) for key, child in module._modules.items()}
            tensors = [self._proxies(module, kind, prefix) for kind in ("_parameters", "_buffers")]
            vars(shadow).update(_modules=parts, _parameters=tensors[0], _buffers=tensors[1])
        if name:
            # `nn.Module.__call__` calls this instead of `forward`; the class and its methods stay as they are.
            vars(shadow)["_compiled_call_impl"] = self._entering(shadow, name) if goes_through else self._calling(name)
        if goes_through:
            self._states.append((name, vars(shadow), {key: _parts(value) for key, value in vars(shadow).items()}))
        return shadow

    def _is_transparent(self, module: nn.Module) -> bool:
        if is_plain(module):
            return False
        if module._modules:
            return has_layers(module)
        # A layer scale: a single parameter with one value per channel, and no epsilon.
        values = list(module._parameters.values())
        is_scale = len(values) == 1 and values[0] is not None and values[0].dim() == 1 and not module._buffers
        return is_scale and epsilon_of(module) is None and not type(module).__module__.startswith("torch.nn.")

    def _proxies(self, module: nn.Module, kind: str, prefix: str) -> dict[str, Any]:
        held: dict[str, Tensor | None] = getattr(module, kind)
        proxies: dict[str, Any] = {}
        for key, value in held.items():
            proxies[key] = None
            if value is not None:
                self.result.attributes[prefix + key] = held, key
                proxies[key] = self.create_proxy("get_attr", prefix + key, (), {})
        return proxies

    def _calling(self, name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: self.create_proxy("call_module", name, args, kwargs)

    def _entering(self, shadow: nn.Module, name: str) -> Callable[..., Any]:
        def enter(*args: Any, **kwargs: Any) -> Any:
            self._scope.append(name)
            try:
                return shadow.forward(*args, **kwargs)  # type: ignore[operator]
            except Exception:
                self.failed = self.failed or name
                raise
            finally:
                self._scope.pop()

        return enter


def _parts(value: Any) -> list[Any]:
    """Return what a value consists of: the elements of a list, set or dict, or the value itself."""
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    return list(value) if isinstance(value, _CONTAINERS) else [value]
