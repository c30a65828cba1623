"""How many channels a network's images have, and images of that many channels."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image
from torch import Tensor, nn

from widekernel.data.preprocess import ImageTransform
from widekernel.errors import ConfigError
from widekernel.tasks.assembly import pretrained_cfg

RGB = 3


def input_channels(model: nn.Module) -> int:
    """Channels of the images that `model` takes: what it says, else those of its first convolution, else three."""
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
    """A transform to one channel: of the grey image, the mean of what `transform` makes of its three equal channels.

    Args:
        transform: from an RGB image to a tensor `(3, height, width)`
    """

    transform: ImageTransform

    def __call__(self, image: Image.Image) -> Tensor:
        """Give a tensor `(1, height, width)`."""
        return self.transform(image.convert("L").convert("RGB")).mean(0, keepdim=True)


def match_channels(transform: ImageTransform, channels: int) -> ImageTransform:
    """Let `transform`, from RGB images to tensors of three channels, give those that a network takes.

    Raises:
        ConfigError: it takes neither one nor three.
    """
    if channels == RGB:
        return transform
    if channels == 1:
        return ToGray(transform)
    raise ConfigError(
        f"The network takes images of {channels} channels (in_chans), but images are read with {RGB}, or 1 when grey. "
        f"Set in_chans to {RGB} or 1, or train on images of {channels} channels with a loop of your own."
    )
