"""Number of image channels that a network takes, and transforms to that number."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image
from torch import Tensor, nn

from widekernel.data.preprocess import ImageTransform
from widekernel.errors import ConfigError
from widekernel.tasks.assembly import pretrained_cfg

RGB = 3


def input_channels(model: nn.Module) -> int:
    """Return the number of image channels of `model`: as it states, or as its first convolution takes, or three."""
    stated = getattr(model, "in_chans", None)
    if stated is not None:
        return int(stated)
    first = pretrained_cfg(model).get("first_conv")
    names = [first] if isinstance(first, str) else list(first or ())
    modules = dict(model.named_modules())
    found = [getattr(modules.get(name), "in_channels", None) for name in names]
    return next((int(channels) for channels in found if channels is not None), RGB)


@dataclass(frozen=True)
class ToGray:
    """Transform to one channel: the gray image is transformed as three equal channels, which are then averaged.

    Args:
        transform: transform from an RGB image to a tensor `(3, height, width)`
    """

    transform: ImageTransform

    def __call__(self, image: Image.Image) -> Tensor:
        """Return a tensor `(1, height, width)`."""
        return self.transform(image.convert("L").convert("RGB")).mean(0, keepdim=True)


def match_channels(transform: ImageTransform, channels: int) -> ImageTransform:
    """Return `transform`, which yields three channels, or a version of it that yields `channels`.

    Raises:
        ConfigError: `channels` is neither one nor three.
    """
    if channels == RGB:
        return transform
    if channels == 1:
        return ToGray(transform)
    raise ConfigError(
        f"The network takes images of {channels} channels (in_chans), but images are read with {RGB}, or 1 when gray. "
        f"Set in_chans to {RGB} or 1, or train on images of {channels} channels with your own loop."
    )
