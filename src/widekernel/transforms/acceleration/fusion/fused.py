"""Fused blocks: the class that a block gets, and what decides at each call whether the native calls or its code run."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from widekernel.errors import ArgumentError
from widekernel.ops.eager import TENSOR_TYPES
from widekernel.transforms.acceleration.fusion.calls import is_usual_call, reasons_against_call
from widekernel.transforms.acceleration.fusion.deviation import TOLERANCES, Deviation, deviation
from widekernel.transforms.acceleration.fusion.graph import NotTraceableError
from widekernel.transforms.acceleration.fusion.guards import STATE, is_hooked
from widekernel.transforms.acceleration.fusion.packing import missing, pack
from widekernel.transforms.acceleration.fusion.plan import NOTHING_TO_FUSE, Plan, UnsuitableInputError
from widekernel.transforms.acceleration.fusion.weights import UnsuitableWeightsError

# How many calls of a copy try to plan it.
_ATTEMPTS = 3


class FusedBlock:
    """Mixin of blocks of which one or more parts are computed by one native call each, in inference.

    The block has its own class as a base. Whenever the native calls do not compute the same, its own code runs:
    `reasons_against` says why.

    Attributes:
        unfused: its own class.
        fused_precision: the type of the factors of products in native calls, `float32`, `bfloat16` or `int8`.
    """

    unfused: type[nn.Module]
    fused_precision: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the block like its own class."""
        # The compiler sees the code of the block.
        if not torch.compiler.is_compiling() and len(args) == 1 and not kwargs and type(args[0]) in TENSOR_TYPES:
            state = _state_of(self)
            if state.is_ready(args[0]):
                try:
                    return state.plan.run(args[0])  # type: ignore[union-attr]
                except (UnsuitableInputError, UnsuitableWeightsError):
                    pass
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def reasons_against(self, x: Tensor) -> list[str]:
        """List why a call with `x` would run the code of the block instead of the native calls; empty if it would not.

        To find out, the block is computed, unless a reason is known before.
        """
        state = _state_of(self)
        reasons = list(state.reasons(x))
        if not reasons and state.plan is not None:
            try:
                with torch.no_grad():
                    state.plan.run(x)
            except (UnsuitableInputError, UnsuitableWeightsError) as error:
                reasons.append(str(error))
        return reasons

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle the block without its packed weights; they are made again when the copy is first called."""
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        _, made_of, state, *rest = reduced
        assert made_of == (type(self),)
        return (
            _new_block,
            (self.unfused, self.fused_precision),
            {key: value for key, value in state.items() if key != STATE},
            *rest,
        )


def fuse(block: Any, plan: Plan) -> None:
    """Make `block` a fused one, which is computed as planned; it remains the same object."""
    block.__class__ = fused_class(type(block), plan.precision)
    vars(block)[STATE] = _State(block, plan)


def unfuse(block: Any) -> None:
    """Give a fused block its own class back.

    Raises:
        ArgumentError: if its class has been changed since it was fused.
    """
    if not is_intact(block):
        raise ArgumentError(
            f"a fused block has become a {type(block).__name__}, whose computation is unknown: remove its parametrizations"
        )
    kind: Any = block.unfused
    block.__class__ = kind
    vars(block).pop(STATE, None)


def is_intact(block: Any) -> bool:
    """Return whether a fused block still has the class that it was given."""
    return type(block) is fused_class(block.unfused, block.fused_precision)


def needs_plan(block: Any, precision: str) -> bool:
    """Return whether a fused block has to be planned again: another precision is wanted, or its plan does not hold.

    A copy that has not been called plans itself. A class that has been changed since the block was fused stays as it is.
    """
    if not is_intact(block):
        return False
    return block.fused_precision != precision or _state_of(block).has_failed()


def reasons_against_fusing(block: nn.Module, precision: str = "float32") -> list[str]:
    """List what prevents the class of a block from being changed; empty if nothing does."""
    kind = type(block)
    lacking = missing(precision)
    reasons = [] if lacking is None else [lacking]
    plain = kind.__reduce_ex__ is object.__reduce_ex__ and kind.__reduce__ is object.__reduce__
    slots = any(vars(base).get("__slots__") for base in kind.__mro__)
    if not plain or slots or any(hasattr(kind, name) for name in ("__deepcopy__", "__getnewargs_ex__", "__getnewargs__")):
        reasons.append(f"{kind.__name__} has its own way of copying")
    if kind.__call__ is not nn.Module.__call__:
        reasons.append(f"{kind.__name__} has its own way of being called")
    if any(hasattr(kind, name) for name in ("unfused", "fused_precision", "reasons_against")):
        reasons.append(f"{kind.__name__} has a method with the name of one of fused blocks")
    if isinstance(block, torch.jit.ScriptModule):
        reasons.append("it is compiled by TorchScript")
    if not reasons:
        try:
            kind.__new__(kind).__class__ = fused_class(kind)
        except Exception as error:  # such as one of a class that refuses subclasses
            reasons.append(f"objects of {kind.__name__} cannot change their class: {error}")
    return reasons


_CLASSES: dict[tuple[type[nn.Module], str], type[nn.Module]] = {}
_SUFFIXES = {"float32": "", "bfloat16": "InBFloat16", "int8": "InInt8"}


def fused_class(kind: type[nn.Module], precision: str = "float32") -> type[nn.Module]:
    """Return the class of fused blocks of a precision whose own class is `kind`; the same one every time."""
    if (kind, precision) in _CLASSES:
        return _CLASSES[kind, precision]
    names = {"unfused": kind, "fused_precision": precision, "__module__": kind.__module__, "__doc__": kind.__doc__}
    bases: tuple[type, ...] = (FusedBlock, kind)
    name = f"Fused{kind.__name__}{_SUFFIXES[precision]}"
    made = types.new_class(name, bases, exec_body=lambda body: body.update(names))
    return _CLASSES.setdefault((kind, precision), made)


def _new_block(kind: type[nn.Module], precision: str = "float32") -> nn.Module:
    new: Any = fused_class(kind, precision)
    return new.__new__(new)  # type: ignore[no-any-return]


class _State:
    """The plan of one fused block; copies of the block make their own.

    Args:
        block: the block.
        plan: its plan; None if it has yet to be made.
    """

    def __init__(self, block: nn.Module, plan: Plan | None = None) -> None:
        self.block, self.plan = block, plan
        self._attempts, self._failure = 0, ""

    def __reduce__(self) -> Any:
        """Copy and pickle nothing: classes made on top of that of the block may copy all attributes."""
        return type(None), ()

    def is_ready(self, x: Tensor) -> bool:
        """Return whether a call with `x` can use the plan; a copy that is called for the first time makes it."""
        if self.plan is not None and is_usual_call(x) and x.numel():
            return self.plan.guards.hold()  # which includes the training flag
        return next(self.reasons(x), None) is None

    def reasons(self, x: Tensor) -> Iterator[str]:
        """Yield why a call with `x` cannot use the plan."""
        against = False
        for reason in reasons_against_call(self.block, x):
            against = True
            yield reason
        if self.plan is not None:
            if not self.plan.guards.hold():
                yield from self.plan.guards.violations()
        elif against:
            return
        elif any(is_hooked(module) for module in self.block.modules()):
            yield "a module of it has a hook, so that the block cannot be planned yet"
        else:
            self._make_plan(x)
            if self.plan is None:
                yield self._failure

    def has_failed(self) -> bool:
        """Return whether there is a plan that does not hold, or making one has failed."""
        return bool(self._failure) if self.plan is None else next(self.plan.why_not(), None) is not None

    def _make_plan(self, x: Tensor) -> None:
        # An input may be unsuitable for the comparison.
        if self._attempts < _ATTEMPTS:
            self._attempts += 1
            precision = type(self.block).fused_precision  # type: ignore[attr-defined]
            lacking = missing(precision)
            self.plan, self._failure = (None, lacking) if lacking else checked_plan(self.block, x, precision)


def checked_plan(block: nn.Module, x: Tensor, precision: str = "float32") -> tuple[Plan | None, str]:
    """Plan a block and compare the plan with the code of the block on an input.

    Returns:
        the plan and "", or None and why the block cannot be fused.
    """
    # One block of random numbers for both: code that draws some must get others each time, so that the results differ.
    with torch.random.fork_rng(devices=[]):
        plan, reason = planned(block, precision)
        reason = reason if plan is None else compared(plan, block, x).reason
    return (None, reason) if reason else (plan, "")


def planned(block: nn.Module, precision: str = "float32") -> tuple[Plan | None, str]:
    """Plan a block without running it; return None and why it cannot be fused, or the plan and ""."""
    try:
        plan = Plan(block, pack, precision)
    except NotTraceableError as error:
        return None, str(error)
    except Exception as error:  # the block still has its code, which must not fail because of its plan
        return None, f"it cannot be planned: {_named(error)}"
    return (plan, "") if plan.regions else (None, NOTHING_TO_FUSE)


@torch.no_grad()
def compared(plan: Plan, block: nn.Module, x: Tensor) -> Deviation:
    """Compare the plan of a block with its code on an input; the reason says what differs or prevents it.

    What the plan computes is compared in float32 first, because the rounding of a lower precision could hide an error.
    """
    if plan.precision != "float32":
        exact, reason = planned(block)
        found = Deviation(reason=reason) if exact is None else compared(exact, block, x)
        if found.reason:
            return found
    try:
        found = Deviation(reason=next(plan.why_not(), ""))
        found = found if found.reason else plan.check(x)
        if found.reason:
            return found
        whole = deviation(plan.run(x), nn.Module.__call__(block, x), TOLERANCES[plan.precision])
        return whole if whole.reason else max(found, whole)
    except (UnsuitableInputError, UnsuitableWeightsError) as error:
        return Deviation(reason=str(error))
    except Exception as error:  # of the plan, or of code that takes no such input, which is only a part of the example
        return Deviation(reason=f"it cannot be compared with its plan: {_named(error)}")


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _state_of(block: Any) -> _State:
    state = vars(block).get(STATE)
    # A shallow copy has the state of the original.
    if state is None or state.block is not block:
        state = vars(block)[STATE] = _State(block)
    return state  # type: ignore[no-any-return]
