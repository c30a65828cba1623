"""Chains: fused blocks in a row, which are checked in one pass and computed by one native call."""

from __future__ import annotations

from collections.abc import Iterator
from operator import is_
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from widekernel.layers.folding import deep_copy
from widekernel.ops.eager import TENSOR_TYPES, is_ordinary_call
from widekernel.transforms.acceleration.fusion.calls import is_usual_call, reasons_against_call
from widekernel.transforms.acceleration.fusion.fused import FusedBlock, unfuse
from widekernel.transforms.acceleration.fusion.guards import HOOKS, REPLACEMENTS, STATE, alteration
from widekernel.transforms.acceleration.fusion.plan import Plan, UnsuitableInputError
from widekernel.transforms.acceleration.fusion.replay import Replay
from widekernel.transforms.acceleration.fusion.weights import UnsuitableWeightsError

ModelT = TypeVar("ModelT", bound=nn.Module)
_CHAIN = "_fused_chain"
_IN_TURN = nn.Sequential.forward


class FusedChain(nn.Sequential):
    """A sequential container whose members are fused blocks.

    One native call computes all of them if each of them could be computed by native calls alone, and nothing observes the
    values between them. Otherwise the container calls each of its members, as its own class does.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the members in turn."""
        # The compiler sees the code of the container.
        if not torch.compiler.is_compiling() and len(args) == 1 and not kwargs and type(args[0]) in TENSOR_TYPES:
            y = _state_of(self).run(args[0])
            if y is not None:
                return y
        return super().__call__(*args, **kwargs)

    def reasons_against(self, x: Tensor) -> list[str]:
        """List why a call with `x` would call the members one by one; empty if one native call would compute them.

        Each member may still be computed by native calls of its own; its own `reasons_against` says whether it is. To find
        out, the members are computed, unless a reason is known before.
        """
        return list(_state_of(self).reasons(x))


def chain(model: nn.Module) -> tuple[str, ...]:
    """Make chains of the containers in `model` that consist of several fused blocks; they stay the same objects.

    Returns:
        the names of all chains in `model`.
    """
    names = []
    for name, module in model.named_modules():
        blocks = list(module.children())
        if type(module) is nn.Sequential and len(blocks) > 1 and all(isinstance(block, FusedBlock) for block in blocks):
            module.__class__ = FusedChain
        if type(module) is FusedChain:
            names.append(name)
    return tuple(names)


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
        # Replaced as a whole, so that threads which run while members change see what belongs together.
        self._members: _Members | None = None

    def __reduce__(self) -> Any:
        """Copy and pickle nothing."""
        return type(None), ()

    def run(self, x: Tensor) -> Any:
        """Return the result for `x`; None if the members have to be called."""
        if not is_usual_call(x) or next(self._alterations(), None) is not None:
            return None
        current = self._present()
        if current is None or not all(plan.guards.hold() for plan in current.plans):
            return None
        try:
            return current.run(x)
        except (UnsuitableInputError, UnsuitableWeightsError):
            return None

    def reasons(self, x: Tensor) -> Iterator[str]:
        """Yield why `run` would return None, or why its native calls cannot be made again."""
        members = self.container._modules
        against = [reason for block in members.values() for reason in reasons_against_call(block, x)]
        if torch.is_grad_enabled():
            against.append("gradients are enabled: use torch.no_grad() or torch.inference_mode()")
        if not is_ordinary_call() and not against:
            against.append("a profiler is on")
        against += self._alterations()
        for name, block in members.items():
            against += [f"{name}: {reason}" for reason in _reasons_of_member(block)]
        yield from dict.fromkeys(against)
        current = self._present()
        if against or current is None:
            return
        try:
            current.run(x)
        except (UnsuitableInputError, UnsuitableWeightsError) as error:
            yield str(error)
        else:
            if reason := current.replay.reason_against(x):
                yield reason

    def _alterations(self) -> Iterator[str]:
        """Yield what prevents the container from being anything but a call of its members in turn."""
        held = vars(self.container)
        if any(map(held.get, HOOKS)):
            yield "there is a hook on the container"
        if not held.keys().isdisjoint(REPLACEMENTS):
            yield f"the container {alteration(self.container)}"
        if type(self.container).forward is not _IN_TURN:
            yield "the forward of the class of the container has been replaced"

    def _present(self) -> _Members | None:
        """Return the present members; None if there are none, or one cannot be replayed."""
        plans = tuple([plan_of(block) for block in self.container._modules.values()])
        members = self._members
        if members is not None and len(plans) == len(members.plans) and all(map(is_, plans, members.plans)):
            return members
        replayable = [plan for plan in plans if plan is not None and plan.is_replayable]
        if not replayable or len(replayable) < len(plans):
            return None
        for plan in replayable:
            plan.forget_recorded()
        replay = Replay(layer for plan in replayable for layer in plan.layers_between)
        members = self._members = _Members(tuple(replayable), replay)
        return members


class _Members(NamedTuple):
    """The plans of members, and the replay of all of their native calls."""

    plans: tuple[Plan, ...]
    replay: Replay

    def run(self, x: Tensor) -> Any:
        """Compute the members in turn.

        Raises:
            UnsuitableInputError: if a native call does not cover a value that has come up.
            UnsuitableWeightsError: if the weights of a member have become such that they cannot be packed.
        """
        packed = tuple([plan.current() for plan in self.plans])

        def in_turn(value: Any) -> Any:
            for plan, weights in zip(self.plans, packed):
                value = plan.step_by_step(value, weights)
            return value

        return self.replay.run(x, packed, in_turn)


def _state_of(container: FusedChain) -> _Chain:
    state = vars(container).get(_CHAIN)
    # A copy of a container has no state of its own yet.
    if state is None or state.container is not container:
        state = vars(container)[_CHAIN] = _Chain(container)
    return state  # type: ignore[no-any-return]


def plan_of(block: nn.Module) -> Plan | None:
    """Return the plan of a fused block; None for another module, and for a copy that has not been called yet."""
    state = vars(block).get(STATE)
    # A shallow copy of a block has the state of the original.
    return None if state is None or state.block is not block else state.plan


def _reasons_of_member(block: nn.Module) -> Iterator[str]:
    plan = plan_of(block)
    if plan is None:
        yield "it is not a fused block, or it is a copy that has not been called yet"
    elif not plan.is_replayable:
        yield "it needs more than native calls"
    elif not plan.guards.hold():
        yield from plan.guards.violations()
