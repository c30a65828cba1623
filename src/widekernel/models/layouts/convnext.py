"""Layouts of ConvNeXt: the official one, timm's, the isotropic one; and the rules that SLaK and Shift-wise share with it."""

from __future__ import annotations

from widekernel.models.layouts.layout import Layout, Rule

TAIL = (
    Rule("norm.{rest}", "head.norm.{rest}"),
    Rule("head.{rest}", "head.fc.{rest}"),
)


def backbone_rules(stages: int) -> tuple[Rule, ...]:
    """Stem and downsampling, which the official code keeps in one list."""
    between = tuple(Rule(f"downsample_layers.{i}.{{rest}}", f"stages.{i}.downsample.{{rest}}") for i in range(1, stages))
    return (Rule("downsample_layers.0.{rest}", "stem.{rest}"), *between)


def block_rules(official: str, native: str) -> tuple[Rule, ...]:
    """Everything in a ConvNeXt block but its spatial layer."""
    return (
        Rule(f"{official}.gamma", f"{native}.gamma"),
        Rule(f"{official}.norm.{{rest}}", f"{native}.norm.{{rest}}"),
        Rule(f"{official}.pwconv1.{{rest}}", f"{native}.mlp.fc1.{{rest}}"),
        Rule(f"{official}.pwconv2.{{rest}}", f"{native}.mlp.fc2.{{rest}}"),
    )


OFFICIAL_BLOCK, BLOCK = "stages.{i}.{j}", "stages.{i}.blocks.{j}"

# Official ConvNeXt weights into timm's network.
TIMM = Layout(
    "ConvNeXt",
    (
        *backbone_rules(4),
        Rule(f"{OFFICIAL_BLOCK}.dwconv.{{rest}}", f"{BLOCK}.conv_dw.{{rest}}"),
        *block_rules(OFFICIAL_BLOCK, BLOCK),
        *TAIL,
    ),
)

_ROADMAP_STEM = (
    Rule("downsample_layers.0.0.{rest}", "stem.0.conv.{rest}"),
    Rule("downsample_layers.0.1.{rest}", "stem.0.bn.{rest}"),
)

# Official and timm's ConvNeXt weights into the last step of the road.
ROADMAP = (
    Layout(
        "ConvNeXt",
        (
            *_ROADMAP_STEM,
            *backbone_rules(4)[1:],
            Rule(f"{OFFICIAL_BLOCK}.dwconv.{{rest}}", f"{BLOCK}.mixer.{{rest}}"),
            *block_rules(OFFICIAL_BLOCK, BLOCK),
            *TAIL,
        ),
    ),
    Layout(
        "timm's ConvNeXt",
        (
            Rule("stem.0.{rest}", "stem.0.conv.{rest}"),
            Rule("stem.1.{rest}", "stem.0.bn.{rest}"),
            Rule(f"{BLOCK}.conv_dw.{{rest}}", f"{BLOCK}.mixer.{{rest}}"),
            Rule("stages.{rest}", "stages.{rest}"),
            Rule("head.{rest}", "head.{rest}"),
        ),
    ),
)

ISOTROPIC = Layout(
    "isotropic ConvNeXt",
    (
        Rule("stem.{rest}", "stem.{rest}"),
        Rule("blocks.{i}.dwconv.{rest}", "stages.{i}.blocks.0.mixer.{rest}"),
        *block_rules("blocks.{i}", "stages.{i}.blocks.0"),
        *TAIL,
    ),
)
