"""Chains: fused blocks in a row, which are checked in one pass and computed by one native call."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from widekernel.layers.alterations import REPLACEABLE_METHODS
from widekernel.layers.folding import deep_copy
from widekernel.ops.eager import TENSOR_TYPES
from widekernel.transforms.acceleration.fusion.fused import FusedBlock, unfuse
from widekernel.transforms.acceleration.fusion.guards import HOOKS, STATE
from widekernel.transforms.acceleration.fusion.plan import Plan, UnsuitableInputError
from widekernel.transforms.acceleration.fusion.replay import Replay, is_usual_call
from widekernel.transforms.acceleration.fusion.weights import UnsuitableWeightsError

ModelT = TypeVar("ModelT", bound=nn.Module)
_CHAIN = "_fused_chain"


class FusedChain(nn.Sequential):
    """A sequential container whose members are fused blocks.

    One native call computes all of them if each of them could be computed by native calls alone, and nothing observes the
    values between them. Otherwise the container calls each of its members, as its own class does.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the members in turn."""
        # The compiler sees the code of the container.
        if not torch.compiler.is_compiling() and len(args) == 1 and not kwargs and type(args[0]) in TENSOR_TYPES:
            state = vars(self).get(_CHAIN)
            # A copy of a container has no state of its own yet.
            if state is None or state.container is not self:
                state = vars(self)[_CHAIN] = _Chain(self)
            y = state.run(args[0])
            if y is not None:
                return y
        return super().__call__(*args, **kwargs)


def chain(model: nn.Module) -> None:
    """Make chains of the containers in `model` that consist of several fused blocks; they stay the same objects."""
    for module in model.modules():
        blocks = list(module.children())
        if type(module) is nn.Sequential and len(blocks) > 1 and all(isinstance(block, FusedBlock) for block in blocks):
            module.__class__ = FusedChain


def unchain(model: nn.Module) -> None:
    """Make sequential containers of the chains in `model`."""
    for module in model.modules():
        if type(module) is FusedChain:
            kind: Any = nn.Sequential
            module.__class__ = kind
            vars(module).pop(_CHAIN, None)


def unfused(model: ModelT) -> ModelT:
    """Return `model` if it has no fused blocks, or a copy in which they run the code of their own classes.

    Raises:
        ArgumentError: if the class of a fused block has been changed since it was fused.
    """
    if not any(isinstance(module, FusedBlock) for module in model.modules()):
        return model
    model = deep_copy(model)
    unchain(model)
    for module in model.modules():
        if isinstance(module, FusedBlock):
            unfuse(module)
    return model


class _Chain:
    """The plans of a container's members, and the native calls recorded from them.

    Args:
        container: the container.
    """

    def __init__(self, container: nn.Sequential) -> None:
        self.container = container
        self._plans: tuple[Plan, ...] = ()
        self._replay = Replay(())

    def __reduce__(self) -> Any:
        """Copy and pickle nothing."""
        return type(None), ()

    def run(self, x: Tensor) -> Any:
        """Return the result for `x`; None if the members have to be called."""
        held = vars(self.container)
        if not is_usual_call(x) or any(map(held.get, HOOKS)) or not held.keys().isdisjoint(REPLACEABLE_METHODS):
            return None
        plans = self._present_plans()
        if plans is None:
            return None
        try:
            packed = tuple([plan.current() for plan in plans])
            return self._replay.run(x, packed, lambda value: _in_turn(plans, packed, value))
        except (UnsuitableInputError, UnsuitableWeightsError):
            return None

    def _present_plans(self) -> tuple[Plan, ...] | None:
        """Return the plans of all members, if all can be replayed and hold."""
        states = [vars(block).get(STATE) for block in self.container._modules.values()]
        plans = tuple([None if state is None else state.plan for state in states])
        if len(plans) != len(self._plans) or not all(map(is_, plans, self._plans)):
            if not all(plan is not None and plan.is_replayable for plan in plans):
                return None
            self._plans = plans  # type: ignore[assignment]
            self._replay = Replay(layer for plan in self._plans for layer in plan.layers_between)
        return self._plans if all(plan.guards.hold() for plan in self._plans) else None


def _in_turn(plans: Sequence[Plan], packed: Sequence[Any], x: Tensor) -> Any:
    for plan, weights in zip(plans, packed):
        x = plan.step_by_step(x, weights)
    return x
