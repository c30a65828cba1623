"""Chains of layers whose channels can be permuted: one layer writes the channels, and only one other layer reads them.

Between the two, there may only be operations that treat every channel alike and separately.
"""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from widekernel.layers import KernelSource, LargeKernel, PartialChannels
from widekernel.layers.rebuilding import is_plain
from widekernel.layers.training_modes import training_modes_restored
from widekernel.sparsity.semi_structured.eligibility import conv_groups

# Exact types, because a subclass may do anything. None of them mixes channels or treats them differently.
ELEMENTWISE: frozenset[type[nn.Module]] = frozenset(
    {
        *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh),
        *(nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus, nn.Identity, nn.Dropout),
    }
)
POOLING: frozenset[type[nn.Module]] = frozenset({nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d})
FUNCTIONS = frozenset({torch.relu, F.relu, F.gelu, F.silu, F.relu6, F.hardswish, F.dropout, torch.sigmoid, torch.tanh})
METHODS = frozenset({"relu", "relu_", "sigmoid", "tanh", "contiguous"})
SUMS = frozenset({operator.add, operator.iadd, torch.add, "add", "add_"})


@dataclass(frozen=True)
class Chain:
    """Two layers, and the modules between them.

    Attributes:
        producer: name of the layer whose output channels are the consumer's input channels.
        consumer: name of that layer.
        between: names of the modules between them that have per-channel parameters or statistics.
    """

    producer: str
    consumer: str
    between: tuple[str, ...]


