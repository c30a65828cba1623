"""Guards: what the graph of a block depends on, besides tensors, and how to notice that any of it has changed."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter, getitem, is_
from typing import Any, NamedTuple

from torch import nn

from widekernel.layers.alterations import REPLACEABLE_METHODS, replaced_method
from widekernel.layers.rebuilding import is_plain
from widekernel.transforms.acceleration.fusion.graph import BlockGraph, patch_of

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Attributes of a module that hold its hooks."""
# Attributes that every module has and that do not influence its forward, or that are compared in another way.
_BOOKKEEPING = frozenset(vars(nn.Module())) - {"training"}
# Attributes of PyTorch's layers that repeat the shape of the weight, or have no effect on 1x1 convolutions.
_SIZES = {"in_features", "out_features", "in_channels", "out_channels", "kernel_size", "dilation", "transposed"}
_SIZES |= {"output_padding", "padding_mode", "_reversed_padding_repeated_twice", "elementwise_affine"}
# Those that have an effect on other convolutions.
_GEOMETRY = {"kernel_size", "dilation", "padding_mode"}
STATE = "_fused_state"
"""Name of the attribute of a fused block that holds its plan; it is not part of copies."""
_COMPARABLE = (bool, int, float, str, tuple)
_NOTHING = object()
REPLACEMENTS = (*REPLACEABLE_METHODS, "_compiled_call_impl")
"""Attributes of an instance that replace the computation of its class, or stand for a compiled one."""
_forward_of = attrgetter("forward")


class _Seen(NamedTuple):
    """What is looked at in every call, and what was found when nothing had changed.

    Every comparison runs over whole tuples inside the interpreter. After a native call, the processor has to load code and
    data again, so that Python code takes several times as long as in a loop of its own.

    Attributes:
        held: the dicts of the values; with `keys` and `values`, one item each.
        keys: their keys.
        values: the objects themselves.
        sized: dicts of attributes and of parts.
        lengths: their numbers of items.
        modules: the modules, the block first.
        kinds: their classes.
        computing: the classes whose forward is computed here, each once.
        forwards: the functions of these.
    """

    held: tuple[dict[str, Any], ...]
    keys: tuple[str, ...]
    values: tuple[Any, ...]
    sized: tuple[dict[str, Any], ...]
    lengths: list[int]
    modules: tuple[nn.Module, ...]
    kinds: list[type[nn.Module]]
    computing: tuple[type[nn.Module], ...]
    forwards: list[Any]

    def is_unchanged(self) -> bool:
        """Return whether every object is the same as before."""
        try:
            return (
                all(map(is_, map(getitem, self.held, self.keys), self.values))
                and list(map(len, self.sized)) == self.lengths
                and all(map(is_, map(type, self.modules), self.kinds))
                and all(map(is_, map(_forward_of, self.computing), self.forwards))
            )
        except KeyError:
            return False


