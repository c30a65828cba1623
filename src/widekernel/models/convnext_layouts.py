"""The layout of ConvNeXt, into which timm's network can be loaded, and the rules that other families share with it."""

from __future__ import annotations

import timm.models

from widekernel.models.layouts.layout import Layout, Rule
from widekernel.models.layouts.registry import register_layouts, register_signature

OFFICIAL_BLOCK, BLOCK = "stages.{i}.{j}", "stages.{i}.blocks.{j}"
TAIL = (
    Rule("norm.{rest}", "head.norm.{rest}"),
    Rule("head.{rest}", "head.fc.{rest}"),
)
PART_ORDER = ("downsample_layers", "stages", "gamma", "dwconv", "norm", "pwconv1", "pwconv2", "head")

register_signature("ConvNeXt", r"^stages\.\d+\.\d+\.dwconv\.", "official")
register_signature("timm's ConvNeXt", r"^stages\.\d+\.blocks\.\d+\.conv_dw\.", "official")


def backbone_rules(num_stages: int) -> tuple[Rule, ...]:
    """Return the rules for stem and downsampling, which are one module list in the official code."""
    between = (Rule(f"downsample_layers.{i}.{{rest}}", f"stages.{i}.downsample.{{rest}}") for i in range(1, num_stages))
    return (Rule("downsample_layers.0.{rest}", "stem.{rest}"), *between)


def block_rules(official: str, native: str) -> tuple[Rule, ...]:
    """Return the rules for all parts of a ConvNeXt block except its spatial layer.

    Args:
        official: template of the official keys' prefix.
        native: template of our keys' prefix.
    """
    return (
        Rule(f"{official}.gamma", f"{native}.gamma"),
        Rule(f"{official}.norm.{{rest}}", f"{native}.norm.{{rest}}"),
        Rule(f"{official}.pwconv1.{{rest}}", f"{native}.mlp.fc1.{{rest}}"),
        Rule(f"{official}.pwconv2.{{rest}}", f"{native}.mlp.fc2.{{rest}}"),
    )


@register_layouts(timm.models.ConvNeXt)
def timm_convnext_layouts(model: timm.models.ConvNeXt) -> tuple[Layout, ...]:
    """Return the official layout, for timm's network."""
    rules = (
        *backbone_rules(4),
        Rule(f"{OFFICIAL_BLOCK}.dwconv.{{rest}}", f"{BLOCK}.conv_dw.{{rest}}"),
        *block_rules(OFFICIAL_BLOCK, BLOCK),
        *TAIL,
    )
    return (Layout("ConvNeXt", rules, PART_ORDER),)
