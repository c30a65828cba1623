"""Transforms from an image to an input tensor, in training and in evaluation."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.auto_augment import posterize
from timm.data.transforms import CenterCropOrPad, RandomCropOrPad, ResizeKeepRatio
from torch import Tensor
from torchvision.transforms import Compose, InterpolationMode, v2

from widekernel.data.config import AugmentConfig, DataConfig
from widekernel.errors import ConfigError

ImageTransform = Callable[[Image.Image], Tensor]

WARP_FROM = 384
"""Smallest input size at which evaluation warps the whole image to the square instead of cropping its center."""

DEFAULT_CROP = 0.875
"""Share of the resized image that the center crop keeps, as in the published recipes: 224 of 256 pixels."""

TRIVIAL_AUGMENT = "ta_wide"
"""Name of torchvision's TrivialAugment, as in its own training script."""

MOST_ELONGATED = 64
"""Largest ratio of the long side to the short side in evaluation; only the middle of longer images is used."""


@dataclass(frozen=True)
class Preprocessing:
    """Settings that turn an image into a `(3, size, size)` tensor; saved with every model.

    Args:
        input_size: height and width in pixels
        mean: subtracted per channel, on the scale 0 to 1
        std: divided by per channel
        interpolation: resampling in evaluation
        crop_pct: input size divided by the size that the short side is resized to; 1.0 if the image is warped
        warp: warp the whole image to the square instead of cropping its center
    """

    input_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    crop_pct: float
    warp: bool = False

    @classmethod
    def resolve(cls, config: DataConfig, model_cfg: dict[str, Any]) -> "Preprocessing":
        """Return the settings of `config`, completed by a timm `pretrained_cfg` and the default crop."""
        size = config.input_size or _square(model_cfg.get("input_size") or (3, 224, 224))
        crop_pct, warp = _crop(config, size)
        return cls(
            input_size=size,
            mean=_triple(config.mean or model_cfg.get("mean") or IMAGENET_DEFAULT_MEAN),
            std=_triple(config.std or model_cfg.get("std") or IMAGENET_DEFAULT_STD),
            interpolation=config.interpolation or "bicubic",
            crop_pct=crop_pct,
            warp=warp,
        )

    def overridden_by(self, config: DataConfig) -> "Preprocessing":
        """Return these settings, overridden by those of `config`; another input size has its own default crop."""
        size = config.input_size or self.input_size
        keeps_crop = size == self.input_size and config.crop_pct is None and config.test_crop is None
        crop_pct, warp = (self.crop_pct, self.warp) if keeps_crop else _crop(config, size)
        return Preprocessing(
            input_size=size,
            mean=_triple(config.mean or self.mean),
            std=_triple(config.std or self.std),
            interpolation=config.interpolation or self.interpolation,
            crop_pct=crop_pct,
            warp=warp,
        )

    def warped(self, size: int) -> "Preprocessing":
        """Return these settings for images that are warped to `size` × `size` pixels."""
        return replace(self, input_size=size, crop_pct=1.0, warp=True, interpolation="bicubic")

    def unusual_crop(self) -> Literal["center", "warp"] | None:
        """Return the setting data.test_crop that these settings need, or `None` if they follow from size and crop_pct."""
        usual = self.input_size >= WARP_FROM and self.crop_pct == 1.0
        return None if self.warp == usual else "warp" if self.warp else "center"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Preprocessing":
        """Rebuild the settings from the JSON form that `dataclasses.asdict` returns."""
        return cls(
            input_size=int(values["input_size"]),
            mean=_triple(values["mean"]),
            std=_triple(values["std"]),
            interpolation=str(values["interpolation"]),
            crop_pct=float(values["crop_pct"]),
            # Version 0.6 and earlier did not store it.
            warp=bool(values.get("warp", int(values["input_size"]) >= WARP_FROM and float(values["crop_pct"]) == 1.0)),
        )

    def eval_transform(self) -> ImageTransform:
        """Return the deterministic transform of evaluation.

        If the long side of an image is more than `MOST_ELONGATED` times the short one, only the middle is resized: the
        center crop keeps nothing else, and resizing the whole image would take memory without bound.
        """
        transform = create_transform(
            self.input_size,
            is_training=False,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
            crop_mode="squash" if self.warp else "center",
        )
        if not self.warp:
            transform.transforms.insert(0, crop_elongated)
        return transform

    def train_transform(self, augment: AugmentConfig) -> ImageTransform:
        """Return the random transform of training, which draws from the global generators.

        Raises:
            ConfigError: timm does not know the auto-augment policy.
        """
        trivial = augment.auto_augment == TRIVIAL_AUGMENT
        try:
            cropped, changed, final = create_transform(
                self.input_size,
                is_training=True,
                scale=augment.crop_scale,
                ratio=augment.crop_ratio,
                hflip=augment.hflip,
                color_jitter=augment.color_jitter,  # strength 0 changes nothing
                auto_augment=None if trivial else augment.auto_augment,
                interpolation=augment.interpolation,
                mean=self.mean,
                std=self.std,
                re_prob=augment.erase_prob,
                re_mode="pixel",
                separate=True,
            )
        except (AssertionError, KeyError, ValueError) as error:
            raise ConfigError(
                f"augment.auto_augment is {augment.auto_augment!r}, which timm refuses ({error}). "
                f"Use a policy such as rand-m9-mstd0.5-inc1, augmix-m5-w4-d2 or {TRIVIAL_AUGMENT}, or null."
            ) from error
        steps = list(cropped.transforms)
        if augment.train_crop != "random_resized":
            steps[:1] = self._crop_of_fixed_size(augment)
        policy = [v2.TrivialAugmentWide(interpolation=_for_policies(augment))] if trivial else changed.transforms
        transform = Compose([*steps, *policy, *final.transforms])
        _allow_posterize_to_nothing(transform)
        return transform

    def _crop_of_fixed_size(self, augment: AugmentConfig) -> list[Any]:
        """Return the steps that resize the short side as in evaluation, and take a crop of the input's size."""
        crop = CenterCropOrPad if augment.train_crop == "center" else RandomCropOrPad
        resize = ResizeKeepRatio(math.floor(self.input_size / self.crop_pct), interpolation=augment.interpolation)
        return [crop_elongated, resize, crop(self.input_size)]


