"""Values that a configuration refuses."""

from __future__ import annotations

import pytest

from widekernel.errors import ArgumentError
from widekernel.sparsity.semi_structured import SemiStructuredConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "magnitud"}, r"method 'magnitud' is unknown.*Did you mean 'magnitude'\?"),
        ({"axis": "im2row"}, r"axis 'im2row' is unknown.*Did you mean 'im2col'\?"),
        ({"method": "permuted", "axis": "im2col"}, "use axis='channels'"),
        ({"layers": "fc"}, r"layers='fc' must be 'all' or a tuple of names: write \('fc',\)"),
        ({"exclude": "fc"}, r"exclude='fc' must be a tuple of names: write \('fc',\)"),
        ({"min_in_channels": 0}, r"min_in_channels is 0, but must be 1 or more"),
        ({"total_steps": 0}, r"total_steps is 0, but must be 1 or more"),
        ({"tau_end": 0.0}, r"tau_end is 0\.0, but must be positive"),
        ({"tau_end": 5.0}, r"tau_end is 5\.0, but must be at most tau_start \(4\.0\)"),
        ({"kappa_start": float("nan")}, r"kappa_start is nan, but must be positive"),
        ({"prior_strength": -1.0}, r"prior_strength is -1\.0, but must be 0 or more"),
        ({"entropy_penalty": float("inf")}, r"entropy_penalty is inf, but must be 0 or more"),
        ({"weight_regularization": -1e-5}, r"weight_regularization is -1e-05, but must be 0 or more"),
        ({"permutation_rounds": -1}, r"permutation_rounds is -1, but must be 0 or more"),
        ({"seed": -1}, r"seed is -1, but must be 0 or more"),
    ],
)
def test_errors(changes: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        SemiStructuredConfig(**changes)


def test_lists_become_tuples() -> None:
    """Configuration files hold lists; equal configurations compare equal and can be keys."""
    config = SemiStructuredConfig(layers=["a", "b*"], exclude=["c"])  # type: ignore[arg-type]
    assert config == SemiStructuredConfig(layers=("a", "b*"), exclude=("c",)) and hash(config)
