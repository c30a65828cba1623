"""Selection of the parameters that dynamic sparse training masks: by the settings, or by given masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from widekernel.errors import ArgumentError
from widekernel.sparsity.dynamic.config import DynamicSparsityConfig
from widekernel.sparsity.dynamic.rules import semi_structured
from widekernel.sparsity.selection import Selection, select
from widekernel.sparsity.semi_structured.config import SEMI_STRUCTURED


def select_parameters(
    model: nn.Module, config: DynamicSparsityConfig, masks: Mapping[str, Tensor] | None
) -> list[Selection]:
    """Decide for every parameter of an unwrapped network whether it is masked.

    Args:
        model: the network.
        config: the settings, which decide if no masks are given.
        masks: parameter name -> bool tensor; exactly these parameters are masked.

    Raises:
        ArgumentError: the masks belong to another network, or nothing can be masked.
    """
    if masks is not None:
        return _select_given(model, masks)
    selection = select(model, config.layers, config.exclude)
    if config.block != SEMI_STRUCTURED:
        return selection
    weights = dict(model.named_parameters())
    only_now = config.init == "from_weights"
    selection = [
        Selection(each.name, each.shape, each.reason or semi_structured.reason_against(weights[each.name], only_now))
        for each in selection
    ]
    if not any(each.masked for each in selection):
        raise ArgumentError(
            "no layer has groups of four input channels for 2:4 masks: depthwise layers have one input channel. Select "
            "other layers, or use another block"
        )
    return selection


def _select_given(model: nn.Module, masks: Mapping[str, Tensor]) -> list[Selection]:
    _check_tensors(masks)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    wrong = [name for name, mask in masks.items() if shapes.get(name) != tuple(mask.shape)]
    if wrong or not masks:
        held = f"{wrong[0]} {tuple(masks[wrong[0]].shape)}" if wrong else "none at all"
        found = shapes.get(wrong[0], "no such parameter") if wrong else f"{len(shapes)} parameters"
        raise ArgumentError(
            f"the masks belong to another network: they hold {held}, but this network has {found}. Give masks of this "
            "network"
        )
    selection = select(model, "all", ())
    refused = [each for each in selection if each.name in masks and each.reason]
    if refused:
        raise ArgumentError(f"{refused[0].name} has a mask, but {refused[0].reason}: leave its mask out")
    absent = "is not among the masks given"
    return [Selection(each.name, each.shape, each.reason or ("" if each.name in masks else absent)) for each in selection]


def _check_tensors(masks: object) -> None:
    if not isinstance(masks, Mapping):
        raise ArgumentError(f"masks is a {type(masks).__name__}: give a dict of parameter names and bool tensors")
    for name, mask in masks.items():
        if not isinstance(mask, Tensor):
            raise ArgumentError(f"the mask of {name} is a {type(mask).__name__}: give a bool tensor (torch.as_tensor)")


def masked_parameters(model: nn.Module, selection: Sequence[Selection]) -> dict[str, nn.Parameter]:
    """Return the parameters that are masked, by name, in the network's order.

    Raises:
        ArgumentError: one is on the meta device, where it has no values.
    """
    wanted = {each.name for each in selection if each.masked}
    found = {name: parameter for name, parameter in model.named_parameters() if name in wanted}
    for name, parameter in found.items():
        if parameter.is_meta:
            raise ArgumentError(
                f"{name} is on the meta device and has no values to be masked: call model.to_empty(device=...) and load "
                "weights, then make the optimizer and the controller"
            )
    return found
