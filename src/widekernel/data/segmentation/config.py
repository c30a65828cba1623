"""Settings of data sets for semantic segmentation."""

from dataclasses import dataclass
from typing import Literal

from widekernel.data.config import LoadingConfig
from widekernel.data.rescaling import Scale, require_scale
from widekernel.settings import require, require_whole

AUTO = "auto"
"""Name of a split that stands for the usual one of the format."""

_SPLITS = {"ade20k": ("training", "validation"), "cityscapes": ("train", "val"), "folder": ("train", "val")}

LARGEST_IGNORE_INDEX = 65535
"""Largest number that a pixel of a label file can hold."""


@dataclass(frozen=True)
class SegmentationDataConfig(LoadingConfig):
    """Settings of a data set with a class for every pixel, and of its preprocessing.

    Args:
        format: how the files lie in data.root: ade20k (images/SPLIT/*.jpg and annotations/SPLIT/*.png), cityscapes
            (leftImg8bit/SPLIT/CITY/*_leftImg8bit.png and gtFine/SPLIT/CITY/*_gtFine_labelTrainIds.png or *_labelIds.png), or
            folder (SPLIT/images/NAME.* and SPLIT/masks/NAME.png, whose pixels are class indices)
        root: folder of the data set
        train_split: training split; auto is the usual name: training for ade20k, otherwise train
        val_split: held-out (validation) split; auto is the usual name: validation for ade20k, otherwise val. Null means that
            there are no held-out images, so nothing is evaluated
        classes: file with the names of the classes, in the order of their indices: one in each line, or JSON with a list or
            with `classes` and `palette`. Null means those of ade20k and cityscapes, and classes.json or classes.txt in
            data.root for folder
        ignore_index: pixels with this number in the labels count nowhere
        reduce_zero_label: labels count from 1, and 0 means no class; null means true for ade20k only
        image_scale: lengths of the long and of the short side that an image must not exceed; its ratio is kept
        ratio_range: smallest and largest factor of image_scale, drawn for each training image
        crop_size: height and width of the random crop of training
        cat_max_ratio: a crop is drawn again, up to ten times, while one class covers this share of its labeled pixels or
            more; 1 takes the first crop
        flip: probability of a horizontal flip
        photometric: change brightness, contrast, saturation and hue of training images at random
        test_scale: image_scale of evaluation; null means the same
        test_ratios: factors of test_scale, at each of which every image is evaluated
    """

    format: Literal["ade20k", "cityscapes", "folder"] = "folder"
    root: str | None = None
    train_split: str = AUTO
    val_split: str | None = AUTO
    classes: str | None = None
    ignore_index: int = 255
    reduce_zero_label: bool | None = None
    image_scale: Scale = (2048, 512)
    ratio_range: tuple[float, float] = (0.5, 2.0)
    crop_size: int = 512
    cat_max_ratio: float = 0.75
    flip: float = 0.5
    photometric: bool = True
    test_scale: Scale | None = None
    test_ratios: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        super().__post_init__()
        ok = isinstance(self.ignore_index, int) and 0 <= self.ignore_index <= LARGEST_IGNORE_INDEX
        require(ok, "data.ignore_index", self.ignore_index, f"a whole number from 0 to {LARGEST_IGNORE_INDEX}")
        require_scale("data.image_scale", self.image_scale)
        if self.test_scale is not None:
            require_scale("data.test_scale", self.test_scale)
        ok = len(self.ratio_range) == 2 and 0 < self.ratio_range[0] <= self.ratio_range[1]
        require(ok, "data.ratio_range", self.ratio_range, "two numbers with 0 < low <= high")
        require_whole("data.crop_size", self.crop_size, 1)
        require(0 < self.cat_max_ratio <= 1, "data.cat_max_ratio", self.cat_max_ratio, "above 0 and at most 1")
        require(0 <= self.flip <= 1, "data.flip", self.flip, "a probability from 0 to 1")
        ok = bool(self.test_ratios) and min(self.test_ratios) > 0
        require(ok, "data.test_ratios", self.test_ratios, "one or more positive numbers")

    @property
    def reduces_zero_label(self) -> bool:
        """Whether labels count from 1, and 0 means no class."""
        return self.format == "ade20k" if self.reduce_zero_label is None else self.reduce_zero_label

    def split(self, part: Literal["train", "val"]) -> str | None:
        """Return the name of the training or held-out split, or `None` if there is no held-out one."""
        name = self.train_split if part == "train" else self.val_split
        return _SPLITS[self.format][part == "val"] if name == AUTO else name
