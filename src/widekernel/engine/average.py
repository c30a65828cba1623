"""Moving average of the weights, which can leave a step out without waiting for the device."""

from __future__ import annotations

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from typing_extensions import override


class Average(ModelEmaV3):
    """timm's exponential moving average of weights and buffers, for steps that may have been skipped.

    Args:
        model: network to average
        decay: fraction of the average that each step keeps
        warmup: start with a smaller decay, which grows to `decay`
    """

    def __init__(self, model: nn.Module, decay: float, warmup: bool) -> None:
        super().__init__(model, decay=decay, use_warmup=warmup)

    @override
    @torch.no_grad()
    def update(self, model: nn.Module, step: int | None = None, made: Tensor | None = None) -> None:
        """Add the weights after optimizer step `step`, counted from 1.

        Args:
            model: network whose weights are added.
            step: number of the step; only a warm-up uses it.
            made: scalar on the device that is 0 if the step was skipped, and 1 if it was made; `None` means made.
        """
        # If given a step, timm overwrites the average at the first update, which is wanted only with warm-up.
        step = step if self.use_warmup else None
        if made is None:
            super().update(model, step)
            return
        weights: dict[torch.dtype, Tensor] = {}
        for average, value in zip(self.module.state_dict().values(), model.state_dict().values(), strict=True):
            if not average.is_floating_point():
                average.copy_(value)
                continue
            if average.dtype not in weights:
                weights[average.dtype] = made.to(average.dtype) * (1 - self.get_decay(step))
            average.lerp_(value, weights[average.dtype])  # rounds like the update above; a weight of 0 changes nothing
