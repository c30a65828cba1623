"""Which parameters of a network are masked, and why the others are not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from widekernel.errors import ArgumentError, nearest
from widekernel.layers import LargeKernel, Rectangles
from widekernel.layers.sources import KernelSource

LARGE = 7  # a depthwise convolution from this size on counts as one of large kernels
SPREAD = (
    "spread over processes (FSDP, or another kind of DTensor), which masks do not support: train with "
    "DistributedDataParallel, or densely"
)


@dataclass(frozen=True)
class Choice:
    """Whether one parameter is masked.

    Attributes:
        name: of the parameter.
        shape: of the parameter.
        reason: why it is not masked; "" if it is.
    """

    name: str
    shape: tuple[int, ...]
    reason: str

    @property
    def masked(self) -> bool:
        """Whether the parameter is masked."""
        return not self.reason


def unwrap(model: nn.Module) -> nn.Module:
    """Give the network inside data-parallel, compiled and Fabric's wrappers; its parameters have the network's own names."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(getattr(model, "_original_module", None), nn.Module):
            model = model._original_module  # type: ignore[assignment]  # Lightning Fabric's
        else:
            return model


def is_spread(parameter: object) -> bool:
    """Whether a parameter is a DTensor, of which a process holds a part."""
    return hasattr(parameter, "placements")


def check_whole(model: nn.Module) -> None:
    """Raise an `ArgumentError` if the network is sharded, which its parameters do not show while they are gathered."""
    kinds = ("FSDPModule", "FullyShardedDataParallel")
    for module in model.modules():
        if any(kind.__name__ in kinds for kind in type(module).__mro__) or any(map(is_spread, module._parameters.values())):
            raise ArgumentError(f"the parameters of the network are {SPREAD}")


def choose(model: nn.Module, layers: str | Sequence[str], exclude: Sequence[str] = ()) -> list[Choice]:
    """Decide for every parameter of an unwrapped network whether it is masked.

    Args:
        model: the network.
        layers: `all`, `large_kernel_only` or name patterns; a module's name stands for all its parameters.
        exclude: patterns of names that stay dense, or names of modules.

    Raises:
        ArgumentError: a pattern names nothing, or something that cannot be masked; a parameter to be masked has two names;
            or nothing is left to be masked.
    """
    owners = dict(_owners(model))
    large = _large_kernels(model) if layers == "large_kernel_only" else set()
    patterns = () if isinstance(layers, str) else tuple(layers)
    for pattern in (*patterns, *exclude):
        if not any(_names(pattern, name) for name in owners):
            modules = [name for name, _ in model.named_modules() if name]
            raise ArgumentError(
                f"the pattern {pattern!r} names no parameter of the network: its first are {', '.join(list(owners)[:3])}."
                f"{nearest(pattern, [*owners, *modules])}"
            )
    choices, spared = [], 0
    for name, (owner, parameter) in owners.items():
        reason = _reason(name, owner, parameter)
        named = any(_names(pattern, name) for pattern in patterns)
        if any(_names(pattern, name) for pattern in exclude):
            spared += not reason
            reason = "excluded by name"
        elif named and reason and parameter.dim() > 1:
            raise ArgumentError(f"layers={list(patterns)} names {name}, which cannot be masked: it {reason}. Leave it out")
        elif patterns and not named:
            reason = reason or "not among the layers named"
        elif layers == "large_kernel_only" and id(parameter) not in large:
            reason = reason or "no large kernel"
        choices.append(Choice(name, tuple(parameter.shape), reason))
    if spared and not any(choice.masked for choice in choices):
        raise ArgumentError(
            f"exclude={list(exclude)} leaves nothing to be masked of layers={layers!r}: it names {spared} parameters that "
            "could be. Exclude fewer"
        )
    _check(model, choices)
    return choices


def _names(pattern: str, name: str) -> bool:
    """Whether a pattern names a parameter: by its own name, or by that of a module which it is in."""
    return fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")


def _owners(model: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, nn.Parameter]]]:
    """Name every parameter once, with the module that uses it; lists of parameters belong to the module that has them."""
    parents = {id(child): module for module in model.modules() for child in module.children()}
    seen = set()
    for prefix, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                is_list = isinstance(module, (nn.ParameterList, nn.ParameterDict)) and module is not model
                yield f"{prefix}.{key}".lstrip("."), (parents[id(module)] if is_list else module, parameter)


def _reason(name: str, owner: nn.Module, parameter: Tensor) -> str:
    if is_spread(parameter):
        return f"is {SPREAD}"
    if not parameter.is_floating_point():
        return f"has whole numbers ({parameter.dtype})"
    if ".parametrizations." in f".{name}":
        return "is parametrised"
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
        return "is an embedding"
    if parameter.dim() < 2 or sum(side > 1 for side in parameter.shape) < 2:
        # A convolution of one channel with a 1×1 kernel is no vector of scales, but has nothing to be pruned either.
        return "scales or shifts channels"
    if parameter.dim() not in (2, 4) and not isinstance(owner, _ConvNd):
        return f"has {parameter.dim()} dimensions and belongs to no convolution"
    if not parameter.requires_grad:
        return "is frozen (requires_grad is False)"
    return ""


def _large_kernels(model: nn.Module) -> set[int]:
    """Give the ids of the kernels whose longer side is the longest of their layer."""
    found: set[int] = set()
    for module in model.modules():
        if isinstance(module, LargeKernel):
            sides = dict(_sides(module.source))
            longest = max(sides.values(), default=0)
            found |= {key for key, side in sides.items() if side == longest}
        elif isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1 and max(module.kernel_size) >= LARGE:
            found.add(id(module.weight))
    return found


def _sides(source: nn.Module) -> Iterator[tuple[int, int]]:
    """Say for each kernel of a source, by id, how long the longer side of the rectangle is that it stands for."""
    for part in source.modules():
        if isinstance(part, Rectangles):
            yield from ((id(kernel), max(kernel.shape[2:])) for kernel in part.kernels)
        elif isinstance(part, KernelSource) and isinstance(getattr(part, "kernel_size", None), int):
            for name, parameter in part.named_parameters():
                if not name.startswith("gates"):
                    yield id(parameter), part.kernel_size  # type: ignore[misc]


def _check(model: nn.Module, choices: list[Choice]) -> None:
    wanted = {choice.name for choice in choices if choice.masked}
    if not wanted:
        counts: dict[str, int] = {}
        for choice in choices:
            counts[choice.reason] = counts.get(choice.reason, 0) + 1
        found = "; ".join(f"{count} x {reason}" for reason, count in counts.items()) or "it has no parameters"
        raise ArgumentError(
            f"the network has no layer that can be masked ({found}): unfreeze it, or widen layers and exclude"
        )
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for several in names.values():
        if len(several) > 1 and wanted & set(several):
            raise ArgumentError(
                f"{' and '.join(several)} are one shared parameter, whose mask would belong to both: keep it dense with "
                f"exclude=[{several[0]!r}]"
            )


def masked_parameters(model: nn.Module, choices: Sequence[Choice]) -> dict[str, nn.Parameter]:
    """Give the parameters that are masked, by name, in the network's order.

    Raises:
        ArgumentError: one is on the meta device, where it has no values.
    """
    wanted = {choice.name for choice in choices if choice.masked}
    found = {name: parameter for name, parameter in model.named_parameters() if name in wanted}
    for name, parameter in found.items():
        if parameter.is_meta:
            raise ArgumentError(
                f"{name} is on the meta device and has no values to be masked: call model.to_empty(device=...) and load "
                "weights, then make optimizer and controller"
            )
    return found