class Guards:
    """The state on which the graph of a block depends: modules, their classes, attributes, hooks and training flags.

    Args:
        found: the graph of the block.
        inside: names of the modules that are computed by native calls.
    """

    def __init__(self, found: BlockGraph, inside: set[str]) -> None:
        called = {str(node.target) for node in found.graph.nodes if node.op == "call_module"}
        watched = {name: module for name, module in found.modules.items() if name in called | found.through}
        self._block = found.modules[""]
        self._modules = [(name, part, _kind(part)) for name, part in watched.items()]
        self._hooked = [vars(module) for module in watched.values() for _ in HOOKS]
        self._hook_keys = HOOKS * len(watched)
        computed = [(name, module) for name, module in watched.items() if name in found.through or name in inside]
        self._forwards = [(name, module, _forward(module)) for name, module in computed]
        self._values: list[tuple[str, dict[str, Any], str, Any]] = []
        self._lengths: list[tuple[str, dict[str, Any], int]] = []
        for name, module in computed:
            if name in found.through:
                self._watch_parts(name, module)
            sizes = _SIZES if patch_of(module) is None else _SIZES - _GEOMETRY
            ignored = _BOOKKEEPING if name in found.through else _BOOKKEEPING | sizes
            own = [(key, value) for key, value in vars(module).items() if key not in ignored and key != STATE]
            self._values += [(name, vars(module), key, value) for key, value in own]
        self._seen = self._look()

    def _watch_parts(self, name: str, module: nn.Module) -> None:
        self._values += [(name, module._modules, key, part) for key, part in module._modules.items()]
        parts: tuple[dict[str, Any], ...] = (module._modules, module._parameters, module._buffers)
        self._lengths += [(name, held, len(held)) for held in parts]
        for held in parts[1:]:
            # A parameter that appears later may change the graph; the values of the others are no part of it.
            self._values += [(name, held, key, None) for key, value in held.items() if value is None]

    def hold(self) -> bool:
        """Return whether nothing has changed."""
        # The dicts of hooks are looked up each time, because they may be replaced.
        altered = any(map(dict.get, self._hooked, self._hook_keys)) or not vars(self._block).keys().isdisjoint(REPLACEMENTS)
        if not altered and self._seen.is_unchanged():
            return True
        if next(self.violations(), None) is not None:
            return False
        # What has changed has no effect, such as the class of a layer that has been accelerated.
        self._seen = self._look()
        return True

    def _look(self) -> _Seen:
        """Return the present state, in which nothing has changed that has an effect."""
        held, keys = zip(*[(held, key) for _, held, key, _ in self._values])
        modules = tuple(module for _, module, _ in self._modules)
        sized = (*(held for _, held, _ in self._lengths), *map(vars, modules))
        computing = tuple({type(module) for _, module, _ in self._forwards})
        return _Seen(
            held,
            keys,
            tuple(dict_.get(key, _NOTHING) for dict_, key in zip(held, keys)),
            sized,
            list(map(len, sized)),
            modules,
            list(map(type, modules)),
            computing,
            list(map(_forward_of, computing)),
        )

    def violations(self) -> Iterator[str]:
        """Yield what has changed."""
        for name, module, kind in self._modules:
            name = name or "the block"
            if is_hooked(module):
                yield f"{name} has a hook"
            if alteration(module):
                yield f"{name} {alteration(module)}"
            if _kind(module) is not kind:
                yield f"the class of {name} has changed since the block was fused"
        for name, module, forward in self._forwards:
            # Acceleration may swap the classes of pointwise layers.
            if _forward(module) is not forward and not is_plain(module):
                yield f"the class of {name or 'the block'} has another forward than when the block was fused"
        for name, held, length in self._lengths:
            if len(held) != length:
                yield f"{name or 'the block'} has other parts than when the block was fused"
        for name, held, key, value in self._values:
            now = held.get(key, _NOTHING)
            if now is value or (type(now) is type(value) and isinstance(now, _COMPARABLE) and now == value):
                continue
            if key == "training":
                yield f"{name or 'the block'} is in training mode"
            else:
                yield f"{key} of {name or 'the block'} has changed since the block was fused"


def is_hooked(module: nn.Module) -> bool:
    """Return whether there is a hook on a module."""
    return any(getattr(module, key) for key in HOOKS)


def alteration(module: nn.Module) -> str:
    """Return how a module has been altered on this instance, apart from hooks; "" if it has not."""
    if getattr(module, "_compiled_call_impl", None) is not None:
        return "is compiled"
    name = replaced_method(module)
    return f"has another {name} than its class" if name else ""


def _forward(module: nn.Module) -> Any:
    return type(module).forward


def _kind(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module, regardless of whether it has been accelerated, which may also happen later."""
    if is_plain(module):
        return nn.Linear if isinstance(module, nn.Linear) else nn.Conv2d
    # Not inherited: a subclass of the class of a fused block may do something else.
    kind: type[nn.Module] = vars(type(module)).get("unfused", type(module))
    return kind
