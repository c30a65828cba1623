"""Masks on disk: bit-packed in training states, and alone in files of their own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor, nn

from widekernel.errors import CheckpointError
from widekernel.files import explained, write_atomically
from widekernel.sparsity.kept import Kept
from widekernel.sparsity.packing import pack, unpack
from widekernel.sparsity.selection import unwrap
from widekernel.sparsity.state import Churn
from widekernel.tensor_files import tensor_file

if TYPE_CHECKING:
    from widekernel.sparsity.dynamic import DynamicSparsity

FORMAT = 1
NEEDED = ("step", "updates", "skipped", "pending", "shapes", "masks", "densities", "fresh", "momentum", "churn", "moved")
METADATA_KEY = "widekernel_masks"


def state_of(controller: DynamicSparsity) -> dict[str, Any]:
    """Give the state of a controller as tensors and plain containers."""
    state = controller._state
    return {
        "format": FORMAT,
        "config": _overridden(controller),
        "step": controller.step,
        "updates": controller.updates,
        "skipped": controller.skipped,
        "pending": controller._pending,
        "shapes": {name: list(mask.shape) for name, mask in state.masks.items()},
        "masks": {name: pack(mask) for name, mask in state.masks.items()},
        "densities": dict(state.densities),
        "fresh": {name: pack(mask) for name, mask in state.fresh.items()},
        "momentum": {name: value.clone() for name, value in controller._gradients.momentum.items()},
        "churn": [(churn.step, churn.removed, churn.grown, churn.active) for churn in controller.churn],
        "moved": dict(controller.moved),
        "live_zeros": {} if controller._pending else controller._watch.live_zeros(),
    }


def restore_state(controller: DynamicSparsity, saved: dict[str, Any]) -> None:
    """Put a controller into a saved state.

    Raises:
        CheckpointError: the state belongs to another network, to settings that it would override, or to a newer version; or
            is none.
    """
    if not isinstance(saved, Mapping):
        raise CheckpointError(f"the sparsity state is a {type(saved).__name__}: give the dict that state_dict() gave")
    if saved.get("format") != FORMAT:
        raise CheckpointError(f"the sparsity state has format {saved.get('format')!r}; this version reads format {FORMAT}")
    if missing := [key for key in NEEDED if key not in saved]:
        raise CheckpointError(
            f"the sparsity state lacks {', '.join(missing)}: give all of what state_dict() gave, not a part or an excerpt"
        )
    _check_settings(controller, saved)
    state = controller._state
    shapes = {name: tuple(shape) for name, shape in saved["shapes"].items()}
    if controller.config.rule == "published":
        # Layers that were drawn almost dense have given up their masks: here others may have than where it was saved.
        known = {name: tuple(parameter.shape) for name, parameter in state.chosen.items()}
        check_names(shapes, {name: shape for name, shape in known.items() if name in shapes})
        given_up = [name for name in known if name not in shapes]
    else:
        given_up = []
        check_names(shapes, {name: tuple(mask.shape) for name, mask in state.masks.items()})
    if controller._kept is not None:
        controller._kept.give_back(controller._holders(), state.masks)
    controller._give_up(given_up)
    controller._averages.find()
    controller._kept = Kept(controller._holders())
    with torch.no_grad():
        for name, mask in state.masks.items():
            mask.copy_(unpack(saved["masks"][name], shapes[name]))
    controller._pending = saved["pending"]
    controller._untold.watch() if controller._pending else controller._untold.stop()
    controller.apply_masks()
    controller._zeros = dict(saved.get("live_zeros", {}))
    controller._settled = controller._chosen = False
    state.densities = {name: float(saved["densities"][name]) for name in state.masks}
    state.fresh = {name: unpack(bits, shapes[name]).to(state.masks[name].device) for name, bits in saved["fresh"].items()}
    means = saved["momentum"].items()
    controller._gradients.momentum = {name: value.to(state.parameters[name], copy=True) for name, value in means}
    controller.step, controller.updates, controller.skipped = saved["step"], saved["updates"], saved["skipped"]
    controller.churn = [Churn(*row) for row in saved["churn"]]
    controller.moved = dict(saved["moved"])


def _overridden(controller: DynamicSparsity) -> dict[str, Any]:
    """Give the settings, as plain values, that show in masks and densities only; all others hold from loading on."""
    config = controller.config
    start = config.initial_sparsity
    return {
        "rule": config.rule,
        "block": config.block if isinstance(config.block, str) else list(config.block),
        "sparsity": float(config.sparsity),
        "initial_sparsity": None if start is None else float(start),
    }


def _check_settings(controller: DynamicSparsity, saved: Mapping[str, Any]) -> None:
    """Raise if masks and densities of a state are those of other settings, which would be ignored from here on."""
    theirs = saved.get("config")
    if theirs is None or saved["pending"]:  # of an older version; or masks are still to be drawn, by the settings here
        return
    ours = _overridden(controller)
    names = ["rule", "block"]
    if controller._by_settings:
        names += ["sparsity", "initial_sparsity"]
    other = [name for name in names if ours[name] != theirs[name]]
    if other:
        here, there = (", ".join(f"{name}={values[name]!r}" for name in other) for values in (ours, theirs))
        raise CheckpointError(
            f"the sparsity state was saved with {there}, and this controller was made with {here}, which the state would "
            f"override: make it with {there}; or load the weights alone and begin with masks of their own "
            "(init='magnitude' for a higher sparsity)"
        )


def check_names(theirs: Mapping[str, tuple[int, ...]], ours: Mapping[str, tuple[int, ...]]) -> None:
    """Raise unless masks of a file are those of the parameters here.

    Raises:
        CheckpointError: naming what differs.
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
            "this network, and the same layers and exclude"
        )


def save_masks(masks: Mapping[str, Tensor], path: str | Path) -> None:
    """Write masks (parameter name -> bool) to a .safetensors file, one bit a weight, whole or not at all.

    Raises:
        WidekernelError: it cannot be written.
    """
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    metadata = {METADATA_KEY: json.dumps({"format": FORMAT, "shapes": shapes})}
    content = save({name: pack(mask) for name, mask in masks.items()}, metadata=metadata)
    with explained(Path(path)):
        write_atomically(Path(path), lambda file: file.write(content))


def load_masks(path: str | Path, model: nn.Module | None = None) -> dict[str, Tensor]:
    """Read masks that `save_masks` wrote.

    Args:
        path: the file.
        model: if given, the masks must be of parameters of this network.

    Raises:
        CheckpointError: the file is unreadable or no mask file, or belongs to another network.
    """
    try:
        with tensor_file(path) as file:
            described = json.loads((file.metadata() or {})[METADATA_KEY])
            shapes = {name: tuple(shape) for name, shape in described["shapes"].items()}
            masks = {name: unpack(file.get_tensor(name), shape) for name, shape in shapes.items()}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a readable file of masks ({error!r}): give one that save_masks wrote"
        ) from error
    if described["format"] != FORMAT:
        raise CheckpointError(f"{path} has format {described['format']!r}; this version reads format {FORMAT}")
    if model is not None:
        ours = {name: tuple(parameter.shape) for name, parameter in unwrap(model).named_parameters()}
        check_names(shapes, {name: shape for name, shape in ours.items() if name in shapes})
    return masks
