"""ConvNets with very wide and very sparse kernels. Importing the package registers its networks with timm."""

from widekernel import ops, sparsity
from widekernel.layers import DepthwiseConv2d, LargeKernel, Rectangles, ShiftTiles
from widekernel.models import load_checkpoint, save_checkpoint
from widekernel.transforms.acceleration import accelerate
from widekernel.transforms.fold import fold

__version__ = "0.4.0"

__all__ = [
    "DepthwiseConv2d",
    "LargeKernel",
    "Rectangles",
    "ShiftTiles",
    "__version__",
    "accelerate",
    "fold",
    "load_checkpoint",
    "ops",
    "save_checkpoint",
    "sparsity",
]
