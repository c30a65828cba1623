"""Large-kernel layers, their kernel sources and their folded forms."""

from widekernel.layers.batch_norm import NativeBatchNorm2d
from widekernel.layers.conv import DepthwiseConv2d
from widekernel.layers.conv_norm import ConvNorm
from widekernel.layers.folding import Foldable, Folded
from widekernel.layers.hidden_units import Compactable, HiddenUnits
from widekernel.layers.large_kernel import FoldedLargeKernel, LargeKernel
from widekernel.layers.partial import FoldedPartialChannels, PartialChannels
from widekernel.layers.pointwise import PointwiseConv2d, PointwiseGradConv2d, PointwiseLinear
from widekernel.layers.rect import Rect, maximal_rectangles
from widekernel.layers.shift_tiles import ShiftTiles
from widekernel.layers.sources import KernelSource, Rectangles, RectSource, SourceGroup
from widekernel.layers.strips import SharedStrips, ShuffledStrips, SplitStrips
from widekernel.layers.truncated import TruncatedTiles

__all__ = [
    "Compactable",
    "ConvNorm",
    "DepthwiseConv2d",
    "Foldable",
    "Folded",
    "FoldedLargeKernel",
    "FoldedPartialChannels",
    "HiddenUnits",
    "KernelSource",
    "LargeKernel",
    "NativeBatchNorm2d",
    "PartialChannels",
    "PointwiseConv2d",
    "PointwiseGradConv2d",
    "PointwiseLinear",
    "Rect",
    "RectSource",
    "Rectangles",
    "SharedStrips",
    "ShiftTiles",
    "ShuffledStrips",
    "SourceGroup",
    "SplitStrips",
    "TruncatedTiles",
    "maximal_rectangles",
]