def crop_elongated(image: Image.Image) -> Image.Image:
    """Return the middle of an image that is longer than `MOST_ELONGATED` times its short side, or the image itself."""
    width, height = image.size
    most = MOST_ELONGATED * min(width, height)
    left, top = max(0, width - most) // 2, max(0, height - most) // 2
    return image.crop((left, top, width - left, height - top)) if left or top else image


def _for_policies(augment: AugmentConfig) -> InterpolationMode:
    """Return the resampling of rotated and sheared images; the random choice of the crop does not apply to them."""
    known = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}
    return known.get(augment.interpolation, InterpolationMode.NEAREST)


def _allow_posterize_to_nothing(transform: Any) -> None:
    """Make timm's policies accept posterizing to 0 bits (a black image), as in published recipes at full magnitude.

    Recent versions of Pillow refuse 0 bits; earlier ones returned a black image.
    """
    for step in transform.transforms:
        operations = getattr(step, "ops", None) or [op for part in getattr(step, "policy", ()) for op in part]
        for operation in operations:
            if getattr(operation, "aug_fn", None) is posterize:
                operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
    return Image.new(image.mode, image.size) if bits_to_keep < 1 else posterize(image, bits_to_keep, **options)


def _crop(config: DataConfig, size: int) -> tuple[float, bool]:
    """Return the share that the center crop keeps, and whether the image is warped instead, for inputs of `size` pixels."""
    by_size = size >= WARP_FROM and config.crop_pct in (None, 1.0)
    warp = by_size if config.test_crop is None else config.test_crop == "warp"
    return config.crop_pct or (1.0 if warp else DEFAULT_CROP), warp


def _square(input_size: tuple[int, ...]) -> int:
    _, height, width = input_size
    if height != width:
        raise ConfigError(f"The model's input is {height}×{width}; set data.input_size to train on square images.")
    return int(height)


def _triple(values: Any) -> tuple[float, float, float]:
    first, second, third = (float(value) for value in values)
    return first, second, third
