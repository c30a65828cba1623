"""2:4 weights without their zeros: two values and a choice per group, with the choices packed in base 6."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from widekernel.errors import ArgumentError, CheckpointError
from widekernel.sparsity.semi_structured.grouping import Axis, group_count, group_view, ungroup
from widekernel.sparsity.semi_structured.masks import check_choices, choices_to_mask
from widekernel.sparsity.semi_structured.patterns import COUNT, kept_slots

PER_BYTE = 3  # 6³ = 216 fits into a byte: 8/3 bits per group; the least possible is log2(6) = 2.585
# Values are moved as integers, because some NaNs would change in floating-point registers.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def pack_choices(choices: Tensor) -> Tensor:
    """Pack choices, three per byte, the first one least significant: (G,) uint8 -> (ceil(G / 3),) uint8."""
    if choices.dtype != torch.uint8 or choices.dim() != 1 or (choices.numel() and int(choices.max()) >= COUNT):
        raise ArgumentError(f"choices must be a list of uint8 in 0..{COUNT - 1}, not {choices.dtype} {tuple(choices.shape)}")
    padded = torch.zeros(-(-choices.numel() // PER_BYTE) * PER_BYTE, dtype=torch.int32, device=choices.device)
    padded[: choices.numel()] = choices
    first, second, third = padded.reshape(-1, PER_BYTE).unbind(1)
    return (first + COUNT * second + COUNT**2 * third).to(torch.uint8)


def unpack_choices(packed: Tensor, count: int) -> Tensor:
    """Undo `pack_choices`: (ceil(count / 3),) uint8 -> (count,) uint8.

    Raises:
        CheckpointError: if the bytes are not the packing of `count` choices.
    """
    if packed.dtype != torch.uint8 or tuple(packed.shape) != (-(-count // PER_BYTE),):
        raise CheckpointError(
            f"packed choices are {packed.dtype} of shape {tuple(packed.shape)}: {count} choices take "
            f"{-(-count // PER_BYTE)} bytes"
        )
    if packed.numel() and int(packed.max()) >= COUNT**PER_BYTE:
        raise CheckpointError(
            f"packed choices hold the byte {int(packed.max())}, above {COUNT**PER_BYTE - 1}: they are damaged"
        )
    digits = packed.to(torch.int32)
    return torch.stack([digits % COUNT, digits // COUNT % COUNT, digits // COUNT**2], 1).flatten()[:count].to(torch.uint8)


@torch.no_grad()
def encode(weight: Tensor, choices: Tensor, axis: Axis = "channels", groups: int = 1) -> tuple[Tensor, Tensor]:
    """Return the two kept values of each group, and the packed choices.

    Args:
        weight: weight of any type; zero (of either sign) where the choices do not keep it.
        choices: (G,) uint8.
        axis: which weights form a group.
        groups: number of groups of the convolution.

    Returns:
        values (G, 2) in the weight's type, lower slot first, zeros where a kept slot is padding; and packed choices.

    Raises:
        ArgumentError: if a weight outside the choices is not zero.
    """
    check_choices(choices, weight.shape, axis, groups)
    weight, choices = weight.detach(), choices.to(weight.device)
    lost = (weight != 0) & ~choices_to_mask(choices, weight.shape, axis, groups)
    if bool(lost.any()):
        raise ArgumentError(
            f"{int(lost.sum())} weights that the choices do not keep are not zero: mask the weight first "
            "(SemiStructured.apply_masks)"
        )
    values, _ = group_view(_bits(weight), axis, groups)
    kept = values.gather(1, kept_slots(choices))
    return kept.view(weight.dtype), pack_choices(choices)


@torch.no_grad()
def decode(values: Tensor, packed: Tensor, shape: Sequence[int], axis: Axis = "channels", groups: int = 1) -> Tensor:
    """Undo `encode` bit for bit, for any type; weights that are not kept become +0.

    Raises:
        CheckpointError: if values and choices are not those of a weight of this shape.
    """
    count = group_count(shape, axis, groups)
    choices = unpack_choices(packed, count)
    if tuple(values.shape) != (count, 2):
        raise CheckpointError(f"values have shape {tuple(values.shape)}: a weight of shape {tuple(shape)} has ({count}, 2)")
    bits = _bits(values)
    full = torch.zeros(count, 4, dtype=bits.dtype, device=bits.device)
    full.scatter_(1, kept_slots(choices.to(bits.device)), bits)
    return ungroup(full, shape, axis, groups).view(values.dtype)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(_INTEGERS[tensor.element_size()])
