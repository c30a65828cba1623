"""Layouts of RepLKNet: the training form, and the merged and deeply fused forms turned back into it."""

from __future__ import annotations

import torch

from widekernel.models.layouts.layout import Layout, Rule, State, Wanted

_BLOCK = "stages.{i}.blocks.{j}"


def layouts(stages: int) -> tuple[Layout, ...]:
    """Give the one layout, which takes every official form."""
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
        *(Rule(f"transitions.{i - 1}.{{rest}}", f"stages.{i}.downsample.{{rest}}") for i in range(1, stages)),
        *branches,
        Rule(f"{_BLOCK}.{{rest}}", f"{_BLOCK}.{{rest}}"),
        Rule("stages.{i}.norm.{rest}", "feature_norms.{i}.{rest}"),
        Rule("norm.{rest}", "norm_pre.{rest}"),
        Rule("head.{rest}", "head.fc.{rest}"),
    )
    return (Layout("RepLKNet", rules, upgrade=unmerge),)


def unmerge(state: State, wanted: Wanted) -> tuple[State, str]:
    """Put merged kernels and fused biases back into the training form, which then computes the same.

    A merged kernel goes into the large branch and its bias into that branch's batch norm, which is set to pass everything
    on; the small branch becomes zero. The same with a norm that was fused into its convolution.
    """
    out, merged, fused = {}, 0, 0
    for key, value in state.items():
        if ".lkb_reparam." in key:
            layer = key.split(".lkb_reparam.")[0]
            if key.endswith("weight"):
                out[f"{layer}.lkb_origin.conv.weight"] = value
                out.update(_zero_branch(f"{layer}.small_conv", wanted))
                merged += 1
            else:
                out.update(_passing_norm(f"{layer}.lkb_origin.bn", value, wanted))
        elif key.endswith(".conv.bias") and f"{key[: -len('.conv.bias')]}.bn.weight" not in state:
            out.update(_passing_norm(f"{key[: -len('.conv.bias')]}.bn", value, wanted))
            fused += 1
        else:
            out[key] = value
    notes = []
    if merged:
        notes.append(f"{merged} merged kernels were put into the large branches, the small branches set to zero")
    if fused:
        notes.append(f"{fused} fused norms were put back as norms that only add a bias")
    return out, "; ".join(notes)


def _passing_norm(prefix: str, bias: torch.Tensor, wanted: Wanted) -> State:
    """Batch norm that adds `bias` and does nothing else in evaluation."""
    variance = 1.0 - wanted.eps.get(prefix, 0.0)
    return {
        f"{prefix}.weight": torch.ones_like(bias),
        f"{prefix}.bias": bias,
        f"{prefix}.running_mean": torch.zeros_like(bias),
        f"{prefix}.running_var": torch.full_like(bias, variance),
        f"{prefix}.num_batches_tracked": torch.tensor(0),
    }


def _zero_branch(prefix: str, wanted: Wanted) -> State:
    kernel = wanted.shapes.get(f"{prefix}.conv.weight")
    if kernel is None:
        return {}
    return {f"{prefix}.conv.weight": torch.zeros(kernel), **_passing_norm(f"{prefix}.bn", torch.zeros(kernel[0]), wanted)}
