"""Residual blocks and other parts of networks that several families share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import DropPath, Mlp, SqueezeExcite, create_conv2d
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn

from widekernel.layers import KernelSource
from widekernel.layers.affine import fold_affine
from widekernel.layers.alterations import alterations, parametrized, replaced_methods
from widekernel.layers.folding import Fusable, is_trained
from widekernel.layers.norms import affine_of, is_foldable
from widekernel.layers.rebuilding import is_plain
from widekernel.layers.replacing import with_submodule
from widekernel.models.base import Parts, Stage
from widekernel.models.options import ModelOptions, StageSpec


class MixerBlock(Fusable, nn.Module):
    """ConvNeXt's block with any spatial layer: mixer, layer norm, two linear layers with GELU, layer scale, residual.

    Liu et al., A ConvNet for the 2020s, CVPR 2022.

    Args:
        mixer: spatial layer, (N, C, H, W) -> (N, C, H, W).
        dim: C.
        drop_path: rate at which whole samples skip the block in training.
        layer_scale: initial value of the factor per channel, 0 for none.
        options: provides the norm and the activation.
    """

    def __init__(self, mixer: nn.Module, dim: int, drop_path: float, layer_scale: float, options: ModelOptions) -> None:
        super().__init__()
        self.mixer = mixer
        self.norm = options.channels_last_norm(dim)
        self.mlp = Mlp(dim, 4 * dim, act_layer=options.activation(nn.GELU))  # type: ignore[arg-type]
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
        """Return whether there is a layer scale to fold, and an unaltered layer to fold it into."""
        return self.gamma is not None and is_plain(self.mlp.fc2) and not self.alterations()

    def is_folded(self) -> bool:
        """Return whether the block had a layer scale that has been folded."""
        return self.gamma is None and self.layer_scale > 0

    def alterations(self) -> list[str]:
        """List the hooks, replaced methods and parametrization that prevent folding the layer scale."""
        return [] if self.gamma is None else alterations_around_scale(self)

    def folded(self) -> MixerBlock:
        """Fold the layer scale into the second linear layer."""
        assert self.gamma is not None
        fc2 = fold_affine(self.mlp.fc2, self.gamma.double(), torch.zeros_like(self.gamma).double())
        fc2.requires_grad_(is_trained(self.mlp.fc2, self.gamma))
        self.mlp = with_submodule(self.mlp, "fc2", fc2)
        self.gamma = None
        return self


class UnbiasedResponseNorm(GlobalResponseNorm):
    """timm's response norm without its bias, which has been folded into the next layer: x · (1 + weight · response).

    Args:
        norm: the response norm whose weight and epsilon are taken over.
    """

    def __init__(self, norm: GlobalResponseNorm) -> None:
        weight = norm.weight
        super().__init__(weight.numel(), norm.eps, norm.channel_dim == -1, device=weight.device, dtype=weight.dtype)
        self.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
        self.bias = None  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, C), or (N, C, H, W) if the norm is not channels-last -> the same shape."""
        norms = x.norm(p=2, dim=self.spatial_dim, keepdim=True)
        response = norms / (norms.mean(dim=self.channel_dim, keepdim=True) + self.eps)
        return x * (1 + self.weight.view(self.wb_shape) * response)


