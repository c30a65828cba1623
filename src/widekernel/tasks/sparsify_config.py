"""How a trained network is made sparse: the settings of ``widekernel sparsify``."""

from dataclasses import dataclass
from typing import Literal

from widekernel.errors import ConfigError
from widekernel.settings import require

Method = Literal["magnitude", "permuted", "learned"]


@dataclass(frozen=True)
class SparsifyConfig:
    """How a trained network becomes sparse.

    Args:
        method: which weights stay: those of the largest magnitude; the same after channels were reordered so that this loses
            less (2:4 only); or those that training the masks on images finds (2:4 only, needs data)
        block: 2:4 (two of four input channels), or what is zero together: element, kernel, branch, channel
        sparsity: share of zeros, for other blocks than 2:4
        layers: name patterns of what becomes sparse (2:4: of layers; else of parameters), separated by commas; default: all
        exclude: name patterns of what stays dense, likewise
        axis: what four weights form a group: consecutive input channels of a tap (channels), or of the flattened filters
            (im2col, as in the paper)
        seed: of random choices
    """

    method: Method = "magnitude"
    block: str = "2:4"
    sparsity: float = 0.5
    layers: str | None = None
    exclude: str | None = None
    axis: Literal["channels", "im2col"] = "channels"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method != "magnitude" and self.block != "2:4":
            raise ConfigError(f"method {self.method!r} makes masks 2:4, but block is {self.block!r}: use method magnitude.")
        if self.block == "2:4" and self.sparsity != 0.5:
            raise ConfigError(f"sparsity is {self.sparsity}, but block 2:4 keeps half: leave it out, or use another block.")


@dataclass(frozen=True)
class LearningConfig:
    """How masks are learned over frozen weights.

    Args:
        epochs: passes over the training images
        lr: learning rate of the logits at the first step, from which it falls along half a cosine
        batch_size: images per step
        device: auto, cpu, cuda or cuda:N
    """

    epochs: int = 1
    lr: float = 0.1
    batch_size: int = 128
    device: str = "auto"

    def __post_init__(self) -> None:
        require(self.epochs > 0, "epochs", self.epochs, "positive")
        require(self.lr > 0, "lr", self.lr, "positive")
        require(self.batch_size > 0, "batch_size", self.batch_size, "positive")
