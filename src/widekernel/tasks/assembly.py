"""Construction of networks and choice of devices from the configuration."""

from typing import Any, cast

import timm
import torch
from torch import nn

import widekernel.models  # noqa: F401 - registers the models with timm
from widekernel.errors import ConfigError, WidekernelError, nearest


def check_model_name(name: str) -> None:
    """Raise a `ConfigError` unless timm knows a model of this name."""
    # timm itself resolves names with a colon (hf-hub:, local-dir:).
    if ":" not in name and not timm.is_model(name):
        raise ConfigError(
            f"model.name is {name!r}, which is not a registered model.{nearest(name, timm.list_models())} "
            "`widekernel models` lists them."
        )


def build_model(name: str, num_classes: int | None, args: dict[str, Any], pretrained: bool = False) -> nn.Module:
    """Create a registered model; if `num_classes` is None, it keeps its own head.

    Raises:
        ConfigError: the name is unknown, the model does not accept an argument, or its pretrained weights do not exist
            or cannot be reached.
    """
    check_model_name(name)
    options = dict(args) if num_classes is None else {**args, "num_classes": num_classes}
    try:
        return timm.create_model(name, pretrained=pretrained, **options)
    except TypeError as error:
        raise ConfigError(
            f"{name} does not accept its arguments {options}: {_first_line(error)}. "
            "Check the names and the types of model.args."
        ) from error
    except WidekernelError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        if ":" not in name and not pretrained:
            raise
        what = f"The pretrained weights of {name}" if pretrained else f"The model {name}"
        hint = "Set model.pretrained to false, or give a checkpoint as model.weights." if pretrained else "Check the name."
        raise ConfigError(f"{what} cannot be loaded: {_first_line(error)}. {hint}") from error


def classifier_of(model: nn.Module) -> nn.Module:
    """Return the linear classifier of a network.

    Raises:
        ConfigError: it has none, or another kind of classifier.
    """
    found = getattr(model, "get_classifier", lambda: None)()
    if not isinstance(found, (nn.Linear, nn.Conv2d)):
        raise ConfigError(
            f"{type(model).__name__} has no linear classifier, but model.head_init_scale and data.class_map need one: leave "
            "them out."
        )
    return found


def scale_classifier(model: nn.Module, factor: float) -> None:
    """Multiply weights and biases of the classifier by `factor`.

    Raises:
        ConfigError: the network has no linear classifier.
    """
    with torch.no_grad():
        for parameter in classifier_of(model).parameters():
            parameter.mul_(factor)


def _first_line(error: Exception) -> str:
    # PyTorch appends a list of signatures.
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text.removesuffix(", but expected one of:").rstrip(".:")


def pretrained_cfg(model: nn.Module) -> dict[str, Any]:
    """Return timm's description of the model's input (`input_size`, `mean`, `std`); empty for models without one."""
    return cast(dict[str, Any], getattr(model, "pretrained_cfg", {}))


def choose_device(name: str) -> torch.device:
    """Return the device named `name`; `auto` is CUDA if it is available, or else the CPU.

    Raises:
        ConfigError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"The device is {name!r}, but must be auto, cpu, cuda or cuda:N.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"The device is {name!r}, but this machine has no usable CUDA device. Use auto or cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"The device is {name!r}, but there are only {torch.cuda.device_count()} CUDA device(s).")
    return device
