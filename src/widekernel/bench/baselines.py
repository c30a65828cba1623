"""The forms of a network that are compared: on PyTorch's convolutions, ours, folded, accelerated, compiled."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from widekernel.ops.problem import LAYOUTS
from widekernel.transforms.acceleration import accelerate
from widekernel.transforms.fold import Foldable, fold
from widekernel.transforms.to_torch import operator_layers, to_torch

TRAIN, INFER = MODES = ("train", "infer")
PYTORCH, PYTORCH_FOLDED = "PyTorch", "PyTorch, folded"
OURS, FOLDED, ACCELERATED = "ours", "ours, folded", "ours, accelerated"

# A scale that the output of a block is multiplied with starts so small that nothing wrong within the block would be seen.
_TINY, _SEEN = 0.01, 0.5


@dataclass(frozen=True)
class Rival:
    """One of the forms, in one layout.

    Attributes:
        rival: which form.
        layout: a key of `LAYOUTS`.
        compiled: whether `forward` is compiled.
        network: whose parameters are trained.
        forward: what is called.
        images: in that layout.
    """

    rival: str
    layout: str
    compiled: bool
    network: nn.Module
    forward: Callable[[Tensor], Tensor]
    images: Tensor

    @property
    def name(self) -> str:
        """What tells it from the others."""
        return f"{self.rival} {self.layout}{' compiled' if self.compiled else ''}"


@torch.no_grad()
def with_visible_blocks(model: nn.Module) -> nn.Module:
    """Give a copy whose blocks all have an influence on the output, as after training."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        if 0 < parameter.abs().max() <= _TINY and parameter.unique().numel() == 1:
            parameter.fill_(_SEEN)
    return model


Conditions = Callable[[], AbstractContextManager[object]]
"""Makes a context in which networks run, autocast for instance."""


def build_rivals(
    model: nn.Module, mode: str, images: Tensor, compiled: bool, conditions: Conditions = nullcontext
) -> list[Rival]:
    """Build the networks to compare; those that would be the same network twice are left out.

    Args:
        model: copied.
        mode: a member of `MODES`.
        images: (N, C, H, W), on the device of the model.
        compiled: whether each network takes part compiled as well.
        conditions: in which they will run, and in which `accelerate` therefore measures.
    """
    rivals = []
    for layout, memory_format in LAYOUTS.items():
        x = images.contiguous(memory_format=memory_format)
        for name, network in _networks(model, mode, x, conditions).items():
            network = network.to(memory_format=memory_format)  # type: ignore[call-overload]
            rivals.append(Rival(name, layout, False, network, network, x))
            if compiled:
                twin = copy.deepcopy(network)
                rivals.append(Rival(name, layout, True, twin, _compiled(twin, len(rivals)), x))
    return rivals


def _networks(model: nn.Module, mode: str, x: Tensor, conditions: Conditions) -> dict[str, nn.Module]:
    base = copy.deepcopy(model).train(mode == TRAIN)
    is_ours = bool(operator_layers(base))
    networks = {PYTORCH: to_torch(base)}
    if is_ours:
        networks[OURS] = base
    fast = copy.deepcopy(base)
    if mode == INFER and any(isinstance(module, Foldable) and module.foldable() for module in base.modules()):
        with warnings.catch_warnings():
            # Of layers that stay as they are, which is a result and no news.
            warnings.simplefilter("ignore")
            fast = fold(base)
        if is_ours:
            networks[PYTORCH_FOLDED] = to_torch(fast)
        networks[FOLDED] = copy.deepcopy(fast)
    layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    with torch.set_grad_enabled(mode == TRAIN), conditions():
        networks[ACCELERATED], _ = accelerate(fast.to(memory_format=layout), x)  # type: ignore[call-overload]
    return networks


def _compiled(network: nn.Module, number: int) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        return network(x)

    # PyTorch keeps what it has compiled by code, a few forms of each. Rivals with the same code would take these from each
    # other, and every call would have to find its own.
    forward.__code__ = forward.__code__.replace(co_name=f"forward_{number}")
    return torch.compile(forward, dynamic=False)
