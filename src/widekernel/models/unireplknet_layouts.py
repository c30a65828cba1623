"""The official layouts of UniRepLKNet: the training form and the merged one, which is that of the folded network."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import torch

from widekernel.layers.folding import is_folded
from widekernel.models.convnext_layouts import BLOCK, OFFICIAL_BLOCK, TAIL, backbone_rules
from widekernel.models.layouts.layout import Expected, Layout, Rule, State
from widekernel.models.layouts.registry import ANY_FOLDED, BLOCK_KEY, register_layouts, register_signature
from widekernel.models.replknet_layouts import bias_only_norm, zero_branch
from widekernel.models.shiftwise_layouts import RESPONSE_NORM_BLOCK
from widekernel.models.unireplknet import DILATED_BRANCHES, SMALL_KERNELS, UniRepLKNet

_TRAINING, _MERGED = "UniRepLKNet", "a merged UniRepLKNet"
_OFFICIAL_KEY = r"^stages\.\d+\.\d+\."
# In the official networks, branches are defined in the order of their dilations.
_BRANCHES = sorted({branch for branches in DILATED_BRANCHES.values() for branch in branches}, key=lambda b: (b[1], b[0]))
_PART_ORDER = (
    *("downsample_layers", "stages", "gamma", "beta", "lk_origin", "origin_bn"),
    *(f"dil_{kind}_k{side}_{dilation}" for side, dilation in _BRANCHES for kind in ("conv", "bn")),
    *("dwconv", "norm", "down", "up", "se", "pwconv1", "act", "pwconv2", "head"),
)

register_signature(
    _TRAINING,
    rf"{_OFFICIAL_KEY}pwconv2\.2\.",
    "official",
    over=("ShiftWise_v2", "ConvNeXt"),
    without=rf"{_OFFICIAL_KEY}large_kernel\.",
)
register_signature(_MERGED, rf"{_OFFICIAL_KEY}pwconv2\.0\.bias$", "official", over=("ConvNeXt",))
register_signature(
    "widekernel's UniRepLKNet",
    rf"{BLOCK_KEY}mlp\.norm\.weight$",
    "native",
    over=("widekernel's ShiftWise_v2", "widekernel's SLaK"),
    without=rf"{BLOCK_KEY}mixer\.layer\.",
)
register_signature(
    "a folded UniRepLKNet",
    rf"{BLOCK_KEY}mlp\.norm\.weight$",
    "folded",
    over=("a folded SLaK", ANY_FOLDED),
    without=rf"{BLOCK_KEY}(mixer\.(layer|source)|norm2)\.",
)


@register_layouts(UniRepLKNet)
def unireplknet_layouts(model: UniRepLKNet) -> tuple[Layout, ...]:
    """Return the layouts that the network can be loaded from: a folded network has only the merged one."""
    around = (*backbone_rules(len(model.cfg.dims)), *RESPONSE_NORM_BLOCK)
    if is_folded(model):
        rules = (*around, *_spatial_rules(model, merged=True), *TAIL)
        return (Layout(_MERGED, rules, _PART_ORDER, (r"\.mixer\.anchor_table$",), folded=True),)
    rules = (*around, *_spatial_rules(model, merged=False), *TAIL)
    training = Layout(_TRAINING, rules, _PART_ORDER, upgrade=_without_biases)
    return training, replace(training, family=_MERGED, upgrade=_unmerge)


def _spatial_rules(model: UniRepLKNet, merged: bool) -> Iterator[Rule]:
    """Yield the rules for the depthwise layer of every block; there, our number of a branch depends on the kernel size."""
    for i, stage in enumerate(model.cfg.block_kernels()):
        for j, size in enumerate(stage):
            official = OFFICIAL_BLOCK.format(i=i, j=j) + ".dwconv"
            ours = BLOCK.format(i=i, j=j) + ".mixer"
            large = official if size in SMALL_KERNELS else f"{official}.lk_origin"
            if merged and size:
                yield Rule(f"{large}.weight", f"{ours}.kernels.0")
                yield Rule(f"{large}.bias", f"{ours}.bias")
            elif size:
                yield Rule(f"{large}.weight", f"{ours}.source.kernels.0")
            if not merged and size in DILATED_BRANCHES:
                yield Rule(f"{official}.origin_bn.{{rest}}", f"{ours}.norms.0.{{rest}}")
                for k, (side, dilation) in enumerate(DILATED_BRANCHES[size], 1):
                    yield Rule(f"{official}.dil_conv_k{side}_{dilation}.weight", f"{ours}.source.kernels.{k}")
                    yield Rule(f"{official}.dil_bn_k{side}_{dilation}.{{rest}}", f"{ours}.norms.{k}.{{rest}}")


def _without_biases(state: State, expected: Expected) -> tuple[State, str]:
    """Move the biases of small kernels, which the first published files had, into the norms that follow."""
    out, moved = dict(state), 0
    for key in state:
        block = key.removesuffix(".dwconv.bias")
        mean = f"{block}.norm.running_mean"
        if block != key and mean in state:
            out[mean] = state[mean] - out.pop(key)
            moved += 1
    return out, f"{moved} biases of small kernels were moved into the norms that follow" if moved else ""


def _unmerge(state: State, expected: Expected) -> tuple[State, str]:
    """Convert merged weights to the training form, which then computes the same function.

    A merged kernel becomes the large branch; the other branches are zero. Biases become those of norms that otherwise change
    nothing, the response norm has no bias, and the layer scale is 1.
    """
    out, blocks = {}, set()
    for key, value in state.items():
        match = re.fullmatch(r"(.*stages\.\d+\.\d+)\.(.*)", key)
        if match is None:
            out[key] = value
            continue
        block, part = match.groups()
        blocks.add(block)
        if part in ("dwconv.lk_origin.bias", "dwconv.bias"):
            out.update(bias_only_norm(f"{block}.norm", value, expected))
        elif part == "pwconv2.0.bias":
            out.update(bias_only_norm(f"{block}.pwconv2.2", value, expected))
            if f"{block}.gamma" in expected.shapes:
                out[f"{block}.gamma"] = torch.ones_like(value)
        else:
            out[key] = value
            if part == "dwconv.lk_origin.weight":
                out.update(bias_only_norm(f"{block}.dwconv.origin_bn", torch.zeros(len(value)), expected))
                out.update(_zero_branches(f"{block}.dwconv", expected))
            elif part == "act.1.gamma":
                out[f"{block}.act.1.beta"] = torch.zeros_like(value)
    what = "the other branches are zero, the norms only add biases"
    return out, f"{len(blocks)} merged blocks were put into the training form: {what}"


def _zero_branches(layer: str, expected: Expected) -> State:
    """Return the state of the dilated branches of a layer, all zero."""
    out: State = {}
    for side, dilation in _BRANCHES:
        name = f"k{side}_{dilation}"
        out.update(zero_branch(f"{layer}.dil_conv_{name}", f"{layer}.dil_bn_{name}", expected))
    return out
