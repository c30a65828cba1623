"""A recipe: what was run, where that is published, and the settings with which the command line repeats it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from widekernel.errors import ConfigError
from widekernel.settings import flatten, require, require_one_of, require_whole

Command = Literal["train", "eval", "sparsify"]

_COMMANDS = ("train", "eval", "sparsify")
_TASKS = ("classification", "segmentation", "detection")


@dataclass(frozen=True)
class Source:
    """Where a recipe comes from.

    Args:
        repository: repository on GitHub as OWNER/NAME, or the title of a paper
        commit: commit that was read; `None` if the repository has none any more
        file: file of the repository that states the command, or the place in the paper
    """

    repository: str
    commit: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        place = self.repository if self.commit is None else f"{self.repository}@{self.commit[:12]}"
        return place if self.file is None else f"{place}, {self.file}"


@dataclass(frozen=True)
class Devices:
    """The GPUs of the published run, and how they shared a batch.

    Args:
        nodes: machines
        gpus: GPUs of each machine
        batch: images per forward pass of one GPU
        accumulation: forward passes per optimizer step
    """

    nodes: int
    gpus: int
    batch: int
    accumulation: int = 1

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus", "batch", "accumulation"):
            require_whole(f"devices.{name}", getattr(self, name), 1)

    @property
    def total(self) -> int:
        """Images per optimizer step."""
        return self.nodes * self.gpus * self.batch * self.accumulation

    def __str__(self) -> str:
        parts = [f"{self.nodes} × " if self.nodes > 1 else "", f"{self.gpus} GPU{'s' if self.nodes * self.gpus > 1 else ''}"]
        passes = f" × {self.accumulation} passes" if self.accumulation > 1 else ""
        return f"{''.join(parts)} × {self.batch} image{'s' if self.batch > 1 else ''}{passes}"


@dataclass(frozen=True)
class Recipe:
    """A named set of settings for one command.

    Args:
        name: name, which tells model, data, epochs and image size
        family: folder of the recipe
        description: what the recipe does, in one sentence
        settings: nested settings of the command, including those of the base
        own_settings: those settings that the recipe states itself
        base: name of the base, or `None`
        task: what is learned
        command: command that takes the settings: train, eval or sparsify
        dataset: the images of the published run
        source: where the recipe comes from; `None` for recipes of this project
        published: published results by name, such as `top1` in percent; `None` if none are published
        checkpoint: name of the published weights of this run, as in `widekernel weights`; `None` if there is no such name
        devices: devices of the published run; `None` if it needs none, or they are not published
        total_batch: images per optimizer step, which is also `loop.batch_size`
        verified: what was run with this library, and what came out; "none" if it was not run at this size
        notes: where settings or results differ from the published run, or what is not published
    """

    name: str
    family: str
    description: str
    settings: dict[str, Any]
    own_settings: dict[str, Any]
    base: str | None = None
    task: str = "classification"
    command: Command = "train"
    dataset: str = ""
    source: Source | None = None
    published: dict[str, float] | None = None
    checkpoint: str | None = None
    devices: Devices | None = None
    total_batch: int | None = None
    verified: str = "none"
    notes: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        require_one_of(f"{self.name}: command", self.command, _COMMANDS)
        require_one_of(f"{self.name}: task", self.task, _TASKS)
        if self.devices is not None:
            ok = self.devices.total == self.total_batch
            require(ok, f"{self.name}: total_batch", self.total_batch, f"{self.devices.total} ({self.devices})")
        batch_size = (self.settings.get("loop") or {}).get("batch_size")
        ok = self.command != "train" or batch_size == self.total_batch
        require(ok, f"{self.name}: loop.batch_size", batch_size, f"total_batch ({self.total_batch})")

    @property
    def model(self) -> str:
        """Name of the model."""
        return str(self.settings["model"]["name"])

    @property
    def epochs(self) -> int | None:
        """Epochs of training; `None` if the command is not `train`, or the length of the run is given in steps."""
        return self.settings["schedule"].get("epochs") if self.command == "train" else None

    @property
    def steps(self) -> int | None:
        """Optimizer steps of training; `None` if the command is not `train`, or the length is given in epochs."""
        return self.settings["schedule"].get("steps") if self.command == "train" else None

    @property
    def input_size(self) -> int | None:
        """Side of the images, or of the crops of segmentation, in pixels; `None` for the model's own, or for several."""
        data = self.settings.get("data") or {}
        return data.get("input_size", data.get("crop_size"))

    def settings_for(self, command: Command) -> dict[str, Any]:
        """Return the settings as `command` takes them; `eval` also takes the model and the data of the other recipes.

        Raises:
            ConfigError: the recipe is not for this command.
        """
        if command == "train" and self.command == "train":
            return self.settings
        if command not in ("eval", self.command):
            raise ConfigError(
                f"The recipe {self.name!r} is for `widekernel {self.command}`, not for `widekernel {command}`. "
                "`widekernel recipes` lists the recipes with their commands."
            )
        model = self.settings["model"]
        ours = {"model": model["name"], "data": self.settings["data"]}
        if model.get("args"):
            ours["model_args"] = model["args"]
        if command == "sparsify":
            ours |= {key: value for key, value in self.settings.items() if key not in ("model", "data")}
        return ours


def deviations(settings: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ from those in `reference`, by dotted key, each with its value there.

    Args:
        settings: nested settings.
        reference: nested settings to compare with; what it does not hold counts as `None`.
    """
    others = flatten(reference)
    found = ((key, value, others.get(key)) for key, value in flatten(settings).items())
    return {key: (value, other) for key, value, other in found if value != other}
