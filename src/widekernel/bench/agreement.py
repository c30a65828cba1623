"""Whether rivals among networks compute the same: their large kernels one by one, their outputs, and their gradients.

Outputs alone would not tell. In a network that has not been trained a block changes little of what passes by it, and norms
take factors away: with all large kernels wrong by a half, the output of a small RepLKNet is off by a ten-thousandth.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from widekernel.bench.baselines import PYTORCH, PYTORCH_FOLDED, TRAIN, Rival
from widekernel.bench.checking import check_agreement
from widekernel.bench.errors import BenchmarkError
from widekernel.transforms.to_torch import operator_layers, to_torch

TOLERANCE = 1e-3
"""Largest difference of outputs allowed, relative to the largest number."""
GRADIENT_TOLERANCE = 1e-2
"""Norm of the difference of gradients allowed, relative to the norm of that parameter's gradient."""
NOISE_FACTOR = 4.0
"""How many times as far as rounding moves PyTorch's own gradient one may be off, where that is more than the tolerance.

Batch norm over a few values makes a deep network that has not been trained magnify the rounding of its first layers. By how
much is seen twice: between PyTorch's two layouts, and between images and the same images with their last digits changed.
"""
LAST_DIGITS = 1e-6
"""How much the images are changed for that, relative to each number: the rounding error of a sum of a thousand of them."""
# A parameter whose gradient is smaller than this, relative to the largest one, has none in theory (a bias before a batch
# norm), and in practice what rounding leaves.
_NO_GRADIENT = 1e-4
# With so much allowed a wrong gradient would pass.
_MEANS_NOTHING = 0.5

YARDSTICK = f"{PYTORCH} NHWC"


def check_rivals(name: str, rivals: Sequence[Rival], mode: str, target: Tensor) -> None:
    """Compare the rivals; compiles what is to be compiled.

    Raises:
        BenchmarkError: if they differ, or the network cannot be trained on these images.
    """
    wanted: list[Tensor] = []
    noise: list[float] = []
    for rival in sorted(rivals, key=lambda rival: (rival.name != YARDSTICK, rival.rival != PYTORCH, rival.compiled)):
        if rival.rival not in (PYTORCH, PYTORCH_FOLDED) and not rival.compiled:
            _check_layers(name, rival)
        if mode == TRAIN:
            got = _gradients(name, rival, target, rival.images)
            if not wanted:
                wanted = [gradient.clone() for gradient in got]
                noise = _moved(wanted, _gradients(name, rival, target, _with_other_last_digits(rival.images)), noise)
            elif rival.rival == PYTORCH and not rival.compiled:
                noise = _moved(wanted, got, noise)
            _check_gradients(name, rival, got, wanted, noise)
        else:
            with torch.inference_mode():
                got = [rival.forward(rival.images)]
            wanted = wanted or got
            check_agreement({rival.name: got[0], YARDSTICK: wanted[0]}, YARDSTICK, f"the output of {name}", TOLERANCE)


@torch.no_grad()
def _check_layers(name: str, rival: Rival) -> None:
    """Compare every layer that runs on our operator with the same layer on PyTorch's convolutions."""
    names = operator_layers(rival.network)
    if not names:
        return
    got, wanted = (_outputs(network, names, rival.images) for network in (rival.network, to_torch(rival.network)))
    for layer, (output, rectified) in got.items():
        theirs, _ = wanted[layer]
        # A layer of ours may do what comes after it in the other network.
        outputs = {rival.name: output, PYTORCH: theirs.relu() if rectified else theirs}
        check_agreement(outputs, PYTORCH, f"the layer {layer or type(rival.network).__name__} of {name}", TOLERANCE)


def _outputs(network: nn.Module, names: Sequence[str], images: Tensor) -> dict[str, tuple[Tensor, bool]]:
    """Run a network and give what the layers of these names put out in their last call, and whether it asked for `relu`."""
    outputs: dict[str, tuple[Tensor, bool]] = {}
    torch.manual_seed(0)  # for networks that drop something at random
    with ExitStack() as hooks:
        for name in names:

            def note(module: nn.Module, args: Any, options: dict[str, Any], output: Tensor, name: str = name) -> None:
                # A rectifier in place must not change what is kept.
                outputs[name] = output.clone(), bool(options.get("relu"))

            hooks.callback(network.get_submodule(name).register_forward_hook(note, with_kwargs=True).remove)
        network(images)
    return outputs


def _with_other_last_digits(images: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    factors = 1 + LAST_DIGITS * torch.randn(images.shape, generator=generator)
    return images.clone().mul_(factors.to(images))


def _moved(wanted: Sequence[Tensor], got: Sequence[Tensor], noise: Sequence[float]) -> list[float]:
    """Return by how much gradients differ where that is more than the noise seen before, else that noise."""
    seen = [_difference(*pair) for pair in zip(got, wanted)]
    return [max(pair) for pair in zip(seen, noise)] if noise else seen


def _gradients(name: str, rival: Rival, target: Tensor, images: Tensor) -> list[Tensor]:
    rival.network.zero_grad()
    torch.manual_seed(0)
    try:
        F.cross_entropy(rival.forward(images), target).backward()
    except (RuntimeError, ValueError) as error:
        shape = tuple(rival.images.shape)
        raise BenchmarkError(
            f"{name} ({rival.name}) cannot be trained on images {shape}: {error}. Give another batch or size, or time "
            "inference only."
        ) from error
    return [p.grad for p in rival.network.parameters() if p.grad is not None]


def _difference(got: Tensor, wanted: Tensor) -> float:
    """Give the norm of the difference, relative to the norm of what is wanted."""
    return (got - wanted).norm().item() / max(wanted.norm().item(), 1e-30) if got.shape == wanted.shape else float("nan")


def _check_gradients(
    name: str, rival: Rival, got: Sequence[Tensor], wanted: Sequence[Tensor], noise: Sequence[float]
) -> None:
    largest = max((gradient.norm().item() for gradient in wanted), default=0.0)
    same = [g.shape for g in got] == [w.shape for w in wanted]
    compared = steady = 0
    for i, (ours, theirs) in enumerate(zip(got, wanted) if same else ()):
        if theirs.norm().item() <= _NO_GRADIENT * largest:
            continue
        allowed = max(GRADIENT_TOLERANCE, NOISE_FACTOR * noise[i]) if noise else GRADIENT_TOLERANCE
        compared, steady = compared + 1, steady + (allowed < _MEANS_NOTHING)
        # Written so that NaN counts as different.
        same &= _difference(ours, theirs) <= allowed
    if same and 2 * steady < compared:
        raise BenchmarkError(
            f"the gradients of {name} cannot be compared: rounding alone changes {compared - steady} of {compared} by more "
            f"than {_MEANS_NOTHING / NOISE_FACTOR:.0%} of their norms. Take more or larger images, or time inference."
        )
    if not same or largest != largest:
        raise BenchmarkError(
            f"the gradients of {name}: {rival.name} and {YARDSTICK} differ by more than {GRADIENT_TOLERANCE:g} of the norm "
            f"of one of them, and by more than {NOISE_FACTOR:g} times what rounding changes in PyTorch's. Nothing is "
            "reported: find out which of the two is wrong, or time inference only."
        )