class ResponseNormBlock(Fusable, nn.Module):
    """Block of UniRepLKNet and Shift-wise v2: spatial layer, batch norm, squeeze-excite, MLP with response norm, residual.

    A second batch norm and the layer scale follow the MLP, whose second layer has no bias.

    Args:
        mixer: spatial layer, (N, C, H, W) -> (N, C, H, W); `nn.Identity` for none.
        dim: C.
        drop_path: rate at which whole samples skip the block in training.
        layer_scale: initial value of the factor per channel, 0 for none.
        options: provides the activation.
        ffn_ratio: number of hidden units of the MLP, as a multiple of C.
        norm: whether a batch norm follows the spatial layer.
    """

    # Whether folding moves the bias of the response norm into the second linear layer.
    folds_response_bias = True

    def __init__(
        self,
        mixer: nn.Module,
        dim: int,
        drop_path: float,
        layer_scale: float,
        options: ModelOptions,
        ffn_ratio: int = 4,
        norm: bool = True,
    ) -> None:
        super().__init__()
        self.mixer = mixer
        self.norm: nn.Module = nn.BatchNorm2d(dim) if norm else nn.Identity()
        self.se = SqueezeExcite(dim, rd_channels=dim // 4)
        act: Any = options.activation(nn.GELU)
        self.mlp = Mlp(dim, ffn_ratio * dim, act_layer=act, norm_layer=GlobalResponseNorm, bias=(True, False))
        self.norm2: nn.Module = nn.BatchNorm2d(dim)
        self.gamma = nn.Parameter(torch.full((dim,), layer_scale)) if layer_scale > 0 else None
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        y = self.se(self.norm(self.mixer(x)))
        y = self.norm2(self.mlp(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        if self.gamma is not None:
            y = y * self.gamma.view(1, -1, 1, 1)
        return x + self.drop_path(y)

    def foldable(self) -> bool:
        """Return whether the norms and the mixer can be folded."""
        around = is_foldable(self.norm) and is_foldable(self.norm2) and is_plain(self.mlp.fc2)
        return around and not self.is_folded() and self._mixer_is_foldable() and not self.alterations()

    def _mixer_is_foldable(self) -> bool:
        nothing = type(self.mixer) is nn.Identity and type(self.norm) is nn.Identity
        return nothing or getattr(self.mixer, "foldable", lambda: False)()

    def is_folded(self) -> bool:
        """Return whether the norms have been folded."""
        return self.gamma is None and all(type(part) is nn.Identity for part in (self.norm, self.norm2))

    def alterations(self) -> list[str]:
        """List the hooks, replaced methods and parametrizations that prevent folding norms and layer scale."""
        if self.is_folded():
            return []
        return alterations_around_scale(self, "mixer", "norm", "norm2", *(["mlp.norm"] if self._has_foldable_bias() else []))

    def folded(self) -> ResponseNormBlock:
        """Fold the first norm into the mixer; the response norm's bias, the second norm and the layer scale into the MLP."""
        dim: int = self.mlp.fc2.out_features  # type: ignore[assignment]
        if type(self.mixer) is not nn.Identity:
            trained = is_trained(self.mixer, self.norm)
            self.mixer = self.mixer.folded(*affine_of(self.norm, dim)).requires_grad_(trained)  # type: ignore[operator]
        scale, shift = affine_of(self.norm2, dim)
        if self.gamma is not None:
            scale, shift = scale * self.gamma.detach().double(), shift * self.gamma.detach().double()
        trained = is_trained(self.mlp.fc2, self.norm2, self.gamma)
        if self._has_foldable_bias():
            norm: Any = self.mlp.norm
            trained = trained or is_trained(norm.bias)
            shift = shift + scale * (self.mlp.fc2.weight.detach().double() @ norm.bias.detach().double())
            self.mlp = with_submodule(self.mlp, "norm", UnbiasedResponseNorm(norm))
        fc2 = fold_affine(self.mlp.fc2, scale, shift).requires_grad_(trained)
        self.mlp = with_submodule(self.mlp, "fc2", fc2)
        self.norm, self.norm2 = nn.Identity(), nn.Identity()
        self.gamma = None
        return self

    def _has_foldable_bias(self) -> bool:
        return self.folds_response_bias and type(self.mlp.norm) is GlobalResponseNorm


def alterations_around_scale(block: nn.Module, *others: str) -> list[str]:
    """List what prevents folding the layer scale into `mlp.fc2`.

    Obstacles are hooks, which would see scaled values, replaced methods, and a parametrized `gamma`.

    Args:
        block: block with the parts `mlp` and `gamma`.
        others: names of other parts of the block that must be unaltered.
    """
    found = replaced_methods(block) + alterations(block, ("mlp", "mlp.fc2", "mlp.drop2", *others))
    return found + parametrized(block, "gamma")


def conv_stem(dim: int, options: ModelOptions) -> nn.Sequential:
    """Create the stem of UniRepLKNet and Shift-wise v2: two 3x3 convolutions of stride 2, each with a layer norm."""
    norm = options.channel_norm()
    return nn.Sequential(
        nn.Conv2d(options.in_chans, dim // 2, 3, stride=2, padding=1),
        norm(dim // 2),
        nn.GELU(),
        nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1),
        norm(dim),
    )


def conv_downsample(dim_in: int, dim_out: int, spec: StageSpec, options: ModelOptions) -> nn.Sequential:
    """Create the downsampling of UniRepLKNet and Shift-wise v2: a 3x3 convolution, then a layer norm."""
    dilation = 1 if spec.stride > 1 else spec.downsample_dilation
    conv = nn.Conv2d(dim_in, dim_out, 3, stride=spec.stride, padding=dilation, dilation=dilation)
    return nn.Sequential(conv, options.channel_norm()(dim_out))


def norm_downsample(dim_in: int, dim_out: int, spec: StageSpec, options: ModelOptions) -> nn.Sequential:
    """Create ConvNeXt's downsampling: layer norm, then a 2x2 convolution, which preserves the size if the stride is 1."""
    conv: nn.Module
    if spec.stride > 1:
        conv = nn.Conv2d(dim_in, dim_out, 2, stride=spec.stride)
    else:
        conv = create_conv2d(dim_in, dim_out, 2, stride=1, dilation=spec.downsample_dilation, padding="same", bias=True)
    return nn.Sequential(options.channel_norm()(dim_in), conv)


def convnext_parts(
    widths: Sequence[int],
    options: ModelOptions,
    make_block: Callable[[int, int, float, StageSpec], nn.Module],
    patch: int = 4,
) -> Parts:
    """Create the parts of a ConvNeXt with custom blocks.

    Args:
        widths: width of each stage.
        options: options of the network.
        make_block: creates a block from the index of its stage, its width, its drop-path rate and the stage's strides.
        patch: side of the stem's patches in pixels.
    """
    stages, specs = [], options.stage_specs(len(widths), patch)
    for i, (width, spec) in enumerate(zip(widths, specs)):
        downsample = norm_downsample(widths[i - 1], width, spec, options) if i else nn.Identity()
        blocks = [make_block(i, width, rate, spec) for rate in options.drop_path_rates[i]]
        stages.append((Stage(downsample, blocks), width))
    stem = nn.Sequential(nn.Conv2d(options.in_chans, widths[0], patch, stride=patch), options.channel_norm()(widths[0]))
    return Parts(stem, stages, [spec.reduction for spec in specs])


def init_convnext(model: nn.Module, head_init_scale: float) -> None:
    """Initialize a network like ConvNeXt: convolution and linear weights from a normal with standard deviation 0.02.

    Args:
        model: the network.
        head_init_scale: factor on the initial weights of the classifier.
    """
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, KernelSource):
            for weight in module.parameters(recurse=True):
                if weight.dim() == 4 and weight.shape[-1] > 1:  # the gates keep their initial values
                    nn.init.trunc_normal_(weight, std=0.02)
    classifier = model.head.fc  # type: ignore[union-attr]
    if isinstance(classifier, nn.Linear):
        with torch.no_grad():
            classifier.weight.mul_(head_init_scale)
            classifier.bias.mul_(head_init_scale)
