"""Settings of `widekernel sparsify`: how a trained network is made sparse."""

from dataclasses import dataclass
from typing import Literal

from widekernel.errors import ConfigError
from widekernel.settings import require
from widekernel.sparsity.semi_structured.config import SEMI_STRUCTURED, current_name

Method = Literal["magnitude", "permuted", "learned"]


@dataclass(frozen=True)
class SparsifyConfig:
    """How a trained network is made sparse.

    Args:
        method: which weights are kept: magnitude (the largest), permuted (the largest after channels were reordered so that
            less is lost; semi_structured only) or learned (masks trained on images; semi_structured only, needs data)
        block: semi_structured (2:4: two of four input channels are kept), or what is pruned together: element, kernel,
            branch or channel
        sparsity: share of zeros, for blocks other than semi_structured
        layers: name patterns of what becomes sparse (semi_structured: of layers; else of parameters), separated by commas;
            default: all
        exclude: name patterns of what stays dense, likewise
        axis: what a group of four weights is: consecutive input channels of a tap (channels), or of the flattened filters
            (im2col, as in the paper)
        seed: of random choices
    """

    method: Method = "magnitude"
    block: str = SEMI_STRUCTURED
    sparsity: float = 0.5
    layers: str | None = None
    exclude: str | None = None
    axis: Literal["channels", "im2col"] = "channels"
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", current_name("block", self.block))
        if self.method != "magnitude" and self.block != SEMI_STRUCTURED:
            raise ConfigError(
                f"method {self.method!r} makes masks 2:4, but block is {self.block!r}: use method magnitude, or block "
                f"{SEMI_STRUCTURED}."
            )
        if self.block == SEMI_STRUCTURED and self.sparsity != 0.5:
            raise ConfigError(
                f"sparsity is {self.sparsity}, but block {SEMI_STRUCTURED} (2:4) keeps half: leave it out, or use another "
                "block."
            )


@dataclass(frozen=True)
class MaskLearningConfig:
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
