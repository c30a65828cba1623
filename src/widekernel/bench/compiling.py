"""Networks compiled by `torch.compile`, each with cached programs of its own."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

_NUMBERS = itertools.count()


def compiled(network: nn.Module, backend: str = "inductor") -> Callable[[Tensor], Tensor]:
    """Return a function that runs a network compiled by a backend of `torch.compile`, for images of one size."""

    def forward(x: Tensor) -> Tensor:
        return network(x)

    # PyTorch caches a few compiled programs for each code object. Networks that share their code would evict each other's
    # programs, and every call would have to search among them.
    forward.__code__ = forward.__code__.replace(co_name=f"forward_{next(_NUMBERS)}")
    return torch.compile(forward, dynamic=False, backend=backend)
