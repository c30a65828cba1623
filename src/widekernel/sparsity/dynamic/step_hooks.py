"""Hooks around optimizer steps, which handle skipped steps, closures, and steps that call the step of a base class."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch.optim import Optimizer

Outcome = Literal["made", "repeated", "skipped"]
_MARK = "_widekernel_masks_of"


class StepHooks:
    """Hooks that call functions before and after each step of an optimizer.

    Args:
        optimizer: the optimizer.
        owner: the object that the functions belong to, which `owners_of` finds.
        before: called before a step; its argument says whether the step has a closure, which will compute the gradients.
        before_closure: called before each call of the closure.
        after_closure: called after each call of the closure.
        after: called after a step with its outcome: "made"; "repeated" if a step called that of its base class, so that the
            hooks run twice; or "skipped" if a gradient scaler made a fused optimizer skip it.

    Attributes:
        in_step: whether a step is in progress.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        owner: object,
        before: Callable[[bool], None],
        before_closure: Callable[[], None],
        after_closure: Callable[[], None],
        after: Callable[[Outcome], None],
    ) -> None:
        self.owner, self.in_step = owner, False
        self._before, self._after = before, after
        self._before_closure, self._after_closure = before_closure, after_closure
        self._handles = [
            optimizer.register_step_pre_hook(self._pre_hook),
            optimizer.register_step_post_hook(self._post_hook),
        ]

    def remove(self) -> None:
        """Remove the hooks from the optimizer."""
        for handle in self._handles:
            handle.remove()

    def _pre_hook(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _overflowed(optimizer):
            return None
        self.in_step, closure = True, _closure_of(args, kwargs)
        self._before(closure is not None)
        return None if closure is None else self._with_closure(closure, args, kwargs)

    @torch.no_grad()
    def _post_hook(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _overflowed(optimizer):
            self._after("skipped")
            return
        first, self.in_step = self.in_step, False
        self._after("made" if first else "repeated")

    def _with_closure(self, closure: Callable[[], Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the arguments of a step, with a closure that also calls the owner's functions."""
        if getattr(closure, _MARK, None) is self:  # wrapped already: this step was called by that of a subclass
            return args, kwargs

        def wrapped() -> Any:
            self._before_closure()
            result = closure()
            self._after_closure()
            return result

        setattr(wrapped, _MARK, self)
        return ((args[0], wrapped, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": wrapped})


def owners_of(optimizer: Optimizer) -> Iterator[object]:
    """Yield the owners of all `StepHooks` of an optimizer."""
    for hook in optimizer._optimizer_step_pre_hooks.values():
        hooks = getattr(hook, "__self__", None)
        if isinstance(hooks, StepHooks):
            yield hooks.owner


def _overflowed(optimizer: Optimizer) -> bool:
    """Return whether a gradient scaler makes a fused optimizer skip this step."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def _closure_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[[], Any] | None:
    """Return the closure in the arguments of a step, of which the first is the optimizer; None if there is none."""
    found = args[1] if len(args) > 1 else kwargs.get("closure")
    return found if callable(found) else None
