"""Mixup and cutmix that do not depend on how a global batch is divided among processes and forward passes."""

import torch
from timm.data import Mixup
from torch import Tensor

from widekernel.data.seeding import MIX_STREAM, scoped_seed
from widekernel.errors import ArgumentError

GROUP = 64
"""Number of neighboring images of a global batch that are mixed with the same strength, or by the same box."""


class GroupMixup:
    """Mixup or cutmix of groups of `GROUP` images at fixed places of the global batch.

    All random choices of a group (whether it is mixed, by mixup or by cutmix, strength and box) are a function of (seed,
    step, number of the group). The image at an even place is mixed with its neighbor at the next, odd place. Therefore any
    division of a global batch into parts of even size gives the same images and targets, bit for bit.

    timm and the published recipes choose once for each forward pass of each GPU, and mix its first image with its last.
    There, other numbers of GPUs or accumulation steps give other images. The distribution of a mixed image is the same;
    the number of images that share a choice is not, unless their batch per GPU has `GROUP` images.

    Args:
        mixup: timm's implementation, in batch mode
    """

    def __init__(self, mixup: Mixup) -> None:
        if mixup.mode != "batch":
            raise ArgumentError(f"mixup.mode is {mixup.mode!r}, but must be 'batch': a group shares its random choices")
        self.mixup = mixup

    def __call__(self, images: Tensor, targets: Tensor, *, seed: int, step: int, first: int) -> tuple[Tensor, Tensor]:
        """Mix a part of a global batch.

        Args:
            images: `(n, channels, height, width)`, floating-point; `n` is even.
            targets: class indices `(n,)`.
            seed: seed of the run.
            step: optimizer steps done before this one.
            first: place of the first image in the global batch, which is even.

        Returns:
            mixed images, in new memory of the same layout, and target probabilities `(n, classes)`.

        Raises:
            ArgumentError: `n` or `first` is odd, so that an image would have no partner.
        """
        if len(images) % 2 or first % 2:
            raise ArgumentError(
                f"{len(images)} images from place {first} of the batch cannot be mixed in pairs of neighbors: set "
                "loop.batch_size and loop.micro_batch so that every forward pass has an even number of images"
            )
        mixed, soft = torch.empty_like(images), []
        start = 0
        while start < len(images):
            group = (first + start) // GROUP
            end = min(len(images), (group + 1) * GROUP - first)
            with scoped_seed(MIX_STREAM, seed, step, group):
                part, probabilities = self.mixup(_mirrored(images[start:end]), _mirrored(targets[start:end]))
            _write_neighbors(mixed[start:end], part)
            soft.append(torch.empty_like(probabilities))
            _write_neighbors(soft[-1], probabilities)
            start = end
        return mixed, torch.cat(soft)


def _mirrored(values: Tensor) -> Tensor:
    """Return a copy in which the partner of each value is its mirror image, as timm needs, and not its neighbor."""
    return torch.cat([values[0::2], values[1::2].flip(0)])


def _write_neighbors(target: Tensor, mirrored: Tensor) -> None:
    """Write to `target` the values in the order that `_mirrored` was given."""
    half = len(mirrored) // 2
    target[0::2] = mirrored[:half]
    target[1::2] = mirrored[half:].flip(0)
