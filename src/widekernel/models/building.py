"""Making networks the way timm makes its own: registration, arguments, pretrained weights."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, register_model
from torch import Tensor, nn

from widekernel.errors import UnknownArgumentError, nearest
from widekernel.layers.folding import fold_in_place
from widekernel.models.base import StagedConvNet
from widekernel.models.layouts.translate import translate

ConfigT = TypeVar("ConfigT")
# What timm's builder takes for itself: what its signature names but not what `build` sets, and what it looks for beside.
_SET_HERE = {
    "model_cls",
    "variant",
    "pretrained",
    "model_cfg",
    "feature_cfg",
    "pretrained_filter_fn",
    "kwargs_filter",
    "kwargs",
}
BUILDER_ARGUMENTS = (
    *(name for name in inspect.signature(build_model_with_cfg).parameters if name not in _SET_HERE),
    "feature_cls",
    "features_only",
    "out_indices",
)


def default_cfg(input_size: int = 224, stride: int = 32, **kwargs: Any) -> dict[str, Any]:
    """Describe a network's preprocessing and head the way timm wants it; `kwargs` overrides entries."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, input_size, input_size),
        "pool_size": (input_size // stride, input_size // stride),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.0",
        "classifier": "head.fc",
        **kwargs,
    }


def build(model_cls: type[StagedConvNet], variant: str, config: ConfigT, pretrained: bool, kwargs: dict[str, Any]) -> Any:
    """Create a network from its configuration, arguments that override parts of it, and timm's usual ones.

    With `folded=True` it is made in its folded form, into which the weights of a folded network are loaded; this is how
    timm's hub format brings back what was saved folded.

    Raises:
        UnknownArgumentError: a TypeError, for an argument that nobody takes; names the nearest.
    """
    fields = [field.name for field in dataclasses.fields(config)]  # type: ignore[arg-type]
    of_model = [name for name in inspect.signature(model_cls).parameters if name != "cfg"]
    known = [*fields, *of_model, "folded", *BUILDER_ARGUMENTS]
    for name in kwargs:
        if name not in known:
            raise UnknownArgumentError(
                f"{variant} got an unknown argument {name!r}.{nearest(name, known)} It takes {', '.join(fields + of_model)}"
            )
    overrides = {name: _frozen(kwargs.pop(name)) for name in fields if name in kwargs}
    make = _folded_form(model_cls) if kwargs.pop("folded", False) else model_cls
    # timm hands the pretrained configuration's arguments to every model; the defaults are the same here.
    feature_cfg = {"feature_cls": "getter", **_default_indices(model_cls, config, overrides)}
    if kwargs.get("feature_cls") in ("list", "dict"):
        feature_cfg["flatten_sequential"] = True
    return build_model_with_cfg(
        make,
        variant,
        pretrained,
        model_cfg=dataclasses.replace(config, **overrides),  # type: ignore[type-var]
        feature_cfg=feature_cfg,
        pretrained_filter_fn=_to_native,
        **kwargs,
    )


def register(network: type[StagedConvNet], name: str, config: Any, doc: str) -> None:
    """Register a configuration of a network with timm, as a function of that name in the network's module."""

    def entry(pretrained: bool = False, **kwargs: Any) -> Any:
        return build(network, name, config, pretrained, kwargs)

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = doc
    entry.__module__ = network.__module__
    setattr(sys.modules[network.__module__], name, entry)
    register_model(entry)


def _folded_form(model_cls: type[StagedConvNet]) -> Callable[..., nn.Module]:
    def make(**kwargs: Any) -> nn.Module:
        return fold_in_place(model_cls(**kwargs).eval()).train()

    return make


def _default_indices(model_cls: Any, config: Any, overrides: dict[str, Any]) -> dict[str, Any]:
    config = dataclasses.replace(config, **overrides)
    choose = getattr(model_cls, "default_out_indices", None)
    return {"out_indices": choose(config) if choose else tuple(range(len(config.depths)))}


def _to_native(state: dict[str, Tensor], model: StagedConvNet) -> dict[str, Tensor]:
    """Translate a pretrained state dict for timm's loader, which is to name the keys that no rule knows."""
    found = translate(model, state)
    unknown = {key: state[key] for key in found.unknown if key in state}
    return {**unknown, **found.state}


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
