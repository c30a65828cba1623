"""`torch.sparse` semi-structured weights: whether this machine supports them, and layers that use them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from widekernel.errors import ArgumentError
from widekernel.layers.sides import sides
from widekernel.sparsity.semi_structured.eligibility import layer_name
from widekernel.sparsity.semi_structured.manifest import Manifest
from widekernel.sparsity.semi_structured.masks import check_semi_structured

# Rows and columns of a compressed weight must be multiples of these (torch.sparse.semi_structured, 2.15).
MULTIPLES = {
    "cutlass": {torch.float16: (32, 64), torch.bfloat16: (32, 64), torch.int8: (16, 128)},
    "cusparselt": {torch.float16: (16, 16), torch.bfloat16: (16, 16), torch.int8: (32, 32)},
}


@dataclass(frozen=True)
class HardwareSupport:
    """Support for products of 2:4 matrices on this machine.

    Attributes:
        available: whether they are supported.
        reason: why not; "" if they are.
        backend: "cutlass" or "cusparselt", whichever PyTorch would use.
    """

    available: bool
    reason: str
    backend: str


@dataclass(frozen=True)
class PaddingPlan:
    """Padding of a weight to a size that the hardware supports.

    Attributes:
        rows: number of rows of the weight.
        columns: number of columns of the weight.
        padded_rows: the next supported size; additional outputs are cut off.
        padded_columns: the next supported size; the input is padded with zeros.
        reason: why the weight does not fit at all; "" if it does.
    """

    rows: int
    columns: int
    padded_rows: int
    padded_columns: int
    reason: str = ""


def hardware_support() -> HardwareSupport:
    """Return whether `torch.sparse.to_sparse_semi_structured` works here: it needs a CUDA device of capability 8.0."""
    if not hasattr(torch.sparse, "to_sparse_semi_structured"):
        return HardwareSupport(False, f"PyTorch {torch.__version__} has no semi-structured sparsity", "")
    from torch.sparse import SparseSemiStructuredTensor

    backend = "cutlass" if SparseSemiStructuredTensor._FORCE_CUTLASS else "cusparselt"
    if not torch.cuda.is_available():
        return HardwareSupport(False, "there is no CUDA device", backend)
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return HardwareSupport(False, f"{torch.cuda.get_device_name()} is older than capability 8.0", backend)
    return HardwareSupport(True, "", backend)


def plan_padding(rows: int, columns: int, dtype: torch.dtype, backend: str = "cutlass") -> PaddingPlan:
    """Round the size of a weight (out, in) up to a size that the hardware supports.

    float32 is refused: the hardware uses 1:2 there, and PyTorch's conversion would silently drop non-zeros.

    Raises:
        ArgumentError: if the backend is unknown.
    """
    if backend not in MULTIPLES:
        raise ArgumentError(f"backend {backend!r} is unknown: it must be one of {', '.join(map(repr, MULTIPLES))}")
    if dtype not in MULTIPLES[backend]:
        why = "float32 weights must be 1:2, so values would be lost" if dtype == torch.float32 else f"{dtype} has no kernels"
        return PaddingPlan(rows, columns, rows, columns, f"{why}: convert the network to float16 or bfloat16")
    high, wide = MULTIPLES[backend][dtype]
    return PaddingPlan(rows, columns, -(-rows // high) * high, -(-columns // wide) * wide)


class SparseLinear(nn.Module):
    """A linear layer with a compressed weight; for inference.

    Args:
        weight: (out, in), 2:4 along its rows.
        bias: (out,) or None.
        plan: the sizes to pad it to.
        compress: function that returns the compressed form of the padded weight.

    Raises:
        ArgumentError: if the weight is not 2:4; compressing it would silently drop non-zeros.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, plan: PaddingPlan, compress: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        check_semi_structured(weight, "channels")
        self.plan = plan
        rows, columns = plan.padded_rows - plan.rows, plan.padded_columns - plan.columns
        padded = F.pad(weight.detach(), (0, columns, 0, rows)).contiguous()
        self.weight = nn.Parameter(compress(padded), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: (..., in) -> (..., out)."""
        columns = self.plan.padded_columns - self.plan.columns
        rows = F.pad(x, (0, columns)).reshape(-1, self.plan.padded_columns)
        y = F.linear(rows, self.weight)[:, : self.plan.rows]
        y = y.reshape(*x.shape[:-1], self.plan.rows)
        return y if self.bias is None else y + self.bias


class SparsePointwise(nn.Module):
    """A 1x1 convolution, computed by a `SparseLinear` over channels; for inference.

    Args:
        linear: (out, in).
        stride: stride of the convolution.
    """

    def __init__(self, linear: SparseLinear, stride: tuple[int, int]) -> None:
        super().__init__()
        self.linear = linear
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Apply the convolution: (N, in, H, W) -> (N, out, H', W')."""
        x = x[:, :, :: self.stride[0], :: self.stride[1]]
        return self.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def is_compressed(layer: nn.Module) -> bool:
    """Return whether a layer's weight is compressed, and so is not a plain tensor."""
    return isinstance(layer, (SparseLinear, SparsePointwise))


def reason_against(layer: nn.Module, axis: str, backend: str) -> str:
    """Return why a 2:4 layer cannot use a compressed weight, or "" if it can."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if type(layer) not in (nn.Linear, nn.Conv2d):  # a subclass may read the weight in other ways
        return f"{type(layer).__name__} may compute something other than a plain layer"
    if isinstance(layer, nn.Conv2d):
        if prod(layer.kernel_size) != 1 or layer.groups != 1:
            return "torch.sparse multiplies matrices: only linear layers and 1x1 convolutions can be compressed"
        if not isinstance(layer.padding, str) and sides(layer.padding) != (0, 0):
            return f"padding {layer.padding} of a 1x1 convolution"
    if axis != "channels" and not (axis == "im2col" and weight.shape[1] % 4 == 0):
        return f"groups along axis={axis!r} do not lie within rows"
    plan = plan_padding(weight.shape[0], weight[0].numel(), weight.dtype, backend)
    if plan.reason:
        return plan.reason
    if plan.padded_rows * plan.padded_columns >= 2 * plan.rows * plan.columns:
        size, padded = f"{plan.rows} x {plan.columns}", f"{plan.padded_rows} x {plan.padded_columns}"
        return f"padding it from {size} to {padded} costs as much as sparsity can save, a factor of 2"
    return "" if weight.is_cuda else f"its weight is on {weight.device}, not on a CUDA device"


def compress_layers(model: nn.Module, manifest: Manifest) -> dict[str, str]:
    """Compress the weight of every 2:4 layer that supports it, in place.

    Returns:
        the names of the weights that were not compressed, each with the reason.
    """
    backend = hardware_support().backend
    dense = {}
    for name, known in manifest.weights.items():
        path = layer_name(name)
        layer = model.get_submodule(path)
        reason = reason_against(layer, known.axis, backend) if path else "the network is this one layer"
        if reason:
            dense[name] = reason
            continue
        model.set_submodule(path, compressed(layer, backend, torch.sparse.to_sparse_semi_structured))
    return dense


def compressed(layer: nn.Module, backend: str, compress: Callable[[Tensor], Tensor]) -> nn.Module:
    """Return a layer with a compressed weight that computes the same as a linear layer or 1x1 convolution."""
    assert isinstance(layer, (nn.Linear, nn.Conv2d))
    matrix = layer.weight.detach().flatten(1)
    plan = plan_padding(matrix.shape[0], matrix.shape[1], matrix.dtype, backend)
    linear = SparseLinear(matrix, layer.bias, plan, compress)
    if isinstance(layer, nn.Linear):
        return linear.train(layer.training)
    return SparsePointwise(linear, sides(layer.stride)).train(layer.training)
