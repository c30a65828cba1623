"""The authors' published weights as timm's tags: their configurations, and their use when a network is built."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from timm.models import resolve_pretrained_cfg

from widekernel.errors import ArgumentError, nearest
from widekernel.models.checkpoint.reader import read_checkpoint
from widekernel.weights.catalog import Checkpoint, find_checkpoint, is_published, list_checkpoints


def with_published(cfgs: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Return timm's configurations of networks with those of their published classifiers added.

    Args:
        cfgs: "name.untrained" -> configuration of the network. A classifier with the same input and number of classes
            becomes the network's default in timm.
    """
    out: dict[str, Any] = {}
    for key, cfg in cfgs.items():
        published = [each for each in list_checkpoints(key.partition(".")[0], "classification") if not each.timm]
        added = {each.name: published_cfg(each, cfg) for each in published}
        like = [name for name, new in added.items() if _is_like(new, cfg) and not find_checkpoint(name).arguments]
        out.update(sorted(added.items(), key=lambda item: item[0] not in like))
        out[key] = cfg
    return out


def _is_like(new: Mapping[str, Any], cfg: Mapping[str, Any]) -> bool:
    return all(new[key] == cfg[key] for key in ("num_classes", "input_size"))


def published_cfg(checkpoint: Checkpoint, cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return timm's configuration of a published classifier, given that of its network without weights."""
    size = checkpoint.image_size() or cfg["input_size"][-1]
    stride = cfg["input_size"][-1] // cfg["pool_size"][-1]
    return {
        **cfg,
        **checkpoint.preprocessing,
        "input_size": (cfg["input_size"][0], size, size),
        "pool_size": (size // stride, size // stride),
        "num_classes": checkpoint.classes or 0,
        "url": checkpoint.sources[0].link,
        "custom_load": True,
        "license": checkpoint.license.lower(),
        "origin_url": checkpoint.origin,
    }


def published_checkpoint(variant: str, kwargs: Mapping[str, Any]) -> Checkpoint | None:
    """Return the published checkpoint that the user's arguments choose, or None if they choose other weights or none.

    Args:
        variant: registered name of the network.
        kwargs: the user's arguments, with timm's `pretrained_cfg` and `pretrained_cfg_overlay`.

    Raises:
        ArgumentError: the network has no weights of the tag.
    """
    given = kwargs.get("pretrained_cfg")
    if isinstance(given, str) and given:
        _check_tag(variant, given)
    cfg = resolve_pretrained_cfg(variant, given, kwargs.get("pretrained_cfg_overlay"))
    name = f"{variant}.{cfg.tag}"
    if cfg.file or cfg.state_dict or cfg.hf_hub_id or cfg.source or not is_published(name):
        return None
    registered = timm.models.get_pretrained_cfg(name)
    return find_checkpoint(name) if registered is not None and cfg.url == registered.url else None


def _check_tag(variant: str, tag: str) -> None:
    tags = timm.models.get_arch_pretrained_cfgs(variant)
    name = f"{variant}.{tag}"
    if name in tags or not tags:
        return
    if is_published(name):
        raise ArgumentError(
            f"{name} is the backbone of a network for {find_checkpoint(name).task}: create {variant!r} and call "
            f"widekernel.load_checkpoint(model, {name!r})"
        )
    raise ArgumentError(
        f"{variant} has no weights {tag!r}.{nearest(name, tags)} `widekernel weights --model {variant}` lists them"
    )


def arguments_of_file(checkpoint: Checkpoint, path: Path) -> dict[str, Any]:
    """Return the arguments that the keys of a published file ask for: some tables do not say how a network was built."""
    if not checkpoint.arguments_by_key:
        return {}
    keys = list(read_checkpoint(path).state)
    found: dict[str, Any] = {}
    for pattern, arguments in checkpoint.arguments_by_key.items():
        if any(re.search(pattern, key) for key in keys):
            found.update(arguments)
    return found
