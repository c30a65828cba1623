"""ConvNets with very wide and very sparse kernels. Importing the package registers its networks with timm."""

import sys
from typing import TYPE_CHECKING

from widekernel.lazy import attach

if TYPE_CHECKING:
    from widekernel import ops, sparsity
    from widekernel.layers import DepthwiseConv2d, LargeKernel, Rectangles, ShiftTiles
    from widekernel.models import load_checkpoint, save_checkpoint
    from widekernel.transforms.acceleration import accelerate
    from widekernel.transforms.fold import fold
    from widekernel.transforms.to_torch import to_torch

__version__ = "0.6.0"

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
    "to_torch",
]

_WHERE = {
    "DepthwiseConv2d": "widekernel.layers",
    "LargeKernel": "widekernel.layers",
    "Rectangles": "widekernel.layers",
    "ShiftTiles": "widekernel.layers",
    "accelerate": "widekernel.transforms.acceleration",
    "fold": "widekernel.transforms.fold",
    "layers": "widekernel.layers",
    "load_checkpoint": "widekernel.models",
    "models": "widekernel.models",
    "ops": "widekernel.ops",
    "save_checkpoint": "widekernel.models",
    "sparsity": "widekernel.sparsity",
    "to_torch": "widekernel.transforms.to_torch",
    "transforms": "widekernel.transforms",
}
__getattr__, __dir__ = attach(__name__, _WHERE)


def _is_the_command() -> bool:
    """Return whether this process is the command line, which imports the networks only where a command needs them."""
    if "widekernel_command" in sys.modules:
        return True
    # `python -m widekernel`: while Python imports the package, sys.argv[0] is still "-m".
    arguments = sys.argv[1:]
    interpreter = sys.orig_argv[: len(sys.orig_argv) - len(arguments)]
    return sys.argv[:1] == ["-m"] and (interpreter[-2:] == ["-m", "widekernel"] or interpreter[-1:] == ["-mwidekernel"])


if not _is_the_command():
    import widekernel.models  # noqa: F401 - registers the networks
