"""Settings of `widekernel sparsify`: how a trained network is made sparse."""

from dataclasses import dataclass
from typing import Literal

from widekernel.errors import ConfigError
from widekernel.settings import require
from widekernel.sparsity.semi_structured.config import SEMI_STRUCTURED, current_name

Method = Literal["magnitude", "permuted", "learned"]


@dataclass(frozen=True)
class SparsifyConfig:
    """Settings that say how a trained network is made sparse.

    Args:
        method: which weights are kept: magnitude (the largest), permuted (the largest, after reordering channels so that
            less magnitude is lost; only with block semi_structured) or learned (masks trained on images; only with block
            semi_structured, and needs data)
        block: semi_structured (2:4: two of every four consecutive weights are kept), or the unit that is pruned as a whole:
            element, kernel, branch or channel
        sparsity: share of zeros; semi_structured is always 0.5
        layers: patterns of names to make sparse, separated by commas: names of layers with semi_structured, names of
            parameters with other blocks; null means all
        exclude: patterns of names to keep dense, in the same form
        axis: which four weights form a group with semi_structured: input channels at the same tap (channels), or
            consecutive elements of the flattened filters (im2col, as in the paper)
        seed: seed of the random choices
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
                f"method {self.method!r} creates 2:4 masks, but block is {self.block!r}: use method magnitude, or block "
                f"{SEMI_STRUCTURED}."
            )
        if self.block == SEMI_STRUCTURED and self.sparsity != 0.5:
            raise ConfigError(
                f"sparsity is {self.sparsity}, but block {SEMI_STRUCTURED} (2:4) keeps half: leave sparsity out, or use "
                "another block."
            )


@dataclass(frozen=True)
class MaskLearningConfig:
    """Settings of method learned: how masks are trained while the weights are frozen.

    Args:
        epochs: passes over the training images (method learned)
        lr: learning rate of the mask logits at the first step; it falls along half a cosine (method learned)
        batch_size: images per step of method learned, and per forward pass in evaluation
        device: device for learning masks and for evaluation: auto (CUDA if available), cpu, cuda or cuda:N
    """

    epochs: int = 1
    lr: float = 0.1
    batch_size: int = 128
    device: str = "auto"

    def __post_init__(self) -> None:
        require(self.epochs > 0, "epochs", self.epochs, "positive")
        require(self.lr > 0, "lr", self.lr, "positive")
        require(self.batch_size > 0, "batch_size", self.batch_size, "positive")
