"""The official layouts of both versions of the Shift-wise network, merged or not."""

from __future__ import annotations

import re

import torch

from widekernel.models.convnext_layouts import BLOCK, OFFICIAL_BLOCK, TAIL, backbone_rules, block_rules
from widekernel.models.layouts.layout import Expected, Layout, Rule, State
from widekernel.models.layouts.registry import ANY_FOLDED, BLOCK_KEY, register_layouts, register_signature
from widekernel.models.shiftwise import ShiftWise, ShiftWiseV1

_LAYER, _OURS = f"{OFFICIAL_BLOCK}.large_kernel", f"{BLOCK}.mixer.layer"
_SHIFT = (
    Rule(f"{_LAYER}.LoRAs.{{k}}.weight", f"{_OURS}.source.tiles.{{k}}"),
    Rule(f"{_LAYER}.bn_lora1.{{rest}}", f"{_OURS}.norms.0.{{rest}}"),
    Rule(f"{_LAYER}.bn_lora2.{{rest}}", f"{_OURS}.norms.1.{{rest}}"),
    Rule(f"{_LAYER}.bn_small.{{rest}}", f"{_OURS}.norms.2.{{rest}}"),
)
RESPONSE_NORM_BLOCK = (
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
# The official code generates its tables whenever it creates a network, from the same seed as here.
_TABLES = (r"\.source\.(tile_at|centre)$", r"\.mixer\.(selected|ghosts)$")
_PART_ORDER = (
    *("downsample_layers", "stages", "gamma", "beta", "LoRAs", "bn_lora1", "bn_lora2", "bn_small", "large_kernel"),
    *("norm", "down", "up", "se", "pwconv1", "act", "pwconv2", "head"),
)

register_signature("a folded Shift-wise network", rf"{BLOCK_KEY}mixer\.layer\.kernels\.\d+$", "folded", over=(ANY_FOLDED,))
register_signature("ShiftWise_v1", r"large_kernel\.LoRAs?\.(\d+\.)?weight$", "official")
register_signature("ShiftWise_v2", r"^stages\.\d+\.\d+\.pwconv2\.2\.", "official", over=("ShiftWise_v1",))
register_signature("widekernel's ShiftWise_v1", rf"{BLOCK_KEY}mixer\.layer\.source\.", "native")
register_signature(
    "widekernel's ShiftWise_v2", rf"{BLOCK_KEY}mlp\.norm\.weight$", "native", over=("widekernel's ShiftWise_v1",)
)


@register_layouts(ShiftWiseV1)
def shiftwise_v1_layouts(model: ShiftWiseV1) -> tuple[Layout, ...]:
    """Return the layout of ShiftWise_v1."""
    rules = (*backbone_rules(len(model.cfg.dims)), *_SHIFT, *block_rules(OFFICIAL_BLOCK, BLOCK), *TAIL)
    return (Layout("ShiftWise_v1", rules, _PART_ORDER, _TABLES, _unmerge),)


@register_layouts(ShiftWise)
def shiftwise_layouts(model: ShiftWise) -> tuple[Layout, ...]:
    """Return the layout of ShiftWise_v2."""
    rules = (*backbone_rules(len(model.cfg.dims)), *_SHIFT, *RESPONSE_NORM_BLOCK, *TAIL)
    return (Layout("ShiftWise_v2", rules, _PART_ORDER, _TABLES, _unmerge),)


def _unmerge(state: State, expected: Expected) -> tuple[State, str]:
    """Put merged tiles into the first path and set the other paths to zero."""
    out, merged = {}, 0
    for key, value in state.items():
        match = re.fullmatch(r"(.*\.large_kernel)\.LoRA\.weight", key)
        if not match:
            out[key] = value
            continue
        merged += 1
        path = 0
        while (name := f"{match.group(1)}.LoRAs.{path}.weight") in expected.shapes:
            out[name] = value if path == 0 else torch.zeros_like(value)
            path += 1
    return out, f"{merged} merged tile sets were put into the first path, the other paths set to zero" if merged else ""
