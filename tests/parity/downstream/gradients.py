"""Gradients of our networks under their official names."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from tests.parity.downstream.arrays import Golden
from widekernel.models.layouts.conversion import to_official


def official_gradients(detector: nn.Module) -> dict[str, Tensor]:
    """Return the gradients of a detector's parameters; what its buffers are called is there too, without meaning."""
    copied = copy.deepcopy(detector)
    for parameter, original in zip(copied.parameters(), detector.parameters()):
        parameter.data = original.grad
    return to_official(copied)


def check_gradients(
    golden: Golden, gradients: dict[str, Tensor], relative: float, chosen: str = "", smallest: float = 0.01
) -> None:
    """Compare norms of all gradients whose name contains `chosen`, and whole gradients where they are stored.

    Deviations are relative to the norm, but at least to the part `smallest` of the largest norm.
    """
    norms = dict(zip(golden.arrays["grad_names"].tolist(), golden.arrays["grad_norms"].tolist()))
    names = [name for name in norms if chosen in name]
    assert names
    floor = smallest * max(norms.values())
    for name in names:
        wanted = norms[name]
        error = abs(gradients[name].norm().item() - wanted)
        assert error <= relative * max(wanted, floor), f"{name}: {gradients[name].norm().item()} instead of {wanted}"
        stored = {f"grad:{name}", f"grad:{name}|shape"} & set(golden.arrays)
        if stored:
            golden.check(f"grad:{name}", gradients[name], 0.0, relative * max(wanted, floor))
