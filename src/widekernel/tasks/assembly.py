"""Construction of networks and choice of devices from the configuration."""

from collections.abc import Iterator
from contextlib import contextmanager
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
        ConfigError: the name is unknown, the model does not accept an argument or a value, or its pretrained weights do not
            exist or cannot be reached.
    """
    options = dict(args) if num_classes is None else {**args, "num_classes": num_classes}
    with construction_explained(name, args, pretrained, options):
        return timm.create_model(name, pretrained=pretrained, **options)


@contextmanager
def construction_explained(
    name: str, args: dict[str, Any], pretrained: bool, options: dict[str, Any] | None = None
) -> Iterator[None]:
    """Check the name of a model, and turn the errors of its construction in the block into those of settings.

    Args:
        name: name of the model.
        args: its arguments, as set by the user.
        pretrained: whether its pretrained weights are loaded.
        options: all of its arguments; `None` if those of the user are all.

    Raises:
        ConfigError: the name is unknown, the model does not accept an argument or a value, or its pretrained weights do not
            exist or cannot be reached.
    """
    check_model_name(name)
    options = args if options is None else options
    try:
        yield
    except TypeError as error:
        raise ConfigError(
            f"{name} does not accept its arguments {options}: {_first_line(error)}. "
            "Check the names and the types of model.args."
        ) from error
    except WidekernelError:
        raise
    except Exception as error:  # constructors raise anything for values that they do not expect
        if ":" not in name and not pretrained:
            if not args:
                raise
            raise ConfigError(
                f"{name} cannot be created with its arguments {options} ({type(error).__name__}: {_first_line(error)}). "
                "Check the values of model.args."
            ) from error
        what = f"The pretrained weights of {name}" if pretrained else f"The model {name}"
        hint = "Set model.pretrained to false, or give a checkpoint as model.weights." if pretrained else "Check the name."
        raise ConfigError(f"{what} cannot be loaded: {_first_line(error)}. {hint}") from error


def classifier_of(
    model: nn.Module,
    needed_by: str = "model.head_init_scale and data.class_map",
    kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d),
) -> nn.Module:
    """Return the linear classifier of a network.

    Args:
        model: the network.
        needed_by: settings that need one, for the message.
        kinds: classes that the classifier may have.

    Raises:
        ConfigError: it has none, or another kind of classifier.
    """
    found = getattr(model, "get_classifier", lambda: None)()
    if not isinstance(found, kinds):
        raise ConfigError(
            f"{type(model).__name__} has no linear classifier, which {needed_by} need(s): leave that out, or choose "
            "another network."
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


def check_model(name: str, args: dict[str, Any], grad_checkpointing: bool = False) -> None:
    """Raise what the construction of a model would raise, without its weights: it takes little memory and time.

    Args:
        name: name of the model; names that timm has to resolve (hf-hub:, local-dir:) are not checked.
        args: arguments of the model.
        grad_checkpointing: whether it has to checkpoint gradients.

    Raises:
        ConfigError: the name is unknown, or the model does not accept an argument or a value.
    """
    check_model_name(name)
    if ":" in name:
        return
    try:
        with torch.device("meta"):
            model = build_model(name, None, args)
    except Exception:
        model = build_model(name, None, args)  # only an error that also occurs with weights counts
    if grad_checkpointing:
        checkpoint_gradients(model, name)


def checkpoint_gradients(model: nn.Module, name: str) -> None:
    """Let the model `name` recompute activations in the backward pass.

    Raises:
        ConfigError: it cannot do that.
    """
    try:
        cast(Any, model).set_grad_checkpointing(True)
    except (AttributeError, AssertionError, NotImplementedError) as error:  # timm's models assert that they can
        raise ConfigError(
            f"model.grad_checkpointing is true, but {name} has no gradient checkpointing: leave it out."
        ) from error


def _first_line(error: Exception) -> str:
    # PyTorch appends a list of signatures.
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text.removesuffix(", but expected one of:").rstrip(".:")


def pretrained_cfg(model: nn.Module) -> dict[str, Any]:
    """Return timm's description of the model's input (`input_size`, `mean`, `std`); empty for models without one."""
    return cast(dict[str, Any], getattr(model, "pretrained_cfg", {}))


def choose_device(name: str, key: str = "device") -> torch.device:
    """Return the device named `name`; `auto` is CUDA if it is available, or else the CPU.

    Args:
        name: auto, cpu, cuda or cuda:N.
        key: name of the setting, for messages.

    Raises:
        ConfigError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError(device.type)
    except RuntimeError as error:
        raise ConfigError(f"{key} is {name!r}, but must be auto, cpu, cuda or cuda:N.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"{key} is {name!r}, but this machine has no usable CUDA device. Use auto or cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"{key} is {name!r}, but there are only {torch.cuda.device_count()} CUDA device(s).")
    return device
