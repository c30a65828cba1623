"""From a data configuration to the training and held-out images."""

import pickle
import urllib.error
from pathlib import Path
from typing import Any

from timm.data import create_dataset

from widekernel.data.config import DataConfig
from widekernel.data.digits import load_digits
from widekernel.data.errors import DataError
from widekernel.data.sources import FolderSource, ImageSource, MappedSource, TarSource
from widekernel.data.torchvision_sets import class_names, known_names, open_torchvision
from widekernel.errors import nearest

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
    torchvision = known_names()
    if not (config.name in torchvision or (prefix == "hfds" and rest)):
        known = ("folder", "digits", *torchvision)
        raise DataError(
            f"data.name is {config.name!r}, which is no known data set.{nearest(config.name, known)} "
            f"Known: {', '.join(known)}, and hfds/<owner>/<name>."
        )
    if config.root is None and prefix == "torch":
        raise DataError(f"data.root is not set; give the folder where {config.name} is kept (--data.root DIR).")
    dataset = _open(config, part)
    # timm's data set would replace an unreadable image by its neighbour without a word: its reader does not
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
