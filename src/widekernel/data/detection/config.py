"""Settings of data sets for object detection and instance segmentation."""

from dataclasses import dataclass
from typing import Literal

from widekernel.data.config import LoadingConfig
from widekernel.data.rescaling import Scale, require_scale
from widekernel.errors import ConfigError
from widekernel.settings import require, require_whole

AUTO = "auto"
"""Name of a split that stands for the usual one of the format."""

_SPLITS = {"coco": ("train2017", "val2017"), "coco_json": ("train.json", "val.json")}


@dataclass(frozen=True)
class DetectionDataConfig(LoadingConfig):
    """Settings of a data set with boxes, classes and perhaps masks, and of its preprocessing.

    Args:
        format: how the files lie in data.root: coco (SPLIT/*.jpg and annotations/instances_SPLIT.json), or coco_json (splits
            are annotation files in the form of COCO)
        root: folder of the data set
        train_split: training split: a name for coco, an annotation file below data.root for coco_json; auto is train2017 or
            train.json
        val_split: held-out (validation) split, in the same form; auto is val2017 or val.json. Null means that there are no
            held-out images, so nothing is evaluated
        images: folder below data.root to which the file names in annotation files of coco_json are relative; null means the
            folder of the annotation file
        masks: load masks, for detectors that predict them
        image_scale: lengths of the long and of the short side that an image must not exceed in evaluation; its ratio is kept
        short_sides: lengths of the short side in training, of which one is drawn for each image; the long side is at most
            the first number of image_scale
        crop: crop half of the training images at random before they are resized
        crop_short_sides: lengths of the short side before the crop, of which one is drawn
        crop_range: smallest and largest height and width of the crop, as far as the image allows
        flip: probability of a horizontal flip
        min_size: training images with a shorter side are left out
        skip_empty: leave out training images without any object
        size_divisor: height and width of a batch are padded to multiples of this number
        group_by_shape: put landscape and portrait images into different training batches
    """

    format: Literal["coco", "coco_json"] = "coco"
    root: str | None = None
    train_split: str = AUTO
    val_split: str | None = AUTO
    images: str | None = None
    masks: bool = True
    image_scale: Scale = (1333, 800)
    short_sides: tuple[int, ...] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    crop: bool = True
    crop_short_sides: tuple[int, ...] = (400, 500, 600)
    crop_range: tuple[int, int] = (384, 600)
    flip: float = 0.5
    min_size: int = 32
    skip_empty: bool = True
    size_divisor: int = 32
    group_by_shape: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_scale("data.image_scale", self.image_scale)
        for key in ("short_sides", "crop_short_sides"):
            value = getattr(self, key)
            ok = bool(value) and all(type(length) is int and length >= 1 for length in value)
            require(ok, f"data.{key}", value, "one or more whole numbers, at least 1")
        low, high = self.crop_range if len(self.crop_range) == 2 else (0, 0)
        require(1 <= low <= high, "data.crop_range", self.crop_range, "two whole numbers with 1 <= low <= high")
        require(0 <= self.flip <= 1, "data.flip", self.flip, "a probability from 0 to 1")
        require_whole("data.min_size", self.min_size, 0)
        require_whole("data.size_divisor", self.size_divisor, 1)
        if self.images is not None and self.format != "coco_json":
            raise ConfigError(
                f"data.images is {self.images!r}, but data.format is {self.format!r}, whose images lie in the folder of the "
                "split: leave it out, or set data.format to coco_json."
            )

    def split(self, part: Literal["train", "val"]) -> str | None:
        """Return the name of the training or held-out split, or `None` if there is no held-out one."""
        name = self.train_split if part == "train" else self.val_split
        return _SPLITS[self.format][part == "val"] if name == AUTO else name
