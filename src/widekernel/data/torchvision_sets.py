"""Classification data sets of torchvision by name: those that timm opens, and all others that have splits."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
from timm.data import create_dataset
from torchvision import datasets

from widekernel.data.config import DataConfig
from widekernel.errors import DataError

TIMM_NAMES = (
    "cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist", "places365", "imagenet", "inaturalist", "inat",
)  # fmt: skip
"""Names of map-style torchvision data sets that timm opens; it knows the names of their splits."""

_NO_CLASSIFICATION = {"CelebA", "Cityscapes", "Kitti", "LFWPairs", "LFWPeople", "WIDERFace"}
_TRAIN = ("train", "training")


def known_names() -> tuple[str, ...]:
    """Return all names that `open_torchvision` takes, with their prefix `torch/`."""
    return tuple(f"torch/{name}" for name in (*TIMM_NAMES, *(name for name in _classes() if name not in TIMM_NAMES)))


def open_torchvision(config: DataConfig, part: str) -> Any:
    """Open the split `part` of the data set `config.name`; errors of torchvision are passed on.

    Raises:
        DataError: a download is requested, but the data set does not support it.
    """
    name = config.name.partition("/")[2]
    if name in TIMM_NAMES:
        return create_dataset(config.name, root=config.root, split=part, download=config.download)
    kind = _classes()[name]
    parameters = inspect.signature(kind).parameters
    options: dict[str, Any] = {"split": part} if "split" in parameters else {"train": part in _TRAIN}
    if "download" in parameters:
        options["download"] = config.download
    elif config.download:
        raise DataError(
            f"{config.name} cannot be downloaded automatically: see torchvision's documentation of {kind.__name__}."
        )
    return kind(config.root, **options)


def class_names(dataset: Any) -> tuple[str, ...] | None:
    """Return the class names of a torchvision data set, numbers if it has only labels, or `None` if it has neither."""
    for attribute in ("classes", "categories", "all_categories"):
        names = getattr(dataset, attribute, None)
        if names is not None:
            # ImageNet has tuples of synonyms.
            return tuple(name if isinstance(name, str) else name[0] for name in names)
    for attribute in ("targets", "labels", "_labels"):
        labels = getattr(dataset, attribute, None)
        if labels is not None:
            return tuple(str(number) for number in range(int(np.max(labels)) + 1))
    return None


def _classes() -> dict[str, Callable[..., Any]]:
    """Return the data sets that have a root, splits and one class per image, by name in lower case."""
    found: dict[str, Callable[..., Any]] = {}
    for name in datasets.__all__:
        kind = getattr(datasets, name)
        if name in _NO_CLASSIFICATION or not inspect.isclass(kind):
            continue
        parameters = inspect.signature(kind).parameters
        required = {
            key for key, value in parameters.items() if value.default is value.empty and value.kind != value.VAR_KEYWORD
        }
        if required == {"root"} and "target_transform" in parameters and {"split", "train"} & set(parameters):
            found[name.lower()] = kind
    return found
