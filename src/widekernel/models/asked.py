"""What a network is asked for beside its architecture, as timm asks its ConvNeXt: channels, strides, norms, activation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from timm.layers import (
    LayerNorm,
    LayerNorm2d,
    RmsNorm,
    RmsNorm2d,
    SimpleNorm,
    SimpleNorm2d,
    calculate_drop_path_rates,
    get_act_layer,
    get_norm_layer,
)
from torch import nn

from widekernel.errors import ArgumentError, nearest

OUTPUT_STRIDES = (8, 16, 32)
# For maps (N, C, H, W) and for (N, H, W, C).
_CHANNEL_NORMS: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    "layernorm": (LayerNorm2d, LayerNorm),
    "rmsnorm": (RmsNorm2d, RmsNorm),
    "simplenorm": (SimpleNorm2d, SimpleNorm),
}


@dataclass(frozen=True)
class Step:
    """How one stage follows the one before it.

    Attributes:
        stride: of its downsampling.
        dilation_before: of its downsampling, where that has lost its stride.
        dilation: of the spatial layers of its blocks.
        reduction: stride of its output against the image.
    """

    stride: int
    dilation_before: int
    dilation: int
    reduction: int


@dataclass(frozen=True)
class Asked:
    """What the user of a network may choose for every family.

    Attributes:
        in_chans: channels of the image.
        rates: drop-path rate of every block, listed by stage.
        output_stride: the stride that the network shall not exceed, 8, 16 or 32; None for its own.
        act_layer: name or maker of the activation in the place of the family's own; None for that.
        norm_layer: name or maker of the normalisation in the place of the family's own; None for that.
    """

    in_chans: int
    rates: Sequence[Sequence[float]]
    output_stride: int | None = None
    act_layer: str | Callable[..., nn.Module] | None = None
    norm_layer: str | Callable[..., nn.Module] | None = None

    def __post_init__(self) -> None:
        stride = self.output_stride
        if stride is not None and (isinstance(stride, bool) or stride not in OUTPUT_STRIDES):
            raise ArgumentError(f"output_stride {stride!r} is unknown: it must be 8, 16 or 32 (no change)")

    def steps(self, stages: int, stem: int = 4) -> list[Step]:
        """Give strides and dilations of the stages: where a stride is not allowed, what follows is dilated instead."""
        steps, reduction, dilation = [], stem, 1
        for i in range(stages):
            stride, before = (2 if i else 1), dilation
            if stride > 1 and self.output_stride is not None and reduction >= self.output_stride:
                dilation, stride = dilation * stride, 1
            reduction *= stride
            steps.append(Step(stride, before, dilation, reduction))
        return steps

    def activation(self, default: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        """Give what makes the activation: the one asked for, or the family's own.

        Raises:
            ArgumentError: for a name that timm does not know.
        """
        if self.act_layer is None:
            return default
        try:
            made = get_act_layer(self.act_layer)
        except (AssertionError, KeyError):
            made = None
        if made is None:
            raise ArgumentError(
                f"act_layer {self.act_layer!r} is unknown: give a name that timm knows ('relu', 'silu'), or a class"
            )
        return made  # type: ignore[no-any-return]

    def channel_norm(self) -> type[nn.Module]:
        """Give the normalisation over the channels of maps (N, C, H, W), by default a layer norm."""
        return self._channel_norms()[0]

    def last_norm(self, dim: int) -> nn.Module:
        """Make the normalisation over the channels of maps (N, H, W, C), by default a layer norm."""
        kind: Any = self._channel_norms()[1]
        return kind(dim, eps=1e-6)  # type: ignore[no-any-return]

    def batch_norm(self) -> Callable[..., nn.Module]:
        """Give what makes the norm in the place of a batch norm, for maps (N, C, H, W).

        Raises:
            ArgumentError: for a name that timm does not know.
        """
        if self.norm_layer is None:
            return nn.BatchNorm2d
        if isinstance(self.norm_layer, str) and _plain(self.norm_layer) in _CHANNEL_NORMS:
            return _CHANNEL_NORMS[_plain(self.norm_layer)][0]
        try:
            made = get_norm_layer(self.norm_layer)
        except (AssertionError, KeyError):
            made = None
        if made is None:
            raise ArgumentError(
                f"norm_layer {self.norm_layer!r} is unknown: give a name that timm knows ('batchnorm2d', 'layernorm2d'), "
                "or a class"
            )
        return made  # type: ignore[no-any-return]

    def _channel_norms(self) -> tuple[type[nn.Module], type[nn.Module]]:
        asked = self.norm_layer
        if asked is None:
            return LayerNorm2d, LayerNorm
        if isinstance(asked, str) and _plain(asked) in _CHANNEL_NORMS:
            return _CHANNEL_NORMS[_plain(asked)]
        for pair in _CHANNEL_NORMS.values():
            if asked in pair:
                return pair
        known = sorted(_CHANNEL_NORMS)
        hint = nearest(asked, known) if isinstance(asked, str) else ""
        name = repr(asked) if isinstance(asked, str) else getattr(asked, "__name__", repr(asked))
        raise ArgumentError(
            f"norm_layer {name} cannot take the place of this family's layer norms, which act on maps (N, H, W, C) too: "
            f"it must be one of {', '.join(map(repr, known))}.{hint}"
        )


def _plain(name: str) -> str:
    return name.lower().removesuffix("2d")


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Let the drop-path rate run linearly from 0 to `rate` over all the blocks, listed by stage."""
    return calculate_drop_path_rates(rate, list(depths), stagewise=True)  # type: ignore[return-value]


def check_drop_rates(**rates: float) -> None:
    """Raise an `ArgumentError` for a share of dropped values or paths that is not from 0 to below 1."""
    for name, rate in rates.items():
        if rate is not None and (isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < 1):
            raise ArgumentError(f"{name} is {rate!r}, but must be a number from 0 to below 1")
