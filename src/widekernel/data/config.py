"""Settings of data sets, preprocessing and augmentation."""

import os
from dataclasses import dataclass
from typing import Any, Literal

from widekernel.errors import ConfigError
from widekernel.settings import require, require_finite, require_literals, require_one_of

_RESAMPLING = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")


def processors() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _require_statistics(key: str, values: Any, ok: bool, rule: str) -> None:
    """Raise unless `values` is `None`, or holds three numbers and `ok` is true; `rule` says what was tested."""
    require(values is None or len(values) == 3, key, values, "three numbers, or null")
    if not ok:
        raise ConfigError(f"{key} is {values!r}, but must be {rule}: pixels are scaled to 0..1, so divide by 255.")


@dataclass(frozen=True, kw_only=True)
class LoadingConfig:
    """Settings that the data of all tasks share: normalization, and the processes that load images.

    Args:
        mean: channel means, for pixels from 0 to 1; null uses the model's own
        std: channel standard deviations, for pixels from 0 to 1; null uses the model's own
        exif_transpose: turn images as their EXIF orientation says; published ImageNet results were obtained without
        workers: number of processes that decode images; 0 decodes in the training process. The default is 4, or the number
            of processors if that is smaller
        max_unreadable: stop once more than this many different images cannot be decoded
        timeout: seconds after which a process that is still loading the same image counts as hung
        worker_restarts: how often the processes that decode images are started again, at the exact batch, after one of them
            died or hung; then the run stops
    """

    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    exif_transpose: bool = False
    workers: int = min(4, processors())
    max_unreadable: int = 100
    timeout: float = 120.0
    worker_restarts: int = 2

    def __post_init__(self) -> None:
        require_finite(self, "data")
        require_literals(self, "data")
        require(self.workers >= 0, "data.workers", self.workers, "0 or more")
        require(self.max_unreadable >= 0, "data.max_unreadable", self.max_unreadable, "0 or more")
        require(self.timeout > 0, "data.timeout", self.timeout, "positive")
        require(self.worker_restarts >= 0, "data.worker_restarts", self.worker_restarts, "0 or more")
        mean, std = self.mean or (0.0,), self.std or (1.0,)
        _require_statistics("data.mean", self.mean, min(mean) >= 0 and max(mean) <= 1, "three numbers from 0 to 1")
        _require_statistics("data.std", self.std, min(std) > 0 and max(std) <= 1, "three numbers above 0 and at most 1")


@dataclass(frozen=True)
class DataConfig(LoadingConfig):
    """Settings of the data set and of its preprocessing.

    Args:
        name: data set: folder (image folders, tar archives or shards below data.root), digits (scikit-learn's 8×8 digits),
            torch/NAME for a data set of torchvision, such as torch/cifar10 or torch/flowers102, or hfds/OWNER/NAME for one
            of the Hugging Face hub
        root: folder that contains the splits; for named data sets, the folder where they are stored
        train_split: training split: a folder or a .tar archive below data.root, the shards of a webdataset, such as
            train-{000..127}.tar or train-*.tar, or the name of a split of a named data set
        val_split: held-out (validation) split, in the same form; null means that there are no held-out images, so nothing
            is evaluated
        class_map: outputs, for the classes of the data, of a classifier that knows more classes: imagenet-22k, or another
            list of timm's ImageNetInfo that names its outputs, or a file with the number of an output in each line, one for
            every class (-1: none). Evaluation then compares these outputs only, and fine-tuning starts from them
        download: download the named data set into data.root
        input_size: height and width of the network's input in pixels; null uses the model's own
        interpolation: resampling in evaluation: nearest, bilinear, bicubic, lanczos, box or hamming; null means bicubic
        crop_pct: share of the resized image that the center crop keeps in evaluation; null means 0.875
        test_crop: how evaluation makes an image square: by its center crop (center), or by warping all of it (warp); null
            crops for inputs below 384 pixels or if crop_pct is below 1, and otherwise warps
    """

    name: str = "folder"
    root: str | None = None
    train_split: str = "train"
    val_split: str | None = "val"
    class_map: str | None = None
    download: bool = False
    input_size: int | None = None
    interpolation: str | None = None
    crop_pct: float | None = None
    test_crop: Literal["center", "warp"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.input_size is None or self.input_size > 0, "data.input_size", self.input_size, "positive")
        require(self.crop_pct is None or 0 < self.crop_pct <= 1, "data.crop_pct", self.crop_pct, "above 0 and at most 1")
        if self.test_crop == "warp" and self.crop_pct not in (None, 1.0):
            raise ConfigError(f"data.crop_pct is {self.crop_pct}, but data.test_crop 'warp' crops nothing: leave one out.")
        if self.interpolation is not None:
            require_one_of("data.interpolation", self.interpolation, _RESAMPLING)


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes to training images (timm's transforms) and mixing of batches (timm's Mixup).

    Args:
        crop_scale: smallest and largest area of a random_resized crop, as shares of the image's area
        crop_ratio: smallest and largest aspect ratio of a random_resized crop
        hflip: probability of a horizontal flip
        color_jitter: strength of brightness, contrast and saturation jitter; not used together with auto_augment
        auto_augment: auto-augment policy: one of timm, such as rand-m9-mstd0.5-inc1, augmix-m5-w4-d2 (AugMix) or original,
            or torchvision's TrivialAugment (ta_wide); null means none
        interpolation: resampling in training: random, bilinear or bicubic
        erase_prob: probability of random erasing (timm's pixel mode)
        mixup: alpha of mixup; 0 turns it off
        cutmix: alpha of cutmix; 0 turns it off
        mix_prob: probability that a batch is mixed
        switch_prob: probability of cutmix rather than mixup when both are on
        train_crop: part of the image: of random size and aspect ratio, resized to the input (random_resized), or of the
            input's size, from a random place (random) or the middle (center) of the image, whose short side is resized as in
            evaluation
        repeats: repeated augmentation: how often each image occurs, each time changed anew, in an epoch of the same length,
            which therefore takes only that fraction of the images
    """

    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (0.75, 1.3333333333333333)
    hflip: float = 0.5
    color_jitter: float = 0.4
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    interpolation: str = "bicubic"
    erase_prob: float = 0.25
    mixup: float = 0.8
    cutmix: float = 1.0
    mix_prob: float = 1.0
    switch_prob: float = 0.5
    train_crop: Literal["random_resized", "random", "center"] = "random_resized"
    repeats: int = 1

    def __post_init__(self) -> None:
        require_finite(self, "augment")
        require_literals(self, "augment")
        require(self.repeats >= 1, "augment.repeats", self.repeats, "1 or more")
        low, high = self.crop_scale
        require(0 < low <= high <= 1, "augment.crop_scale", self.crop_scale, "two numbers with 0 < low <= high <= 1")
        low, high = self.crop_ratio
        require(0 < low <= high, "augment.crop_ratio", self.crop_ratio, "two numbers with 0 < low <= high")
        for key in ("hflip", "erase_prob", "mix_prob", "switch_prob"):
            require(0 <= getattr(self, key) <= 1, f"augment.{key}", getattr(self, key), "a probability from 0 to 1")
        for key in ("color_jitter", "mixup", "cutmix"):
            require(getattr(self, key) >= 0, f"augment.{key}", getattr(self, key), "0 or more")
        require_one_of("augment.interpolation", self.interpolation, ("random", "bilinear", "bicubic"))

    @property
    def mixes(self) -> bool:
        """Whether any batch is mixed."""
        return self.mix_prob > 0 and (self.mixup > 0 or self.cutmix > 0)
