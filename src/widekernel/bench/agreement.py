"""Checks that the variants of a network compute the same results: large kernels one by one, outputs, and gradients.

Comparing outputs alone would not suffice. In an untrained network, a block contributes little compared to the residual
path, and norms remove factors: with all large kernels off by a half, the output of a small RepLKNet is off by 1e-4.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from widekernel.bench.checking import check_agreement
from widekernel.bench.errors import BenchmarkError
from widekernel.bench.rivals import RIVALS
from widekernel.bench.variants import INFER, PYTORCH, PYTORCH_FOLDED, TRAIN, Variant
from widekernel.errors import in_short
from widekernel.transforms.to_torch import operator_layers, to_torch

TOLERANCE = 1e-3
"""Largest allowed difference of outputs, relative to the largest number."""
GRADIENT_TOLERANCE = 1e-2
"""Largest allowed norm of the difference of gradients, relative to the norm of that parameter's gradient."""
NOISE_FACTOR = 4.0
"""Allowed difference of a gradient as a multiple of the rounding noise in PyTorch's own, if that exceeds the tolerance.

An untrained deep network with batch norms over a few values magnifies the rounding errors of its first layers. The noise is
measured in two ways: between PyTorch's two layouts, and between images and slightly perturbed images.
"""
PERTURBATION = 1e-6
"""Size of the perturbation of images, relative to each number: the rounding error of a sum of a thousand numbers."""
# A gradient that is smaller than this, relative to the largest one, is zero in theory (such as that of a bias before a batch
# norm) and consists of rounding errors in practice.
_ZERO_GRADIENT = 1e-4
# Above this tolerance the comparison is meaningless: a wrong gradient would pass.
_MEANINGLESS = 0.5

REFERENCE = f"{PYTORCH} NHWC"
"""Name of the variant with which the others are compared."""


def check_variants(name: str, variants: Sequence[Variant], mode: str, target: Tensor) -> None:
    """Compare the variants of a network; compile those marked as compiled.

    Raises:
        BenchmarkError: if they differ, or the network cannot be trained on these images.
    """
    wanted: list[Tensor] = []
    noise: list[float] = []
    for variant in sorted(variants, key=lambda v: (v.name != REFERENCE, v.kind != PYTORCH, v.compiled)):
        if variant.kind not in (PYTORCH, PYTORCH_FOLDED) and not variant.compiled:
            _check_layers(name, variant)
        if mode == TRAIN:
            got = _gradients(name, variant, target, variant.images)
            if not wanted:
                wanted = [gradient.clone() for gradient in got]
                noise = _largest_noise(wanted, _gradients(name, variant, target, _perturbed(variant.images)), noise)
            elif variant.kind == PYTORCH and not variant.compiled:
                noise = _largest_noise(wanted, got, noise)
            _check_gradients(name, variant, got, wanted, noise)
        else:
            with torch.inference_mode():
                got = [variant.forward(variant.images)]
            wanted = wanted or got
            check_agreement({variant.name: got[0], REFERENCE: wanted[0]}, REFERENCE, f"the output of {name}", TOLERANCE)


def check_rivals(name: str, variants: Sequence[Variant], target: Tensor) -> tuple[list[Variant], list[str]]:
    """Check the variants of a network in inference; unlike an error of ours, that of another program does not end the run.

    Returns:
        the variants that agree, and a line about each one that fails or gives another output.

    Raises:
        BenchmarkError: if variants that are not rivals differ.
    """
    right = [variant for variant in variants if variant.kind not in RIVALS]
    check_variants(name, right, INFER, target)
    reference = next(variant for variant in right if variant.name == REFERENCE)
    remarks = []
    for variant in (variant for variant in variants if variant.kind in RIVALS):
        try:
            check_variants(name, [reference, variant], INFER, target)
            right.append(variant)
        except Exception as error:
            images = len(variant.images)
            remarks.append(f"{variant.name} is left out for {name}, {images} images: {in_short(error)}")
    return right, remarks


