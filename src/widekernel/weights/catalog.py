"""The catalog of the published checkpoints: `checkpoints.json`, which was collected from the authors' repositories.

Nothing was downloaded for it: the layouts follow from the authors' code that reads or writes the files.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Any, Literal
from urllib.parse import urlsplit

from widekernel.errors import CheckpointError, nearest

Task = Literal["classification", "segmentation", "detection"]
Kind = Literal["url", "huggingface", "google_drive", "by_hand"]

_NAME = re.compile(r"[a-z][\w]*\.\w+")


@dataclass(frozen=True)
class Source:
    """A place where a checkpoint can be fetched.

    Attributes:
        kind: "url" for a plain download; "by_hand" for a page that needs a browser.
        url: address of the file, or of the page with it.
        repo: repository on Hugging Face.
        file: name of the file in that repository.
        id: identifier of the file on Google Drive.
        sha256: first digits of the SHA-256 digest, if the publisher states them.
        layout: layout of the weights, if this copy has another one than the authors' file.
        note: what kind of copy it is, or "".
    """

    kind: Kind
    url: str = ""
    repo: str = ""
    file: str = ""
    id: str = ""
    sha256: str = ""
    layout: str = ""
    note: str = ""

    @property
    def link(self) -> str:
        """Address of the file, or of the page with it, for a browser.

        As in Hugging Face's own library, the environment variable HF_ENDPOINT names a mirror of Hugging Face.
        """
        if self.kind == "google_drive":
            return f"https://drive.google.com/file/d/{self.id}/view"
        if self.kind == "huggingface":
            endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
            return f"{endpoint.rstrip('/')}/{self.repo}/resolve/main/{self.file}"
        return self.url

    @property
    def place(self) -> str:
        """Short name for a table: "Google Drive", "Hugging Face", or the name of the host."""
        names = {"google_drive": "Google Drive", "huggingface": "Hugging Face"}
        return names.get(self.kind) or (urlsplit(self.url).hostname or "")

    @property
    def suffix(self) -> str:
        """Suffix of the file's name: ".pth" or ".safetensors"."""
        return ".safetensors" if f"{self.file}{self.url}".endswith(".safetensors") else ".pth"


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint.

    Attributes:
        name: name of the network and tag, as in timm: "replknet_31b.in22k_ft_in1k_384".
        title: name of the network in the authors' table.
        task: what the network in the file does. The networks of other tasks contain ours as their backbone.
        pretraining: data of the pre-training, or None.
        data: data of the training after that, or None if the file is of the pre-training.
        resolution: size of the images in pixels, "224" or "1280x800"; None if not stated.
        classes: number of classes; None if not stated.
        metrics: published results in percent, such as `{"top1": 83.5}`.
        params: published number of parameters in millions, or None.
        macs: published multiply-accumulates in billions, or None.
        layout: layout of the weights, as in `LoadReport.layout`.
        preprocessing: `mean`, `std`, `interpolation`, `crop_pct` and `crop_mode`, as in timm.
        license: license of the weights.
        origin: the authors' repository.
        sources: where the file is, the best place first.
        arguments: arguments of `timm.create_model` besides the name.
        arguments_by_key: arguments that apply if a key of the file matches: pattern -> arguments.
        timm: whether timm has the network and the weights under the same name.
        note: what else to know, or "".
    """

    name: str
    title: str
    task: Task
    pretraining: str | None
    data: str | None
    resolution: str | None
    classes: int | None
    metrics: Mapping[str, float]
    params: float | None
    macs: float | None
    layout: str
    preprocessing: Mapping[str, Any]
    license: str
    origin: str
    sources: tuple[Source, ...]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    arguments_by_key: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    timm: bool = False
    note: str = ""

    @property
    def model(self) -> str:
        """Name of the network: "replknet_31b"."""
        return self.name.partition(".")[0]

    @property
    def tag(self) -> str:
        """Name of the weights: "in22k_ft_in1k_384"."""
        return self.name.partition(".")[2]

    @property
    def training_data(self) -> str:
        """All training data in their order: "ImageNet-22K → ImageNet-1K"."""
        return " → ".join(data for data in (self.pretraining, self.data) if data)

    def image_size(self) -> int | None:
        """Return the side of the images of a classifier in pixels; None if it is not stated."""
        return int(self.resolution) if self.resolution and self.resolution.isdigit() else None


@cache
def _catalog() -> Mapping[str, Checkpoint]:
    content = json.loads(resources.files(__package__).joinpath("checkpoints.json").read_text(encoding="utf-8"))
    found = {}
    prepared = {
        name: {key: tuple(value) if isinstance(value, list) else value for key, value in how.items()}
        for name, how in content["preprocessing"].items()
    }
    for entry in content["checkpoints"]:
        found[entry["name"]] = Checkpoint(
            **{
                **entry,
                "preprocessing": prepared[entry["preprocessing"]],
                "sources": tuple(Source(**source) for source in entry["sources"]),
            }
        )
    return MappingProxyType(found)


def list_checkpoints(model: str = "*", task: Task | None = None) -> list[Checkpoint]:
    """Return the published checkpoints, in the order of the authors' tables.

    Args:
        model: shell pattern of the network's name, or of the full name.
        task: only those of this task.
    """
    return [
        each
        for each in _catalog().values()
        if task in (None, each.task) and (fnmatch.fnmatchcase(each.model, model) or fnmatch.fnmatchcase(each.name, model))
    ]


def find_checkpoint(name: str) -> Checkpoint:
    """Return the published checkpoint of a name.

    Raises:
        CheckpointError: there is none; the message names the closest ones.
    """
    if name in _catalog():
        return _catalog()[name]
    of_model = [each.name for each in list_checkpoints(name.partition(".")[0])]
    if of_model and "." not in name:
        raise CheckpointError(f"{name!r} has several published checkpoints: choose one of {', '.join(of_model)}")
    advice = f" Those of this network: {', '.join(of_model)}." if of_model else ""
    raise CheckpointError(
        f"there is no published checkpoint {name!r}.{nearest(name, _catalog())}{advice} `widekernel weights` lists all"
    )


def is_published(name: str) -> bool:
    """Return whether there is a published checkpoint of this name."""
    return name in _catalog()


def looks_like_a_name(text: str) -> bool:
    """Return whether a text that names no file was meant as the name of a published checkpoint."""
    return bool(_NAME.fullmatch(text)) and bool(list_checkpoints(text.partition(".")[0]))
