"""Opening of the training and held-out images that a configuration describes."""

import pickle
import urllib.error
from dataclasses import replace
from pathlib import Path
from typing import Any

from timm.data import create_dataset

from widekernel.data.class_checks import refuse_one_class
from widekernel.data.config import DataConfig
from widekernel.data.digits import load_digits
from widekernel.data.formats import brief
from widekernel.data.paths import expand_path
from widekernel.data.sources import FileSource, ImageSource, MappedSource
from widekernel.data.split_files import deeper_hint, open_files
from widekernel.data.torchvision_sets import class_names, known_names, open_torchvision
from widekernel.errors import ConfigError, DataError, nearest

STREAMED_PREFIXES = ("tfds", "wds", "hfids")


def open_split(config: DataConfig, split: str) -> ImageSource:
    """Open `"train"` or `"val"` of the configured data set.

    Raises:
        ConfigError: a variable in a path is not set, or there is no held-out split.
        DataError: the split does not exist, is empty, or cannot be indexed.
    """
    part = config.train_split if split == "train" else config.val_split
    if part is None:
        raise ConfigError("data.val_split is null, so there are no held-out images: name them (--data.val_split val).")
    if config.name == "digits":
        digits = load_digits()[0 if split == "train" else 1]
        if config.root is not None:
            digits.notes += (f"data.root ({config.root}) has no effect: data.name is 'digits', part of scikit-learn.",)
        return digits
    source = open_files(config, part, f"data.{split}_split") if config.name == "folder" else _open_named(config, part)
    source.exif_transpose = config.exif_transpose
    return source


def open_train_and_val(config: DataConfig) -> tuple[ImageSource, ImageSource | None]:
    """Open both splits, and check that they have the same two or more classes in the same order.

    Without held-out images (data.val_split null), the second is `None`.

    Raises:
        DataError: a split cannot be opened, the class names differ, or there is only one class.
    """
    train = open_split(config, "train")
    val = None if config.val_split is None else open_split(config, "val")
    if val is not None and train.class_names != val.class_names:
        only_train = sorted(set(train.class_names) - set(val.class_names))
        only_val = sorted(set(val.class_names) - set(train.class_names))
        detail = [
            f"only in {part}: {brief(names)}"
            for part, names in (("training", only_train), ("validation", only_val))
            if names
        ]
        raise DataError(
            f"Training has {len(train.class_names)} classes and validation {len(val.class_names)} "
            f"({'; '.join(detail)}), but both must have the same ones. Check data.train_split and data.val_split."
        )
    if isinstance(train, FileSource):
        fix = deeper_hint(train, config.train_split, "data.train_split")
        refuse_one_class(str(train.path), train.class_names, f"Add images of other classes. {fix}")
        if isinstance(val, FileSource):
            train.notes += _shared_files(train, val)
    else:
        refuse_one_class(config.name, train.class_names, "Choose a data set with several classes.")
    return train, val


def _shared_files(train: FileSource, val: FileSource) -> tuple[str, ...]:
    """Return a note if held-out images are training images."""
    ours, theirs = ({_identity(file) for file in source.files()} for source in (train, val))
    both = len(ours & theirs)
    if not both:
        return ()
    which = "the held-out images" if both == len(theirs) else f"{both:,} of {len(theirs):,} shards of the held-out images"
    return (f"{train.path}: {which} are the training images, so accuracy says nothing new.",)


def _identity(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_dev, status.st_ino


def _open_named(config: DataConfig, part: str) -> ImageSource:
    prefix, _, rest = config.name.partition("/")
    if prefix in STREAMED_PREFIXES:
        raise DataError(
            f"data.name is {config.name!r}, a streamed data set, but training indexes its images to resume exactly. "
            "Export it to image folders or tars, or use the indexable hfds/ form."
        )
    torchvision = known_names()
    if not (config.name in torchvision or (prefix == "hfds" and rest)):
        known = ("folder", "digits", *torchvision)
        raise DataError(
            f"data.name is {config.name!r}, which is not a known data set.{nearest(config.name, known)} "
            f"Known: {', '.join(known)}, and hfds/<owner>/<name>."
        )
    if config.root is None and prefix == "torch":
        raise DataError(f"data.root is not set; give the folder where {config.name} is stored (--data.root DIR).")
    if config.root is not None:
        config = replace(config, root=expand_path("data.root", config.root))
    dataset = _open(config, part)
    # timm's data set silently replaces an unreadable image by the next one; its reader does not.
    return MappedSource(getattr(dataset, "reader", dataset), _class_names(dataset), config.name)


def _open(config: DataConfig, part: str) -> Any:
    try:
        if config.name.startswith("torch/"):
            return open_torchvision(config, part)
        return create_dataset(config.name, root=config.root, split=part, download=config.download)
    except ImportError as error:
        raise DataError(f"{config.name} needs a package that is not installed ({error}).") from error
    except DataError:
        raise
    except urllib.error.URLError as error:
        raise DataError(f"{config.name} cannot be downloaded ({error.reason}). Check the network connection.") from error
    except (OSError, RuntimeError, ValueError, LookupError, EOFError, AssertionError, pickle.UnpicklingError) as error:
        hint = " If it is not there yet, add --data.download true." if not config.download else ""
        reason = str(error) or type(error).__name__
        raise DataError(
            f"The split {part!r} of {config.name} cannot be opened in {config.root!r}: {reason}{hint}"
        ) from error


def _class_names(dataset: Any) -> tuple[str, ...]:
    names = class_names(dataset)
    if names is not None:
        return names
    features = getattr(getattr(getattr(dataset, "reader", None), "dataset", None), "features", {})
    for feature in features.values():
        if getattr(feature, "names", None):
            return tuple(feature.names)
    raise DataError(f"{type(dataset).__name__} does not say which classes it has; export it to image folders.")
