"""Masks learned over frozen weights: one of six patterns per group, drawn with the Gumbel-softmax trick."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from widekernel.sparsity.semi_structured.config import SemiStructuredConfig
from widekernel.sparsity.semi_structured.grouping import Axis, group_view, ungroup
from widekernel.sparsity.semi_structured.masks import legal_choices, magnitude_choices
from widekernel.sparsity.semi_structured.noise import gumbel
from widekernel.sparsity.semi_structured.patterns import bits_of, pattern_table

ILLEGAL = -1e9  # finite, so that 0 · log 0 is 0 in the entropy and in its gradient


class _HardChoice(torch.autograd.Function):
    """The most probable pattern in the forward pass, with the gradient of the mean pattern in the backward pass."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        # Transposed, because a softmax over rows of six numbers is several times slower on a CPU.
        ctx.save_for_backward(torch.softmax(scores.T.contiguous(), 0))
        return bits_of(scores.argmax(1)).to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (soft,) = ctx.saved_tensors
        towards = pattern_table(soft.device, soft.dtype) @ grads[0].to(soft.dtype).T
        return (soft * (towards - (soft * towards).sum(0))).T


def gumbel_mask(logits: Tensor, noise: Tensor, tau: float = 1.0, kappa: float = 1.0, legal: Tensor | None = None) -> Tensor:
    """Draw a mask for every group with a straight-through estimator: 0 and 1 forward, the softmax's gradient backward.

    z = (kappa · logits + noise) / tau; the one-hot argmax of softmax(z) chooses the pattern, and the gradient is that of
    softmax(z) itself (Jang et al., ICLR 2017; over 2:4 patterns Danhofer, arXiv 2411.00288, with tau = kappa = 1).

    Args:
        logits: (G, 6).
        noise: (G, 6), standard Gumbel; with zeros, the most probable pattern is chosen.
        tau: temperature.
        kappa: factor on the logits.
        legal: (G, 6) bool, the patterns to choose from; None for all.

    Returns:
        (G, 4) mask of zeros and ones, in the type of `logits`.
    """
    with torch.autocast(logits.device.type, enabled=False):  # the gradients of logits are small
        scores = kappa * logits + noise
        if legal is not None:
            scores = scores.masked_fill(~legal, ILLEGAL)
        return _HardChoice.apply(scores / tau)  # type: ignore[no-untyped-call,no-any-return]


@dataclass
class Schedule:
    """Step of mask learning, which determines temperature and logit scale.

    Attributes:
        config: start and end of both, and the number of steps between them.
        step: optimizer steps taken.
    """

    config: SemiStructuredConfig
    step: int = 0

    @property
    def tau(self) -> float:
        """The temperature, which falls exponentially."""
        start, end = self.config.tau_start, self.config.tau_end
        return start * math.exp(math.log(end / start) * self._progress)

    @property
    def kappa(self) -> float:
        """The factor on the logits, which changes linearly."""
        return self.config.kappa_start + (self.config.kappa_end - self.config.kappa_start) * self._progress

    @property
    def _progress(self) -> float:
        return min(self.step / self.config.total_steps, 1.0)


class ChoiceMask(nn.Module):
    """Parametrization of a weight: masked by drawn choices in training, by the most probable ones in evaluation.

    In evaluation there is no noise, and masked weights are +0. Noise depends on seed, step and name only, so all forward
    passes of one optimizer step (accumulation, recomputation, other ranks) use the same mask.

    Args:
        logits: (G, 6); become the float32 parameter.
        shape: shape of the weight.
        axis: which weights form a group.
        groups: number of groups of the convolution.
        name: name of the weight; determines its noise.
        schedule: shared by all masks of a network.
    """

    def __init__(self, logits: Tensor, shape: torch.Size, axis: Axis, groups: int, name: str, schedule: Schedule) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.detach().clone().to(torch.float32))
        self.legal: Tensor | None
        self.register_buffer("legal", legal_choices(shape, axis, groups, logits.device), persistent=False)
        self.shape, self.axis, self.groups, self.name, self.schedule = shape, axis, groups, name, schedule

    def forward(self, weight: Tensor) -> Tensor:
        """Return the masked weight."""
        if not self.training:
            return torch.where(self.mask(), weight, torch.zeros((), dtype=weight.dtype, device=weight.device))
        return weight * self.drawn().to(weight.dtype)

    @torch.compiler.disable  # to the compiler, the step is a constant: it would compile every step again
    def drawn(self) -> Tensor:
        """Draw this step's mask, of the weight's shape, with gradients to the logits."""
        schedule = self.schedule
        noise = gumbel(self.logits.shape, schedule.config.seed, schedule.step, self.name, self.logits.device)
        drawn = gumbel_mask(self.logits.float(), noise, schedule.tau, schedule.kappa, self.legal)
        return ungroup(drawn, self.shape, self.axis, self.groups)

    @torch.no_grad()
    def choices(self) -> Tensor:
        """Return the most probable patterns, (G,) uint8; of equal ones the first."""
        return self._scores().argmax(1).to(torch.uint8)

    def mask(self) -> Tensor:
        """Return the mask of the most probable patterns: bool, of the weight's shape."""
        return ungroup(bits_of(self.choices()), self.shape, self.axis, self.groups)

    def entropies(self) -> Tensor:
        """Return the entropy of each group's choice in nats, (G,), at most log 6: the entropy of softmax(kappa · logits).

        It does not depend on the temperature, which affects gradients, but not how often a pattern is drawn.
        """
        log = torch.log_softmax(self._scores().T.contiguous(), 0)
        return -(log.exp() * log).sum(0)

    def _scores(self) -> Tensor:
        scores = self.schedule.kappa * self.logits.float()
        return scores if self.legal is None else scores.masked_fill(~self.legal, ILLEGAL)


@torch.no_grad()
def initial_logits(weight: Tensor, axis: Axis, groups: int, prior_strength: float) -> Tensor:
    """Return logits that prefer the magnitude mask.

    Its pattern gets `prior_strength`; patterns that share one of its two slots get half of it.

    Returns:
        (G, 6) float32; with a prior strength of 0 all patterns are equally likely.
    """
    kept = bits_of(magnitude_choices(weight, axis, groups)).float()
    return prior_strength / 2 * (kept @ pattern_table(weight.device, torch.float32).T)


def kept_share(weight: Tensor, choices: Tensor, axis: Axis, groups: int = 1) -> float:
    """Return the share of the summed magnitude that the choices keep (1 for a weight of zeros)."""
    values, _ = group_view(weight.detach(), axis, groups)
    magnitudes = values.double().abs()
    total = float(magnitudes.sum())
    return float((magnitudes * bits_of(choices)).sum()) / total if total else 1.0
