"""Building a layer with the configuration of another one: convolutions and linear layers with other weights, batch norms."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from widekernel.layers.conv import DepthwiseConv2d
from widekernel.layers.pointwise import PointwiseConv2d, PointwiseGradConv2d, PointwiseLinear

# The kinds of layers whose output depends only on their weight and bias, the most specialized last.
_PLAIN = (nn.Conv2d, nn.Linear, DepthwiseConv2d, PointwiseConv2d, PointwiseGradConv2d, PointwiseLinear)


def is_plain(layer: nn.Module) -> bool:
    """Return whether `layer`, parametrized or not, computes the same as a plain layer with its weight and bias."""
    return type(layer).forward in {kind.forward for kind in _PLAIN}


def layer_like(layer: Any, weight: Tensor, bias: Tensor | None, kind: type[nn.Module] | None = None) -> Any:
    """Return a layer configured like `layer`, with other weights and without its hooks and parametrizations.

    Kernel size, stride, padding, dilation, groups, training mode, dtype, device and `requires_grad` are those of `layer`.
    The numbers of channels or features follow from the shape of `weight`. No random numbers are drawn. Weights that have
    the right dtype and device already are not copied.

    Args:
        layer: an `nn.Conv2d` or `nn.Linear`.
        weight: (C', C / groups, kh, kw) or (C', C).
        bias: (C',), or None for none.
        kind: class of the result; by default the most specialized kind of plain layer that `layer` is, so that accelerated
            layers stay accelerated.
    """
    kind = kind or next(known for known in reversed(_PLAIN) if isinstance(layer, known))
    make: Any = kind
    # On the meta device: elsewhere the constructors would draw initial weights.
    if isinstance(layer, nn.Linear):
        new = make(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    else:
        new = make(
            weight.shape[1] * layer.groups,
            weight.shape[0],
            layer.kernel_size,
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            groups=layer.groups,
            bias=bias is not None,
            padding_mode=layer.padding_mode,
            device="meta",
        )
    new.weight = _parameter(weight, layer.weight)
    if bias is not None:
        new.bias = _parameter(bias, layer.weight if layer.bias is None else layer.bias)
    return new.train(layer.training)


def norm_like(norm: nn.BatchNorm2d, kind: type[nn.Module]) -> Any:
    """Return a batch norm of class `kind` configured like `norm`, without its hooks.

    Its parameters share the data of those of `norm`; its statistics are copies, because training changes them.

    Args:
        norm: the batch norm.
        kind: `nn.BatchNorm2d`, or a class with the same constructor.
    """
    make: Any = kind
    settings = norm.eps, norm.momentum, norm.affine, norm.track_running_stats
    new = make(norm.num_features, *settings, device="meta").train(norm.training)
    for name, value in norm._parameters.items():
        new._parameters[name] = None if value is None else _parameter(value, value)
    for name, statistic in norm._buffers.items():
        new._buffers[name] = None if statistic is None else statistic.clone()
    return new


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach().to(like), requires_grad=like.requires_grad)
