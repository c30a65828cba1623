"""Images for the check of an export and for calibration: drawn from a folder or an archive, or seeded noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from widekernel.data.image_files import ImageFiles, draw
from widekernel.data.images import UnreadableImageError
from widekernel.data.preprocess import ImageTransform
from widekernel.data.seeding import derive_seed
from widekernel.errors import DataError

NOISE = "seeded noise"
Notify = Callable[[str], None]


@dataclass(frozen=True)
class CheckImages:
    """Preprocessed images.

    Attributes:
        check: (n, C, H, W), for the comparison with PyTorch.
        calibration: (m, C, H, W), for quantization; possibly empty.
        source: where the images are from, for reports.
        names: name of each image of `check`; empty for noise.
        shared: number of images that serve both purposes, because there are not enough.
    """

    check: Tensor
    calibration: Tensor
    source: str
    names: tuple[str, ...] = ()
    shared: int = 0

    def labels(self, class_names: tuple[str, ...]) -> Tensor | None:
        """Return the class of each image of `check`, after which its folder is named; None if a folder is not a class."""
        folders = [PurePosixPath(name).parent.name for name in self.names]
        if not folders or not set(folders) <= set(class_names):
            return None
        return torch.tensor([class_names.index(folder) for folder in folders])


def noise(count: int, channels: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Return images of normally distributed numbers."""
    generator = torch.Generator().manual_seed(derive_seed(seed))
    return torch.randn(count, channels, height, width, generator=generator)


def noise_images(count: int, channels: int, size: int, seed: int = 0) -> CheckImages:
    """Return noise for the comparison, and nothing for calibration."""
    images = noise(count, channels, size, size, seed)
    return CheckImages(images, images[:0], NOISE)


def read_images(
    path: Path, transform: ImageTransform, check: int, calibration: int = 0, seed: int = 0, notify: Notify | None = None
) -> CheckImages:
    """Draw images at random from a folder or an archive.

    Args:
        path: folder, .tar archive or image.
        transform: from an image to a tensor (C, H, W).
        check: number of images for the comparison; fewer if there are not as many.
        calibration: number of images for quantization; they are other images than those of the comparison, as far as there
            are enough.
        seed: seed of the choice.
        notify: receives messages on images that are left out.

    Raises:
        DataError: there are no readable images.
    """
    source = ImageFiles(path)

    def report(index: int, error: UnreadableImageError) -> None:
        if notify is not None:
            notify(f"Left out an unreadable image: {source.sample_name(index)}: {error}")

    drawn = draw(source, check + calibration, derive_seed(seed), report)
    found = [(source.sample_name(index), transform(image)) for index, image in drawn]
    if not found:
        raise DataError(f"None of the images of {path} can be read.")
    compared, rest = found[:check], found[check:]
    shared = max(0, min(calibration, len(found)) - len(rest))
    calibrated = [*rest, *found[:shared]]
    images = torch.stack([image for _, image in compared])
    others = torch.stack([image for _, image in calibrated]) if calibrated else images[:0]
    return CheckImages(images, others, str(path), tuple(name for name, _ in compared), shared)
