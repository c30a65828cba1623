"""Networks of the published runs for segmentation and detection, by the name of their weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from widekernel.errors import CheckpointError
from widekernel.recipes.loading import recipe_of_checkpoint
from widekernel.tasks.network_config import DetectorConfig, SegmenterConfig
from widekernel.tasks.networks import build_detector, build_segmenter
from widekernel.weights.catalog import find_checkpoint


def build_published(name: str) -> nn.Module:
    """Build the segmentation or detection network of published weights, as its recipe describes it, with initial weights.

    `widekernel.load_checkpoint(network, name)` then loads the weights. Nothing is fetched here, so the network can be built
    on PyTorch's meta device.

    Args:
        name: name of the weights, as in `widekernel weights --task segmentation`.

    Raises:
        CheckpointError: there are no such weights, they are of a classifier, or no recipe describes the network.
    """
    checkpoint = find_checkpoint(name)
    if checkpoint.task == "classification":
        raise CheckpointError(f"{name} is a classifier: create it with timm.create_model({name!r})")
    recipe = recipe_of_checkpoint(name)
    if recipe is None or checkpoint.classes is None:
        raise CheckpointError(f"the network of {name} cannot be built: there is no recipe that describes it")
    left_out = ("weights", "grad_checkpointing")
    settings: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in recipe.settings["model"].items()
        if key not in left_out
    }
    if recipe.task == "segmentation":
        return build_segmenter(SegmenterConfig(**settings), checkpoint.classes)
    return build_detector(DetectorConfig(**settings), checkpoint.classes, recipe.settings["data"]["masks"])
