"""From a data configuration to the training and held-out images."""

from pathlib import Path
from typing import Any

import numpy as np
from timm.data import create_dataset

from widekernel.data.config import DataConfig
from widekernel.data.digits import load_digits
from widekernel.data.errors import DataError
from widekernel.data.sources import FolderSource, ImageSource, MappedSource, TarSource
from widekernel.errors import nearest

TORCHVISION_NAMES = (
    "torch/cifar10", "torch/cifar100", "torch/mnist", "torch/kmnist", "torch/fashion_mnist", "torch/places365",
    "torch/imagenet",
)  # fmt: skip
"""Map-style torchvision sets that timm opens by name."""

KNOWN_NAMES = ("folder", "digits", *TORCHVISION_NAMES)
STREAMED_PREFIXES = ("tfds", "wds", "hfids")


def open_split(config: DataConfig, split: str) -> ImageSource:
    """Open ``"train"`` or ``"val"`` of the configured data set.

    Raises:
        DataError: it does not exist, is empty, or cannot be indexed; the message says which and what to do.
    """
    if config.name == "digits":
        return load_digits()[0 if split == "train" else 1]
    part = config.train_split if split == "train" else config.val_split
    if config.name == "folder":
        return _open_files(config, part, f"data.{split}_split")
    return _open_named(config, part)


def open_train_and_val(config: DataConfig) -> tuple[ImageSource, ImageSource]:
    """Open both splits and check that they have the same classes in the same order.

    Raises:
        DataError: as ``open_split``, or the class names differ.
    """
    train, val = open_split(config, "train"), open_split(config, "val")
    if train.class_names != val.class_names:
        only_train = sorted(set(train.class_names) - set(val.class_names))
        only_val = sorted(set(val.class_names) - set(train.class_names))
        detail = [
            f"only in {part}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
            for part, names in (("training", only_train), ("validation", only_val))
            if names
        ]
        raise DataError(
            f"Training has {len(train.class_names)} classes and validation {len(val.class_names)} "
            f"({'; '.join(detail)}), but both must hold the same ones. Check data.train_split and data.val_split."
        )
    return train, val


def _open_files(config: DataConfig, part: str, key: str) -> ImageSource:
    if config.root is None and not Path(part).is_absolute():
        raise DataError(
            "data.root is not set. Give the folder that holds the images (--data.root DIR), "
            "or name a data set, for example --data.name digits."
        )
    root = Path(config.root or ".")
    if not root.exists():
        raise DataError(f"data.root is {str(root)!r}, which does not exist. Give the folder that holds the images.")
    if not root.is_dir():
        raise DataError(
            f"data.root is {str(root)!r}, which is not a folder. Give the folder, and name an archive "
            f"inside it by --{key} {root.name}."
        )
    for path in (root / part, root / f"{part}.tar"):
        if path.is_dir():
            return FolderSource(path)
        if path.is_file() and path.suffix == ".tar":
            return TarSource(path)
        if path.is_file():
            raise DataError(f"{path} is neither a folder nor an uncompressed .tar archive; unpack it first.")
    found = sorted(entry.name for entry in root.iterdir() if entry.is_dir() or entry.suffix == ".tar")
    hint = f"It holds: {', '.join(found[:8])}." if found else "It holds no folders and no .tar archives."
    raise DataError(
        f"{root / part} does not exist (nor {part}.tar beside it). {hint} Set --{key} to the one that holds the images."
    )


def _open_named(config: DataConfig, part: str) -> ImageSource:
    prefix, _, rest = config.name.partition("/")
    if prefix in STREAMED_PREFIXES:
        raise DataError(
            f"data.name is {config.name!r}, a streamed data set, but training indexes its images to resume exactly. "
            "Export it to image folders or tars, or use the indexable hfds/ form."
        )
    if not (config.name in TORCHVISION_NAMES or (prefix == "hfds" and rest)):
        raise DataError(
            f"data.name is {config.name!r}, which is no known data set.{nearest(config.name, KNOWN_NAMES)} "
            f"Known: {', '.join(KNOWN_NAMES)}, and hfds/<owner>/<name>."
        )
    if config.root is None and prefix == "torch":
        raise DataError(f"data.root is not set; give the folder where {config.name} is kept (--data.root DIR).")
    try:
        dataset = create_dataset(config.name, root=config.root, split=part, download=config.download)
    except ImportError as error:
        raise DataError(f"{config.name} needs a package that is not installed ({error}).") from error
    except (RuntimeError, FileNotFoundError, ValueError) as error:
        raise DataError(
            f"{config.name} cannot be opened in {config.root!r}: {error} If it is not there yet, add --data.download true."
        ) from error
    # timm's data set would replace an unreadable image by its neighbour without a word: its reader does not
    return MappedSource(getattr(dataset, "reader", dataset), _class_names(dataset), config.name)


def _class_names(dataset: Any) -> tuple[str, ...]:
    names = getattr(dataset, "classes", None)
    if names is not None:
        # ImageNet gives tuples of synonyms
        return tuple(name if isinstance(name, str) else name[0] for name in names)
    features = getattr(getattr(dataset.reader, "dataset", None), "features", {})
    for feature in features.values():
        if getattr(feature, "names", None):
            return tuple(feature.names)
    raise DataError(f"{type(dataset).__name__} does not say which classes it has; export it to image folders.")


def class_counts(source: ImageSource) -> np.ndarray | None:
    """Images per class where the source knows its labels without decoding, else ``None``."""
    targets = getattr(source, "targets", None)
    if targets is None and isinstance(source, FolderSource):
        targets = [target for _, target in source.samples]
    return None if targets is None else np.bincount(targets, minlength=len(source.class_names))
