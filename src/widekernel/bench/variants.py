"""The variants of a network that are compared: on PyTorch's convolutions, on ours, folded, accelerated, fused, compiled."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from widekernel.bench.compiling import compiled as compiled_by_torch
from widekernel.bench.errors import BenchmarkError
from widekernel.bench.rivals import RIVALS, layouts_of, network_in
from widekernel.errors import in_short
from widekernel.ops.problem import LAYOUTS
from widekernel.transforms.acceleration import accelerate
from widekernel.transforms.fold import Foldable, fold
from widekernel.transforms.to_torch import operator_layers, to_torch

TRAIN, INFER = MODES = ("train", "infer")
PYTORCH, PYTORCH_FOLDED = "PyTorch", "PyTorch, folded"
OURS, FOLDED, ACCELERATED, FUSED = "ours", "ours, folded", "ours, accelerated", "ours, fused"

# Initial layer scales are so small that an error within a block would hardly change the output, so they are increased.
_SMALL_SCALE, _VISIBLE_SCALE = 0.01, 0.5


@dataclass(frozen=True)
class Variant:
    """One variant of a network, in one layout.

    Attributes:
        kind: which variant, such as `ours, folded`.
        layout: a key of `LAYOUTS`.
        compiled: whether `forward` is compiled.
        network: the module that holds the parameters.
        forward: the function to call.
        images: input, in that layout.
    """

    kind: str
    layout: str
    compiled: bool
    network: nn.Module
    forward: Callable[[Tensor], Tensor]
    images: Tensor

    @property
    def is_observed(self) -> bool:
        """Whether a mode sees the operators of the variant, without changing what runs."""
        return not self.compiled and self.kind not in (FUSED, *RIVALS)

    @property
    def name(self) -> str:
        """Name, unique among the variants of a network."""
        return f"{self.kind} {self.layout}{' compiled' if self.compiled else ''}"


@torch.no_grad()
def with_visible_blocks(model: nn.Module) -> nn.Module:
    """Return a copy in which every block influences the output, as it does after training."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        if 0 < parameter.abs().max() <= _SMALL_SCALE and parameter.unique().numel() == 1:
            parameter.fill_(_VISIBLE_SCALE)
    return model


Conditions = Callable[[], AbstractContextManager[object]]
"""A function that creates the context in which networks run, such as autocast."""


def build_variants(
    model: nn.Module,
    mode: str,
    images: Tensor,
    compiled: bool,
    conditions: Conditions = nullcontext,
    rivals: Sequence[str] = (),
) -> list[Variant]:
    """Build the variants to compare, without duplicates.

    Args:
        model: network to copy.
        mode: one of `MODES`.
        images: (N, C, H, W), on the device of the model.
        compiled: whether to add a compiled copy of each variant.
        conditions: creates the context in which the variants will run, and in which `accelerate` therefore measures.
        rivals: other programs to add, of `RIVALS`; for inference only.
    """
    variants = []
    for layout, memory_format in LAYOUTS.items():
        x = images.contiguous(memory_format=memory_format)
        for kind, network in _networks(model, mode, x, conditions).items():
            network = network.to(memory_format=memory_format)  # type: ignore[call-overload]
            variants.append(Variant(kind, layout, False, network, network, x))
            # The compiler sees the code of fused blocks, so that compiled they would be there twice.
            if compiled and kind != FUSED:
                twin = copy.deepcopy(network)
                variants.append(Variant(kind, layout, True, twin, compiled_by_torch(twin), x))
    if rivals and mode == INFER:
        plain = to_torch(_folded(copy.deepcopy(model).eval()))
        for layout, memory_format in LAYOUTS.items():
            x = images.contiguous(memory_format=memory_format)
            network = copy.deepcopy(plain).to(memory_format=memory_format)  # type: ignore[call-overload]
            for name in rivals:
                if layout in layouts_of(name):
                    variants.append(Variant(name, layout, False, network, forward_in(name, network, x), x))
    return variants


def _networks(model: nn.Module, mode: str, x: Tensor, conditions: Conditions) -> dict[str, nn.Module]:
    base = copy.deepcopy(model).train(mode == TRAIN)
    is_ours = bool(operator_layers(base))
    networks = {PYTORCH: to_torch(base)}
    if is_ours:
        networks[OURS] = base
    fast = copy.deepcopy(base)
    if mode == INFER and any(isinstance(module, Foldable) and module.foldable() for module in base.modules()):
        fast = _folded(base)
        if is_ours:
            networks[PYTORCH_FOLDED] = to_torch(fast)
        networks[FOLDED] = copy.deepcopy(fast)
    layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    with torch.set_grad_enabled(mode == TRAIN), conditions():
        networks[ACCELERATED], _ = accelerate(fast.to(memory_format=layout), x, blocks=False)  # type: ignore[call-overload]
        if mode == INFER:
            fused, report = accelerate(copy.deepcopy(networks[ACCELERATED]), x)
            # A network without blocks that can be fused would be there twice.
            if any(row.gain is not None for row in report.blocks):
                networks[FUSED] = fused
    return networks


def forward_in(rival: str, network: nn.Module, images: Tensor, precision: str = "float32") -> Callable[[Tensor], Tensor]:
    """Return what `network_in` returns; if the rival cannot convert the network, a function that raises why."""
    try:
        return network_in(rival, network, images, precision)
    except Exception as error:
        why = in_short(error)

    def refuse(x: Tensor) -> Tensor:
        raise BenchmarkError(f"{rival} cannot convert the network: {why}")

    return refuse


def _folded(network: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        # The warnings are about layers that cannot be folded, which is part of the result here.
        warnings.simplefilter("ignore")
        return fold(network)
