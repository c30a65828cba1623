"""The optimizer whose steps hold the masks: taken out of what training libraries wrap it with, and its steps looked into."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from widekernel.errors import ArgumentError
from widekernel.sparsity.selection import SPREAD, is_spread

# With these a weight whose gradient, moments and value are zero stays zero: no need to mask it after each step.
_KEEP_ZEROS = {getattr(torch.optim, name) for name in ("SGD", "Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "Adagrad")}
# Libraries whose wrappers hand a step on and change no weight themselves.
_PASS_ON = ("accelerate", "lightning", "lightning_fabric", "pytorch_lightning")
_MARK = "_widekernel_masks_of"


def inner_optimizer(optimizer: Any) -> tuple[Optimizer, bool]:
    """Give the optimizer that makes the steps, and whether what wraps it is known to change no weights.

    Accelerate's prepared optimizers and those of Lightning and Fabric hold it as `.optimizer`.

    Raises:
        ArgumentError: there is none, or its steps call no hooks.
    """
    inner, known = optimizer, True
    while not _hooked(inner) and hasattr(getattr(inner, "optimizer", None), "param_groups"):
        known = known and type(inner).__mro__[_place(inner)].__module__.partition(".")[0] in _PASS_ON
        inner = inner.optimizer
    if not isinstance(inner, Optimizer):
        raise ArgumentError(f"the optimizer is a {type(inner).__name__}: give a torch.optim.Optimizer")
    if not _hooked(inner):
        raise ArgumentError(
            f"{type(inner).__name__} calls no hooks around its steps, so masks would not hold: use an optimizer whose "
            "constructor calls that of torch.optim.Optimizer"
        )
    return inner, known


def check_trained(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise unless the optimizer trains all the parameters, whole."""
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if any(is_spread(parameter) for parameter in trained):
        raise ArgumentError(f"the optimizer trains parameters that are {SPREAD}")
    known = {id(parameter) for parameter in trained}
    missing = [name for name, parameter in parameters.items() if id(parameter) not in known]
    if missing:
        raise ArgumentError(
            f"the optimizer does not train {len(missing)} of the {len(parameters)} masked parameters, such as {missing[0]}: "
            "create it from the same network, not from a copy and not before parameters were replaced. Where several "
            "optimizers share a network, make one DynamicSparsity for each, with the layers that it trains"
        )


def keeps_zeros(optimizer: Optimizer) -> bool:
    """Whether a weight that is zero, with gradient and moments, stays zero under this optimizer."""
    return type(optimizer) in _KEEP_ZEROS


def overflowed(optimizer: Optimizer) -> bool:
    """Whether a gradient scaler has told a fused optimizer to leave out this step."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def closure_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[[], Any] | None:
    """Give the closure among the arguments of a step, of which the first is the optimizer."""
    found = args[1] if len(args) > 1 else kwargs.get("closure")
    return found if callable(found) else None


def with_closure(
    args: tuple[Any, ...], kwargs: dict[str, Any], before: Callable[[], None], after: Callable[[], None]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give the arguments of a step with `before` and `after` called around each call of its closure, once only."""
    closure = closure_of(args, kwargs)
    assert closure is not None, "a step with a closure"
    if getattr(closure, _MARK, None) == after:
        return args, kwargs  # the step of a base class is handed what that of its class was

    def masked() -> Any:
        before()
        result = closure()
        after()
        return result

    setattr(masked, _MARK, after)
    return ((args[0], masked, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": masked})


@torch.no_grad()
def clear_moments(optimizer: Optimizer, parameter: nn.Parameter, kept: Tensor) -> None:
    """Set the optimizer's values of a parameter to zero where `kept` (a bool tensor of its shape) is False."""
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            value.mul_(kept.to(value.device))


def _hooked(optimizer: Any) -> bool:
    return bool(getattr(getattr(type(optimizer), "step", None), "hooked", False))


def _place(optimizer: Any) -> int:
    """Where among the classes of a wrapper, some of which imitate that of the optimizer inside, its step is defined."""
    return next((place for place, kind in enumerate(type(optimizer).__mro__) if "step" in vars(kind)), 0)
