"""`fold`: the fast inference form of a network, with the same outputs."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from widekernel.layers.folding import Foldable, deep_copy, fold_in_place, is_trained, make_permanent, warn_about_unfolded
from widekernel.layers.strict_loading import load_strictly

__all__ = ["Foldable", "fold"]

ModelT = TypeVar("ModelT", bound=nn.Module)


def fold(model: ModelT) -> ModelT:
    """Return a copy of `model` in its fast inference form; the original is left as it is.

    Every large-kernel layer becomes one operator call: its batch norms and identity are folded in and covered kernels
    absorbed. Batch norms before and after 1x1 convolutions and linear layers, and layer scales, are folded, too.
    Outputs in evaluation mode stay the same up to rounding.

    Layers that equal no single kernel (SLaK_pw with `padding="same"`), or whose norms are more than batch norms with running
    statistics, stay as they are; a warning names them and says why. So do layers with hooks or with a `forward` that was
    replaced on the instance, and layers whose folding would show such a layer other values. Modules that are used in several
    places stay shared, and whatever is computed from frozen parameters alone stays frozen. Masks of `torch.nn.utils.prune`
    and the old weight and spectral norms are made permanent in the copy.

    Raises:
        ArgumentError: if a pruned kernel was trained without its mask being applied; the message says what to do.
    """
    copy = deep_copy(model)
    make_permanent(copy)
    result = fold_in_place(copy.eval())
    load_strictly(result)
    warn_about_unfolded(result, stacklevel=2)
    if not is_trained(model):
        result.requires_grad_(False)
    return result  # type: ignore[return-value]
