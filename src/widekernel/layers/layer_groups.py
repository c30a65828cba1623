"""Layer groups of the published recipes: fine-tuning, segmentation and detection."""

from __future__ import annotations

import re

from torch import nn

LAST_GROUP = 13
"""Group of the head; its learning rate is not scaled."""

_IN_STAGE = re.compile(r"stages\.([0-3])\.(?:downsample|blocks\.(\d+))\.")


def layer_groups(model: nn.Module) -> dict[str, int | None]:
    """Return the group of each parameter, from 0 (stem) to `LAST_GROUP`; `None` if its name does not tell.

    Stages 0, 1 and 3 are groups 1, 2 and 12. In stage 2, groups of blocks begin with group 3. A network whose blocks are
    grouped otherwise than in ConvNeXt has a method `layer_group(name)`.
    """
    rule = getattr(model, "layer_group", convnext_layer_group)
    return {name: rule(name) for name, _ in model.named_parameters()}


def convnext_layer_group(name: str) -> int | None:
    """Return the group of a parameter of ConvNeXt: three blocks of stage 2 each; downsampling belongs to what follows."""
    outside = _outside_stages(name)
    if outside is not None:
        return outside
    found = _IN_STAGE.match(name)
    return None if found is None else _in_stage(int(found[1]), int(found[2] or 0) // 3)


def replknet_layer_group(name: str) -> int | None:
    """Return the group of a parameter of RepLKNet: four blocks of stage 2 each; downsampling belongs to what precedes."""
    outside = _outside_stages(name)
    if outside is not None:
        return outside
    found = _IN_STAGE.match(name)
    if found is None:
        return None
    stage = int(found[1])
    if found[2] is None:
        return (1, 2, 11)[stage - 1]
    return _in_stage(stage, int(found[2]) // 4)


_BODY = "backbone.body."
_BELOW = re.compile(r"stages[._]([0-3])\.(?:(downsample)|blocks\.(\d+))\.")


def dense_layer_groups(model: nn.Module, by: str, layers: int) -> dict[str, int | None]:
    """Return the group of each parameter of a network for dense prediction, as the published runs of ConvNeXt count.

    What does not belong to the network `backbone.body` is the head. Classifiers are grouped in the same way.

    Args:
        model: the network.
        by: `stage` (all downsampling layers are group 0, and stage i is group i + 1), or `layer` (three blocks of stage 2
            share a group; downsampling belongs to what follows).
        layers: number of groups besides the stem and the head.

    Returns:
        groups from 0 to `layers` + 1 (the head) by name; `None` if the name does not tell, or stage 2 is too deep.
    """
    names = [name for name, _ in model.named_parameters()]
    has_body = any(name.startswith(_BODY) for name in names)

    def group_of(name: str) -> int | None:
        if has_body and not name.startswith(_BODY):
            return layers + 1
        return _dense_group(name.removeprefix(_BODY), by, layers)

    return {name: group_of(name) for name in names}


def _dense_group(name: str, by: str, layers: int) -> int | None:
    if re.match(r"stem[._]", name):
        return 0
    if _outside_stages(name) is not None:
        return layers + 1
    found = _BELOW.match(name)
    if found is None:
        return None
    stage, downsamples = int(found[1]), found[2] is not None
    if by == "stage":
        return 0 if downsamples else stage + 1
    group = (1, 2, 3 + int(found[3] or 0) // 3, layers)[stage]
    return group if stage == 3 or group < layers else None


def _outside_stages(name: str) -> int | None:
    """Return the group of a parameter outside the stages, or `None` if it is not there."""
    if name.startswith("stem."):
        return 0
    return LAST_GROUP if re.match(r"(head|norm_pre|feature_norms)\.", name) else None


def _in_stage(stage: int, number: int) -> int:
    """Return the group of the group of blocks `number` in `stage`; only stage 2 has several."""
    return (1, 2, 3 + number, 12)[stage]
