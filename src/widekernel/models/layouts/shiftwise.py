"""Layouts of both versions of the Shift-wise network, merged or not."""

from __future__ import annotations

import re

import torch

from widekernel.models.layouts.convnext import BLOCK, OFFICIAL_BLOCK, TAIL, backbone_rules, block_rules
from widekernel.models.layouts.layout import Layout, Rule, State, Wanted

_LAYER, _OURS = f"{OFFICIAL_BLOCK}.large_kernel", f"{BLOCK}.mixer.layer"
_SHIFT = (
    Rule(f"{_LAYER}.LoRAs.{{k}}.weight", f"{_OURS}.source.tiles.{{k}}"),
    Rule(f"{_LAYER}.bn_lora1.{{rest}}", f"{_OURS}.norms.0.{{rest}}"),
    Rule(f"{_LAYER}.bn_lora2.{{rest}}", f"{_OURS}.norms.1.{{rest}}"),
    Rule(f"{_LAYER}.bn_small.{{rest}}", f"{_OURS}.norms.2.{{rest}}"),
)
_SECOND_BLOCK = (
    Rule(f"{OFFICIAL_BLOCK}.se.down.{{rest}}", f"{BLOCK}.se.fc1.{{rest}}"),
    Rule(f"{OFFICIAL_BLOCK}.se.up.{{rest}}", f"{BLOCK}.se.fc2.{{rest}}"),
    Rule(f"{OFFICIAL_BLOCK}.pwconv1.1.{{rest}}", f"{BLOCK}.mlp.fc1.{{rest}}"),
    Rule(f"{OFFICIAL_BLOCK}.act.1.gamma", f"{BLOCK}.mlp.norm.weight", official_dims=4),
    Rule(f"{OFFICIAL_BLOCK}.act.1.beta", f"{BLOCK}.mlp.norm.bias", official_dims=4),
    Rule(f"{OFFICIAL_BLOCK}.pwconv2.0.{{rest}}", f"{BLOCK}.mlp.fc2.{{rest}}"),
    Rule(f"{OFFICIAL_BLOCK}.pwconv2.2.{{rest}}", f"{BLOCK}.norm2.{{rest}}"),
    Rule(f"{OFFICIAL_BLOCK}.gamma", f"{BLOCK}.gamma"),
    Rule(f"{OFFICIAL_BLOCK}.norm.{{rest}}", f"{BLOCK}.norm.{{rest}}"),
)
# The official code draws its tables anew whenever a network is made, from the seed that ours uses too.
_TABLES = (r"\.source\.(tile_at|centre)$", r"\.mixer\.(selected|ghosts)$")


def first_version(stages: int) -> tuple[Layout, ...]:
    """Give the layout of ShiftWise_v1."""
    rules = (*backbone_rules(stages), *_SHIFT, *block_rules(OFFICIAL_BLOCK, BLOCK), *TAIL)
    return (Layout("ShiftWise_v1", rules, _TABLES, _unmerge),)


def second_version(stages: int) -> tuple[Layout, ...]:
    """Give the layout of ShiftWise_v2."""
    rules = (*backbone_rules(stages), *_SHIFT, *_SECOND_BLOCK, *TAIL)
    return (Layout("ShiftWise_v2", rules, _TABLES, _unmerge),)


def _unmerge(state: State, wanted: Wanted) -> tuple[State, str]:
    """Put merged tiles into the first path and zeros into the others."""
    out, merged = {}, 0
    for key, value in state.items():
        match = re.fullmatch(r"(.*\.large_kernel)\.LoRA\.weight", key)
        if not match:
            out[key] = value
            continue
        merged += 1
        path = 0
        while (name := f"{match.group(1)}.LoRAs.{path}.weight") in wanted.shapes:
            out[name] = value if path == 0 else torch.zeros_like(value)
            path += 1
    return out, f"{merged} merged tile sets were put into the first path, the other paths set to zero" if merged else ""
