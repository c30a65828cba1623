"""Fused blocks that have to be planned again: their plan no longer holds, or another precision is wanted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn

from widekernel.transforms.acceleration.blocks import BlockTrial
from widekernel.transforms.acceleration.fusion import FusedBlock, unfuse
from widekernel.transforms.acceleration.fusion.fused import is_intact, needs_plan
from widekernel.transforms.acceleration.fusion.graph import starts_region
from widekernel.transforms.acceleration.fusion.guards import STATE


class Fused(NamedTuple):
    """How a block was fused: its class, its state (None for a copy that has not been called), and the layers in its plan."""

    block: Any
    kind: type[nn.Module]
    precision: str
    state: Any
    layers: frozenset[nn.Module]

    @classmethod
    def of(cls, block: Any) -> Fused:
        """Note how `block` is fused."""
        state = vars(block).get(STATE)
        planned = state is not None and state.plan is not None
        layers = state.plan.layers if planned else filter(starts_region, block.modules())
        return cls(block, type(block), block.fused_precision, state, frozenset(layers))

    def restore(self) -> None:
        """Fuse the block as it was."""
        self.block.__class__ = self.kind
        if self.state is not None:
            vars(self.block)[STATE] = self.state


@contextmanager
def outdated_unfused(blocks: list[tuple[str, nn.Module]], precision: str) -> Iterator[list[Fused]]:
    """Give those of the fused blocks their own class that have to be planned again; undo it if an error is raised.

    Args:
        blocks: fused blocks and others.
        precision: the precision that is wanted.

    Yields:
        how these blocks were fused.
    """
    outdated = [Fused.of(block) for _, block in blocks if isinstance(block, FusedBlock) and needs_plan(block, precision)]
    for before in outdated:
        unfuse(before.block)
    try:
        yield outdated
    except BaseException:
        for before in outdated:
            before.restore()
        raise


@contextmanager
def all_unfused(blocks: list[tuple[str, nn.Module]]) -> Iterator[None]:
    """Give fused blocks their own class inside the `with` statement, except those whose class has been changed since."""
    intact = [Fused.of(block) for _, block in blocks if isinstance(block, FusedBlock) and is_intact(block)]
    for before in intact:
        unfuse(before.block)
    try:
        yield
    finally:
        for before in intact:
            before.restore()


def with_former_plans(outdated: list[Fused], trials: list[BlockTrial], precision: str) -> list[BlockTrial]:
    """Fuse blocks as before that are not fused anew; return the trials, with what has become of these blocks.

    A block keeps a plan that does not hold, because the change that prevents its use may be undone, as a hook is removed.
    It keeps one in float32, whose results are exact. It does not keep one in a lower precision if another one is wanted.
    """
    chosen = {layer for trial in trials if trial.plan is not None for layer in trial.plan.layers}
    anew = {trial.block for trial in trials if trial.plan is not None}
    fates = {}
    for before in outdated:
        if before.block in anew:
            continue
        kept = before.precision in (precision, "float32") and chosen.isdisjoint(before.layers)
        if kept:
            before.restore()
        if before.precision != precision:
            fates[before.block] = f"it {'remains' if kept else 'is no longer'} fused in {before.precision}"
    return [
        trial._replace(row=replace(trial.row, reason=f"{trial.row.reason}; {fates[trial.block]}"))
        if trial.block in fates
        else trial
        for trial in trials
    ]