@torch.no_grad()
def _check_layers(name: str, variant: Variant) -> None:
    """Compare every layer that runs on our operator with the same layer on PyTorch's convolutions."""
    layers = operator_layers(variant.network)
    if not layers:
        return
    got, wanted = (_layer_outputs(net, layers, variant.images) for net in (variant.network, to_torch(variant.network)))
    for layer, (output, rectified) in got.items():
        theirs, _ = wanted[layer]
        # Our layer may apply the activation itself, which follows the layer in the other network.
        outputs = {variant.name: output, PYTORCH: theirs.relu() if rectified else theirs}
        check_agreement(outputs, PYTORCH, f"the layer {layer or type(variant.network).__name__} of {name}", TOLERANCE)


def _layer_outputs(network: nn.Module, layers: Sequence[str], images: Tensor) -> dict[str, tuple[Tensor, bool]]:
    """Run a network; return the last output of each named layer and whether the layer was called with `relu`."""
    outputs: dict[str, tuple[Tensor, bool]] = {}
    torch.manual_seed(0)  # for networks with dropout or stochastic depth
    with ExitStack() as hooks:
        for layer in layers:

            def note(module: nn.Module, args: Any, options: dict[str, Any], output: Tensor, layer: str = layer) -> None:
                # Cloned, because an in-place activation must not change it.
                outputs[layer] = output.clone(), bool(options.get("relu"))

            hooks.callback(network.get_submodule(layer).register_forward_hook(note, with_kwargs=True).remove)
        network(images)
    return outputs


def _perturbed(images: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    factors = 1 + PERTURBATION * torch.randn(images.shape, generator=generator)
    return images.clone().mul_(factors.to(images))


def _largest_noise(wanted: Sequence[Tensor], got: Sequence[Tensor], noise: Sequence[float]) -> list[float]:
    """Return, for each gradient, its difference or the earlier noise, whichever is larger."""
    seen = [_difference(*pair) for pair in zip(got, wanted)]
    return [max(pair) for pair in zip(seen, noise)] if noise else seen


def _gradients(name: str, variant: Variant, target: Tensor, images: Tensor) -> list[Tensor]:
    variant.network.zero_grad()
    torch.manual_seed(0)
    try:
        F.cross_entropy(variant.forward(images), target).backward()
    except (RuntimeError, ValueError) as error:
        shape = tuple(variant.images.shape)
        raise BenchmarkError(
            f"{name} ({variant.name}) cannot be trained on images {shape}: {error}. Give another batch or size, or time "
            "inference only."
        ) from error
    return [p.grad for p in variant.network.parameters() if p.grad is not None]


def _difference(got: Tensor, wanted: Tensor) -> float:
    """Return the norm of the difference, relative to the norm of `wanted`; NaN if the shapes differ."""
    return (got - wanted).norm().item() / max(wanted.norm().item(), 1e-30) if got.shape == wanted.shape else float("nan")


def _check_gradients(
    name: str, variant: Variant, got: Sequence[Tensor], wanted: Sequence[Tensor], noise: Sequence[float]
) -> None:
    largest = max((gradient.norm().item() for gradient in wanted), default=0.0)
    same = [g.shape for g in got] == [w.shape for w in wanted]
    compared = meaningful = 0
    for i, (ours, theirs) in enumerate(zip(got, wanted) if same else ()):
        if theirs.norm().item() <= _ZERO_GRADIENT * largest:
            continue
        allowed = max(GRADIENT_TOLERANCE, NOISE_FACTOR * noise[i]) if noise else GRADIENT_TOLERANCE
        compared, meaningful = compared + 1, meaningful + (allowed < _MEANINGLESS)
        # Written so that NaN counts as different.
        same &= _difference(ours, theirs) <= allowed
    if same and 2 * meaningful < compared:
        raise BenchmarkError(
            f"the gradients of {name} cannot be compared: rounding alone changes {compared - meaningful} of {compared} by "
            f"more than {_MEANINGLESS / NOISE_FACTOR:.0%} of their norms. Use more or larger images, or time inference."
        )
    if not same or largest != largest:
        raise BenchmarkError(
            f"the gradients of {name}: {variant.name} and {REFERENCE} differ by more than {GRADIENT_TOLERANCE:g} of the "
            f"norm of one of them, and by more than {NOISE_FACTOR:g} times what rounding changes in PyTorch's. Nothing is "
            "reported: find out which of the two is wrong, or time inference only."
        )
