"""Published checkpoints by name: where the file is on this machine, and how the network's images are then prepared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from widekernel.errors import CheckpointError
from widekernel.models.checkpoint.arguments import resolve_path
from widekernel.models.layouts.registry import layouts_of
from widekernel.weights.catalog import Checkpoint, find_checkpoint, looks_like_a_name
from widekernel.weights.fetching import fetch


def locate(path: str | Path, network: nn.Module) -> tuple[Path, Checkpoint | None]:
    """Return the path of a checkpoint's file; for the name of a published checkpoint, fetch it, and return its entry too.

    Raises:
        ArgumentError: `path` is not a path.
        CheckpointError: there is no published checkpoint of that name, or it is of another kind of network.
        FetchError: it cannot be fetched.
    """
    resolved = resolve_path(path)
    if not isinstance(path, str) or resolved.exists() or not looks_like_a_name(path):
        return resolved, None
    checkpoint = find_checkpoint(path)
    layouts = [layout.family for layout in layouts_of(network)]
    if checkpoint.layout not in ("native", *layouts):
        takes = f"takes weights of {' or '.join(layouts)}" if layouts else "has no published weights"
        raise CheckpointError(
            f"{path} holds {checkpoint.layout}, but the {type(network).__name__} {takes}: create {checkpoint.model!r}. "
            "Nothing was fetched"
        )
    return fetch(checkpoint), checkpoint


def describe_input(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Say in the model's `pretrained_cfg`, if it has one, how images are prepared for a published checkpoint.

    The backbone of a network for another task sees images that are normalized alike, but of other sizes.
    """
    described: Any = getattr(model, "pretrained_cfg", None)
    if not isinstance(described, dict):
        return
    changed = dict(checkpoint.preprocessing)
    size = checkpoint.image_size()
    if checkpoint.task != "classification":
        changed = {key: changed[key] for key in ("mean", "std")}
    elif size is not None:
        channels, old, _ = described.get("input_size", (3, size, size))
        changed["input_size"] = (channels, size, size)
        if described.get("pool_size"):
            changed["pool_size"] = (described["pool_size"][0] * size // old,) * 2
    # A feature extractor has its own description.
    model.pretrained_cfg = model.default_cfg = {**described, **changed}  # type: ignore[assignment]
