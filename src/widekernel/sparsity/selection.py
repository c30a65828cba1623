"""Selection of the parameters of a network that are masked, with the reason for each other one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from widekernel.errors import ArgumentError, nearest
from widekernel.layers import LargeKernel, Rectangles
from widekernel.layers.sources import KernelSource

LARGE = 7  # a depthwise convolution of at least this size counts as a large kernel
SHARDED = (
    "sharded over processes (FSDP, or another kind of DTensor), which masks do not support: train with "
    "DistributedDataParallel, or densely"
)


@dataclass(frozen=True)
class Selection:
    """Result of the selection for one parameter: whether it is masked, and why not.

    Attributes:
        name: name of the parameter.
        shape: shape of the parameter.
        reason: why it is not masked; "" if it is.
    """

    name: str
    shape: tuple[int, ...]
    reason: str

    @property
    def masked(self) -> bool:
        """Whether the parameter is masked."""
        return not self.reason


def is_sharded(parameter: object) -> bool:
    """Return whether a parameter is a DTensor, of which each process holds a part."""
    return hasattr(parameter, "placements")


def check_not_sharded(model: nn.Module) -> None:
    """Raise an `ArgumentError` if the network is sharded, even while its parameters are gathered."""
    kinds = ("FSDPModule", "FullyShardedDataParallel")
    for module in model.modules():
        if any(kind.__name__ in kinds for kind in type(module).__mro__) or any(map(is_sharded, module._parameters.values())):
            raise ArgumentError(f"the parameters of the network are {SHARDED}")


def select(model: nn.Module, layers: str | Sequence[str], exclude: Sequence[str] = ()) -> list[Selection]:
    """Decide for every parameter of an unwrapped network whether it is masked.

    Args:
        model: the network.
        layers: `all`, `large_kernel_only` or name patterns; a module's name stands for all its parameters.
        exclude: name patterns, or names of modules, to keep dense.

    Raises:
        ArgumentError: a pattern matches nothing, or something that cannot be masked; a parameter to be masked has two names;
            or nothing is left to be masked.
    """
    owners = dict(_owners(model))
    large = _large_kernels(model) if layers == "large_kernel_only" else set()
    patterns = () if isinstance(layers, str) else tuple(layers)
    for pattern in (*patterns, *exclude):
        if not any(_matches(pattern, name) for name in owners):
            modules = [name for name, _ in model.named_modules() if name]
            raise ArgumentError(
                f"the pattern {pattern!r} matches no parameter. The network has {', '.join(list(owners)[:3])}, ..."
                f"{nearest(pattern, [*owners, *modules])}"
            )
    selection, excluded = [], 0
    for name, (owner, parameter) in owners.items():
        reason = _reason(name, owner, parameter)
        named = any(_matches(pattern, name) for pattern in patterns)
        if any(_matches(pattern, name) for pattern in exclude):
            excluded += not reason
            reason = "excluded by name"
        elif named and reason and parameter.dim() > 1:
            raise ArgumentError(f"layers={list(patterns)} names {name}, which cannot be masked: it {reason}. Leave it out")
        elif patterns and not named:
            reason = reason or "not among the layers named"
        elif layers == "large_kernel_only" and id(parameter) not in large:
            reason = reason or "not a large kernel"
        selection.append(Selection(name, tuple(parameter.shape), reason))
    if excluded and not any(each.masked for each in selection):
        raise ArgumentError(
            f"exclude={list(exclude)} leaves nothing to mask in layers={layers!r}: it excludes {excluded} parameters that "
            "could be masked. Exclude fewer"
        )
    _check(model, selection)
    return selection


def _matches(pattern: str, name: str) -> bool:
    """Return whether a pattern matches the name of a parameter, or is the name of a module that holds it."""
    return fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")


def _owners(model: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, nn.Parameter]]]:
    """Yield every parameter once, by name, with the module that uses it.

    A list of parameters is used by the module that holds the list.
    """
    parents = {id(child): module for module in model.modules() for child in module.children()}
    seen = set()
    for prefix, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                is_list = isinstance(module, (nn.ParameterList, nn.ParameterDict)) and module is not model
                yield f"{prefix}.{key}".lstrip("."), (parents[id(module)] if is_list else module, parameter)


def _reason(name: str, owner: nn.Module, parameter: Tensor) -> str:
    if is_sharded(parameter):
        return f"is {SHARDED}"
    if not parameter.is_floating_point():
        return f"has whole numbers ({parameter.dtype})"
    if ".parametrizations." in f".{name}":
        return "is parametrized"
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
        return "is an embedding"
    if parameter.dim() < 2 or sum(side > 1 for side in parameter.shape) < 2:
        # A 1×1 convolution of one channel is not a vector of scales, but there is nothing to prune in it either.
        return "scales or shifts channels"
    if parameter.dim() not in (2, 4) and not isinstance(owner, _ConvNd):
        return f"has {parameter.dim()} dimensions and belongs to no convolution"
    if not parameter.requires_grad:
        return "is frozen (requires_grad is False)"
    return ""


def _large_kernels(model: nn.Module) -> set[int]:
    """Return the ids of the kernels whose longer side is the longest of their layer."""
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
    """Yield for each kernel of a source its id and the longer side of the rectangle that it represents."""
    for part in source.modules():
        if isinstance(part, Rectangles):
            yield from ((id(kernel), max(extent)) for kernel, extent in zip(part.kernels, part.extents()))
        elif isinstance(part, KernelSource) and isinstance(getattr(part, "kernel_size", None), int):
            for name, parameter in part.named_parameters():
                if not name.startswith("gates"):
                    yield id(parameter), part.kernel_size  # type: ignore[misc]


def _check(model: nn.Module, selection: list[Selection]) -> None:
    wanted = {each.name for each in selection if each.masked}
    if not wanted:
        counts: dict[str, int] = {}
        for each in selection:
            counts[each.reason] = counts.get(each.reason, 0) + 1
        found = "; ".join(f"{count} x {reason}" for reason, count in counts.items()) or "it has no parameters"
        raise ArgumentError(
            f"the network has no layer that can be masked ({found}): unfreeze it, or select others with layers and exclude"
        )
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for several in names.values():
        if len(several) > 1 and wanted & set(several):
            raise ArgumentError(
                f"{' and '.join(several)} are one shared parameter, and a mask would apply to both: keep it dense with "
                f"exclude=[{several[0]!r}]"
            )
