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
register_signature("torchvision's ConvNeXt", r"^features\.\d+\.\d+\.block\.", "official")


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


def torchvision_layout(stem: tuple[str, str], mixer: str) -> Layout:
    """Return torchvision's layout, whose stages and downsamplings are one list.

    Args:
        stem: our prefixes of the convolution and of the norm in the stem.
        mixer: our name of the spatial layer in a block.
    """
    inside = {0: mixer, 2: "norm", 3: "mlp.fc1", 5: "mlp.fc2"}
    rules = [Rule(f"features.0.{k}.{{rest}}", f"{stem[k]}.{{rest}}") for k in range(2)]
    for i in range(4):
        block, ours = f"features.{2 * i + 1}.{{j}}", f"stages.{i}.blocks.{{j}}"
        if i > 0:
            rules.append(Rule(f"features.{2 * i}.{{rest}}", f"stages.{i}.downsample.{{rest}}"))
        rules.append(Rule(f"{block}.layer_scale", f"{ours}.gamma", official_dims=3, channels_first=True))
        rules += [Rule(f"{block}.block.{k}.{{rest}}", f"{ours}.{name}.{{rest}}") for k, name in inside.items()]
    tail = (Rule("classifier.0.{rest}", "head.norm.{rest}"), Rule("classifier.2.{rest}", "head.fc.{rest}"))
    return Layout("torchvision's ConvNeXt", (*rules, *tail))


@register_layouts(timm.models.ConvNeXt)
def timm_convnext_layouts(model: timm.models.ConvNeXt) -> tuple[Layout, ...]:
    """Return the official layout and torchvision's, for timm's network."""
    rules = (
        *backbone_rules(4),
        Rule(f"{OFFICIAL_BLOCK}.dwconv.{{rest}}", f"{BLOCK}.conv_dw.{{rest}}"),
        *block_rules(OFFICIAL_BLOCK, BLOCK),
        *TAIL,
    )
    return Layout("ConvNeXt", rules, PART_ORDER), torchvision_layout(("stem.0", "stem.1"), "conv_dw")
