"""The official layout of isotropic ConvNeXt."""

from __future__ import annotations

from widekernel.models.convnext_layouts import TAIL, block_rules
from widekernel.models.isotropic import ConvNeXtIsotropic
from widekernel.models.layouts.layout import Layout, Rule
from widekernel.models.layouts.registry import BLOCK_KEY, register_layouts, register_signature

register_signature("isotropic ConvNeXt", r"^blocks\.\d+\.dwconv\.", "official")
register_signature("widekernel's isotropic ConvNeXt", rf"{BLOCK_KEY}mixer\.weight$", "native")

_LAYOUT = Layout(
    "isotropic ConvNeXt",
    (
        Rule("stem.{rest}", "stem.{rest}"),
        Rule("blocks.{i}.dwconv.{rest}", "stages.{i}.blocks.0.mixer.{rest}"),
        *block_rules("blocks.{i}", "stages.{i}.blocks.0"),
        *TAIL,
    ),
    part_order=("stem", "blocks", "gamma", "dwconv", "norm", "pwconv1", "pwconv2", "head"),
)


@register_layouts(ConvNeXtIsotropic)
def isotropic_layouts(model: ConvNeXtIsotropic) -> tuple[Layout, ...]:
    """Return the official layout."""
    return (_LAYOUT,)
