"""Layouts of SLaK, SLaK_reg and SLaK_pww, and the split of SLaK's strips into the tiles of SLaK_reg."""

from __future__ import annotations

import re
from dataclasses import replace

from widekernel.layers.tiles import cut_into_tiles
from widekernel.models.layouts.convnext import BLOCK, OFFICIAL_BLOCK, TAIL, backbone_rules, block_rules
from widekernel.models.layouts.layout import Layout, Rule, State, Wanted
from widekernel.models.layouts.replknet import unmerge

_LAYER, _OURS = f"{OFFICIAL_BLOCK}.large_kernel", f"{BLOCK}.mixer"


def layouts(strips: str, decomposed: bool, small: int, stages: int) -> tuple[Layout, ...]:
    """Give the layouts that a SLaK of this kind can be loaded from; the first is the one it is written in.

    Args:
        strips: what its strips are made of, as in `SLaKConfig`.
        decomposed: strips instead of squares.
        small: N.
        stages: number of stages.
    """
    if strips == "free":
        names = ("LoRA1", "LoRA2", "small_conv") if decomposed else ("lkb_origin", "small_conv")
        layout = _layout("SLaK", [rule for i, name in enumerate(names) for rule in _conv_bn(name, i)], stages)
        # Without strips the official code can merge the squares as RepLKNet's does.
        return (layout if decomposed else replace(layout, upgrade=unmerge),)
    square = [
        Rule(f"{_LAYER}.small_conv.conv.weight", f"{_OURS}.source.sources.1.kernels.0"),
        Rule(f"{_LAYER}.small_conv.bn.{{rest}}", f"{_OURS}.norms.2.{{rest}}"),
    ]
    if strips == "split":
        rules = [*_split("LoRA1", "tall", 0), *_split("LoRA2", "wide", 1), *square]
        whole = _layout("SLaK_reg", rules, stages)

        def cut(state: State, wanted: Wanted) -> tuple[State, str]:
            return _cut_strips(state, small)

        return whole, Layout("SLaK", whole.rules, upgrade=cut)
    if strips == "shared":
        return (_layout("SLaK_pww", [*_shared(), *square], stages),)
    return ()


def _layout(family: str, rules: list[Rule], stages: int) -> Layout:
    return Layout(family, (*backbone_rules(stages), *rules, *block_rules(OFFICIAL_BLOCK, BLOCK), *TAIL))


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
    cut, count = {}, 0
    for key, value in state.items():
        match = re.fullmatch(r"(.*\.LoRA[12])\.conv\.weight", key)
        if match:
            cut[f"{match.group(1)}.split_convs.weight"] = cut_into_tiles(value, small)
            count += 1
        else:
            cut[key] = value
    return cut, f"cut {count} strips into {small}x{small} tiles"
