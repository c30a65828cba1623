"""Building networks as timm does: arguments, preprocessing, pretrained weights."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg
from torch import Tensor, nn

from widekernel.errors import UnknownArgumentError, nearest
from widekernel.layers.folding import fold_in_place
from widekernel.models.base import StagedConvNet
from widekernel.models.layouts.conversion import to_native
from widekernel.models.published import arguments_of_file, published_checkpoint
from widekernel.weights.fetching import fetch

ConfigT = TypeVar("ConfigT")
# Parameters of timm's builder that `build_model` sets itself, so that users cannot.
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
# Arguments that users may pass to timm's builder: its other parameters, and those that it pops from its `kwargs`.
BUILDER_ARGUMENTS = (
    *(name for name in inspect.signature(build_model_with_cfg).parameters if name not in _SET_HERE),
    "feature_cls",
    "features_only",
    "out_indices",
)


def default_cfg(input_size: int = 224, stride: int = 32, **kwargs: Any) -> dict[str, Any]:
    """Return timm's pretrained configuration (preprocessing and head) of a network; `kwargs` overrides entries.

    Args:
        input_size: side of the image in pixels.
        stride: total stride of the network in pixels.
        kwargs: other entries of timm's `PretrainedCfg`.
    """
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


def build_model(
    model_cls: type[StagedConvNet], variant: str, config: ConfigT, pretrained: bool, kwargs: dict[str, Any]
) -> Any:
    """Build a network from its configuration and the user's arguments.

    The argument `folded=True` builds the folded form, into which the weights of a folded network can be loaded. timm's hub
    format uses it to restore networks that were saved in folded form.

    Args:
        model_cls: class of the network.
        variant: registered name.
        config: architecture.
        pretrained: whether to load the weights that the pretrained configuration names. Published weights are fetched, and
            bring the arguments that their network was built with.
        kwargs: the user's arguments: fields of `config` to override, arguments of `model_cls` and of timm's builder.

    Raises:
        UnknownArgumentError: a TypeError, for an argument that none of them takes; the message suggests the closest name.
        ArgumentError: the network has no weights of the tag.
        FetchError: the published weights cannot be fetched.
    """
    fields = [field.name for field in dataclasses.fields(config)]  # type: ignore[arg-type]
    of_model = [name for name in inspect.signature(model_cls).parameters if name != "cfg"]
    known = [*fields, *of_model, "folded", *BUILDER_ARGUMENTS]
    for name in kwargs:
        if name not in known:
            raise UnknownArgumentError(
                f"{variant} got an unknown argument {name!r}.{nearest(name, known)} It takes {', '.join(fields + of_model)}"
            )
    published = _published_arguments(variant, pretrained, kwargs)
    kwargs = {**published, **kwargs}
    overrides = {name: _tuples(kwargs.pop(name)) for name in fields if name in kwargs}
    constructor = _folded_form(model_cls) if kwargs.pop("folded", False) else model_cls
    # timm passes the arguments of the pretrained configuration to every model; their defaults are the same here.
    feature_cfg = {"feature_cls": "getter", **_default_indices(model_cls, config, overrides)}
    if kwargs.get("feature_cls") in ("list", "dict"):
        feature_cfg["flatten_sequential"] = True
    model: Any = build_model_with_cfg(
        constructor,
        variant,
        pretrained,
        model_cfg=dataclasses.replace(config, **overrides),  # type: ignore[type-var]
        feature_cfg=feature_cfg,
        pretrained_filter_fn=_filter_pretrained,
        **kwargs,
    )
    if published:
        model._model_args = published  # timm adds the user's
    model.pretrained_cfg.pop("file", None)  # where the weights came from on this machine
    return model


def _published_arguments(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that the chosen published weights bring; if they are to be loaded, fetch them and tell timm."""
    checkpoint = published_checkpoint(variant, kwargs)
    if checkpoint is None or not (pretrained or kwargs.get("pretrained_cfg")):
        return {}
    arguments = dict(checkpoint.arguments)
    if pretrained:
        path = fetch(checkpoint, kwargs.get("cache_dir"))
        arguments.update(arguments_of_file(checkpoint, path))
        overlay = {"file": str(path), "custom_load": True}
        kwargs["pretrained_cfg_overlay"] = {**(kwargs.get("pretrained_cfg_overlay") or {}), **overlay}
    return arguments


def _folded_form(model_cls: type[StagedConvNet]) -> Callable[..., nn.Module]:
    def build_folded(**kwargs: Any) -> nn.Module:
        return fold_in_place(model_cls(**kwargs).eval()).train()

    return build_folded


def _default_indices(model_cls: Any, config: Any, overrides: dict[str, Any]) -> dict[str, Any]:
    config = dataclasses.replace(config, **overrides)
    choose = getattr(model_cls, "default_out_indices", None)
    return {"out_indices": choose(config) if choose else tuple(range(len(config.depths)))}


def _filter_pretrained(state: dict[str, Tensor], model: StagedConvNet) -> dict[str, Tensor]:
    """Convert a pretrained state dict for timm's loader; unknown keys are kept, so that timm's error names them."""
    converted = to_native(model, state)
    unknown = {key: state[key] for key in converted.unknown if key in state}
    return {**unknown, **converted.state}


def _tuples(value: Any) -> Any:
    """Convert lists to tuples, including nested ones, because configurations are frozen."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
