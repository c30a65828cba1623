"""Masks and choices, computed from weights and from each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from widekernel.errors import ArgumentError
from widekernel.sparsity.semi_structured.grouping import Axis, describe, group_count, group_view, ungroup, valid_slots
from widekernel.sparsity.semi_structured.patterns import COUNT, best_choices, bits_of, legal_patterns


@torch.no_grad()
def magnitude_choices(weight: Tensor, axis: Axis = "channels", groups: int = 1) -> Tensor:
    """Return, for each group, the choice of the pattern that keeps the two weights of largest magnitude.

    The result depends on the values only: of equal weights, the later one is kept (the pattern of lowest index); NaN counts
    as the largest; and padding never takes the place of a real weight.

    Args:
        weight: (out, in / groups, kh, kw) or (out, in).
        axis: which weights form a group, see `group_view`.
        groups: number of groups of the convolution; matters for "im2col" only.

    Returns:
        (G,) uint8, indices into `PATTERNS`.
    """
    values, valid = group_view(weight, axis, groups)
    # Convert first: the absolute value of the smallest int8 does not fit into int8.
    values = values if values.dtype == torch.float64 else values.float()
    return best_choices(values.abs(), valid)


def magnitude_mask(weight: Tensor, axis: Axis = "channels", groups: int = 1) -> Tensor:
    """Return the mask that keeps the two weights of largest magnitude in each group: bool, of the weight's shape."""
    return choices_to_mask(magnitude_choices(weight, axis, groups), weight.shape, axis, groups)


def choices_to_mask(choices: Tensor, shape: Sequence[int], axis: Axis = "channels", groups: int = 1) -> Tensor:
    """Return the mask of these choices.

    Args:
        choices: (G,) uint8, each 0..5.
        shape: shape of the weight.
        axis: which weights form a group.
        groups: number of groups of the convolution.

    Returns:
        bool, of `shape`.

    Raises:
        ArgumentError: if a choice is not the index of a pattern, or there is not one choice for each group of the weight.
    """
    check_choices(choices, shape, axis, groups)
    return ungroup(bits_of(choices), shape, axis, groups)


@torch.no_grad()
def mask_to_choices(mask: Tensor, axis: Axis = "channels", groups: int = 1, name: str = "the mask") -> Tensor:
    """Return choices whose mask covers `mask`.

    Of several such patterns, those that keep no padded slot come first, then the one of lowest index. If the mask keeps two
    weights of every full group, the result is the choices of exactly that mask.

    Args:
        mask: bool tensor of the weight's shape, or the weight itself, whose nonzeros count as kept.
        axis: which weights form a group.
        groups: number of groups of the convolution.
        name: what an error calls the mask.

    Raises:
        ArgumentError: if a group keeps more than two weights; the message says where.
    """
    bits, valid = group_view(mask != 0, axis, groups)
    refuse_more_than_two(bits, mask.shape, axis, groups, name)
    table = bits_of(torch.arange(COUNT, dtype=torch.uint8, device=bits.device))
    covers = ~(bits.unsqueeze(1) & ~table).any(2)
    if axis != "im2col":
        preferred = covers & legal_patterns(valid)
        covers = torch.where(preferred.any(1, keepdim=True), preferred, covers)
    return covers.to(torch.uint8).argmax(1).to(torch.uint8)


def check_semi_structured(weight: Tensor, axis: Axis = "channels", groups: int = 1, name: str = "the weight") -> None:
    """Raise unless every group of four has at most two non-zeros.

    PyTorch's converters accept any matrix and silently keep only the first two nonzeros of a group, so call this before a
    matrix is exported.

    Args:
        weight: (out, in / groups, kh, kw) or (out, in).
        axis: which weights form a group.
        groups: number of groups of the convolution.
        name: what the error calls the weight.

    Raises:
        ArgumentError: the weight is not 2:4; the message states the number of such groups, and where the first one is.
    """
    refuse_more_than_two(group_view(weight != 0, axis, groups)[0], weight.shape, axis, groups, name)


def refuse_more_than_two(bits: Tensor, shape: Sequence[int], axis: Axis, groups: int, name: str) -> None:
    """Raise an `ArgumentError` if a row of `bits`, (G, 4) bool, has more than two True."""
    counts = bits.sum(1)
    wrong = (counts > 2).nonzero().flatten()
    if wrong.numel():
        first = int(wrong[0])
        raise ArgumentError(
            f"{name} is not 2:4 along axis={axis!r}: {wrong.numel()} of {bits.shape[0]} groups have more than two "
            f"non-zeros, the first is group {first} ({describe(first, shape, axis, groups)}) with {int(counts[first])}: "
            "mask the weight first, and again after every update (SemiStructured.apply_masks)"
        )


def check_choices(choices: Tensor, shape: Sequence[int], axis: Axis, groups: int, name: str = "choices") -> None:
    """Raise an `ArgumentError` unless there is one choice for each group of the weight, and each is a pattern."""
    wanted = group_count(shape, axis, groups)
    if choices.dtype != torch.uint8 or tuple(choices.shape) != (wanted,):
        raise ArgumentError(
            f"{name} are {choices.dtype} of shape {tuple(choices.shape)}: a weight of shape {tuple(shape)} has {wanted} "
            f"groups along axis={axis!r}; give one uint8 for each"
        )
    if choices.numel() and int(choices.max()) >= COUNT:
        raise ArgumentError(f"{name} hold the value {int(choices.max())}: patterns are numbered 0..{COUNT - 1}")


def legal_choices(shape: Sequence[int], axis: Axis, groups: int = 1, device: torch.device | str = "cpu") -> Tensor | None:
    """Return the patterns that may be learned: (G, 6) bool, or None for all.

    Padding must not take the place of a real weight, except in the paper's grouping, where it does.
    """
    if axis == "im2col":
        return None
    valid = valid_slots(shape, axis, groups, device)
    return None if bool(valid.all()) else legal_patterns(valid)
