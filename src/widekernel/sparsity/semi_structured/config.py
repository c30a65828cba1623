"""Settings of semi-structured (2:4) sparsity, and the value that selects it in other settings."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal, TypeVar

from widekernel.errors import ArgumentError, nearest
from widekernel.settings import require, require_one_of

SEMI_STRUCTURED: Literal["semi_structured"] = "semi_structured"
OLD_NAME = "2:4"  # in settings, saved runs and training states up to version 0.4

METHODS = ("magnitude", "permuted", "learned")
Axis = Literal["channels", "im2col", "taps"]
AXES: tuple[Axis, ...] = ("channels", "im2col", "taps")


T = TypeVar("T")


def current_name(setting: str, value: T) -> T | str:
    """Return the value of a setting; replace the old name by `SEMI_STRUCTURED`, with a `FutureWarning`."""
    if value != OLD_NAME:
        return value
    warnings.warn(
        f"{setting} {OLD_NAME!r} is now called {SEMI_STRUCTURED!r}; the old name will stop working in the next version",
        FutureWarning,
        stacklevel=4,
    )
    return SEMI_STRUCTURED


def check_axis(axis: str) -> None:
    """Raise an `ArgumentError` unless `axis` is one of `AXES`."""
    if axis not in AXES:
        raise ArgumentError(
            f"axis {axis!r} is unknown: it must be one of {', '.join(map(repr, AXES))}.{nearest(axis, AXES)}"
        )


@dataclass(frozen=True)
class SemiStructuredConfig:
    """Settings of 2:4 sparsity: which layers to mask, and how to find the masks.

    A learned mask is a categorical variable over the six patterns for each group of four, drawn with the Gumbel-softmax
    trick while the weights are frozen (Danhofer, arXiv 2411.00288). The temperature falls exponentially. The default has a
    constant logit scale and no weight regularizer on purpose: a patent application (US-2025/0335769-A1, MaskLLM) covers
    scaled logits with that regularizer, so they must be chosen explicitly.

    Args:
        method: how the masks are found: magnitude (keep the two largest of every four weights), permuted (the same, after
            reordering channels so that less magnitude is lost) or learned (train the choice while the weights are frozen)
        axis: which four weights form a group: channels (four input channels at the same tap, as hardware requires), im2col
            (four consecutive elements of the flattened filters, as in the paper) or taps (four taps of a depthwise kernel;
            only for studies of accuracy)
        layers: all, or names of the layers to mask, with * and ? as wildcards
        exclude: names of layers to keep dense, with * and ? as wildcards
        min_in_channels: layers with fewer input channels stay dense
        min_out_channels: layers with fewer output channels stay dense
        total_steps: optimizer steps over which temperature and logit scale change; `widekernel train` uses the length of
            the run
        tau_start: Gumbel-softmax temperature at the first step
        tau_end: Gumbel-softmax temperature at the last step
        kappa_start: logit scale (factor on the logits) at the first step
        kappa_end: logit scale at the last step; it changes linearly
        prior_strength: initial logit of the pattern that keeps the two largest weights
        entropy_penalty: coefficient, in the loss, of the mean entropy of the choices
        weight_regularization: coefficient of the squared norm of the kept weights, which is subtracted from the loss
        freeze_norms: keep batch norms in evaluation mode while masks are learned, so that their statistics do not change
        permutation_rounds: rounds in which pairs of stripes (four channels each) exchange channels; limits the search time
        permutation_escapes: how often the search may leave a local optimum by random exchanges
        seed: seed of the Gumbel noise and of the permutation search
    """

    method: Literal["magnitude", "permuted", "learned"] = "magnitude"
    axis: Literal["channels", "im2col", "taps"] = "channels"
    layers: Literal["all"] | tuple[str, ...] = "all"
    exclude: tuple[str, ...] = ()
    min_in_channels: int = 16
    min_out_channels: int = 8
    total_steps: int = 1000
    tau_start: float = 4.0
    tau_end: float = 0.05
    kappa_start: float = 1.0
    kappa_end: float = 1.0
    prior_strength: float = 3.0
    entropy_penalty: float = 0.01
    weight_regularization: float = 0.0
    freeze_norms: bool = True
    permutation_rounds: int = 200
    permutation_escapes: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        require_one_of("method", self.method, METHODS)
        check_axis(self.axis)
        if self.method == "permuted" and self.axis != "channels":
            raise ArgumentError(
                f"method 'permuted' reorders channels, but axis={self.axis!r} groups other weights: use axis='channels'"
            )
        if isinstance(self.layers, str):
            if self.layers != "all":
                raise ArgumentError(f"layers={self.layers!r} must be 'all' or a tuple of names: write ({self.layers!r},)")
        else:
            object.__setattr__(self, "layers", tuple(self.layers))
        if isinstance(self.exclude, str):
            raise ArgumentError(f"exclude={self.exclude!r} must be a tuple of names: write ({self.exclude!r},)")
        object.__setattr__(self, "exclude", tuple(self.exclude))
        for field in ("min_in_channels", "min_out_channels", "total_steps"):
            require(getattr(self, field) >= 1, field, getattr(self, field), "1 or more")
        for field in ("tau_start", "tau_end", "kappa_start", "kappa_end"):
            require(0 < getattr(self, field) < float("inf"), field, getattr(self, field), "positive")
        require(self.tau_end <= self.tau_start, "tau_end", self.tau_end, f"at most tau_start ({self.tau_start})")
        for field in ("prior_strength", "entropy_penalty", "weight_regularization"):
            require(0 <= getattr(self, field) < float("inf"), field, getattr(self, field), "0 or more")
        for field in ("permutation_rounds", "permutation_escapes", "seed"):
            require(getattr(self, field) >= 0, field, getattr(self, field), "0 or more")
