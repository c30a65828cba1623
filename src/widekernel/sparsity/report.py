"""One report on the sparsity of a network: per layer, as text, as JSON and as a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from widekernel.sparsity.selection import Choice, unwrap
from widekernel.sparsity.state import Churn

if TYPE_CHECKING:
    from widekernel.sparsity.dynamic import DynamicSparsity


@dataclass(frozen=True)
class LayerSparsity:
    """One parameter.

    Attributes:
        name: of the parameter.
        shape: of the parameter.
        active: weights inside the mask; for a parameter without one, weights that are not zero.
        target: share of weights that is to be kept; None without a mask.
        moved: weights that grew at the last update.
        reason: why the parameter is not masked; "" if it is.
    """

    name: str
    shape: tuple[int, ...]
    active: int
    target: float | None
    moved: int
    reason: str

    @property
    def size(self) -> int:
        """Number of weights."""
        return torch.Size(self.shape).numel()

    @property
    def density(self) -> float:
        """Share of live weights."""
        return self.active / max(1, self.size)


@dataclass(frozen=True)
class SparsityReport:
    """What is masked, how densely, why not the rest, and how the masks have moved.

    Attributes:
        layers: every parameter, in the network's order.
        churn: the updates of the masks so far.
        pictures: magnitudes of some weights, by name, with NaN where they are dead.
        pending: whether masks are still to be drawn, from the gradients of the first step.
    """

    layers: tuple[LayerSparsity, ...]
    churn: tuple[Churn, ...]
    pictures: dict[str, Tensor]
    pending: bool = False

    @classmethod
    def of(
        cls,
        model: nn.Module,
        choices: Sequence[Choice],
        masks: Mapping[str, Tensor],
        controller: DynamicSparsity | None = None,
    ) -> SparsityReport:
        """Look at a network.

        Args:
            model: the network, with plain weights.
            choices: what is masked, and why not the rest.
            masks: parameter name -> bool; without masks the zeros count.
            controller: of dynamic sparse training.
        """
        parameters = dict(unwrap(model).named_parameters())
        densities = {} if controller is None else controller.densities()
        moved = {} if controller is None else controller.moved
        layers = []
        for choice in choices:
            weight = parameters[choice.name].detach()
            live = masks.get(choice.name, weight != 0)
            target = densities.get(choice.name, float(live.float().mean())) if choice.masked else None
            layers.append(
                LayerSparsity(choice.name, choice.shape, int(live.sum()), target, moved.get(choice.name, 0), choice.reason)
            )
        churn = () if controller is None else tuple(controller.churn)
        pending = controller is not None and not controller.masks
        return cls(tuple(layers), churn, _pictures(parameters, masks), pending)

    @property
    def masked(self) -> list[LayerSparsity]:
        """The parameters that have masks."""
        return [layer for layer in self.layers if not layer.reason]

    def sparsity(self) -> float:
        """Share of dead weights among the masked parameters."""
        total = sum(layer.size for layer in self.masked)
        return 1 - sum(layer.active for layer in self.masked) / max(1, total)

    def summary(self) -> str:
        """Tell in a few lines how much is masked, and why the rest is not."""
        total = sum(layer.size for layer in self.layers)
        inside = sum(layer.size for layer in self.masked)
        now = "masks follow with the first step" if self.pending else f"{100 * self.sparsity():.1f} % of them zero"
        lines = [f"{len(self.masked)} of {len(self.layers)} parameters are masked: {inside:,} of {total:,} weights, {now}"]
        for reason, count in Counter(layer.reason for layer in self.layers if layer.reason).most_common():
            size = sum(layer.size for layer in self.layers if layer.reason == reason)
            lines.append(f"dense: {count} parameters, {size:,} weights: {reason}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "sparsity": self.sparsity(),
            "layers": [
                {
                    "name": layer.name,
                    "shape": list(layer.shape),
                    "weights": layer.size,
                    "active": layer.active,
                    "density": layer.density,
                    "target_density": layer.target,
                    "moved": layer.moved,
                    "masked": not layer.reason,
                    "reason": layer.reason,
                }
                for layer in self.layers
            ],
            "churn": [vars(churn) for churn in self.churn],
        }

    def picture(self) -> bytes:
        """Draw density per layer, churn per update and some kernels with their masks: a PNG file."""
        from widekernel.sparsity.plot import draw

        return draw(self)


_SHOWN = 6


@torch.no_grad()
def _pictures(parameters: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give a few masked weights as images: kernels side by side where they have a window, else the corner of a matrix."""
    masks = {name: mask for name, mask in masks.items() if not bool(mask.all())} or masks  # where there is something to see
    windowed = [name for name, mask in masks.items() if mask.dim() == 4 and mask.shape[2] * mask.shape[3] > 9]
    tiles = [name for name, mask in masks.items() if mask.dim() == 4 and mask.shape[2] * mask.shape[3] == 9]
    flat = [name for name, mask in masks.items() if mask.dim() == 2 or mask.shape[2:].numel() == 1]
    names = [*_spread(windowed, 4), *_spread(tiles, 2), *_spread(flat, _SHOWN)][:_SHOWN]
    return {name: _image(parameters[name].detach().abs().float().cpu(), masks[name].cpu()) for name in names}


def _spread(names: list[str], count: int) -> list[str]:
    """Pick `count` names over the whole depth."""
    if len(names) <= count:
        return names
    return [names[round(i * (len(names) - 1) / (count - 1))] for i in range(count)]


def _image(weight: Tensor, mask: Tensor) -> Tensor:
    values = torch.where(mask, weight, torch.nan)
    if values.dim() == 2 or values.shape[2:].numel() == 1:
        return values.flatten(1)[:96, :96]
    kernels = values.flatten(0, 1)
    height, width = kernels.shape[1:]
    # About as wide as high, with a line between kernels.
    columns = max(1, min(round((len(kernels) * (height + 1) / (width + 1)) ** 0.5), round(60 / (width + 1))))
    rows = max(1, min(len(kernels) // columns, round(60 / (height + 1))))
    sheet = torch.full((rows * (height + 1) - 1, columns * (width + 1) - 1), -1.0)
    for place, kernel in enumerate(kernels[: rows * columns]):
        top, left = place // columns * (height + 1), place % columns * (width + 1)
        # Channels differ in scale; within one, the largest weight is 1.
        sheet[top : top + height, left : left + width] = kernel / kernel.nan_to_num().max().clamp_min(1e-12)
    return sheet
