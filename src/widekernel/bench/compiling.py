"""Networks compiled by `torch.compile`, each with cached programs of its own."""

from __future__ import annotations

import copy
import importlib
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_NUMBERS = itertools.count()
_KEPT: list[nn.Module] = []


def compiled(network: nn.Module, backend: str | Callable[..., Any] = "inductor") -> Callable[[Tensor], Tensor]:
    """Return a function that runs a network compiled by a backend of `torch.compile`, for images of one size."""

    def forward(x: Tensor) -> Tensor:
        return network(x)

    # PyTorch caches a few compiled programs for each code object. Networks that share their code would evict each other's
    # programs, and every call would have to search among them.
    forward.__code__ = forward.__code__.replace(co_name=f"forward_{next(_NUMBERS)}")
    return torch.compile(forward, dynamic=False, backend=backend)


def compiled_by_zentorch(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return a function that runs a network compiled by zentorch, for images of one size.

    Its side effects are kept away from others. It adds its passes to the settings of PyTorch's own compiler, which would use
    them from then on. And it reorders weights in place, and takes new weights at the address of freed ones for reordered. So
    it gets a copy of the network, which stays in memory until the process ends.
    """
    importlib.import_module("zentorch")  # registers its compiler
    _KEPT.append(copy.deepcopy(network))
    return compiled(_KEPT[-1], _zentorch)


def _zentorch(graph: Any, inputs: Any) -> Callable[..., Any]:
    from torch._dynamo import lookup_backend
    from torch._inductor import config

    # Settings that are named here get their values back at the end.
    with config.patch(joint_custom_post_pass=config.joint_custom_post_pass):
        return lookup_backend("zentorch")(graph, inputs)  # type: ignore[no-any-return]
