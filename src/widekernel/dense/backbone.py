"""Feature pyramids: the maps of several stages of any timm network, as heads for dense prediction take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import timm
import timm.models
from timm.layers import LayerNorm2d, NormMlpClassifierHead, get_device_dtype
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from widekernel.errors import ArgumentError, nearest
from widekernel.models.base import StagedConvNet
from widekernel.models.layouts.layout import Rule
from widekernel.models.layouts.nesting import Nesting
from widekernel.settings import require_one_of

Norms = Literal["auto", "layer", "none"]
_LEVELS = 4
# Prefix of the keys of norms in a checkpoint that belong to stages of which the pyramid leaves out the maps.
_LEFT_OUT = "norms.of_stage_"
# `build_pyramid` sets these arguments of timm's builder itself.
_SET_HERE = ("features_only", "out_indices", "feature_cls", "pretrained")


class Pyramid(nn.Module):
    """The feature maps of a network's stages, from fine to coarse, each with a norm of its own.

    The normalized maps go to the heads only: the next stage gets the map as it was.

    Args:
        body: a network of this package or timm's ConvNeXt, without the parts after its last used stage; or any
            `features_only` network of timm.
        out_indices: indices of the maps that a network with `forward_intermediates` returns; for a `features_only` network,
            which knows its maps, None.
        channels: number of channels of each map.
        strides: stride of each map, in pixels of the image.
        norms: norm of each map; none by default.

    Attributes:
        channels: number of channels of each map.
        strides: stride of each map, in pixels of the image.
    """

    def __init__(
        self,
        body: nn.Module,
        out_indices: Sequence[int] | None,
        channels: Sequence[int],
        strides: Sequence[int],
        norms: Sequence[nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.body: Any = body
        self.out_indices = None if out_indices is None else list(out_indices)
        self.channels, self.strides = list(channels), list(strides)
        self.norms = nn.ModuleList(norms or [nn.Identity() for _ in channels])

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """How the images of the network are prepared, as timm describes it; empty if that is unknown."""
        return getattr(self.body, "pretrained_cfg", None) or {}

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N, channels of the image, H, W) -> one map (N, C, H', W') per level, from fine to coarse."""
        if self.out_indices is None:
            maps = list(self.body(images))
            if getattr(self.body, "output_fmt", "NCHW") == "NHWC":
                maps = [x.permute(0, 3, 1, 2).contiguous() for x in maps]
        else:
            maps = self.body.forward_intermediates(images, indices=self.out_indices, intermediates_only=True)
        return [norm(x) for norm, x in zip(self.norms, maps)]

    def nesting(self) -> Nesting:
        """Return where the network is in checkpoints of the pyramid; in official ones, the norm of stage 2 is `norm2`."""
        taken = list(range(len(self.norms))) if self.out_indices is None else self.out_indices
        stages = range(len(self.norms) if self.out_indices is None else len(self.body.feature_info))
        places = {stage: f"norms.{taken.index(stage)}" if stage in taken else f"{_LEFT_OUT}{stage}" for stage in stages}
        norms = tuple(Rule(f"norm{stage}.{{rest}}", f"{place}.{{rest}}") for stage, place in places.items())
        return Nesting(self.body, "body.", "", norms, optional=("norms.", "body.feature_norms."), removed=(_LEFT_OUT,))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable or disable the recomputation of activations in the backward pass.

        Raises:
            ArgumentError: the network does not support it.
        """
        network: Any = self.body.model if isinstance(self.body, FeatureGetterNet) else self.body
        if not hasattr(network, "set_grad_checkpointing"):
            raise ArgumentError(
                f"{type(network).__name__} cannot recompute its activations: leave gradient checkpointing out, or choose "
                "another network"
            )
        network.set_grad_checkpointing(enable)


def build_pyramid(
    name: str,
    args: dict[str, Any] | None = None,
    out_indices: int | Sequence[int] = _LEVELS,
    norms: Norms = "auto",
    pretrained: bool = False,
) -> Pyramid:
    """Build the feature pyramid of a registered network.

    Args:
        name: name of the network in timm.
        args: arguments of the network, such as `drop_path_rate` or `norm_intermediate_features`.
        out_indices: indices of the network's maps from fine to coarse; an integer n for the last n.
        norms: "layer" for a layer norm over the channels of each map (eps 1e-6), as the authors of ConvNeXt and SLaK add
            it; "none" for the maps as they are, as in RepLKNet, whose own batch norms `norm_intermediate_features=True`
            turns on; "auto" for layer norms where the network itself normalizes only after the pooling, like ConvNeXt.
        pretrained: whether to load the weights that timm knows for the network.

    Raises:
        ArgumentError: the name is unknown, or the network has no such maps.
    """
    args = dict(args or {})
    require_one_of("norms", norms, get_args(Norms))
    _check_arguments(name, args)
    if _is_timm_convnext(name):
        args["feature_cls"] = "getter"  # the other forms rename the stages
    indices = out_indices if isinstance(out_indices, int) else tuple(out_indices)
    try:
        features: Any = timm.create_model(name, pretrained=pretrained, features_only=True, out_indices=indices, **args)
        channels, strides = features.feature_info.channels(), features.feature_info.reduction()
    except (AssertionError, IndexError) as error:
        raise ArgumentError(
            f"out_indices {out_indices!r} name no maps of {name}: {error}. Choose among those that it has"
        ) from error
    body, taken = features, None
    if isinstance(features, FeatureGetterNet) and isinstance(features.model, (StagedConvNet, timm.models.ConvNeXt)):
        body, taken = features.model, list(features.feature_info.out_indices)
    layers = None
    if norms == "layer" or (norms == "auto" and _normalizes_after_pooling(body)):
        layers = [LayerNorm2d(width, eps=1e-6, **get_device_dtype(body)) for width in channels]
    return Pyramid(body, taken, channels, strides, layers)


def _check_arguments(name: str, args: dict[str, Any]) -> None:
    if ":" not in name and not timm.is_model(name):
        raise ArgumentError(f"{name!r} is not a network that timm knows.{nearest(name, timm.list_models())}")
    for key in _SET_HERE:
        if key in args:
            raise ArgumentError(f"{key} cannot be an argument of the network: use the parameters of build_pyramid")


def _is_timm_convnext(name: str) -> bool:
    return ":" not in name and timm.model_entrypoint(name).__module__ == "timm.models.convnext"


def _normalizes_after_pooling(network: nn.Module) -> bool:
    known = isinstance(network, (StagedConvNet, timm.models.ConvNeXt))
    return known and isinstance(getattr(network, "head", None), NormMlpClassifierHead)
