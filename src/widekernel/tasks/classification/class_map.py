"""Map from the classes of the data to some of the outputs of a classifier that knows more classes (data.class_map)."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageNetInfo
from torch import nn

from widekernel.data.formats import brief
from widekernel.errors import CheckpointError, ConfigError
from widekernel.models.checkpoint import LoadReport
from widekernel.tasks.assembly import build_model, classifier_of
from widekernel.tasks.foreign_checkpoint import load_weights

LISTS = ("imagenet-1k", "imagenet-12k", "imagenet-22k", "imagenet-22k-ms", "imagenet-21k-goog", "imagenet-21k-miil")
"""Lists of class names in timm; each is in the order of the outputs of published networks."""

NO_OUTPUT = -1
"""In place of an output: the class has none. ImageNet-22K lacks one class of ImageNet-1K, n04399382 (teddy bear)."""


def read_class_map(setting: str, names: tuple[str, ...]) -> tuple[int, ...]:
    """Return the output for each class of the data, or `NO_OUTPUT`.

    Args:
        setting: data.class_map: name of one of `LISTS`, or a file with the number of an output, from 0, in each line; -1
            stands for a class without an output.
        names: the classes of the data; for a list, WordNet identifiers such as n01440764.

    Raises:
        ConfigError: there is no such list or file, or it does not fit the classes.
    """
    if setting in LISTS:
        return _from_list(setting, names)
    try:
        lines = Path(setting).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"data.class_map is {setting!r}, which is neither a readable file ({error}) nor one of {', '.join(LISTS)}."
        ) from error
    wrong = next((line for line in lines if not re.fullmatch(r"[0-9]+|-1", line)), None)
    if wrong is not None:
        raise ConfigError(f"data.class_map {setting} holds {wrong!r}, but must hold the number of an output in each line.")
    if len(lines) != len(names):
        raise ConfigError(
            f"data.class_map {setting} holds {len(lines)} outputs, but the data has {len(names)} classes: give one for each."
        )
    return tuple(int(line) for line in lines)


def _from_list(setting: str, names: tuple[str, ...]) -> tuple[int, ...]:
    outputs = {name: number for number, name in enumerate(ImageNetInfo(setting).label_names())}
    missing = [name for name in names if name not in outputs]
    if 2 * len(missing) > len(names):
        raise ConfigError(
            f"data.class_map is {setting!r}, which lacks {len(missing)} of the {len(names)} classes of the data: "
            f"{brief(missing, 3)}. The folders must be named by WordNet identifiers; for others, give a file."
        )
    return tuple(outputs.get(name, NO_OUTPUT) for name in names)


def class_map_note(chosen: tuple[int, ...], names: tuple[str, ...], setting: str) -> str:
    """Return a line for the user on the outputs that are used, and on classes without one."""
    missing = [name for name, output in zip(names, chosen, strict=True) if output == NO_OUTPUT]
    text = f"{len(names) - len(missing)} outputs are used (data.class_map {setting})"
    return f"{text}; {len(missing)} of {len(names)} classes have none: {brief(missing, 3)}." if missing else f"{text}."


def check_outputs(chosen: tuple[int, ...], outputs: int, setting: str) -> None:
    """Raise a `ConfigError` unless a network with `outputs` outputs has all that were chosen."""
    if max(chosen) >= outputs:
        raise ConfigError(
            f"data.class_map {setting} chooses output {max(chosen)}, but the network has {outputs} outputs. "
            "Check the map, or leave it out for a network of the same classes as the data."
        )


def load_mapped(
    model: nn.Module, config: Any, chosen: tuple[int, ...], setting: str, notify: Callable[[str], None]
) -> LoadReport:
    """Load the checkpoint `config.weights` into `model`, whose classifier takes the chosen outputs of that in the file.

    Args:
        model: the network.
        config: its settings (`ModelConfig`).
        chosen: the output of the file's classifier for each class of the network.
        setting: data.class_map, for messages.
        notify: receives messages for the user.

    Raises:
        CheckpointError: the file cannot be read, does not fit, or holds no classifier of more classes.
        ConfigError: the classifier does not have the outputs.
    """
    report, untrained = load_weights(model, config.weights, notify)
    found = re.search(r"they are for (\d+) classes", untrained)
    if not report.dropped or found is None:
        raise CheckpointError(
            f"data.class_map is {setting!r}, but {config.weights} holds no classifier of another number of classes than "
            f"{len(chosen)}, whose outputs it could choose. Leave data.class_map out."
        )
    outputs = int(found[1])
    check_outputs(chosen, outputs, setting)
    wide = build_model(config.name, outputs, config.args)
    report, _ = load_weights(wide, config.weights, notify)
    outputs_there = torch.tensor(chosen)
    has_output = outputs_there != NO_OUTPUT
    with torch.no_grad():
        for name, parameter in classifier_of(model).named_parameters():
            parameter[has_output] = classifier_of(wide).get_parameter(name)[outputs_there[has_output]]
    return report
