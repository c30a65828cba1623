"""Training in two processes, played one after the other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from widekernel.dense.detection.processes import MeanOverProcesses, alone

Losses = Callable[[slice, MeanOverProcesses], dict[str, Tensor]]


def gradients(module: nn.Module, losses: dict[str, Tensor]) -> list[Tensor]:
    """Return the gradient of the sum of losses with respect to all parameters."""
    return list(torch.autograd.grad(sum(losses.values()), list(module.parameters())))


def check_two_processes(module: nn.Module, losses: Losses, count: int = 4) -> None:
    """Assert that the mean of two processes' gradients is that of the whole batch, and that it is not so by itself.

    Args:
        module: the parameters
        losses: returns the losses of a part of the batch, given the mean over processes
        count: number of images in the batch
    """
    parts = [slice(0, count // 4), slice(count // 4, count)]  # of different size, so that the normalizers matter
    seen: list[list[Tensor]] = []
    for part in parts:
        seen.append([])
        losses(part, lambda value, least=0: (seen[-1].append(value), alone(value, least))[1])
    shared = [torch.stack(values).mean(dim=0) for values in zip(*seen)]
    assert shared
    averaged, apart = [], []
    for part in parts:
        waiting = iter(shared)
        averaged.append(gradients(module, losses(part, lambda _, least=0, waiting=waiting: next(waiting))))
        apart.append(gradients(module, losses(part, alone)))
    whole = gradients(module, losses(slice(0, count), alone))
    scale = max(gradient.norm() for gradient in whole)

    def distance(two: list[list[Tensor]]) -> float:
        return max(((a + b) / 2 - c).norm() / scale for a, b, c in zip(*two, whole)).item()

    assert distance(averaged) <= 1e-4
    assert distance(apart) >= 1e-2
