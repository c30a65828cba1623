"""Residual blocks and other parts that several families share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from timm.layers import DropPath, Mlp, create_conv2d
from torch import Tensor, nn

from widekernel.layers import KernelSource
from widekernel.layers.affine import fold_affine
from widekernel.layers.alterations import alterations, parametrized, replaced_methods
from widekernel.layers.folding import Fusable, is_trained
from widekernel.layers.rebuilding import is_plain
from widekernel.layers.replacing import with_submodule
from widekernel.models.asked import Asked, Step
from widekernel.models.base import Parts, Stage


class MixerBlock(Fusable, nn.Module):
    """ConvNeXt's block with any spatial layer: mixer, layer norm, two linear layers with GELU, layer scale, residual.

    Liu et al., A ConvNet for the 2020s, CVPR 2022.

    Args:
        mixer: (N, C, H, W) -> (N, C, H, W).
        dim: C.
        drop_path: rate at which whole samples skip the block in training.
        layer_scale: initial value of the factor per channel, 0 for none.
        asked: which norm and activation.
    """

    def __init__(self, mixer: nn.Module, dim: int, drop_path: float, layer_scale: float, asked: Asked) -> None:
        super().__init__()
        self.mixer = mixer
        self.norm = asked.last_norm(dim)
        self.mlp = Mlp(dim, 4 * dim, act_layer=asked.activation(nn.GELU))  # type: ignore[arg-type]
        self.layer_scale = layer_scale
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
        return self.gamma is not None and is_plain(self.mlp.fc2) and not self.alterations()

    def is_folded(self) -> bool:
        """Whether there was a layer scale, which has been folded."""
        return self.gamma is None and self.layer_scale > 0

    def alterations(self) -> list[str]:
        """List hooks, replaced methods and a parametrisation that keep a layer scale from being folded."""
        return [] if self.gamma is None else alterations_around_scale(self)

    def folded(self) -> MixerBlock:
        """Put the layer scale into the second linear layer."""
        assert self.gamma is not None
        fc2 = fold_affine(self.mlp.fc2, self.gamma.double(), torch.zeros_like(self.gamma).double())
        fc2.requires_grad_(is_trained(self.mlp.fc2, self.gamma))
        self.mlp = with_submodule(self.mlp, "fc2", fc2)
        self.gamma = None
        return self


def alterations_around_scale(block: nn.Module, *others: str) -> list[str]:
    """List what keeps a layer scale from going into `mlp.fc2`: hooks that would see scaled values, a computed `gamma`."""
    found = replaced_methods(block) + alterations(block, ("mlp", "mlp.fc2", "mlp.drop2", *others))
    return found + parametrized(block, "gamma")


def norm_downsample(dim_in: int, dim_out: int, step: Step, asked: Asked) -> nn.Sequential:
    """ConvNeXt's downsampling: layer norm, then a 2x2 convolution of stride 2; of stride 1, it keeps the size."""
    conv: nn.Module
    if step.stride > 1:
        conv = nn.Conv2d(dim_in, dim_out, 2, stride=step.stride)
    else:
        conv = create_conv2d(dim_in, dim_out, 2, stride=1, dilation=step.dilation_before, padding="same", bias=True)
    return nn.Sequential(asked.channel_norm()(dim_in), conv)


def convnext_parts(
    widths: Sequence[int], asked: Asked, block: Callable[[int, int, float, Step], nn.Module], patch: int = 4
) -> Parts:
    """Put blocks into ConvNeXt's frame.

    Args:
        widths: of the stages.
        asked: what the network is asked for.
        block: makes a block, given the index of its stage, its width, its drop-path rate, and the step to its stage.
        patch: side of the stem's patches in pixels.
    """
    stages, steps = [], asked.steps(len(widths), patch)
    for i, (width, step) in enumerate(zip(widths, steps)):
        downsample = norm_downsample(widths[i - 1], width, step, asked) if i else nn.Identity()
        stages.append((Stage(downsample, [block(i, width, rate, step) for rate in asked.rates[i]]), width))
    stem = nn.Sequential(nn.Conv2d(asked.in_chans, widths[0], patch, stride=patch), asked.channel_norm()(widths[0]))
    return Parts(stem, stages, [step.reduction for step in steps])


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
