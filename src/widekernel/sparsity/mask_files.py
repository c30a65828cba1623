"""Mask files: safetensors files with one bit per weight."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor, nn

from widekernel.errors import CheckpointError
from widekernel.files import write_file
from widekernel.layers.wrappers import unwrap
from widekernel.sparsity.packing import pack, unpack
from widekernel.tensor_files import tensor_file

FORMAT = 1
METADATA_KEY = "widekernel_masks"


def save_masks(masks: Mapping[str, Tensor], path: str | Path) -> None:
    """Write masks (parameter name -> bool) to a .safetensors file, one bit per weight, atomically.

    Raises:
        WidekernelError: the file cannot be written.
    """
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    metadata = {METADATA_KEY: json.dumps({"format": FORMAT, "shapes": shapes})}
    content = save({name: pack(mask) for name, mask in masks.items()}, metadata=metadata)
    write_file(Path(path), content)


def load_masks(path: str | Path, model: nn.Module | None = None) -> dict[str, Tensor]:
    """Read masks that `save_masks` wrote.

    Args:
        path: the file.
        model: if given, every mask must belong to a parameter of this network.

    Returns:
        parameter name -> bool tensor.

    Raises:
        CheckpointError: the file is unreadable, is not a mask file, or belongs to another network.
    """
    try:
        with tensor_file(path) as file:
            described = json.loads((file.metadata() or {})[METADATA_KEY])
            shapes = {name: tuple(shape) for name, shape in described["shapes"].items()}
            masks = {name: unpack(file.get_tensor(name), shape) for name, shape in shapes.items()}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a readable mask file ({error!r}): give a file that save_masks wrote"
        ) from error
    if described["format"] != FORMAT:
        raise CheckpointError(f"{path} has format {described['format']!r}; this version reads format {FORMAT}")
    if model is not None:
        ours = {name: tuple(parameter.shape) for name, parameter in unwrap(model).named_parameters()}
        check_names(shapes, {name: shape for name, shape in ours.items() if name in shapes})
    return masks


def check_names(theirs: Mapping[str, tuple[int, ...]], ours: Mapping[str, tuple[int, ...]]) -> None:
    """Raise unless saved masks fit the parameters of this network.

    Args:
        theirs: shape of every saved mask, by parameter name.
        ours: shape of every masked parameter here, by name.

    Raises:
        CheckpointError: they do not fit; the message names the differences.
    """
    problems = [f"{name} is missing" for name in ours if name not in theirs]
    problems += [f"{name} is not masked here" for name in theirs if name not in ours]
    problems += [
        f"{name} is {shape} in the file and {ours[name]} here"
        for name, shape in theirs.items()
        if name in ours and shape != ours[name]
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            f"the masks belong to another network or to other settings: {'; '.join(problems[:3])}{more}. Give the masks of "
            "this network, and use the same layers and exclude"
        )
