"""Residual blocks and other parts that several families share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from timm.layers import DropPath, LayerNorm, LayerNorm2d, Mlp
from torch import Tensor, nn

from widekernel.layers import KernelSource
from widekernel.layers.conv import fold_affine, is_plain
from widekernel.layers.folding import Fusable
from widekernel.models.base import Parts, Stage

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class MixerBlock(Fusable, nn.Module):
    """ConvNeXt's block with any spatial layer: mixer, layer norm, two linear layers with GELU, layer scale, residual.

    Liu et al., A ConvNet for the 2020s, CVPR 2022.

    Args:
        mixer: (N, C, H, W) -> (N, C, H, W).
        dim: C.
        drop_path: rate at which whole samples skip the block in training.
        layer_scale: initial value of the factor per channel, 0 for none.
    """

    def __init__(self, mixer: nn.Module, dim: int, drop_path: float, layer_scale: float) -> None:
        super().__init__()
        self.mixer = mixer
        self.norm = LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.gamma = nn.Parameter(torch.full((dim,), layer_scale)) if layer_scale > 0 else None
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        y = self.mixer(x).permute(0, 2, 3, 1)
        y = self.mlp(self.norm(y))
        if self.gamma is not None:
            y = y * self.gamma
        return x + self.drop_path(y.permute(0, 3, 1, 2))

    def foldable(self) -> bool:
        """Whether there is a layer scale to fold, and a plain layer to fold it into."""
        return self.gamma is not None and is_plain(self.mlp.fc2)

    def folded(self) -> MixerBlock:
        """Put the layer scale into the second linear layer."""
        assert self.gamma is not None
        fc2 = fold_affine(self.mlp.fc2, self.gamma.double(), torch.zeros_like(self.gamma).double())
        self.mlp = with_part(self.mlp, "fc2", fc2)
        self.gamma = None
        return self


def with_part(module: ModuleT, name: str, part: nn.Module) -> ModuleT:
    """Give `module` with another part of that name; the one given, which may stand elsewhere too, stays as it is."""
    new = copy.copy(module)
    new._modules = {**module._modules, name: part}
    return new


def patch_stem(in_chans: int, dim: int, patch: int) -> nn.Sequential:
    """ConvNeXt's stem: patches of `patch` x `patch` pixels, then a layer norm."""
    return nn.Sequential(nn.Conv2d(in_chans, dim, patch, stride=patch), LayerNorm2d(dim))


def norm_downsample(dim_in: int, dim_out: int) -> nn.Sequential:
    """ConvNeXt's downsampling: layer norm, then a 2x2 convolution of stride 2."""
    return nn.Sequential(LayerNorm2d(dim_in), nn.Conv2d(dim_in, dim_out, 2, stride=2))


def convnext_parts(
    widths: Sequence[int],
    in_chans: int,
    rates: Sequence[Sequence[float]],
    block: Callable[[int, int, float], nn.Module],
) -> Parts:
    """Put blocks into ConvNeXt's frame.

    Args:
        widths: of the stages.
        in_chans: channels of the image.
        rates: drop-path rate of every block, listed by stage.
        block: makes a block, given the index of its stage, its width and its drop-path rate.
    """
    stages = []
    for i, width in enumerate(widths):
        downsample = norm_downsample(widths[i - 1], width) if i else nn.Identity()
        stages.append((Stage(downsample, [block(i, width, rate) for rate in rates[i]]), width))
    return Parts(patch_stem(in_chans, widths[0], 4), stages, [4 * 2**i for i in range(len(stages))])


def init_convnext(model: nn.Module, head_init_scale: float) -> None:
    """Initialise as ConvNeXt does: every convolution, kernel and linear layer from a normal of deviation 0.02."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, KernelSource):
            for weight in module.parameters(recurse=True):
                if weight.dim() == 4 and weight.shape[-1] > 1:  # not the gates
                    nn.init.trunc_normal_(weight, std=0.02)
    classifier = model.head.fc  # type: ignore[union-attr]
    if isinstance(classifier, nn.Linear):
        with torch.no_grad():
            classifier.weight.mul_(head_init_scale)
            classifier.bias.mul_(head_init_scale)
