"""The large-kernel layer: the trainable form and the folded form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from widekernel import ops
from widekernel.errors import ArgumentError
from widekernel.layers.alterations import alteration
from widekernel.layers.folding import Folded, Fusable, is_trained
from widekernel.layers.norms import affine_of, reasons_against_folding
from widekernel.layers.rect import Rect, maximal_rectangles
from widekernel.layers.sources import KernelSource, rects_of, tensors_of
from widekernel.layers.strict_loading import load_strictly
from widekernel.ops import plain
from widekernel.ops.registration import autocast_dtype


class LargeKernel(Fusable, nn.Module):
    """y = Σ_b norm_b( branch_b(x) ) [+ x], the trainable large-kernel layer of all families.

    Without normalization a single operator call computes all branches.

    Args:
        source: the kernel source, which yields the branches.
        norms: one module per branch, or None for no normalization.
        identity: whether to add the input.

    Raises:
        ArgumentError: if the numbers of norms and branches differ.
    """

    def __init__(self, source: KernelSource, norms: Sequence[nn.Module] | None = None, identity: bool = False) -> None:
        super().__init__()
        if norms is not None and len(norms) != source.num_branches:
            raise ArgumentError(f"{len(norms)} norms for {source.num_branches} branches: every branch needs one")
        self.source = source
        self.norms = nn.ModuleList(norms or [])
        self.identity = identity

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        if torch.jit.is_scripting():
            return self._scripted(x)
        else:  # noqa: RET505 - TorchScript leaves out the other branch, and only that
            return self._computed(x)

    def _scripted(self, x: Tensor) -> Tensor:
        responses = self.source.responses(x)
        if len(self.norms) == 0:
            y = torch.stack(responses).sum(0)
        else:
            y = torch.zeros_like(responses[0])
            for i, norm in enumerate(self.norms):
                y = norm(responses[i]) if i == 0 else y + norm(responses[i])
        return y + x if self.identity else y

    @torch.jit.unused
    def _computed(self, x: Tensor) -> Tensor:
        source, norms = self.source, list(self.norms)
        if not norms and (branches := source.branches()) is not None:
            kernels, anchors, dilations = branches
            y = ops.depthwise_sum(x, kernels, anchors, dilations=dilations)
        else:
            # Under autocast the branches share one converted copy of the input.
            dtype = autocast_dtype(x)
            responses = source.responses(x if dtype is None else x.to(dtype))
            y = add_normalized(responses, norms) if norms else torch.stack(responses).sum(0)
        return y + x if self.identity else y

    def foldable(self) -> bool:
        """Return whether every branch is a rectangle and every norm an affine map in evaluation."""
        return not self.reasons_against_folding()

    def reasons_against_folding(self) -> list[str]:
        """List why the layer cannot be folded; empty if it can."""
        reasons = [] if self.source.branches() is not None else ["a branch equals no single kernel near the borders"]
        if text := alteration(self):
            reasons.append(text)
        return list(dict.fromkeys(reasons + [why for norm in self.norms for why in reasons_against_folding(norm)]))

    @torch.no_grad()
    def folded(self, scale: Tensor | None = None, shift: Tensor | None = None) -> FoldedLargeKernel:
        """Return the layer as few rectangles and a bias: norms and identity folded in, covered rectangles absorbed.

        Args:
            scale: (C,), applied to the output of the layer and folded in, too; for instance the scale of a following norm.
            shift: (C,), added after the scale.

        Raises:
            TypeError: if a branch is not a rectangle or a norm depends on its input.
        """
        rects = rects_of(self.source)
        if rects is None:
            raise TypeError(
                f"a {type(self.source).__name__} layer equals no single kernel near the borders and cannot be folded"
            )
        dtype, device, channels = rects[0].kernel.dtype, rects[0].kernel.device, self.source.channels
        rects = [rect.with_kernel(rect.kernel.double()) for rect in rects]
        bias = torch.zeros(channels, dtype=torch.float64, device=device)
        for i, norm in enumerate(self.norms):
            by, plus = affine_of(norm, channels)
            rects[i] = rects[i].scaled(by.to(device))
            bias = bias + plus.to(device)
        if self.identity:
            rects.append(Rect.identity(rects[0].kernel))
        if scale is not None:
            rects = [rect.scaled(scale.double()) for rect in rects]
            bias = bias * scale.double()
        if shift is not None:
            bias = bias + shift.double()
        merged = [rect.with_kernel(rect.kernel.to(dtype)) for rect in maximal_rectangles(rects)]
        return FoldedLargeKernel(merged, bias.to(dtype)).requires_grad_(is_trained(self))


def add_normalized(responses: Sequence[Tensor], norms: Sequence[nn.Module]) -> Tensor:
    """Return Σ_b norm_b(response_b)."""
    y = norms[0](responses[0])
    for norm, response in zip(norms[1:], responses[1:]):
        y = y + norm(response)
    return y


def is_plain_relu(act: nn.Module) -> bool:
    """Return whether `act` is a plain ReLU: not a subclass, and without hooks, which need it to be called."""
    return type(act) is nn.ReLU and not alteration(act)


class FoldedLargeKernel(Folded, nn.Module):
    """y = Σ_r depthwise(x, rect_r) + bias: one operator call, the fast form for inference.

    Args:
        rects: rectangles of C channels each; zeros fill the gaps of dilated ones.
        bias: (C,).
    """

    def __init__(self, rects: Sequence[Rect], bias: Tensor) -> None:
        super().__init__()
        rects = [rect.dense() for rect in rects]
        self.kernels = nn.ParameterList(nn.Parameter(rect.kernel.detach().clone()) for rect in rects)
        self.anchors = tuple(rect.anchor for rect in rects)
        # Part of the state dict only so that `table_misfits` can compare the anchors when weights are loaded.
        self.register_buffer("anchor_table", torch.tensor(self.anchors, dtype=torch.int32, device=bias.device))
        self.bias = nn.Parameter(bias.detach().clone())
        load_strictly(self)

    def forward(self, x: Tensor, relu: bool = False) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W); with `relu`, ReLU is applied, which our kernels do in the same pass."""
        if torch.jit.is_scripting():
            return self._scripted(x, relu)
        else:  # noqa: RET505 - TorchScript leaves out the other branch, and only that
            return ops.depthwise_sum(x, tensors_of(self.kernels), self.anchors, self.bias, relu=relu)

    def _scripted(self, x: Tensor, relu: bool) -> Tensor:
        y = plain.depthwise_sum(x, [self.kernels[0]], [self.anchors[0]], self.bias)
        for i, (kernel, anchor) in enumerate(zip(self.kernels, self.anchors)):
            if i > 0:
                y = y + plain.depthwise_sum(x, [kernel], [anchor])
        return y.relu() if relu else y

    def table_misfits(self, state: Mapping[str, Tensor], prefix: str) -> list[str]:
        """List the mismatch if the state dict is from a layer whose kernels have other anchors; empty if it is not."""
        table = state.get(f"{prefix}anchor_table")
        if table is None or table.is_meta or tuple(map(tuple, table.tolist())) == self.anchors:
            return []
        return [f"{prefix}anchors are {table.tolist()} in the file but {list(self.anchors)} here"]

    def table_problem(self, name: str, tables: Mapping[str, Tensor]) -> str:
        """Return what is wrong with the table read from a file; "" if its anchors are those of this layer."""
        theirs = tables[name].tolist()
        if theirs == list(map(list, self.anchors)):
            return ""
        return f"is {theirs} but the anchors here are {list(self.anchors)}"

    def rects(self) -> list[Rect]:
        """Return the rectangles."""
        return [Rect(kernel, anchor) for kernel, anchor in zip(self.kernels, self.anchors)]

    def extra_repr(self) -> str:
        """Return channels, sizes and anchors."""
        sizes = [tuple(kernel.shape[2:]) for kernel in self.kernels]
        return f"{self.bias.numel()}, rects={sizes}, anchors={list(self.anchors)}"
