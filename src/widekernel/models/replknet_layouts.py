"""The official layout of RepLKNet; merged and deeply fused forms are converted to the training form."""

from __future__ import annotations

import re

import torch

from widekernel.models.layouts.layout import Expected, Layout, Rule, State
from widekernel.models.layouts.registry import (
    ANY_FOLDED,
    BLOCK_KEY,
    register_layouts,
    register_rewriting,
    register_signature,
)
from widekernel.models.replknet import RepLKNet

_BLOCK = "stages.{i}.blocks.{j}"
_PART_ORDER = (
    *("stem", "stages", "transitions", "lkb_origin", "conv", "small_conv", "bn", "preffn_bn", "pw1", "pw2"),
    *("large_kernel", "prelkb_bn", "norm", "head"),
)

register_signature("RepLKNet", rf"{BLOCK_KEY}large_kernel\.lkb_", "official")
register_signature("a folded RepLKNet", rf"{BLOCK_KEY}large_kernel\.kernels\.\d+$", "folded", over=(ANY_FOLDED,))
register_signature(
    "widekernel's RepLKNet",
    rf"{BLOCK_KEY}large_kernel\.source\.",
    "native",
    over=("a step of widekernel's roadmap",),
)


@register_layouts(RepLKNet)
def replknet_layouts(model: RepLKNet) -> tuple[Layout, ...]:
    """Return the layout of the official network; all official forms can be loaded."""
    branches = [
        rule
        for branch, name in enumerate(("lkb_origin", "small_conv"))
        for rule in (
            Rule(f"{_BLOCK}.large_kernel.{name}.conv.weight", f"{_BLOCK}.large_kernel.source.kernels.{branch}"),
            Rule(f"{_BLOCK}.large_kernel.{name}.bn.{{rest}}", f"{_BLOCK}.large_kernel.norms.{branch}.{{rest}}"),
        )
    ]
    rules = (
        Rule("stem.{rest}", "stem.{rest}"),
        # The transition after stage i is the downsampling of stage i + 1 here.
        *(Rule(f"transitions.{i - 1}.{{rest}}", f"stages.{i}.downsample.{{rest}}") for i in range(1, len(model.cfg.dims))),
        *branches,
        Rule(f"{_BLOCK}.{{rest}}", f"{_BLOCK}.{{rest}}"),
        Rule("stages.{i}.norm.{rest}", "feature_norms.{i}.{rest}"),
        Rule("norm.{rest}", "norm_pre.{rest}"),
        Rule("head.{rest}", "head.fc.{rest}"),
    )
    return (Layout("RepLKNet", rules, _PART_ORDER, upgrade=unmerge),)


@register_rewriting("OpenMMLab's RepLKNet classifier")
def from_openmmlab(state: State) -> State | None:
    """Return the weights of OpenMMLab's classifier under the authors' names; None if the state dict is of another network.

    There, the norm before the pooling belongs to the last stage.
    """
    layer = re.compile(r"backbone\.stages\.(\d+)\.blocks\.\d+\.large_kernel\.lkb_")
    stages = [int(match[1]) for key in state if (match := layer.match(key))]
    if not stages or "head.fc.weight" not in state:
        return None
    norm = f"backbone.stages.{max(stages)}.norm."
    renamed = {norm: "norm.", "backbone.": "", "head.fc.": "head."}
    out = {}
    for key, value in state.items():
        prefix = next((prefix for prefix in renamed if key.startswith(prefix)), "")
        out[renamed.get(prefix, "") + key.removeprefix(prefix)] = value
    return out


def unmerge(state: State, expected: Expected) -> tuple[State, str]:
    """Convert merged kernels and fused norms to the training form, which then computes the same function.

    A merged kernel becomes the large branch, and its bias becomes that of the branch's batch norm, which is otherwise the
    identity. The small branch is set to zero. A norm that was fused into its convolution also becomes such a bias-only norm.
    """
    out, merged, fused = {}, 0, 0
    for key, value in state.items():
        if ".lkb_reparam." in key:
            layer = key.split(".lkb_reparam.")[0]
            if key.endswith("weight"):
                out[f"{layer}.lkb_origin.conv.weight"] = value
                out.update(zero_branch(f"{layer}.small_conv.conv", f"{layer}.small_conv.bn", expected))
                merged += 1
            else:
                out.update(bias_only_norm(f"{layer}.lkb_origin.bn", value, expected))
        elif key.endswith(".conv.bias") and f"{key[: -len('.conv.bias')]}.bn.weight" not in state:
            out.update(bias_only_norm(f"{key[: -len('.conv.bias')]}.bn", value, expected))
            fused += 1
        else:
            out[key] = value
    notes = []
    if merged:
        notes.append(f"{merged} merged kernels were put into the large branches, the small branches set to zero")
    if fused:
        notes.append(f"{fused} fused norms were put back as norms that only add a bias")
    return out, "; ".join(notes)


def bias_only_norm(prefix: str, bias: torch.Tensor, expected: Expected) -> State:
    """Return the state of a batch norm, by its official name, that only adds `bias` in evaluation."""
    variance = 1.0 - expected.eps.get(prefix, 0.0)
    return {
        f"{prefix}.weight": torch.ones_like(bias),
        f"{prefix}.bias": bias,
        f"{prefix}.running_mean": torch.zeros_like(bias),
        f"{prefix}.running_var": torch.full_like(bias, variance),
        f"{prefix}.num_batches_tracked": torch.tensor(0),
    }


def zero_branch(conv: str, norm: str, expected: Expected) -> State:
    """Return the state of a branch of zeros, by its official names; empty if the network has no such branch."""
    kernel = expected.shapes.get(f"{conv}.weight")
    if kernel is None:
        return {}
    return {f"{conv}.weight": torch.zeros(kernel), **bias_only_norm(norm, torch.zeros(kernel[0]), expected)}
