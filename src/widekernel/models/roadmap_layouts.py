"""The layouts of ConvNeXt, official and timm's, for the last step of the roadmap; the other steps have no official code."""

from __future__ import annotations

from widekernel.models.convnext_layouts import (
    BLOCK,
    OFFICIAL_BLOCK,
    PART_ORDER,
    TAIL,
    backbone_rules,
    block_rules,
    torchvision_layout,
)
from widekernel.models.layouts.layout import Layout, Rule
from widekernel.models.layouts.registry import register_layouts, register_signature
from widekernel.models.roadmap import Roadmap

register_signature(
    "a step of widekernel's roadmap",
    r"^stem\.0\.conv\.weight$",
    "native",
    over=("widekernel's isotropic ConvNeXt",),
)

_OFFICIAL = Layout(
    "ConvNeXt",
    (
        Rule("downsample_layers.0.0.{rest}", "stem.0.conv.{rest}"),
        Rule("downsample_layers.0.1.{rest}", "stem.0.bn.{rest}"),
        *backbone_rules(4)[1:],
        Rule(f"{OFFICIAL_BLOCK}.dwconv.{{rest}}", f"{BLOCK}.mixer.{{rest}}"),
        *block_rules(OFFICIAL_BLOCK, BLOCK),
        *TAIL,
    ),
    PART_ORDER,
)
_TIMM = Layout(
    "timm's ConvNeXt",
    (
        Rule("stem.0.{rest}", "stem.0.conv.{rest}"),
        Rule("stem.1.{rest}", "stem.0.bn.{rest}"),
        Rule(f"{BLOCK}.conv_dw.{{rest}}", f"{BLOCK}.mixer.{{rest}}"),
        Rule("stages.{rest}", "stages.{rest}"),
        Rule("head.{rest}", "head.{rest}"),
    ),
)
_TORCHVISION = torchvision_layout(("stem.0.conv", "stem.0.bn"), "mixer")


@register_layouts(Roadmap)
def roadmap_layouts(model: Roadmap) -> tuple[Layout, ...]:
    """Return the layouts of ConvNeXt for the last step, and none for the other steps."""
    return (_OFFICIAL, _TIMM, _TORCHVISION) if model.cfg.separate_downsample else ()
