"""Convolution, batch norm and activation in one module, which folds the norm into the convolution."""

from __future__ import annotations

from torch import Tensor, nn

from widekernel.deprecation import renamed_arguments
from widekernel.layers.affine import fold_affine, fold_input_affine
from widekernel.layers.alterations import alterations
from widekernel.layers.folding import Folded, Fusable, is_trained
from widekernel.layers.norms import affine_of, is_foldable
from widekernel.layers.rebuilding import is_plain


class ConvNorm(Fusable, nn.Module):
    """Convolution, batch norm and activation.

    Args:
        conv: the convolution.
        bn: the normalization after it.
        act: the activation after the normalization, by default none.
    """

    def __init__(self, conv: nn.Conv2d, bn: nn.Module, act: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = conv
        self.bn = bn
        self.act = act or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""
        return self.act(self.bn(self.conv(x)))

    def foldable(self) -> bool:
        """Return whether the norm is an affine map in evaluation and the convolution a plain one, both without hooks."""
        return is_foldable(self.bn) and is_plain(self.conv) and not alterations(self, ("", "conv"))

    def alterations(self) -> list[str]:
        """List the hooks and replaced methods that prevent folding the norm; empty if there is no norm."""
        return [] if type(self.bn) is nn.Identity else alterations(self, ("", "conv", "bn"))

    @renamed_arguments(before="input_norm")
    def folded(self, input_norm: nn.Module | None = None) -> ConvNorm:
        """Return the layer with the norm folded into the convolution, which then has a bias.

        Args:
            input_norm: a batch norm right before the layer, to be folded in, too. The convolution must not pad its input,
                because the shift of that norm does not reach padded pixels.

        Raises:
            ArgumentError: if there is an input norm and the convolution is grouped or pads.
        """
        conv = fold_affine(self.conv, *affine_of(self.bn, self.conv.out_channels))
        if input_norm is not None:
            conv = fold_input_affine(conv, *affine_of(input_norm, self.conv.in_channels))
        conv.requires_grad_(is_trained(self.conv, self.bn, input_norm))
        has_norm = not isinstance(self.bn, nn.Identity) or not isinstance(input_norm, (nn.Identity, type(None)))
        kind = FoldedConvNorm if has_norm or isinstance(self, FoldedConvNorm) else ConvNorm
        return kind(conv, nn.Identity(), self.act)


class FoldedConvNorm(Folded, ConvNorm):
    """A `ConvNorm` whose norm is folded into its convolution."""
