"""Options that every network takes beside its architecture, as timm's ConvNeXt does: strides, norms, activation."""

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
class StageSpec:
    """Strides and dilations of one stage.

    Attributes:
        stride: stride of the downsampling before the stage.
        downsample_dilation: dilation of that downsampling; above 1 if an earlier stride was replaced by dilation.
        dilation: dilation of the spatial layers in the blocks.
        reduction: total stride of the stage's output, in pixels of the image.
    """

    stride: int
    downsample_dilation: int
    dilation: int
    reduction: int


@dataclass(frozen=True)
class ModelOptions:
    """Options that the networks of every family take.

    Attributes:
        in_chans: number of channels of the image.
        drop_path_rates: drop-path rate of every block, listed by stage.
        output_stride: largest stride of the network: 8, 16 or 32; None for the network's own.
        act_layer: name or constructor of the activation; None for the family's own.
        norm_layer: name or constructor of the normalization; None for the family's own.
    """

    in_chans: int
    drop_path_rates: Sequence[Sequence[float]]
    output_stride: int | None = None
    act_layer: str | Callable[..., nn.Module] | None = None
    norm_layer: str | Callable[..., nn.Module] | None = None

    def __post_init__(self) -> None:
        stride = self.output_stride
        if stride is not None and (isinstance(stride, bool) or stride not in OUTPUT_STRIDES):
            raise ArgumentError(f"output_stride {stride!r} is unknown: it must be 8, 16 or 32 (no change)")

    def stage_specs(self, num_stages: int, stem_stride: int = 4) -> list[StageSpec]:
        """Return the strides and dilations of the stages.

        A stage that may not reduce the resolution any further keeps it; the layers after it are dilated instead.
        """
        specs, reduction, dilation = [], stem_stride, 1
        for i in range(num_stages):
            stride, downsample_dilation = (2 if i else 1), dilation
            if stride > 1 and self.output_stride is not None and reduction >= self.output_stride:
                dilation, stride = dilation * stride, 1
            reduction *= stride
            specs.append(StageSpec(stride, downsample_dilation, dilation, reduction))
        return specs

    def activation(self, default: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        """Return the constructor of the activation: that of `act_layer`, or `default`.

        Raises:
            ArgumentError: if timm does not know the name.
        """
        if self.act_layer is None:
            return default
        act = _found(get_act_layer, self.act_layer)
        if act is None:
            raise ArgumentError(
                f"act_layer {self.act_layer!r} is unknown: give a name that timm knows ('relu', 'silu'), or a class"
            )
        return act  # type: ignore[no-any-return]

    def channel_norm(self) -> type[nn.Module]:
        """Return the class that normalizes the channels of maps (N, C, H, W): by default a layer norm."""
        return self._channel_norms()[0]

    def channels_last_norm(self, dim: int) -> nn.Module:
        """Create a normalization over the channels of maps (N, H, W, C): by default a layer norm."""
        norm: Any = self._channel_norms()[1]
        return norm(dim, eps=1e-6)  # type: ignore[no-any-return]

    def batch_norm(self) -> Callable[..., nn.Module]:
        """Return the constructor of the norms for maps (N, C, H, W): that of `norm_layer`, or batch norm.

        Raises:
            ArgumentError: if timm does not know the name.
        """
        if self.norm_layer is None:
            return nn.BatchNorm2d
        if isinstance(self.norm_layer, str) and _without_2d(self.norm_layer) in _CHANNEL_NORMS:
            return _CHANNEL_NORMS[_without_2d(self.norm_layer)][0]
        norm = _found(get_norm_layer, self.norm_layer)
        if norm is None:
            raise ArgumentError(
                f"norm_layer {self.norm_layer!r} is unknown: give a name that timm knows ('batchnorm2d', 'layernorm2d'), "
                "or a class"
            )
        return norm  # type: ignore[no-any-return]

    def _channel_norms(self) -> tuple[type[nn.Module], type[nn.Module]]:
        wanted = self.norm_layer
        if wanted is None:
            return LayerNorm2d, LayerNorm
        if isinstance(wanted, str) and _without_2d(wanted) in _CHANNEL_NORMS:
            return _CHANNEL_NORMS[_without_2d(wanted)]
        for pair in _CHANNEL_NORMS.values():
            if wanted in pair:
                return pair
        known = sorted(_CHANNEL_NORMS)
        hint = nearest(wanted, known) if isinstance(wanted, str) else ""
        name = repr(wanted) if isinstance(wanted, str) else getattr(wanted, "__name__", repr(wanted))
        raise ArgumentError(
            f"norm_layer {name} cannot take the place of this family's layer norms, which act on maps (N, H, W, C) too: "
            f"it must be one of {', '.join(map(repr, known))}.{hint}"
        )


def _found(get: Callable[[Any], Any], wanted: Any) -> Any:
    """Return what timm finds by a name; None if it does not know the name."""
    try:
        return get(wanted)
    except (AssertionError, KeyError):
        return None


def _without_2d(name: str) -> str:
    return name.lower().removesuffix("2d")


def linear_drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Return the drop-path rates of all blocks, listed by stage; they grow linearly from 0 to `rate`."""
    return calculate_drop_path_rates(rate, list(depths), stagewise=True)  # type: ignore[return-value]
