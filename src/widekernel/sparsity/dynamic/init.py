"""First masks: drawn by scores (SNIP, magnitude) or at random, or given."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from widekernel.collectives import average
from widekernel.errors import ArgumentError
from widekernel.sparsity.dynamic.densities import check_finite
from widekernel.sparsity.dynamic.rules import published
from widekernel.sparsity.dynamic.state import MaskState
from widekernel.sparsity.dynamic.topology import Rule


def draw_masks(state: MaskState, rule: Rule, scores: Mapping[str, Tensor]) -> list[str]:
    """Draw the first masks, as `init` says.

    Args:
        state: the state whose masks and densities are set.
        rule: the rule that draws masks.
        scores: nonnegative scores of the parameters' shapes, by parameter name.

    Returns:
        names of parameters that the published rule leaves dense.

    Raises:
        ArgumentError: `init` ranks weights by scores that are not finite.
    """
    config = state.config
    if config.init in ("snip", "snip_mask", "magnitude"):
        check_finite(scores, f"the scores (init={config.init!r})")
    rule.allocate_densities(state, scores)
    rule.draw_masks(state, scores)
    return published.almost_dense(state) if config.rule == "published" else []


@torch.no_grad()
def copy_masks(state: MaskState, masks: Mapping[str, Tensor]) -> None:
    """Set the given masks, and the densities that follow from them.

    Raises:
        ArgumentError: a mask does not consist of whole blocks.
    """
    for group in state.groups:
        for name, blocks in zip(group.names, group.blocks):
            mask = masks[name].to(state.masks[name].device, torch.bool)
            if not torch.equal(blocks.expand(blocks.live(mask)), mask):
                raise ArgumentError(
                    f"the mask given for {name} cuts through its blocks (block={state.config.block!r}): use "
                    "block='element', or masks made with these blocks"
                )
            state.set_mask(name, mask)


def gradient_scores(state: MaskState) -> dict[str, Tensor] | None:
    """Compute |weight · gradient| from the gradients that the parameters have now.

    Returns:
        scores by parameter name; None if no parameter has a gradient (all scores would be equal), or if one is not finite
        (after an overflow the gradient scaler skips the step).
    """
    gradients = [parameter.grad for parameter in state.parameters.values() if parameter.grad is not None]
    if not gradients or not all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
        return None
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else (parameter * parameter.grad).abs()
        for name, parameter in state.parameters.items()
    }


def snip_scores(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    batch: tuple[Tensor, Tensor],
    loss: Callable[[Any, Tensor], Tensor],
) -> dict[str, Tensor]:
    """Compute |weight · gradient| on a copy of the network in training mode (SNIP; Lee et al., 2019).

    The state of no random number generator changes.

    Args:
        model: the network, unwrapped.
        parameters: parameters to score, by name.
        batch: inputs and targets.
        loss: function of outputs and targets.

    Returns:
        scores by parameter name, of the parameters' shapes.

    Raises:
        ArgumentError: `batch` is not a pair, or cross-entropy does not take its targets.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        length = f" of {len(batch)}" if isinstance(batch, (tuple, list, dict, str)) else ""
        raise ArgumentError(f"batch is a {type(batch).__name__}{length}: give a pair, batch=(inputs, targets)")
    devices = sorted({parameter.device.index or 0 for parameter in parameters.values() if parameter.is_cuda})
    with torch.random.fork_rng(devices):
        trial = copy.deepcopy(model).train()
        inputs, targets = batch
        with torch.enable_grad():
            outputs = trial(inputs)
            if loss is F.cross_entropy:
                _check_targets(outputs, targets)
            loss(outputs, targets).backward()
    scores = {}
    for name, parameter in trial.named_parameters():
        if name in parameters:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else average(parameter.grad)
            scores[name] = (parameter.detach() * gradient).abs()
    return {name: scores[name] for name in parameters}


def _check_targets(outputs: object, targets: object) -> None:
    """Raise unless cross-entropy takes these targets: class numbers, or a probability for every output."""
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        found = f"outputs are a {type(outputs).__name__}, the targets a {type(targets).__name__}"
        raise ArgumentError(f"batch: cross-entropy takes two tensors; the network's {found}. Give a loss that takes these")
    if targets.dtype == torch.int64 or (targets.is_floating_point() and targets.shape == outputs.shape):
        return
    raise ArgumentError(
        f"batch: the targets are {targets.dtype} {tuple(targets.shape)}; cross-entropy takes class numbers (torch.int64) or "
        f"probabilities of the outputs' shape {tuple(outputs.shape)}: convert them (targets.long()), or give another loss"
    )
