"""Folding of a network, with a check that its outputs stay the same."""

from dataclasses import dataclass

import torch
from torch import nn

import widekernel
from widekernel.data.seeding import derive_seed
from widekernel.engine.error_context import NetworkError, errors_as
from widekernel.errors import WidekernelError
from widekernel.tasks.image_channels import input_channels
from widekernel.tasks.networks import tensor_outputs

RELATIVE_TOLERANCE = 1e-3
"""Largest difference of outputs that is accepted, relative to the largest output."""


class FoldError(WidekernelError, RuntimeError):
    """Error for a folded network whose outputs differ from those of the original."""


@dataclass(frozen=True)
class FoldCheck:
    """Comparison of a network with its folded form on the same random images.

    Args:
        max_error: largest absolute difference of the outputs
        max_output: largest absolute output of the original
        images: number of random images
    """

    max_error: float
    max_output: float
    images: int


def fold_and_check(model: nn.Module, input_size: int, images: int = 4) -> tuple[nn.Module, FoldCheck]:
    """Fold `model`, and compare both forms on random images of `input_size` × `input_size` pixels.

    Raises:
        FoldError: the outputs differ by more than `RELATIVE_TOLERANCE` of the largest one, or are not finite.
    """
    model = model.eval()
    folded = widekernel.fold(model).eval()
    generator = torch.Generator().manual_seed(derive_seed(0))
    inputs = torch.randn(images, input_channels(model), input_size, input_size, generator=generator)
    with (
        torch.inference_mode(),
        errors_as(NetworkError, f"Running the network on images of {input_size}×{input_size} pixels"),
    ):
        expected, found = tensor_outputs(model, inputs), tensor_outputs(folded, inputs)
    check = FoldCheck((expected - found).abs().max().item(), expected.abs().max().item(), images)
    if not check.max_error <= RELATIVE_TOLERANCE * max(check.max_output, 1e-6):
        raise FoldError(
            f"Outputs of the folded network differ by up to {check.max_error:.3g}, but at most {RELATIVE_TOLERANCE:g} of "
            f"the largest output ({check.max_output:.3g}) is accepted. Nothing was saved."
        )
    return folded, check
