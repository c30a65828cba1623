"""The official layouts of SLaK, SLaK_reg and SLaK_pww; SLaK_reg also loads SLaK's strips, cut into tiles."""

from __future__ import annotations

import re
from dataclasses import replace

from widekernel.layers.tiles import cut_into_tiles
from widekernel.models.convnext_layouts import BLOCK, OFFICIAL_BLOCK, TAIL, backbone_rules, block_rules
from widekernel.models.layouts.layout import Expected, Layout, Rule, State
from widekernel.models.layouts.registry import ANY_FOLDED, BLOCK_KEY, register_layouts, register_signature
from widekernel.models.replknet_layouts import unmerge
from widekernel.models.slak import SLaK

_LAYER, _OURS = f"{OFFICIAL_BLOCK}.large_kernel", f"{BLOCK}.mixer"
_PART_ORDER = (
    *("downsample_layers", "stages", "gamma", "lkb_origin", "split_convs", "conv", "LoRA", "LoRA1", "LoRA2", "small_conv"),
    *("lora1", "lora2", "bn", "bn_lora1", "bn_lora2", "large_kernel", "norm", "pwconv1", "pwconv2", "head"),
)
_TILES_KEY = rf"{BLOCK_KEY}mixer\.source\.sources\.0\."

register_signature("a folded SLaK", rf"{BLOCK_KEY}mixer\.kernels\.\d+$", "folded", over=(ANY_FOLDED,))
register_signature("SLaK", r"^stages\.\d+\.\d+\.large_kernel\.(LoRA[12]\.conv|lkb_origin|lkb_reparam)\.", "official")
register_signature("SLaK_reg", r"large_kernel\.LoRA[12]\.split_convs\.", "official", over=("SLaK",))
register_signature("SLaK_pww", r"large_kernel\.LoRA\.split_convs\.", "official", over=("SLaK", "SLaK_reg"))
register_signature("widekernel's SLaK", rf"{BLOCK_KEY}mixer\.source\.kernels\.", "native")
register_signature("widekernel's SLaK_reg", rf"{_TILES_KEY}tall$", "native")
register_signature("widekernel's SLaK_pw", rf"{_TILES_KEY}(source\.)?tiles$", "native")
register_signature("widekernel's SLaK_pww", rf"{_TILES_KEY}gates\.", "native", over=("widekernel's SLaK_pw",))


@register_layouts(SLaK)
def slak_layouts(model: SLaK) -> tuple[Layout, ...]:
    """Return the layouts that a SLaK of this kind can be loaded from; SLaK_pw has no official code."""
    strips, decomposed, stages = model.cfg.strips, model.cfg.decomposed, len(model.cfg.dims)
    if strips == "free":
        names = ("LoRA1", "LoRA2", "small_conv") if decomposed else ("lkb_origin", "small_conv")
        layout = _layout("SLaK", [rule for i, name in enumerate(names) for rule in _conv_bn(name, i)], stages)
        # Without strips, the official code can merge the squares, like that of RepLKNet.
        return (layout if decomposed else replace(layout, upgrade=unmerge),)
    square = [
        Rule(f"{_LAYER}.small_conv.conv.weight", f"{_OURS}.source.sources.1.kernels.0"),
        Rule(f"{_LAYER}.small_conv.bn.{{rest}}", f"{_OURS}.norms.2.{{rest}}"),
    ]
    if strips == "split":
        rules = [*_split("LoRA1", "tall", 0), *_split("LoRA2", "wide", 1), *square]
        whole = _layout("SLaK_reg", rules, stages)

        def cut(state: State, expected: Expected) -> tuple[State, str]:
            return _cut_strips(state, model.cfg.short or 0)

        return whole, replace(whole, family="SLaK", upgrade=cut)
    if strips == "shared":
        return (_layout("SLaK_pww", [*_shared(), *square], stages),)
    return ()


def _layout(family: str, rules: list[Rule], stages: int) -> Layout:
    return Layout(family, (*backbone_rules(stages), *rules, *block_rules(OFFICIAL_BLOCK, BLOCK), *TAIL), _PART_ORDER)


def _conv_bn(name: str, branch: int) -> tuple[Rule, Rule]:
    return (
        Rule(f"{_LAYER}.{name}.conv.weight", f"{_OURS}.source.kernels.{branch}"),
        Rule(f"{_LAYER}.{name}.bn.{{rest}}", f"{_OURS}.norms.{branch}.{{rest}}"),
    )


def _split(name: str, direction: str, branch: int) -> tuple[Rule, Rule]:
    return (
        Rule(f"{_LAYER}.{name}.split_convs.weight", f"{_OURS}.source.sources.0.{direction}"),
        Rule(f"{_LAYER}.{name}.bn.{{rest}}", f"{_OURS}.norms.{branch}.{{rest}}"),
    )


def _shared() -> tuple[Rule, ...]:
    source = f"{_OURS}.source.sources.0"
    return (
        Rule(f"{_LAYER}.LoRA.split_convs.weight", f"{source}.tiles"),
        Rule(f"{_LAYER}.LoRA.lora1.weight", f"{source}.gates.0"),
        Rule(f"{_LAYER}.LoRA.lora2.weight", f"{source}.gates.1"),
        Rule(f"{_LAYER}.LoRA.bn_lora1.{{rest}}", f"{_OURS}.norms.0.{{rest}}"),
        Rule(f"{_LAYER}.LoRA.bn_lora2.{{rest}}", f"{_OURS}.norms.1.{{rest}}"),
    )


def _cut_strips(state: State, small: int) -> tuple[State, str]:
    """Cut SLaK's strips into tiles of side `small`, in the layout of SLaK_reg."""
    cut, count = {}, 0
    for key, value in state.items():
        match = re.fullmatch(r"(.*\.LoRA[12])\.conv\.weight", key)
        if match:
            cut[f"{match.group(1)}.split_convs.weight"] = cut_into_tiles(value, small)
            count += 1
        else:
            cut[key] = value
    return cut, f"cut {count} strips into {small}x{small} tiles"