class _Tracer(fx.Tracer):
    """Tracer of containers and blocks, with single layers as leaves."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        kinds = (_BatchNorm, nn.LayerNorm, LargeKernel, PartialChannels, KernelSource)
        return super().is_leaf_module(module, name) or isinstance(module, kinds) or not any(module.children())


def find_chains(model: nn.Module, consumers: list[str]) -> dict[str, Chain | str]:
    """Return for each consumer the chain from its producer, or the reason why its input channels cannot be permuted.

    The network is traced with torch.fx, as a whole if possible, and otherwise in the largest parts that can be traced. The
    traces in training and in evaluation mode must agree. Within a part, all readers of the tensors between two layers are
    known. Parts are assumed to be called as modules, through their `forward`. The outputs of `forward_features` keep their
    order.

    Args:
        model: the network.
        consumers: names of layers.
    """
    found: dict[str, Chain | str] = dict.fromkeys(consumers, "the code around it cannot be traced")
    with training_modes_restored(model):
        _visit(model, "", model, found)
        _keep_features(model, found)
    return found


def _keep_features(model: nn.Module, found: dict[str, Chain | str]) -> None:
    """Drop chains between the features of a network and its head, because users may read the features (timm)."""
    if not hasattr(type(model), "forward_features"):
        return
    tracer = _Tracer()
    tracer.traced_func_name = "forward_features"
    try:
        graph = tracer.trace(model)
    except Exception:  # as in _trace; its parts were traced one by one then, and no chain crosses parts
        return
    inside = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    for name, chain in found.items():
        if isinstance(chain, Chain) and (chain.producer in inside) != (chain.consumer in inside):
            found[name] = "it reads the outputs of forward_features"


def _visit(model: nn.Module, path: str, part: nn.Module, found: dict[str, Chain | str]) -> None:
    """Look for chains in a part of the network, or in the parts of that part."""
    prefix = f"{path}." if path else ""
    inside = [name for name in found if name.startswith(prefix)]
    if not inside or not any(part.children()):
        return
    graphs = [_trace(part, training) for training in (False, True)]
    if None in graphs:
        for name, child in part.named_children():
            _visit(model, prefix + name, child, found)
        return
    for name in inside:
        results = [_chain(model, part, graph, prefix, name) for graph in graphs if graph is not None]
        found[name] = results[0] if results[0] == results[1] else "it is used differently in training"


def _trace(part: nn.Module, training: bool) -> fx.Graph | None:
    # Hooks would be called with proxies instead of tensors.
    if any(module._forward_hooks or module._forward_pre_hooks for module in part.modules()):
        return None
    part.train(training)
    try:
        return _Tracer().trace(part)
    except Exception:  # whatever the network's code raises when it gets a proxy instead of a tensor
        return None


def _chain(model: nn.Module, part: nn.Module, graph: fx.Graph, prefix: str, consumer: str) -> Chain | str:
    """Walk back from a consumer to its producer, and return the chain, or the reason why there is none."""
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    own = consumer.removeprefix(prefix)
    if len(calls.get(own, ())) != 1:
        return f"it is called {len(calls.get(own, ()))} times"
    layer = part.get_submodule(own)
    if problem := _owner_problem(model, layer, own, read):
        return problem
    assert isinstance(layer, (nn.Conv2d, nn.Linear))
    if not _is_known(layer):
        return f"{type(layer).__name__} may do more with its weight than a plain layer does"
    channels, linear = layer.weight.shape[1], isinstance(layer, nn.Linear)
    between: list[str] = []
    node = calls[own][0].args[0] if calls[own][0].args else None
    while isinstance(node, fx.Node):
        if len(node.users) != 1:
            return "its input is read elsewhere too (a residual stream)"
        if node.op == "call_module":
            name = str(node.target)
            module = part.get_submodule(name)
            has_state = any(True for _ in module.parameters()) or any(True for _ in module.buffers())
            if has_state and len(calls[name]) != 1:
                return f"{prefix}{name}, which comes before it, is used several times"
            if has_state and (problem := _owner_problem(model, module, name, read)):
                return f"{prefix}{name}: {problem}"
            if _is_producer(module, channels, linear):
                return Chain(prefix + name, consumer, tuple(between))
            if not _keeps_channels(module, channels, linear):
                return f"{prefix}{name} ({type(module).__name__}), which comes before it, treats channels differently"
            if has_state:
                between.append(prefix + name)
        elif not _is_elementwise(node):
            return _other_reason(node)
        node = node.args[0] if node.args else None
    return "its input comes from outside the part that could be traced"


def _other_reason(node: fx.Node) -> str:
    if node.op == "placeholder":
        return "its input comes from outside the part that could be traced"
    if node.target in SUMS:
        return "its input is a sum (a residual stream)"
    return f"its input comes from {getattr(node.target, '__name__', node.target)}, which may treat channels differently"


def _is_elementwise(node: fx.Node) -> bool:
    if any(isinstance(value, fx.Node) for value in [*node.args[1:], *node.kwargs.values()]):
        return False
    known = FUNCTIONS if node.op == "call_function" else METHODS
    return node.op in ("call_function", "call_method") and node.target in known


def _owner_problem(model: nn.Module, module: nn.Module, name: str, read: set[str]) -> str:
    """Return why the parameters of a module cannot be reordered, or "" if they can."""
    if any(target.startswith(f"{name}.") for target in read):
        return "its parameters are read directly"
    held = [one for one in model.modules() if one is module]
    places = [path for path, one in model.named_modules(remove_duplicate=False) if one is module]
    if len(held) != 1 or len(places) != 1:
        return "it is used in several places"
    uses = Counter(id(p) for one in model.modules() for p in one._parameters.values() if p is not None)
    if any(uses[id(p)] > 1 for p in module.parameters()):
        return "it shares parameters"
    return "it is parametrized" if hasattr(module, "parametrizations") else ""


def _is_producer(module: nn.Module, channels: int, linear: bool) -> bool:
    kind = nn.Linear if linear else nn.Conv2d
    return isinstance(module, kind) and _is_known(module) and conv_groups(module) == 1 and module.weight.shape[0] == channels


def _is_known(layer: nn.Module) -> bool:
    """Return whether a convolution or linear layer is plain, or is timm's convolution with TensorFlow's padding."""
    return is_plain(layer) or (type(layer).__name__ == "Conv2dSame" and type(layer).__module__.startswith("timm.layers."))


def _keeps_channels(module: nn.Module, channels: int, linear: bool) -> bool:
    """Return whether reordering a module's input channels and its own vectors only reorders its output."""
    kind = type(module)
    if kind in ELEMENTWISE or (kind.__module__.startswith("timm.layers.activations") and kind.__name__ != "PReLU"):
        return True
    if kind.__name__ == "GlobalResponseNorm" and kind.__module__.startswith("timm.layers."):
        return module.channel_dim == (-1 if linear else 1)  # type: ignore[return-value]
    if isinstance(module, nn.LayerNorm):
        # They normalize the last dimension, except for the two-dimensional ones of timm and torchvision.
        across = kind.__name__ == "LayerNorm2d"
        others = kind.__name__ in ("LayerNorm", "LayerNorm2d") and kind.__module__.startswith(
            ("timm.layers.", "torchvision.")
        )
        known = kind is nn.LayerNorm or others
        return known and across is not linear and tuple(module.normalized_shape) == (channels,)
    if linear:
        return False
    if isinstance(module, _BatchNorm):
        return module.num_features == channels and all(_keeps_channels(one, channels, linear) for one in module.children())
    if isinstance(module, nn.Conv2d):
        return _is_known(module) and module.groups == module.in_channels == module.out_channels == channels
    return kind in POOLING
