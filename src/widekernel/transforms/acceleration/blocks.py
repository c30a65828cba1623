"""Blocks of a network that can be fused: finding, checking and measuring them."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from widekernel.transforms.acceleration import timing
from widekernel.transforms.acceleration.fusion import FusedBlock, FusedChain, fuse
from widekernel.transforms.acceleration.fusion.calls import reasons_against_call
from widekernel.transforms.acceleration.fusion.chains import plan_of
from widekernel.transforms.acceleration.fusion.deviation import Deviation
from widekernel.transforms.acceleration.fusion.fused import (
    compared,
    fused_class,
    planned,
    reasons_against_fusing,
)
from widekernel.transforms.acceleration.fusion.graph import may_own, starts_region
from widekernel.transforms.acceleration.fusion.plan import NOTHING_TO_FUSE, Plan
from widekernel.transforms.acceleration.input_capture import InputSpec, Seen, unmeasurable
from widekernel.transforms.acceleration.report import LayerAcceleration
from widekernel.transforms.acceleration.timing import Timing


class BlockTrial(NamedTuple):
    """The decision on one block.

    Attributes:
        block: the block.
        row: its row of the report.
        plan: the plan if it is to be fused.
        spare: the plan if it gains nothing alone, which may change in a chain.
    """

    block: nn.Module
    row: LayerAcceleration
    plan: Plan | None = None
    spare: Plan | None = None


def block_candidates(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """List the modules that could be fused, with their names, from the outside in."""
    return [(name, module) for name, module in model.named_modules() if may_own(module)]


def try_blocks(
    blocks: list[tuple[str, nn.Module]], seen: Seen, samples: dict[nn.Module, Tensor], precision: str = "float32"
) -> list[BlockTrial]:
    """Check and measure blocks; a block within another one is considered only if that one is not fused.

    Args:
        blocks: the candidates, from the outside in.
        seen: the inputs of each.
        samples: an input of each.
        precision: type of the factors of products in fused blocks.

    Returns:
        the decisions on those blocks of which something can be fused, or which cannot be traced.
    """
    trials: list[BlockTrial] = []
    taken: set[nn.Module] = set()
    for name, block in blocks:
        layers = {module for module in block.modules() if starts_region(module)}
        if layers <= taken:
            continue
        trial = _try_block(name, block, taken, seen[block], samples.get(block), precision)
        if trial is not None:
            trials.append(trial)
            taken |= layers if isinstance(block, FusedBlock) else set(trial.plan.layers if trial.plan else ())
    return _with_chains_completed([block for _, block in blocks], trials, taken)


def _with_chains_completed(blocks: list[nn.Module], trials: list[BlockTrial], taken: set[nn.Module]) -> list[BlockTrial]:
    """Fuse all members of containers if they are together as fast as with the best choice for each.

    One call then computes them all, which is faster than the measurements of single blocks can show.
    """
    by_block = {trial.block: trial for trial in trials}
    for container in blocks:
        members = [by_block.get(block) for block in container.children()]
        if type(container) not in (nn.Sequential, FusedChain) or len(members) < 2:
            continue
        if not all(trial is not None and _fits_into_chain(trial) for trial in members):
            continue
        present = [trial for trial in members if trial is not None]
        spares = [(trial, trial.spare) for trial in present if trial.spare is not None]
        layers = [layer for _, spare in spares for layer in spare.layers]
        # All or none: some of them alone would only be slower.
        if not taken.isdisjoint(layers) or len(set(layers)) < len(layers):
            continue
        # Members that are fused already have no times.
        times = [(trial.row.milliseconds_before or 0.0, trial.row.milliseconds_after or 0.0) for trial in present]
        if not spares or sum(after for _, after in times) >= timing.LEAST_GAIN * sum(map(min, times)):
            continue
        for trial, spare in spares:
            after = fused_class(type(trial.block), spare.precision).__name__
            row = replace(trial.row, after=after, reason="a part of a chain")
            by_block[trial.block] = BlockTrial(trial.block, row, spare)
        taken |= set(layers)
    return [by_block[trial.block] for trial in trials]


def _fits_into_chain(trial: BlockTrial) -> bool:
    """Return whether native calls alone compute the block, or would if it were fused."""
    if isinstance(trial.block, FusedBlock):
        found = plan_of(trial.block)
        return found is not None and found.is_replayable and found.guards.hold()
    plan = trial.plan or trial.spare
    return plan is not None and plan.is_replayable


@torch.no_grad()
def _try_block(
    name: str,
    block: nn.Module,
    taken: set[nn.Module],
    seen: Counter[InputSpec | str],
    sample: Tensor | None,
    precision: str,
) -> BlockTrial | None:
    kind, calls = type(block).__name__, seen.total()
    if isinstance(block, FusedBlock):
        own = type(block) is fused_class(block.unfused, block.fused_precision)
        reason = "fused already" if own else "fused already, and its class has been changed since"
        return BlockTrial(block, LayerAcceleration(name, kind, None, reason, calls))
    reason = unmeasurable(seen)
    if not reason and block.training:
        reason = "it is in training mode: blocks are fused for inference only"
    if sample is None or reason:
        return None if not calls else BlockTrial(block, LayerAcceleration(name, kind, None, reason, calls))
    with torch.random.fork_rng(devices=[]):
        plan, reason = planned(block, precision)
        if reason == NOTHING_TO_FUSE or (plan is not None and not taken.isdisjoint(plan.layers)):
            return None
        reason = reason or "; ".join([*reasons_against_fusing(block, precision), *reasons_against_call(block, sample)])
        found = Deviation(reason=reason) if plan is None or reason else compared(plan, block, sample)
    if plan is None or found.reason:
        return BlockTrial(block, LayerAcceleration(name, kind, None, found.reason, calls, deviation=found.size or None))
    before = f"{kind}: {plan.describe()}"
    # Calls of a fused block include the search for reasons against it.
    fused = copy.copy(block)
    fuse(fused, plan)
    total = Timing(0.0, 0.0)
    for spec, count in seen.items():
        assert isinstance(spec, InputSpec)
        time = timing.compare_block(block, fused, spec)
        total = Timing(total.before + count * time.before, total.after + count * time.after)
    after = fused_class(type(block), precision).__name__ if total.is_gain else None
    row = LayerAcceleration(name, before, after, "" if total.is_gain else "not faster", calls, *total, found.size)
    return BlockTrial(block, row, *((plan, None) if total.is_gain else (None, plan)))
