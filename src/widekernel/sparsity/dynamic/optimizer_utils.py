"""Access to the optimizer inside its wrappers, and to its moments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from widekernel.errors import ArgumentError
from widekernel.sparsity.selection import SHARDED, is_sharded

# Under these optimizers, a weight stays zero if its gradient and moments are zero, so a step needs no masking afterwards.
_KEEP_ZEROS = {getattr(torch.optim, name) for name in ("SGD", "Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "Adagrad")}
# Libraries whose wrappers forward the step and do not change weights themselves.
_TRUSTED = ("accelerate", "lightning", "lightning_fabric", "pytorch_lightning")


def inner_optimizer(optimizer: Any) -> tuple[Optimizer, bool]:
    """Return the optimizer that makes the steps, and whether its wrappers are known to change no weights.

    The wrappers of Accelerate, Lightning and Fabric hold it as `.optimizer`.

    Raises:
        ArgumentError: there is no optimizer, or its steps call no hooks.
    """
    inner, trusted = optimizer, True
    while not _calls_hooks(inner) and hasattr(getattr(inner, "optimizer", None), "param_groups"):
        trusted = trusted and type(inner).__mro__[_index_of_step(inner)].__module__.partition(".")[0] in _TRUSTED
        inner = inner.optimizer
    if not isinstance(inner, Optimizer):
        raise ArgumentError(f"the optimizer is a {type(inner).__name__}: give a torch.optim.Optimizer")
    if not _calls_hooks(inner):
        raise ArgumentError(
            f"{type(inner).__name__} calls no hooks around its steps, so masks would not hold: use an optimizer whose "
            "constructor calls that of torch.optim.Optimizer"
        )
    return inner, trusted


def check_trained(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise an `ArgumentError` unless the optimizer trains all the parameters, and none is sharded."""
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if any(is_sharded(parameter) for parameter in trained):
        raise ArgumentError(f"the optimizer trains parameters that are {SHARDED}")
    known = {id(parameter) for parameter in trained}
    missing = [name for name, parameter in parameters.items() if id(parameter) not in known]
    if missing:
        raise ArgumentError(
            f"the optimizer does not train {len(missing)} of the {len(parameters)} masked parameters, such as {missing[0]}: "
            "create it from the same network, not from a copy and not before parameters were replaced. If several "
            "optimizers share a network, make one DynamicSparsity for each, with the layers that it trains"
        )


def keeps_zeros(optimizer: Optimizer) -> bool:
    """Return whether a weight stays zero under this optimizer if its gradient and moments are zero."""
    return type(optimizer) in _KEEP_ZEROS


@torch.no_grad()
def clear_moments(optimizer: Optimizer, parameter: nn.Parameter, kept: Tensor) -> None:
    """Set the optimizer's moments of a parameter to zero where `kept` (a bool tensor of its shape) is False."""
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            value.mul_(kept.to(value.device))


def _calls_hooks(optimizer: Any) -> bool:
    return bool(getattr(getattr(type(optimizer), "step", None), "hooked", False))


def _index_of_step(optimizer: Any) -> int:
    """Return the index in a wrapper's MRO where its step is defined; some wrappers imitate the class of the optimizer."""
    return next((place for place, kind in enumerate(type(optimizer).__mro__) if "step" in vars(kind)), 0)
